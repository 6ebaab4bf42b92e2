"""Options that many commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from aidocks.cli.output import manner

if TYPE_CHECKING:
    from aidocks.client.http import Client


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
Local = Annotated[bool, typer.Option("--local", help="Use the data directory itself, without a service.")]

#: Nobody likes to watch a command line that repeats itself; a service that is up answers at once.
RETRY_S = 1.0


def connect(url: str | None) -> Client:
    """Return a client of the service at ``url``, or of the usual one."""
    from aidocks.client.http import Client

    return Client(url, retry_s=RETRY_S)
