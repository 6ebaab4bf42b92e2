"""One command for each registered operation, made from its spec when it is asked for, not before."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from aidocks.cli.options import Json, Priority, Timeout, Url
from aidocks.operations import OPERATIONS, Registration

if TYPE_CHECKING:
    from aidocks.cli.flags import Flag

PANEL = "Operations"

SpecFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="SPEC_FILE", help="The request as YAML or JSON; '-' reads standard input. Flags win over it.",
        show_default=False,
    ),
]  # fmt: skip
RunHere = Annotated[bool, typer.Option("--local", help="Run in this process, without a service.")]
Detach = Annotated[bool, typer.Option("--detach", help="Print the job's id and do not wait for it.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key", metavar="TEXT", help="Submitting again under this key returns the same job."
    ),
]

#: What every operation's command takes besides the fields of its spec.
COMMON: dict[str, tuple[Any, Any]] = {
    "spec_file": (SpecFile, None),
    "local": (RunHere, False),
    "detach": (Detach, False),
    "json": (Json, False),
    "url": (Url, None),
    "idempotency_key": (Key, None),
    "priority": (Priority, None),
    "timeout": (Timeout, None),
}
#: Of those, what means nothing without a service.
_OF_A_SERVICE = ("detach", "url", "idempotency_key", "priority")


class OperationCommand(TyperCommand):
    """Stands for the command of an operation; its spec is imported when the command is used."""

    def __init__(self, registration: Registration) -> None:
        super().__init__(name=registration.name, help=registration.summary, rich_help_panel=PANEL)
        self._registration = registration

    def make_context(self, *args: Any, **extra: Any) -> Any:
        return operation_command(self._registration).make_context(*args, **extra)


class DockGroup(TyperGroup):
    """The top level: what is written by hand, and before it a command for each operation."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        written = dict(self.commands)
        self.commands = {registration.name: OperationCommand(registration) for registration in OPERATIONS}
        self.commands |= written


def operation_command(registration: Registration) -> TyperCommand:
    """Return the full command of an operation."""
    from aidocks.cli.flags import flags_of

    spec_type = registration.spec_type()
    flags = flags_of(spec_type)
    clash = {flag.field for flag in flags} & set(COMMON)
    assert not clash, f"{spec_type.__name__} uses names of common options: {sorted(clash)}"

    def command(**values: Any) -> None:
        _run(registration, flags, values)

    _give_signature(command, flags)
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(registration.name, help=_help(registration, spec_type))(command)
    return cast("TyperCommand", typer.main.get_command(app))


def _give_signature(command: Any, flags: tuple[Flag, ...]) -> None:
    parameters = {"spec_file": COMMON["spec_file"]}
    for flag in flags:
        option = typer.Option(
            flag.option,
            help=flag.help,
            metavar=flag.metavar,
            show_default=False,
            rich_help_panel="Fields of the request",
        )
        parameters[flag.field] = (Annotated[flag.annotation | None, option], None)
    parameters |= COMMON
    command.__annotations__ = {name: annotation for name, (annotation, _) in parameters.items()}
    command.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in parameters.items()
        ]
    )


def _help(registration: Registration, spec_type: type) -> str:
    from rich.markup import escape

    paragraphs = (inspect.getdoc(spec_type) or "").replace("``", "`").split("\n\n")
    return "\n\n".join(escape(" ".join(text.split())) for text in [registration.summary, *paragraphs])


def _run(registration: Registration, flags: tuple[Flag, ...], values: dict[str, Any]) -> None:
    from aidocks.cli import run
    from aidocks.cli.flags import given_fields
    from aidocks.specs.read import build_spec

    if values["local"] and any(
        values[name] not in (None, "") and values[name] is not False for name in _OF_A_SERVICE
    ):
        raise typer.BadParameter(
            "--local runs here and now: --detach, --url, --idempotency-key and --priority need a service."
        )
    data = _file_fields(values["spec_file"]) | given_fields(flags, values)
    spec = build_spec(registration.spec_type(), data)
    if values["local"]:
        run.run_here(registration.name, spec, values["timeout"])
    else:
        run.submit(
            registration.name,
            spec,
            url=values["url"],
            detach=values["detach"],
            idempotency_key=values["idempotency_key"],
            priority=values["priority"],
            timeout_s=values["timeout"],
        )


def _file_fields(path: Path | None) -> dict[str, Any]:
    from aidocks.errors import InvalidSpec
    from aidocks.specs.read import parse_yaml, read_spec_file

    if path is None:
        return {}
    if str(path) != "-":
        return read_spec_file(path)
    data = parse_yaml(sys.stdin.buffer.read())
    if not isinstance(data, dict):
        raise InvalidSpec("A spec is a mapping of fields to values.", hint="Write 'field: value' lines.")
    return data
