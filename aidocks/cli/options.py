"""Options that many commands share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from aidocks.cli.output import manner

if TYPE_CHECKING:
    from aidocks.client.http import Client


_SECONDS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def read_duration(text: str) -> float:
    """Return the seconds of a length of time such as ``90s``, ``1.5h`` or ``1h30m``; a bare number is seconds."""
    from aidocks.jobs.terms import LONGEST_S

    parts = re.fullmatch(r"(?:([0-9.]+)d)?(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s?)?", text.strip())
    try:
        given = zip(_SECONDS.values(), parts.groups() if parts else (), strict=True)
        seconds = sum(worth * float(number) for worth, number in given if number is not None)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_S:
        raise typer.BadParameter(f"{text!r} is no length of time up to a year, such as 90s, 30m, 2h or 1d.")
    return seconds


def _speak_json(json: bool) -> bool:
    manner.json = manner.json or json
    return json


Json = Annotated[
    bool,
    typer.Option(
        "--json", callback=_speak_json, help="Print one JSON document; errors as problem JSON on stderr."
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The service. Default: AIDOCKS_URL, else the one that `aidocks up` started.",
    ),
]
Priority = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        help="-10 to 10: jobs of a higher priority get the workers first.",
        show_default=False,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        parser=read_duration,
        metavar="TIME",
        help="End the job as failed so long after its start: 90s, 30m, 2h, 1d, 1h30m.",
        show_default=False,
    ),
]
Local = Annotated[bool, typer.Option("--local", help="Use the data directory itself, without a service.")]

#: Nobody likes to watch a command line that repeats itself; a service that is up answers at once.
RETRY_S = 1.0


def connect(url: str | None) -> Client:
    """Return a client of the service at ``url``, or of the usual one."""
    from aidocks.client.http import Client

    return Client(url, retry_s=RETRY_S)
