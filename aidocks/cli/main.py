"""The entry point of the command line. Listing the commands imports none of what they need."""

from __future__ import annotations

import gc
import sys
from typing import Annotated, NoReturn

import typer

from aidocks._version import __version__
from aidocks.cli import jobs, models, service
from aidocks.cli.ask import ask
from aidocks.cli.demo import demo
from aidocks.cli.operations import DockGroup
from aidocks.cli.output import manner, report, report_unexpected
from aidocks.errors import AIDocksError

# What a start makes (modules, specs, headers) stays, and is a hundred times what the collector waits for by default:
# looking through it again and again took a tenth of a short run.
_COLLECT_AFTER = 100_000

EPILOG = """\
[bold]Exit codes[/]: 0 done, 1 our fault, 2 usage, 3 the request is not valid, 4 not found, 5 conflict, \
6 no service, 7 the job failed, 8 no disk space, 9 the job was cancelled, \
10 a part is not installed, 130 Ctrl-C."""

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
app.command(rich_help_panel="Use a model")(demo)
app.add_typer(models.app, name="models", rich_help_panel="Look after things")
app.add_typer(jobs.app, name="jobs", rich_help_panel="Look after things")
for command in (service.up, service.down, service.status, service.logs, service.env, service.doctor):
    app.command(rich_help_panel="The service")(command)


def main() -> NoReturn:
    """Run the command line and exit with the code that the outcome has."""
    manner.json = manner.debug = False
    gc.set_threshold(_COLLECT_AFTER)
    try:
        typer.main.get_command(app).main(prog_name="aidocks")
    except AIDocksError as error:
        report(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - the last place where anything can be said
        report_unexpected(error)
        sys.exit(1)
    finally:
        # The exit would look through all of it, which takes longer than a short command.
        gc.freeze()
    sys.exit(0)
