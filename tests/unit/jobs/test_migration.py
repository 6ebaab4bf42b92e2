"""A job store that an older AIDocks wrote is brought up to date, and keeps what it holds."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from aidocks.errors import Conflict
from aidocks.jobs.database import SCHEMA_VERSION
from aidocks.jobs.store import JobStore

#: What the first version made, as SQLite tells it.
FIRST = """
CREATE TABLE meta (key VARCHAR(64) NOT NULL PRIMARY KEY, value BIGINT);
CREATE TABLE jobs (
    number INTEGER NOT NULL PRIMARY KEY, id VARCHAR(64) NOT NULL UNIQUE,
    operation VARCHAR(64) NOT NULL, status VARCHAR(16) NOT NULL, place VARCHAR(16) NOT NULL, spec JSON NOT NULL,
    output_name VARCHAR(128), inputs JSON NOT NULL, progress JSON, result JSON, error JSON,
    attempt INTEGER NOT NULL, cancel_requested BOOLEAN NOT NULL, token BIGINT NOT NULL,
    last_sequence INTEGER NOT NULL, idempotency_key VARCHAR(255), body_hash VARCHAR(64) NOT NULL,
    created_at FLOAT NOT NULL, started_at FLOAT, finished_at FLOAT
);
CREATE INDEX jobs_by_status ON jobs (status, number);
CREATE UNIQUE INDEX one_job_per_output_name ON jobs (output_name) WHERE status IN ('queued', 'running');
CREATE UNIQUE INDEX one_job_per_idempotency_key ON jobs (operation, idempotency_key);
INSERT INTO meta VALUES ('schema_version', 1), ('last_token', 7);
INSERT INTO jobs VALUES (1, 'job-old', 'laser', 'running', 'service', '{"a": 1}', 'out', '[]', NULL, NULL, NULL,
    1, 0, 7, 0, 'key', 'hash', 1.0, 2.0, NULL);
"""


def test_a_store_of_the_first_version_keeps_its_jobs(tmp_path: Path) -> None:
    path = tmp_path / "aidocks.db"
    with sqlite3.connect(path) as old:
        old.executescript(FIRST)
    store = JobStore(f"sqlite:///{path}")
    job = store.get("job-old")
    assert (job.owner, job.priority, job.timeout_s, job.spec) == ("local", 0, None, {"a": 1})
    token = store.acquire_lease("service")
    assert token == 8
    claimed = store.claim("job-old", token)
    assert claimed is not None
    assert claimed.attempt == 2
    store.close()
    # The same tables as of a new store, to the last index.
    JobStore(f"sqlite:///{tmp_path / 'new.db'}").close()
    assert _schema(path) == _schema(tmp_path / "new.db")
    JobStore(f"sqlite:///{path}").close()


def _schema(path: Path) -> tuple[set[str], set[str]]:
    with sqlite3.connect(path) as connection:
        indexes = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type='index'")}
        columns = {
            f"{table}.{column[1]}"
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            for column in connection.execute(f"PRAGMA table_info({table})")
        }
    return {name for name in indexes if not name.startswith("sqlite_")}, columns


def test_a_store_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "aidocks.db"
    JobStore(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as later:
        later.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (SCHEMA_VERSION + 1,))
    with pytest.raises(Conflict, match="reads up to"):
        JobStore(f"sqlite:///{path}")
