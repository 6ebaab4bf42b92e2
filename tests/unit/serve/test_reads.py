"""Many who read at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from aidocks.errors import UnknownJob
from serve.reads import Reads


@pytest.fixture
def reads() -> Iterator[Reads]:
    with closing(Reads()) as reads:
        yield reads


def test_who_asks_the_same_meanwhile_shares_an_answer_that_is_no_older_than_the_question(
    reads: Reads,
) -> None:
    first_reads, go_on = threading.Event(), threading.Event()
    told: list[str] = []

    def slowly() -> bytes:
        first_reads.set()
        go_on.wait()
        return b"first"

    def newly() -> bytes:
        told.append("read")
        return b"second"

    async def ask() -> list[bytes]:
        first = asyncio.create_task(reads.read("job", slowly))
        await asyncio.to_thread(first_reads.wait)
        # The first is being read already: these may know more.
        later = [asyncio.create_task(reads.read("job", newly)) for _ in range(3)]
        other = asyncio.create_task(reads.read("list", lambda: b"list"))
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(first, *later, other)

    assert asyncio.run(ask()) == [b"first", b"second", b"second", b"second", b"list"]
    assert told == ["read"]


def test_an_error_is_that_of_whoever_asked(reads: Reads) -> None:
    def fail() -> bytes:
        raise UnknownJob("There is no job 'x'.")

    async def ask() -> list[bytes | BaseException]:
        questions = [reads.read("x", fail), reads.read("x", fail), reads.read("y", lambda: b"there")]
        return await asyncio.gather(*questions, return_exceptions=True)

    first, second, third = asyncio.run(ask())
    assert isinstance(first, UnknownJob)
    assert isinstance(second, UnknownJob)
    assert third == b"there"


def test_who_goes_away_takes_nothing_from_the_others(reads: Reads) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly() -> bytes:
        begun.set()
        go_on.wait()
        return b"there"

    async def leave() -> None:
        asking = asyncio.create_task(reads.read("job", slowly))
        await asyncio.to_thread(begun.wait)
        asking.cancel()

    async def stay() -> bytes:
        asking = asyncio.create_task(reads.read("other", lambda: b"other"))
        await asyncio.sleep(0)
        go_on.set()
        return await asking

    asyncio.run(leave())  # its event loop is closed before the answer comes
    assert asyncio.run(stay()) == b"other"
