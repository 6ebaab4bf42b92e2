"""Stores of both kinds, and the trivial operation in the table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from aidocks import operations
from aidocks.jobs.store import JobStore
from aidocks.settings import Settings
from tests.support.private_postgres import find_programs, private_postgres
from tests.support.trivial_operation import REGISTRATION


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a PostgreSQL server: the one that the environment names, or one of the tests' own."""
    given, programs = os.environ.get("AIDOCKS_TEST_POSTGRES_URL"), find_programs()
    if given:
        yield given
    elif programs is not None:
        with private_postgres(programs) as url:
            yield url
    else:
        pytest.skip("install PostgreSQL, or set AIDOCKS_TEST_POSTGRES_URL")


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty job store."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'jobs.db'}"
        return
    server = request.getfixturevalue("postgres_url")
    name = f"aidocks_{os.getpid()}_{abs(hash(str(tmp_path))):x}"
    engine = create_engine(
        make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(server).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture
def store(store_url: str) -> Iterator[JobStore]:
    opened = JobStore(store_url)
    yield opened
    opened.close()


@pytest.fixture
def local_store(settings: Settings) -> Iterator[JobStore]:
    """The store of ``settings``."""
    opened = JobStore(settings.store_url)
    yield opened
    opened.close()


@pytest.fixture
def trivial(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the trivial operation, which is in the table for this test."""
    monkeypatch.setattr(operations, "OPERATIONS", (*operations.OPERATIONS, REGISTRATION))
    return REGISTRATION.name


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    directory = tmp_path / "traces"
    directory.mkdir()
    return directory
