"""`aidocks status`: whether the service runs, where, and what it does."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer

from aidocks.cli.options import Json, Url, connect
from aidocks.cli.output import err, manner, out, print_json
from aidocks.errors import AIDocksError, MissingExtra, NotFound, ServiceUnreachable

if TYPE_CHECKING:
    from aidocks.client.http import Client
    from aidocks.settings import Settings


def status(url: Url = None, json: Json = False) -> None:
    """Say whether the service runs, where, and what it does. Exit code 6 when it does not answer."""
    from aidocks.client.address import service_url
    from aidocks.settings import Settings

    settings = Settings()
    facts: dict[str, Any] = {
        "url": url or service_url(settings),
        "healthy": False,
        "home": str(settings.home),
    }
    unreachable: ServiceUnreachable | None = None
    try:
        with connect(facts["url"]) as client:
            facts |= {"healthy": True, "health": client.health()}
            facts |= _overview(client)
    except ServiceUnreachable as error:
        unreachable = error
    facts |= _embedded_facts(settings)
    if manner.json:
        print_json(facts)
    else:
        _print(facts)
    if unreachable is not None:
        if not manner.json:
            err().print(f"[red]{unreachable.message}[/] {unreachable.hint}", soft_wrap=True)
        raise typer.Exit(unreachable.exit_code)


def _overview(client: Client) -> dict[str, Any]:
    try:
        return {"overview": client.status().model_dump(mode="json")}
    except NotFound:  # an older service
        return {}
    except ServiceUnreachable:
        raise
    except AIDocksError as error:  # no key, or not the right one
        return {"note": f"{error.message} {error.hint or ''}".strip()}


def _embedded_facts(settings: Settings) -> dict[str, Any]:
    from aidocks.cli.embedded import bringup

    try:
        embedded = bringup().service_status(settings)
    except MissingExtra:  # a client of somebody else's service
        return {}
    names = ("docs", "pid", "ray_address", "dashboard", "log_dir")
    return {name: getattr(embedded, name) for name in names} if embedded.running else {}


def _print(facts: dict[str, Any]) -> None:
    from aidocks.cli.render import fact_table, table_of
    from aidocks.client.wording import duration

    overview = facts.pop("overview", None)
    if overview is None:
        out().print(fact_table(facts))
        return
    health = facts.pop("health")
    nodes = overview["nodes"] or []
    up_since = datetime.fromisoformat(overview["up_since"])
    told = {
        "url": facts.pop("url"),
        "health": f"{health.get('status')}, supervisor {health.get('supervisor')}",
        "version": overview["version"],
        "uptime": duration((datetime.now(UTC) - up_since).total_seconds()),
        "jobs": _jobs(overview["jobs"]),
        "workers": overview["workers"] or "not known: the supervisor does not answer",
        "nodes": len(nodes) or None,
        "disk": _disk(overview["disk"]),
    }
    del facts["healthy"]
    out().print(fact_table(told | facts))
    if nodes:
        out().print()
        out().print(table_of(nodes))


def _jobs(jobs: dict[str, Any] | None) -> str:
    from aidocks.client.wording import duration

    if jobs is None:
        return "not known: the job store does not answer"
    waiting = f" (the oldest for {duration(jobs['oldest_queued_s'])})" if jobs["queued"] else ""
    ended = ", ".join(f"{jobs[f'{how}_today']} {how}" for how in ("succeeded", "failed", "cancelled"))
    return f"{jobs['running']} running, {jobs['queued']} queued{waiting}; in 24 hours {ended}"


def _disk(disk: dict[str, Any] | None) -> str | None:
    from aidocks.client.wording import size

    return None if disk is None else f"{size(disk['free_bytes'])} free of {size(disk['total_bytes'])}"
