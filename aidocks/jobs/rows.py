"""Pieces of transactions: how rows become jobs and events, and the checks that fence every write."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, exists, insert, select, update

from aidocks.errors import IdempotencyMismatch, LeaseLost, UnknownJob
from aidocks.jobs.database import events, jobs, leases
from aidocks.jobs.model import Event, EventType, Job, Status

IDEMPOTENCY_S = 24 * 3600.0
UNFINISHED = (Status.QUEUED.value, Status.RUNNING.value)
COLUMNS = tuple(
    jobs.c.not_before.label(name) if name == "retry_at" else jobs.c[name] for name in Job.model_fields
)
_ENDINGS = {
    Status.SUCCEEDED: EventType.SUCCEEDED,
    Status.FAILED: EventType.FAILED,
    Status.CANCELLED: EventType.CANCELLED,
}


@dataclass(frozen=True)
class UnitRecord:
    """One line of a job's journal: what a finished unit returned."""

    unit_id: str
    stage: str
    label: str
    result: dict[str, Any]
    seconds: float
    worker: str


@dataclass(frozen=True)
class Lease:
    """Who executes the jobs of a place, and until when that is certain."""

    place: str
    token: int
    owner: str
    expires: float

    @property
    def live(self) -> bool:
        return time.time() < self.expires


def body_hash(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def unknown_job(job_id: str, field: str = "job_id") -> UnknownJob:
    return UnknownJob(
        f"There is no job {job_id!r}.", field=field, value=job_id, hint="See `aidocks jobs list`."
    )


def lease_lost(token: int) -> LeaseLost:
    return LeaseLost(f"Token {token} is no longer the newest: another executor has taken over.")


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _read_job(row: Row[Any]) -> Job:
    values = dict(row._mapping)
    for name in ("created_at", "started_at", "finished_at", "retry_at"):
        values[name] = _time(values[name])
    return Job.model_validate(values)


def read_jobs(connection: Connection, query: Select[Any]) -> list[Job]:
    return [_read_job(row) for row in connection.execute(query)]


def load(connection: Connection, job_id: str, *, lock: bool = False) -> Job:
    query = select(*COLUMNS).where(jobs.c.id == job_id)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise unknown_job(job_id)
    return _read_job(row)


def read_event(job_id: str, sequence: int, seconds: float, type: str, data: dict[str, Any]) -> Event:
    time_ = datetime.fromtimestamp(seconds, UTC)
    return Event(job_id=job_id, sequence=sequence, time=time_, type=EventType(type), data=data)


def append(
    connection: Connection, job_id: str, type: EventType, data: dict[str, Any], token: int | None = None
) -> Event:
    # Counting in the job's own row makes the sequence gapless: writers of one job queue for that row.
    bump = update(jobs).where(jobs.c.id == job_id).values(last_sequence=jobs.c.last_sequence + 1)
    if token is not None:
        newest = exists().where(leases.c.token == token)
        bump = bump.where(jobs.c.token == token, jobs.c.status == Status.RUNNING.value, newest)
    sequence = connection.execute(bump.returning(jobs.c.last_sequence)).scalar()
    if sequence is None:
        load(connection, job_id)
        raise lease_lost(token or 0)
    row = {"job_id": job_id, "sequence": sequence, "time": time.time(), "type": type.value, "data": data}
    connection.execute(insert(events).values(row))
    return read_event(row["job_id"], sequence, row["time"], row["type"], data)


def check_token(connection: Connection, token: int) -> None:
    # FOR SHARE holds off a later acquire_lease until this transaction ends (on SQLite writers are alone).
    query = select(leases.c.token).where(leases.c.token == token).with_for_update(read=True)
    if connection.scalar(query) is None:
        raise lease_lost(token)


def check_executor(connection: Connection, job_id: str, token: int) -> Job:
    check_token(connection, token)
    job = load(connection, job_id, lock=True)
    executor = connection.scalar(select(jobs.c.token).where(jobs.c.id == job_id))
    if executor != token:
        raise lease_lost(token)
    return job


def end(
    connection: Connection,
    job_id: str,
    status: Status,
    result: dict[str, Any] | None,
    error: dict[str, Any] | None,
) -> None:
    values = {"status": status.value, "result": result, "error": error, "finished_at": time.time()}
    append(connection, job_id, _ENDINGS[status], result or error or {})
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))


def remembered(connection: Connection, owner: str, operation: str, key: str, body_hash: str) -> Job | None:
    mine = (jobs.c.owner == owner) & (jobs.c.operation == operation) & (jobs.c.idempotency_key == key)
    expired = jobs.c.created_at < time.time() - IDEMPOTENCY_S
    connection.execute(update(jobs).where(mine, expired).values(idempotency_key=None))
    row = connection.execute(select(jobs.c.id, jobs.c.body_hash).where(mine)).first()
    if row is None:
        return None
    if row.body_hash != body_hash:
        raise IdempotencyMismatch(
            f"The idempotency key {key!r} was used for another request, the job {row.id}.",
            field="Idempotency-Key",
            value=key,
            hint="Use a new key for a new request.",
        )
    return load(connection, row.id)


def name_holder(connection: Connection, output_name: str | None) -> str | None:
    if output_name is None:
        return None
    query = select(jobs.c.id).where(jobs.c.output_name == output_name, jobs.c.status.in_(UNFINISHED))
    return connection.scalar(query)
