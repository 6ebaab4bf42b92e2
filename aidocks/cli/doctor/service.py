"""Checks of the service: whether it answers, who may use it, what its logs say, the way to the hub."""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aidocks.cli.doctor.finding import Finding, bad, good, note
from aidocks.errors import AIDocksError, MissingExtra, NotFound, NotPermitted, Unauthenticated
from aidocks.log import redacted
from aidocks.settings import LOOPBACK, Settings

_LAST_LINES = 2000
_RECENT = timedelta(days=1)
#: Texts of errors can be long.
_SHOWN = 160


def service_answers(settings: Settings) -> Iterator[Finding]:
    """See whether the service answers; if there is none, whether one could be started."""
    from aidocks.client.address import service_url
    from aidocks.client.http import Client

    url = service_url(settings)
    try:
        with Client(url, timeout=2.0, retry_s=0.0) as client:
            health = client.health()
            yield good("service", f"answers at {url}")
            if health.get("supervisor") in ("superseded", "absent"):
                text = f"is {health['supervisor']}: nobody runs jobs; aidocks down, then aidocks up"
                yield bad("supervisor", text)
            yield from _key(client)
        return
    except AIDocksError:
        pass
    yield from _could_start(settings)


def _key(client: Any) -> Iterator[Finding]:
    try:
        client.status()
    except (Unauthenticated, NotPermitted) as error:
        yield bad("API key", f"{error.message} {error.hint or 'Set AIDOCKS_API_KEY.'}")
    except NotFound:
        yield note("service", "is of an older version than this command line")


def _could_start(settings: Settings) -> Iterator[Finding]:
    from aidocks.cli.embedded import bringup

    try:
        embedded = bringup().service_status(settings)
    except MissingExtra:
        yield note("service", f"does not run at {settings.service_url}, and this is a client only")
        return
    if embedded.running:
        yield bad("service", "its processes are there, but it does not answer; aidocks down, then aidocks up")
        return
    if settings.state_file.exists():
        yield note("service", "was killed; `aidocks up` goes on, `aidocks down` clears it away")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            text = f"port {settings.port} is taken by another program ({error.strerror}); set AIDOCKS_PORT"
            yield bad("service", text)
            return
    yield note("service", f"does not run; port {settings.port} is free for `aidocks up`")


def open_door(settings: Settings) -> Iterator[Finding]:
    """See whether a service that others can reach asks for keys."""
    if settings.host not in LOOPBACK and settings.open_to_all:
        text = f"whoever reaches {settings.host}:{settings.port} can run jobs without a key; AIDOCKS_ACCESS=keys asks"
        yield note("access", f"{text} for one, if nothing in front of it does")


def hub_access(_: Settings) -> Iterator[Finding]:
    """Say how models of the hub can be had; never a token."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    stored = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
    known = bool(os.environ.get("HF_TOKEN")) or stored.is_file()
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        yield note("hub", f"HF_HUB_OFFLINE is set: nothing is downloaded; {'a' if known else 'no'} token")
    elif known:
        yield good("hub", "with a token")
    else:
        yield good("hub", "no token: models that ask for one cannot be had without HF_TOKEN")
    if stored.is_file() and stored.stat().st_mode & 0o077:
        yield bad("hub", f"others can read the token in {stored}; chmod 600 {stored}")


def last_errors(settings: Settings) -> Iterator[Finding]:
    """Tell of errors that the service has logged in the last day."""
    since = (datetime.now(UTC) - _RECENT).isoformat()
    for path in sorted(settings.log_dir.glob("*.log")):
        errors = [record for record in _records(path) if record.get("level") in ("error", "critical")]
        recent = [record for record in errors if str(record.get("time", "")) >= since]
        if recent:
            said = redacted(" ".join(str(recent[-1].get("message")).split()))[:_SHOWN]
            count = f"{len(recent)} error{'s' if len(recent) > 1 else ''} in a day"
            yield note(path.name, f"{count}, the last: {said}  (aidocks logs {path.name})")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(errors="replace") as stream:
        for line in deque(stream, _LAST_LINES):
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


SERVICE_CHECKS = (service_answers, open_door, hub_access, last_errors)
