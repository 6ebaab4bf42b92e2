"""The queue: who may submit one more job, and which of those that wait is started next.

Both are rules over a few columns of the jobs table; no spec is read for them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, func, or_, select, text

from aidocks.errors import QueueFull, QuotaExceeded
from aidocks.jobs import rows
from aidocks.jobs.database import jobs
from aidocks.jobs.model import Place, Status
from aidocks.jobs.terms import LOCAL

#: Submissions to PostgreSQL are made one after the other under this lock (those to SQLite are anyway).
_ADMISSION_LOCK = 872301


@dataclass(frozen=True)
class Limits:
    """What a submission may find in the queue without being refused; None: any number.

    Attributes:
        queued: Jobs that wait, whoever submitted them.
        unfinished: Jobs of the same owner that wait or run. Nobody counts those of ``local``.
    """

    queued: int | None = None
    unfinished: int | None = None


UNLIMITED = Limits()


@dataclass(frozen=True)
class Waiting:
    """A job that may be started now.

    Attributes:
        number: Counts the jobs of the store in the order of their submission.
        abandoned: It was running when its executor died, and holds what that had finished.
    """

    id: str
    number: int
    owner: str
    priority: int
    abandoned: bool = False


@dataclass(frozen=True)
class Started:
    """What counts of a job that runs."""

    owner: str
    priority: int


@dataclass(frozen=True)
class QueueLength:
    """How many jobs wait, and for how many seconds the oldest has."""

    waiting: int = 0
    oldest_s: float = 0.0


def next_job(waiting: Iterable[Waiting], running: Collection[Started], places: int) -> Waiting | None:
    """Return the job to start next, or None where none may start now.

    What was abandoned comes first: it holds disk space and names. Then the highest priority; among equals the owner
    with the fewest running jobs, then whoever has waited longest. While jobs end, none waits for ever behind others of
    its own priority: an owner whose jobs have ended comes before all that have one running.

    Running jobs are never stopped for another. But one that is more urgent than all of them need not wait for a place:
    it starts beside them, and its units get the next workers that are free. As each such job raises the bar for the
    next, the priorities' range bounds how many there are.

    Args:
        waiting: In any order.
        running: What this executor runs now.
        places: How many jobs run side by side.
    """
    jobs_of = Counter(job.owner for job in running)
    if len(running) >= places:
        urgent = max((job.priority for job in running), default=None)
        waiting = [job for job in waiting if urgent is None or job.priority > urgent]
    return min(
        waiting,
        key=lambda job: (not job.abandoned, -job.priority, jobs_of[job.owner], job.number),
        default=None,
    )


def stand_in_line(connection: Connection) -> None:
    """Wait until this is the only submission under way: what it reads of the queue stays so until it ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_ADMISSION_LOCK})"))


def admit(connection: Connection, owner: str, limits: Limits) -> None:
    """Refuse a job that is one too many.

    Raises:
        QueueFull: Enough jobs wait.
        QuotaExceeded: The owner has enough unfinished ones.
    """
    if limits.queued is not None:
        waiting = length(connection, "service").waiting
        if waiting >= limits.queued:
            raise QueueFull(
                f"{waiting} jobs wait already, which is as many as may.",
                hint="Submit it again later; AIDOCKS_MAX_QUEUED_JOBS sets how many may wait.",
            )
    if limits.unfinished is not None and owner != LOCAL:
        mine = (jobs.c.owner == owner) & jobs.c.status.in_(rows.UNFINISHED) & (jobs.c.place == "service")
        unfinished = connection.scalar(select(func.count()).select_from(jobs).where(mine)) or 0
        if unfinished >= limits.unfinished:
            raise QuotaExceeded(
                f"The API key {owner} has {unfinished} unfinished jobs, which is as many as it may have.",
                hint="Wait until some have ended, or cancel some: aidocks jobs list.",
            )


def length(connection: Connection, place: Place) -> QueueLength:
    """Return how many jobs of ``place`` wait."""
    query = select(func.count(), func.min(jobs.c.created_at)).where(
        jobs.c.status == Status.QUEUED.value, jobs.c.place == place
    )
    count, oldest = connection.execute(query).one()
    return QueueLength(count, 0.0 if oldest is None else max(0.0, time.time() - oldest))


def startable(connection: Connection, place: str, token: int) -> list[Waiting]:
    """Return the jobs of ``place`` that wait and are due, or that ran under a token before ``token``."""
    abandoned = (jobs.c.status == Status.RUNNING.value) & (jobs.c.token < token)
    due = or_(jobs.c.not_before.is_(None), jobs.c.not_before <= time.time())
    query = (
        select(jobs.c.id, jobs.c.number, jobs.c.owner, jobs.c.priority, jobs.c.status)
        # For the index: the rest is only looked at where the status fits.
        .where(jobs.c.status.in_(rows.UNFINISHED), jobs.c.place == place)
        .where(or_(abandoned, (jobs.c.status == Status.QUEUED.value) & due))
        .order_by(jobs.c.number)
    )
    return [
        Waiting(row.id, row.number, row.owner, row.priority, row.status == Status.RUNNING.value)
        for row in connection.execute(query)
    ]
