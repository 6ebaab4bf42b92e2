"""The job store's tables, and how its databases are opened: SQLite (one host) or PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.schema import CreateColumn

from aidocks.errors import Conflict, ServiceUnreachable

#: What says that the job store is away, locked, or has no room. It passes, and says nothing of any job.
STORE_ERRORS = (OperationalError, InterfaceError)
SCHEMA_VERSION = 2
BUSY_TIMEOUT_MS = 30_000

metadata = MetaData()
_json = JSON(none_as_null=True)

meta = Table("meta", metadata, Column("key", String(64), primary_key=True), Column("value", BigInteger))

jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("operation", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("place", String(16), nullable=False),
    Column("spec", _json, nullable=False),
    Column("output_name", String(128)),
    Column("inputs", _json, nullable=False),
    Column("progress", _json),
    Column("result", _json),
    Column("error", _json),
    Column("attempt", Integer, nullable=False, default=0),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("owner", String(64), nullable=False, server_default="local"),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("timeout_s", Float(53)),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("not_before", Float(53)),
    Column("token", BigInteger, nullable=False, default=0),
    Column("last_sequence", Integer, nullable=False, default=0),
    Column("idempotency_key", String(255)),
    Column("body_hash", String(64), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("started_at", Float(53)),
    Column("finished_at", Float(53)),
)
_unfinished = text("status IN ('queued', 'running')")
Index("jobs_by_status", jobs.c.status, jobs.c.number)
# All that is asked of those that wait, twice a second: their rows hold specs, and SQLite would walk through them.
Index(
    "jobs_to_start",
    jobs.c.status,
    jobs.c.place,
    jobs.c.number,
    jobs.c.owner,
    jobs.c.priority,
    jobs.c.not_before,
    jobs.c.token,
    jobs.c.created_at,
    jobs.c.id,
)
# Two unfinished jobs can never be about to create the same model.
Index(
    "one_job_per_output_name",
    jobs.c.output_name,
    unique=True,
    sqlite_where=_unfinished,
    postgresql_where=_unfinished,
)
# What one key's holder calls a request says nothing of another's.
Index("one_job_per_key", jobs.c.owner, jobs.c.operation, jobs.c.idempotency_key, unique=True)
Index("jobs_by_owner", jobs.c.owner, jobs.c.status)

events = Table(
    "events",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("time", Float(53), nullable=False),
    Column("type", String(32), nullable=False),
    Column("data", _json, nullable=False),
)

units = Table(
    "units",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("unit_id", String(64), primary_key=True),
    Column("stage", String(128), nullable=False),
    Column("label", Text, nullable=False),
    Column("result", _json, nullable=False),
    Column("seconds", Float(53), nullable=False),
    Column("worker", String(128), nullable=False),
    Column("finished_at", Float(53), nullable=False),
)

#: One row for each place where jobs are executed; whoever holds the row's present token may write.
leases = Table(
    "leases",
    metadata,
    Column("place", String(128), primary_key=True),
    Column("token", BigInteger, nullable=False, unique=True),
    Column("owner", String(255), nullable=False),
    Column("expires", Float(53), nullable=False),
)

#: API keys; of their secrets only a hash.
keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("salt", String(64), nullable=False),
    Column("hash", String(128), nullable=False),
    Column("scopes", _json, nullable=False),
    Column("limits", _json, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    Column("revoked_at", Float(53)),
    Column("last_used_at", Float(53)),
)

#: Who did what; rows are only ever added, and removed by age.
audit = Table(
    "audit",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("time", Float(53), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("action", String(128), nullable=False),
    Column("object", Text),
    Column("status", Integer),
    Column("address", String(64)),
    Column("request_id", String(128)),
)
Index("audit_by_time", audit.c.time)

#: What older stores lack, by the version that they have.
_ADDED: dict[int, tuple[Column[Any], ...]] = {
    1: (jobs.c.owner, jobs.c.priority, jobs.c.timeout_s, jobs.c.failures, jobs.c.not_before)
}
_DROPPED: dict[int, tuple[str, ...]] = {1: ("one_job_per_idempotency_key",)}


class Database:
    """Transactions of three kinds: reading, durable writing, and writing that a power cut may undo.

    On SQLite a durable transaction waits for the disk (``synchronous=FULL``, about 4 ms) and a relaxed one
    does not; both survive the death of the process. PostgreSQL treats all three alike.

    Args:
        url: SQLAlchemy URL.
    """

    def __init__(self, url: str) -> None:
        address = make_url(url)
        self.sqlite = address.get_backend_name() == "sqlite"
        if self.sqlite:
            assert address.database not in (None, "", ":memory:"), "the store is shared between processes"
            Path(str(address.database)).parent.mkdir(parents=True, exist_ok=True)
            self._reading = _sqlite_engine(url, "BEGIN", "NORMAL")
            self._durable = _sqlite_engine(url, "BEGIN IMMEDIATE", "FULL")
            self._relaxed = _sqlite_engine(url, "BEGIN IMMEDIATE", "NORMAL")
        else:
            if address.drivername == "postgresql":
                address = address.set(drivername="postgresql+psycopg")
            self._reading = self._durable = self._relaxed = create_engine(address, pool_pre_ping=True)
        self._create_tables()

    def _create_tables(self) -> None:
        with self.durable() as connection:
            if not self.sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(872300)"))
            self._migrate(connection)
            metadata.create_all(connection)

    def _migrate(self, connection: Connection) -> None:
        """Bring the tables of an older store to this version; a new one has none yet.

        Raises:
            Conflict: A newer AIDocks wrote it.
        """
        known = inspect(connection).has_table(meta.name)
        version = (
            connection.scalar(select(meta.c.value).where(meta.c.key == "schema_version")) if known else None
        )
        if version is None:
            meta.create(connection, checkfirst=True)
            rows = [{"key": "schema_version", "value": SCHEMA_VERSION}, {"key": "last_token", "value": 0}]
            connection.execute(insert(meta), rows)
            return
        if version > SCHEMA_VERSION:
            raise Conflict(
                f"The job store has schema version {version}; this AIDocks reads up to {SCHEMA_VERSION}.",
                hint="Use the AIDocks version that wrote it, or another AIDOCKS_DATABASE_URL.",
            )
        for older in range(int(version), SCHEMA_VERSION):
            for name in _DROPPED[older]:
                connection.execute(text(f"DROP INDEX IF EXISTS {name}"))
            for column in _ADDED[older]:
                ddl = CreateColumn(column).compile(dialect=connection.dialect)
                connection.execute(text(f"ALTER TABLE {column.table.name} ADD COLUMN {ddl}"))
            for index in {index for column in _ADDED[older] for index in column.table.indexes}:
                index.create(connection, checkfirst=True)
        connection.execute(update(meta).where(meta.c.key == "schema_version").values(value=SCHEMA_VERSION))

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._reading.begin() as connection:
            yield connection

    @contextmanager
    def durable(self) -> Iterator[Connection]:
        with self._durable.begin() as connection:
            yield connection

    @contextmanager
    def relaxed(self) -> Iterator[Connection]:
        with self._relaxed.begin() as connection:
            yield connection

    def close(self) -> None:
        for engine in (self._reading, self._durable, self._relaxed):
            engine.dispose()


def _sqlite_engine(url: str, begin: str, synchronous: str) -> Engine:
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        _switch_to_wal(connection)
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # IMMEDIATE: a transaction that upgraded from reading to writing could not wait for the other writer.
        connection.exec_driver_sql(begin)

    return engine


def _switch_to_wal(connection: Any) -> None:
    # The busy time-out does not cover the switch itself, which several processes may try at the same moment.
    for attempt in range(100):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except connection.OperationalError:
            if attempt == 99:
                raise
            time.sleep(0.05)
        else:
            return


def store_away() -> ServiceUnreachable:
    """Return what whoever asks is told of :data:`STORE_ERRORS`: not what the store is made of."""
    return ServiceUnreachable("The job store does not answer.", hint="Try again in a moment.")
