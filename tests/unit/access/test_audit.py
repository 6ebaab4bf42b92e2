"""The audit log: what is kept, in which order, for how long."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from aidocks.access.audit import RETENTION_DAYS, AuditLog
from aidocks.access.entry import AuditEntry
from aidocks.access.store import KeyStore
from aidocks.jobs.database import Database
from serve.problems import REQUEST_ID
from serve.trail import MOST_WAITING, REFUSED_PER_MINUTE, Trail

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def entry(number: int, **fields: Any) -> AuditEntry:
    given: dict[str, Any] = {"time": NOW, "owner": "local", "action": f"POST /{number}", "status": 202}
    return AuditEntry(**given | fields)


def test_pages_newest_first(database: Database) -> None:
    audit = AuditLog(database)
    audit.add([])
    audit.add([entry(1), entry(2, owner="b")])
    audit.add([entry(3, object="job-1", address="::1", request_id="r")])
    first = audit.page(2)
    assert [found.action for found in first] == ["POST /3", "POST /2"]
    newest = entry(3, object="job-1", address="::1", request_id="r")
    assert first[0] == newest.model_copy(update={"number": first[0].number})
    assert [found.action for found in audit.page(2, before=first[-1].number)] == ["POST /1"]
    assert [found.action for found in audit.page(9, owner="b")] == ["POST /2"]


def test_what_is_old_or_too_much_is_removed(database: Database) -> None:
    audit = AuditLog(database)
    old = NOW - timedelta(days=RETENTION_DAYS, seconds=1)
    audit.add([entry(0, time=old), *(entry(number) for number in range(1, 6))])
    assert audit.sweep(NOW.timestamp()) == 1
    assert audit.sweep(NOW.timestamp(), most=3) == 2
    assert [found.action for found in audit.page()] == ["POST /5", "POST /4", "POST /3"]
    assert audit.sweep(NOW.timestamp() + 1e9) == 3
    assert audit.sweep() == 0


def told(trail: Trail, number: int = 1, method: str = "POST", status: int = 202) -> None:
    scope = {"method": method, REQUEST_ID: f"r{number}", "client": ("10.0.0.1", 5)}
    trail.note(scope, f"/made-up/{number}", status, f"/jobs/job-{number}" if status == 202 else None)


def test_a_store_that_is_away_costs_nothing_but_the_oldest(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = AuditLog(database)
    trail = Trail(audit, KeyStore(database), asks_for_keys=False)

    def away(*_: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("database is locked"))

    with monkeypatch.context() as patch:
        patch.setattr(audit, "add", away)
        for number in range(MOST_WAITING + 3):
            told(trail, number)
        with pytest.raises(OperationalError):
            trail.write()
    trail.write()
    assert [found.object for found in audit.page(1)] == [f"job-{MOST_WAITING + 2}"]
    assert len(audit.page(MOST_WAITING * 2)) == MOST_WAITING
    assert audit.page(MOST_WAITING)[-1].object == "job-3"


def test_a_flood_of_refused_keys_fills_nothing(database: Database) -> None:
    audit = AuditLog(database)
    trail = Trail(audit, KeyStore(database), asks_for_keys=True)
    for number in range(1000):
        told(trail, number, "GET", 401)
        for status in (421, 429, 503):  # without a key nobody else writes here at all
            told(trail, number, "POST", status)
    trail.write()
    assert len(audit.page(1000)) == REFUSED_PER_MINUTE
    assert {(found.owner, found.action, found.object) for found in audit.page()} == {
        ("-", "GET without a right key", None)
    }


def test_reading_is_not_recorded(database: Database) -> None:
    audit = AuditLog(database)
    trail = Trail(audit, KeyStore(database), asks_for_keys=False)
    for method in ("GET", "HEAD", "OPTIONS"):
        told(trail, method=method, status=200)
    told(trail, status=429)
    told(trail, status=421)
    trail.note({"method": "POST", REQUEST_ID: "r"}, "/embed", 200, None)
    trail.note({"method": "PUT", REQUEST_ID: "r"}, "/uploads/upload-1", 204, None)
    trail.write()
    assert audit.page() == []
