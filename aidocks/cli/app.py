"""The command line: all commands. Listing them imports none of what they need."""

from __future__ import annotations

from typing import Annotated

import typer

from aidocks._version import __version__
from aidocks.cli import datasets, jobs, keys, models, retrieve, service
from aidocks.cli.ask import ask
from aidocks.cli.demo import demo
from aidocks.cli.doctor import doctor
from aidocks.cli.logs import logs
from aidocks.cli.operations import DockGroup
from aidocks.cli.output import manner
from aidocks.cli.status import status

EPILOG = """\
[bold]Exit codes[/]: 0 done, 1 our fault, 2 usage, 3 the request is not valid, 4 not found, 5 conflict, \
6 no service, 7 the job failed, 8 no disk space, 9 the job was cancelled, \
10 a part is not installed, 11 no (or the wrong) API key, 130 Ctrl-C."""

app = typer.Typer(
    cls=DockGroup,
    name="aidocks",
    help="The dry dock for open-weight language models.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aidocks {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    manner.debug = debug


app.command(rich_help_panel="Use a model")(ask)
for using in (retrieve.embed, retrieve.rerank):
    app.command(rich_help_panel="Use a model")(using)
app.command(rich_help_panel="Use a model")(demo)
app.add_typer(models.app, name="models", rich_help_panel="Look after things")
app.add_typer(datasets.app, name="datasets", rich_help_panel="Look after things")
app.add_typer(jobs.app, name="jobs", rich_help_panel="Look after things")
app.add_typer(keys.app, name="keys", rich_help_panel="The service")
app.command(rich_help_panel="The service")(keys.audit)
for command in (service.up, service.down, status, logs, service.env, doctor):
    app.command(rich_help_panel="The service")(command)
