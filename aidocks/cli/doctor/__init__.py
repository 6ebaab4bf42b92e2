"""`aidocks doctor`: what would keep AIDocks from working here, in words, each with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

from aidocks.cli.options import Json
from aidocks.cli.output import manner, out, print_json

if TYPE_CHECKING:
    from aidocks.cli.doctor.finding import Finding
    from aidocks.settings import Settings


def doctor(json: Json = False) -> None:
    """Look for what would keep AIDocks from working here. Exit code 1 when something would."""
    from aidocks.settings import Settings

    findings = list(examine(Settings()))
    if manner.json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            mark = {"good": "[green]✓[/]", "note": "[yellow]·[/]", "bad": "[red]✗[/]"}[finding.state]
            out().print(f"{mark} [bold]{finding.subject}[/] ", end="")
            out().print(finding.text, markup=False, soft_wrap=True)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield what was found, from the interpreter outwards. A check that fails itself is a finding, too."""
    from aidocks.cli.doctor.data import DATA_CHECKS
    from aidocks.cli.doctor.finding import note
    from aidocks.cli.doctor.machine import MACHINE_CHECKS
    from aidocks.cli.doctor.service import SERVICE_CHECKS
    from aidocks.cli.doctor.software import SOFTWARE_CHECKS
    from aidocks.log import redacted

    checks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        *SOFTWARE_CHECKS,
        *MACHINE_CHECKS,
        *DATA_CHECKS,
        *SERVICE_CHECKS,
    )
    for check in checks:
        try:
            yield from check(settings)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other checks are wanted
            reason = redacted(f"{type(error).__name__}: {error}")
            yield note(check.__name__.replace("_", " "), f"could not be looked at: {reason}")
