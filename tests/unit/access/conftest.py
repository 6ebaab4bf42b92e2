"""Keys in job stores of both kinds, under a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aidocks.access.store import KeyStore
from aidocks.jobs.database import Database
from tests.unit.jobs.conftest import postgres_url, store_url

__all__ = ["postgres_url", "store_url"]


class Clock:
    """Seconds since the epoch, as the test says."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(store_url: str) -> Iterator[Database]:
    opened = Database(store_url)
    yield opened
    opened.close()


@pytest.fixture
def keys(database: Database, clock: Clock) -> KeyStore:
    return KeyStore(database, clock=clock)
