"""`aidocks up`, `down`, `status`, `logs`, `env`, `doctor`: the embedded service."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aidocks.cli.options import Json, Url, connect
from aidocks.cli.output import err, manner, out, print_json, print_text, remark
from aidocks.errors import AIDocksError, NotFound, ServiceUnreachable

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
    json: Json = False,
) -> None:
    """Start the service on this machine; when it runs already, say where."""
    from aidocks.settings import Settings

    given: dict[str, Any] = {"port": port, "host": host, "home": home}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    status = start(settings)
    if manner.json:
        print_json(status.model_dump(mode="json"))
    else:
        out().print(f"[green]✓[/] [bold]{status.url}[/]", soft_wrap=True)
        out().print(f"  documentation  {status.docs}", soft_wrap=True)
        out().print(f"  data           {settings.home}", soft_wrap=True)
        out().print(f"  stop it with   {'Ctrl-C' if foreground else _command('down', home)}", soft_wrap=True)
    if foreground:
        _stay(settings)


def down(
    home: Annotated[
        Path | None, typer.Option(help="Data directory.  [dim](AIDOCKS_HOME, else ~/.aidocks)[/]")
    ] = None,
    json: Json = False,
) -> None:
    """Stop the service. Jobs under way go on when it is started again."""
    stopped = _bringup().stop_service(_settings(home))
    if manner.json:
        print_json({"stopped": stopped})
    else:
        print_text("stopped" if stopped else "there is no service to stop")


def status(url: Url = None, json: Json = False) -> None:
    """Say whether the service runs, where, and what it does. Exit code 6 when it does not answer."""
    from aidocks.client.address import service_url

    settings = _settings()
    facts: dict[str, Any] = {
        "url": url or service_url(settings),
        "healthy": False,
        "home": str(settings.home),
    }
    unreachable: ServiceUnreachable | None = None
    try:
        with connect(facts["url"]) as client:
            facts |= {"healthy": True, "health": client.health()}
    except ServiceUnreachable as error:
        unreachable = error
    facts |= _embedded_facts(settings)
    if manner.json:
        print_json(facts)
    else:
        from aidocks.cli.render import fact_table

        out().print(fact_table(facts))
    if unreachable is not None:
        if not manner.json:
            err().print(f"[red]{unreachable.message}[/] {unreachable.hint}", soft_wrap=True)
        raise typer.Exit(unreachable.exit_code)


def logs(
    name: Annotated[
        str, typer.Argument(metavar="[FILE]", help="Log file.", show_default=False)
    ] = "service.log",
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines from the end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the file grows.")] = False,
) -> None:
    """Print the end of a log of the service, and name the other logs."""
    directory = _settings().log_dir
    files = {str(path.relative_to(directory)): path for path in _log_files(directory)}
    if name not in files:
        known = ", ".join(files) or "none; has the service ever run?"
        raise NotFound(f"There is no log {name!r} in {directory}.", hint=f"There are: {known}.")
    with files[name].open(errors="replace") as stream:
        for line in stream.readlines()[-lines or 10**9 :] if lines else stream.readlines()[:0]:
            print_text(line.rstrip("\n"))
        while follow:
            line = stream.readline()
            if line:
                print_text(line.rstrip("\n"))
            else:
                time.sleep(_POLL_S)
    others = [other for other in files if other != name]
    if others:
        remark(f"more in {directory}: {', '.join(others)}")


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


def doctor(json: Json = False) -> None:
    """Look for what would keep AIDocks from working here. Exit code 1 when something would."""
    from aidocks.cli.doctor import examine

    findings = list(examine(_settings()))
    if manner.json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            mark = {"good": "[green]✓[/]", "note": "[yellow]·[/]", "bad": "[red]✗[/]"}[finding.state]
            out().print(f"{mark} [bold]{finding.subject}[/] ", end="")
            out().print(finding.text, markup=False, soft_wrap=True)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def start(settings: Settings) -> Any:
    """Start the embedded service, showing its phases on standard error; returns its status.

    Raises:
        AIDocksError: It could not be started.
    """
    with _phases() as show:
        return _bringup().start_service(settings, progress=show)


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


def _embedded_facts(settings: Settings) -> dict[str, Any]:
    from aidocks.errors import MissingExtra

    try:
        embedded = _bringup().service_status(settings)
    except MissingExtra:  # a client of somebody else's service
        return {}
    names = ("docs", "pid", "ray_address", "dashboard", "log_dir")
    return {name: getattr(embedded, name) for name in names} if embedded.running else {}


def _log_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file()) if directory.is_dir() else []


def _command(verb: str, home: Path | None) -> str:
    return f"aidocks {verb}" + (f" --home {shlex.quote(str(home))}" if home else "")


def _settings(home: Path | None = None) -> Settings:
    from aidocks.settings import Settings

    return Settings() if home is None else Settings(home=home)


def _bringup() -> Any:
    from aidocks.cli.embedded import bringup

    return bringup()
