"""The record of who changed what through the service's door."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime

from sqlalchemy import delete, func, insert, select

from aidocks.access.entry import AuditEntry
from aidocks.jobs.database import Database, audit

RETENTION_DAYS = 90
#: What a busy service does in that time must not fill the disk: about 200 MB.
MOST_ENTRIES = 1_000_000


class AuditLog:
    """The entries in the job store.

    Args:
        database: Of the job store.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, entries: Iterable[AuditEntry]) -> None:
        """Write entries down, all or none."""
        rows = [
            entry.model_dump(exclude={"number", "time"}) | {"time": entry.time.timestamp()}
            for entry in entries
        ]
        if rows:
            with self._database.relaxed() as connection:
                connection.execute(insert(audit), rows)

    def page(self, limit: int = 100, before: int | None = None, owner: str | None = None) -> list[AuditEntry]:
        """Return entries, the newest first.

        Args:
            limit: So many at most.
            before: Only those with smaller numbers.
            owner: Only those of this key.
        """
        query = select(audit).order_by(audit.c.number.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.number < before)
        if owner is not None:
            query = query.where(audit.c.owner == owner)
        with self._database.read() as connection:
            found = connection.execute(query).mappings().all()
        return [
            AuditEntry.model_validate(dict(row) | {"time": datetime.fromtimestamp(row["time"], UTC)})
            for row in found
        ]

    def sweep(self, now: float | None = None, most: int = MOST_ENTRIES) -> int:
        """Remove what is older than :data:`RETENTION_DAYS`, and beyond ``most`` the oldest; return how many."""
        oldest = (time.time() if now is None else now) - RETENTION_DAYS * 86400
        with self._database.relaxed() as connection:
            newest = connection.scalar(select(func.max(audit.c.number))) or 0
            # Numbers may have gaps, so fewer may be left; never more.
            old = (audit.c.time < oldest) | (audit.c.number <= newest - most)
            return int(connection.execute(delete(audit).where(old)).rowcount)
