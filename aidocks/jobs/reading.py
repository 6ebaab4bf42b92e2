"""What the job store tells whoever asks: jobs, events, journals, leases. Nothing here writes."""

from __future__ import annotations

import builtins

from sqlalchemy import func, select

from aidocks.jobs import queue, rows
from aidocks.jobs.database import Database, events, jobs, leases, units
from aidocks.jobs.model import Event, Job, Place, Status
from aidocks.jobs.queue import QueueLength
from aidocks.jobs.rows import Lease, UnitRecord


class JobReader:
    """Jobs in a database, to be read.

    Args:
        url: SQLAlchemy URL, ``sqlite:///path`` or ``postgresql://...``.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url)

    def close(self) -> None:
        self._database.close()

    def get(self, job_id: str) -> Job:
        """Return one job.

        Raises:
            UnknownJob: There is none of this id.
        """
        with self._database.read() as connection:
            return rows.load(connection, job_id)

    def list(
        self,
        status: Status | str | None = None,
        operation: str | None = None,
        limit: int = 50,
        before: str | None = None,
        output_name: str | None = None,
        owner: str | None = None,
    ) -> builtins.list[Job]:
        """Return jobs, newest first, from the one after ``before`` on."""
        query = select(*rows.COLUMNS).order_by(jobs.c.number.desc()).limit(limit)
        if status is not None:
            query = query.where(jobs.c.status == Status(status).value)
        asked = ((jobs.c.operation, operation), (jobs.c.output_name, output_name), (jobs.c.owner, owner))
        for column, wanted in asked:
            if wanted is not None:
                query = query.where(column == wanted)
        with self._database.read() as connection:
            if before is not None:
                number = connection.scalar(select(jobs.c.number).where(jobs.c.id == before))
                if number is None:
                    raise rows.unknown_job(before, field="before")
                query = query.where(jobs.c.number < number)
            return rows.read_jobs(connection, query)

    def events(self, job_id: str, after: int = 0, limit: int = 500) -> builtins.list[Event]:
        """Return the events of a job whose sequence is greater than ``after``, oldest first."""
        query = (
            select(events)
            .where(events.c.job_id == job_id, events.c.sequence > after)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        with self._database.read() as connection:
            found = connection.execute(query).all()
            if not found:
                rows.load(connection, job_id)
            return [rows.read_event(*row) for row in found]

    def last_sequence(self, job_id: str) -> int:
        """Return the sequence of the newest event of a job."""
        with self._database.read() as connection:
            last = connection.scalar(select(jobs.c.last_sequence).where(jobs.c.id == job_id))
        if last is None:
            raise rows.unknown_job(job_id)
        return int(last)

    def units(self, job_id: str) -> dict[str, UnitRecord]:
        """Return the journal of a job: every finished unit, by unit id."""
        columns = (
            units.c.unit_id,
            units.c.stage,
            units.c.label,
            units.c.result,
            units.c.seconds,
            units.c.worker,
        )
        with self._database.read() as connection:
            found = connection.execute(select(*columns).where(units.c.job_id == job_id)).all()
        return {row.unit_id: UnitRecord(*row) for row in found}

    def model_in_use(self, name: str) -> builtins.list[str]:
        """Return the ids of the unfinished jobs that read or create the registry model ``name``."""
        query = select(jobs.c.id, jobs.c.output_name, jobs.c.inputs).where(jobs.c.status.in_(rows.UNFINISHED))
        with self._database.read() as connection:
            found = connection.execute(query.order_by(jobs.c.number)).all()
        return [row.id for row in found if name == row.output_name or name in row.inputs]

    def lease(self, place: str) -> Lease | None:
        """Return the newest lease of a place."""
        with self._database.read() as connection:
            row = connection.execute(select(leases).where(leases.c.place == place)).first()
        return None if row is None else Lease(*row)

    def unfinished(self, place: Place) -> builtins.list[Job]:
        """Return the queued and running jobs of ``place``, oldest first."""
        mine = (jobs.c.place == place) & jobs.c.status.in_(rows.UNFINISHED)
        with self._database.read() as connection:
            return rows.read_jobs(connection, select(*rows.COLUMNS).where(mine).order_by(jobs.c.number))

    def counts(self, place: Place, since: float) -> dict[str, int]:
        """Return how many jobs of ``place`` have each status; of those that have ended, since a time of the clock."""
        mine = (jobs.c.place == place) & (jobs.c.status.in_(rows.UNFINISHED) | (jobs.c.finished_at >= since))
        query = select(jobs.c.status, func.count()).where(mine).group_by(jobs.c.status)
        with self._database.read() as connection:
            return {status: int(count) for status, count in connection.execute(query)}

    def queue_length(self, place: Place = "service") -> QueueLength:
        """Return how many jobs of ``place`` wait, and how long the oldest has."""
        with self._database.read() as connection:
            return queue.length(connection, place)
