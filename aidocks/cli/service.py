"""`aidocks up`, `down`, `env`: the embedded service."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aidocks.cli.options import Json
from aidocks.cli.output import err, manner, out, print_json, print_text, remark
from aidocks.errors import AIDocksError, ServiceUnreachable

if TYPE_CHECKING:
    from aidocks.settings import Settings

_POLL_S = 0.5


def up(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on.  [dim](8723)[/]")
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Address to listen on.  [dim](127.0.0.1)[/]")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Data directory.  [dim](AIDOCKS_HOME, else ~/.aidocks)[/]")
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and stop the service on Ctrl-C.")
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Deploy to this Ray cluster, or bring the service there up to date, instead of starting a "
            "Ray: host:port, or `auto` on one of its nodes.",
        ),
    ] = None,
    allow_no_token: Annotated[
        bool,
        typer.Option("--allow-no-token", help="Also to a cluster without token authentication."),
    ] = False,
    json: Json = False,
) -> None:
    """Start the service on this machine; when it runs already, say where."""
    from aidocks.access.local import warn_of_open_door
    from aidocks.settings import Settings

    given: dict[str, Any] = {"port": port, "host": host, "home": home}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    status = start(settings) if ray_address is None else _deploy(settings, ray_address, allow_no_token)
    if manner.json:
        print_json(status.model_dump(mode="json"))
    else:
        _tell_of(status, settings, "Ctrl-C" if foreground else _command("down", home))
    if warning := warn_of_open_door(settings):
        err().print(f"[red]{warning}[/]", soft_wrap=True)
    if foreground:
        _stay(settings)


def down(
    home: Annotated[
        Path | None, typer.Option(help="Data directory.  [dim](AIDOCKS_HOME, else ~/.aidocks)[/]")
    ] = None,
    json: Json = False,
) -> None:
    """Stop the service. Jobs under way go on when it is started again.

    Of a service on a Ray cluster of others, that cluster and all else on it stay.
    """
    stopped = _bringup().stop_service(_settings(home))
    if manner.json:
        print_json({"stopped": stopped})
    else:
        print_text("stopped" if stopped else "there is no service to stop")


def env(json: Json = False) -> None:
    """Print what `ray job submit` and Ray drivers need: eval "$(aidocks env)"."""
    settings = _settings()
    variables = _bringup().service_status(settings).environment
    if not variables:
        raise ServiceUnreachable(
            f"No service of {settings.home} is running on this machine.", hint="Start it with `aidocks up`."
        )
    if manner.json:
        print_json(variables)
        return
    for variable, value in variables.items():
        print_text(f"export {variable}={shlex.quote(value)}")


def start(settings: Settings) -> Any:
    """Start the embedded service, showing its phases on standard error; returns its status.

    Raises:
        AIDocksError: It could not be started.
    """
    with _phases() as show:
        return _bringup().start_service(settings, progress=show)


def _deploy(settings: Settings, address: str, allow_no_token: bool) -> Any:
    with _phases() as show:
        return _bringup().deploy_to_cluster(settings, address, allow_no_token=allow_no_token, progress=show)


def _tell_of(status: Any, settings: Settings, stopping: str) -> None:
    from aidocks.access.local import admin_key_file

    facts = {"documentation": status.docs, "data": settings.home, "stop it with": stopping}
    if not settings.open_to_all:
        facts["API key"] = f"{admin_key_file(settings)} (the administrator's; others: aidocks keys --help)"
    out().print(f"[green]✓[/] [bold]{status.url}[/]", soft_wrap=True)
    for name, fact in facts.items():
        out().print(f"  {name:<14} {fact}", soft_wrap=True, highlight=False)


@contextmanager
def _phases() -> Iterator[Callable[[str, float], None]]:
    def show(phase: str, seconds: float) -> None:
        remark(f"  {seconds:5.1f} s  {phase}")

    if manner.json or not err().is_terminal:
        yield show
        return
    with err().status("starting the service"):
        yield show


def _stay(settings: Settings) -> None:
    """Wait until the service ends, and end it when this process is told to."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        while _bringup().service_status(settings).running:
            time.sleep(_POLL_S)
        raise AIDocksError("The service has ended by itself.", hint="See `aidocks logs`.")
    except KeyboardInterrupt:
        _bringup().stop_service(settings)
        remark("stopped")


def _command(verb: str, home: Path | None) -> str:
    return f"aidocks {verb}" + (f" --home {shlex.quote(str(home))}" if home else "")


def _settings(home: Path | None = None) -> Settings:
    from aidocks.settings import Settings

    return Settings() if home is None else Settings(home=home)


def _bringup() -> Any:
    from aidocks.cli.embedded import bringup

    return bringup()
