"""The job store: jobs, their events, the journal of finished units, and leases. The truth; the rest is cache.

Every write of an executor carries its *token*. A token is valid while no later one was issued for the same
place, and a job belongs to the token that claimed it last; a write under any other token changes nothing and
raises :class:`~aidocks.errors.LeaseLost`. So an executor that was thought dead and comes back can do no harm.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from aidocks.errors import IllegalTransition, NameTaken
from aidocks.jobs import queue, rows
from aidocks.jobs.database import events, jobs, leases, meta, units
from aidocks.jobs.model import TRANSITIONS, Event, EventType, Job, Place, Progress, Status
from aidocks.jobs.queue import UNLIMITED, Limits, Waiting
from aidocks.jobs.reading import JobReader
from aidocks.jobs.terms import USUAL, Terms

LEASE_S = 15.0


def new_job_id() -> str:
    """Return an id that sorts by time of creation and cannot be guessed."""
    return f"job-{time.time_ns() // 1_000_000:011x}-{secrets.token_hex(4)}"


class JobStore(JobReader):
    """Jobs in a database that several processes share.

    Args:
        url: SQLAlchemy URL, ``sqlite:///path`` or ``postgresql://...``.
    """

    # Submission: any process.

    def submit(
        self,
        operation: str,
        spec: dict[str, Any],
        *,
        output_name: str | None,
        output_field: str = "output_name",
        place: Place = "service",
        idempotency_key: str | None = None,
        inputs: Sequence[str] = (),
        job_id: str | None = None,
        guard: Callable[[], None] | None = None,
        asked: dict[str, Any] | None = None,
        terms: Terms = USUAL,
        limits: Limits = UNLIMITED,
    ) -> tuple[Job, bool]:
        """Insert a queued job and reserve the name of its output.

        Args:
            operation: Registered name of the operation.
            spec: The request, as JSON.
            output_name: Registry name that the job will create.
            output_field: Field of the spec to blame when that name is taken.
            place: Who is to execute it.
            idempotency_key: The same key and body of the same owner within 24 hours return the job that exists.
            inputs: Registry names that the job reads.
            job_id: Id for the job, where its maker needed one beforehand.
            guard: Called in the transaction, once the name is reserved; when it raises, there is no job.
            asked: Kept as the data of the job's first event.
            terms: Owner, priority and time limit.
            limits: How many jobs may be there already.

        Returns:
            The job, and whether this call created it.

        Raises:
            NameTaken: An unfinished job will create a model of this name.
            IdempotencyMismatch: The key was used for another body.
            TooBusy: As many jobs wait as may (QueueFull), or the owner has as many as it may have (QuotaExceeded).
        """
        row = {
            **terms.model_dump(),
            "id": job_id or new_job_id(),
            "operation": operation,
            "status": Status.QUEUED.value,
            "place": place,
            "spec": spec,
            "output_name": output_name,
            "inputs": list(inputs),
            "idempotency_key": idempotency_key,
            "body_hash": rows.body_hash(spec),
        }
        for attempt in range(3):
            try:
                return self._insert(row, output_field, guard, asked or {}, limits)
            except IntegrityError:
                # Another process inserted the same key or name in this moment; the next look finds out which.
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _insert(
        self,
        row: dict[str, Any],
        output_field: str,
        guard: Callable[[], None] | None,
        asked: dict[str, Any],
        limits: Limits,
    ) -> tuple[Job, bool]:
        with self._database.durable() as connection:
            # Else one of two under the same key could find the other's name, but not its key.
            queue.stand_in_line(connection)
            if row["idempotency_key"]:
                names = ("owner", "operation", "idempotency_key", "body_hash")
                known = rows.remembered(connection, *(row[name] for name in names))
                if known is not None:
                    return known, False
            queue.admit(connection, row["owner"], limits)
            holder = rows.name_holder(connection, row["output_name"])
            if holder is not None:
                raise NameTaken(
                    f"The job {holder} is about to create a model called {row['output_name']!r}.",
                    field=output_field,
                    value=row["output_name"],
                    hint="Choose another name, or wait for that job or cancel it.",
                )
            connection.execute(insert(jobs).values(**row, created_at=time.time()))
            if guard is not None:
                guard()
            rows.append(connection, row["id"], EventType.QUEUED, asked)
            return rows.load(connection, row["id"]), True

    def find_idempotent(
        self, operation: str, key: str, spec: dict[str, Any], owner: str = USUAL.owner
    ) -> Job | None:
        """Return the job that ``owner`` submitted with this key, if it is remembered.

        Raises:
            IdempotencyMismatch: The key was used for another body.
        """
        with self._database.durable() as connection:
            return rows.remembered(connection, owner, operation, key, rows.body_hash(spec))

    def request_cancel(self, job_id: str) -> Job:
        """Cancel a queued job at once; ask the executor of a running one to stop.

        Raises:
            UnknownJob: There is none of this id.
            IllegalTransition: The job has ended already.
        """
        with self._database.durable() as connection:
            job = rows.load(connection, job_id, lock=True)
            if job.status.terminal:
                raise IllegalTransition(
                    f"The job {job_id} has {job.status.value} already.",
                    field="job_id",
                    value=job_id,
                    hint="Only queued and running jobs can be cancelled.",
                )
            if not job.cancel_requested:
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancel_requested=True))
                rows.append(connection, job_id, EventType.CANCEL_REQUESTED, {})
            if job.status is Status.QUEUED:
                rows.end(connection, job_id, Status.CANCELLED, None, None)
            return rows.load(connection, job_id)

    # Leases and fenced writes: executors.

    def acquire_lease(self, place: str, owner: str = "", seconds: float = LEASE_S) -> int:
        """Become the executor of ``place``; whoever was it before can write no more.

        Args:
            place: ``service``, or ``local:<job id>`` for a process that executes one job of its own.
            owner: Host and process, for people.
            seconds: How long the lease counts as live without being renewed.

        Returns:
            The token to pass with every write.
        """
        with self._database.durable() as connection:
            counter = meta.c.key == "last_token"
            bump = update(meta).where(counter).values(value=meta.c.value + 1).returning(meta.c.value)
            token = int(connection.execute(bump).scalar_one())
            connection.execute(delete(leases).where(leases.c.place == place))
            values = {"place": place, "token": token, "owner": owner, "expires": time.time() + seconds}
            connection.execute(insert(leases).values(values))
        return token

    def renew_lease(self, token: int, seconds: float = LEASE_S) -> None:
        """Say that the holder of ``token`` is alive.

        Raises:
            LeaseLost: A later token was issued.
        """
        with self._database.relaxed() as connection:
            renewal = update(leases).where(leases.c.token == token).values(expires=time.time() + seconds)
            if connection.execute(renewal).rowcount == 0:
                raise rows.lease_lost(token)

    def release_lease(self, token: int) -> None:
        """Give the lease up, so that nobody takes its holder for alive."""
        with self._database.relaxed() as connection:
            connection.execute(update(leases).where(leases.c.token == token).values(expires=0.0))

    def waiting(self, place: Place, token: int) -> list[Waiting]:
        """Return the jobs of ``place`` that whoever holds ``token`` may start now, oldest first.

        They wait, and not for a later try; or a former executor left them running.
        """
        with self._database.read() as connection:
            return queue.startable(connection, place, token)

    def claim(self, job_id: str, token: int) -> Job | None:
        """Make a waiting or abandoned job running under ``token``; None when it is neither.

        Raises:
            LeaseLost: The token is not the newest of its place.
        """
        with self._database.durable() as connection:
            rows.check_token(connection, token)
            abandoned = (jobs.c.status == Status.RUNNING.value) & (jobs.c.token < token)
            taking = (
                update(jobs)
                .where(jobs.c.id == job_id, or_(jobs.c.status == Status.QUEUED.value, abandoned))
                .values(
                    status=Status.RUNNING.value,
                    token=token,
                    attempt=jobs.c.attempt + 1,
                    not_before=None,
                    started_at=func.coalesce(jobs.c.started_at, time.time()),
                )
            )
            if connection.execute(taking).rowcount == 0:
                return None
            return rows.load(connection, job_id)

    def append(
        self, job_id: str, type: EventType, data: dict[str, Any] | None = None, *, token: int
    ) -> Event:
        """Append an event to a job that runs under ``token``.

        Raises:
            LeaseLost: It does not.
        """
        with self._database.relaxed() as connection:
            return rows.append(connection, job_id, type, data or {}, token)

    def save_progress(self, job_id: str, progress: Progress, token: int) -> Event:
        """Write the present progress into the job and its events."""
        with self._database.relaxed() as connection:
            data = progress.model_dump(mode="json")
            event = rows.append(connection, job_id, EventType.PROGRESS, data, token)
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(progress=data))
            return event

    def record_unit(
        self,
        job_id: str,
        unit_id: str,
        stage: str,
        label: str,
        result: dict[str, Any],
        seconds: float,
        worker: str,
        *,
        token: int,
    ) -> Event | None:
        """Journal a finished unit and append its ``unit_finished`` event, both or neither.

        Returns:
            The event; None when the journal had the unit already (its record is replaced, without an event).

        Raises:
            LeaseLost: The job does not run under ``token``.
        """
        record = {"stage": stage, "label": label, "result": result, "seconds": seconds, "worker": worker}
        data = {"stage": stage, "unit_id": unit_id, "label": label, "worker": worker, "seconds": seconds}
        with self._database.durable() as connection:
            if rows.check_executor(connection, job_id, token).status is not Status.RUNNING:
                raise rows.lease_lost(token)
            mine = (units.c.job_id == job_id) & (units.c.unit_id == unit_id)
            replaced = update(units).where(mine).values(**record, finished_at=time.time())
            if connection.execute(replaced).rowcount:
                return None
            row = {"job_id": job_id, "unit_id": unit_id, "finished_at": time.time(), **record}
            connection.execute(insert(units).values(row))
            return rows.append(connection, job_id, EventType.UNIT_FINISHED, data, token)

    def transition(
        self,
        job_id: str,
        to: Status,
        *,
        token: int,
        result: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> Job:
        """End a job that runs under ``token``: status, result or error and the closing event, all or nothing.

        Raises:
            IllegalTransition: The table of transitions does not allow it.
            LeaseLost: The job does not run under ``token``.
        """
        with self._database.durable() as connection:
            job = rows.check_executor(connection, job_id, token)
            if to not in TRANSITIONS[job.status] or not to.terminal:
                raise _illegal(job, to)
            rows.end(connection, job_id, to, result, error)
            return rows.load(connection, job_id)

    def put_back(self, job_id: str, reason: dict[str, Any], wait_s: float, *, token: int) -> Job:
        """Let a job that runs under ``token`` wait for another try; its journal stays.

        Args:
            job_id: Of the job.
            reason: Why, as problem details.
            wait_s: Seconds before which it is not started again.
            token: The executor's.

        Returns:
            The job: queued; or cancelled, where that was asked for.

        Raises:
            IllegalTransition: It does not run.
            LeaseLost: It does not run under ``token``.
        """
        with self._database.durable() as connection:
            job = rows.check_executor(connection, job_id, token)
            if Status.QUEUED not in TRANSITIONS[job.status]:
                raise _illegal(job, Status.QUEUED)
            if job.cancel_requested:
                rows.end(connection, job_id, Status.CANCELLED, None, None)
            else:
                data = {"attempt": job.attempt, "reason": reason, "wait_s": round(wait_s, 1)}
                rows.append(connection, job_id, EventType.RETRYING, data, token)
                # Under no token: whoever held it has nothing more to say of the job.
                waiting = {"status": Status.QUEUED.value, "token": 0, "not_before": time.time() + wait_s}
                again = update(jobs).where(jobs.c.id == job_id)
                connection.execute(again.values(**waiting, failures=jobs.c.failures + 1))
            return rows.load(connection, job_id)

    # Retention: the service.

    def remove_ended(self, before: float, keep: Collection[str] = (), limit: int = 50) -> list[str]:
        """Remove the oldest jobs that ended before a time, with their events and journals.

        Jobs whose idempotency key may still be asked for stay.

        Args:
            before: Seconds since the epoch.
            keep: Ids of jobs that stay.
            limit: How many are removed at most, in one transaction.

        Returns:
            Their ids.
        """
        ended = [status.value for status in Status if status.terminal]
        askable = time.time() - rows.IDEMPOTENCY_S
        query = (
            select(jobs.c.id)
            .where(jobs.c.status.in_(ended), jobs.c.finished_at < before, jobs.c.id.not_in(keep))
            .where(or_(jobs.c.idempotency_key.is_(None), jobs.c.created_at < askable))
            .order_by(jobs.c.number)
            .limit(limit)
        )
        with self._database.durable() as connection:
            ids = list(connection.scalars(query))
            for table, column in ((events, events.c.job_id), (units, units.c.job_id), (jobs, jobs.c.id)):
                connection.execute(delete(table).where(column.in_(ids)))
        return ids


def _illegal(job: Job, to: Status) -> IllegalTransition:
    return IllegalTransition(f"The job {job.id} is {job.status.value}; it cannot become {to.value}.")
