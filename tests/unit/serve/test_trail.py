"""Notes of deeds are written down also when the process ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from aidocks.access.audit import AuditLog
from aidocks.access.store import KeyStore
from aidocks.jobs.database import Database
from serve.problems import REQUEST_ID
from serve.trail import Trail


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(f"sqlite:///{tmp_path / 'store.db'}")) as database:
        yield database


def test_the_last_notes_are_written_when_no_thread_is_to_be_had(database: Database) -> None:
    audit = AuditLog(database)
    trail = Trail(audit, KeyStore(database), asks_for_keys=False)

    async def serve() -> None:
        keeping = asyncio.create_task(trail.keep())
        await asyncio.sleep(0)
        await asyncio.get_running_loop().shutdown_default_executor()
        scope = {"method": "DELETE", "client": ("192.0.2.7", 1), REQUEST_ID: "r"}
        trail.note(scope, "/models/mine", 204, None)
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping

    asyncio.run(serve())
    assert [(entry.action, entry.address) for entry in audit.page()] == [("DELETE /models/mine", "192.0.2.7")]
