"""The pool without a cluster."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from pydantic import BaseModel

from aidocks.executor import InProcessPool
from aidocks.plan import Unit, UnitContext


class Answer(BaseModel):
    threads: int
    same_cache: bool


class Ask(Unit[Answer]):
    """Say what the context offers."""

    result_type = Answer

    @property
    def label(self) -> str:
        return "ask"

    def run(self, context: UnitContext) -> Answer:
        seen = context.cache.get("seen", list)
        seen.append(1)
        return Answer(threads=context.threads, same_cache=len(seen) > 1)


class Wait(Unit[Answer]):
    """Run until told to end."""

    result_type = Answer

    @property
    def label(self) -> str:
        return "wait"

    def run(self, context: UnitContext) -> Answer:
        began.set()
        assert ending.wait(20)
        finished.set()
        return Answer(threads=0, same_cache=False)


class Stop(Unit[Answer]):
    """Raise what a future cannot carry."""

    result_type = Answer

    @property
    def label(self) -> str:
        return "stop"

    def run(self, context: UnitContext) -> Answer:
        raise StopIteration


began, ending, finished = threading.Event(), threading.Event(), threading.Event()


def test_units_share_the_cache_and_are_announced(tmp_path: Path) -> None:
    async def run() -> list[Answer]:
        pool, said = InProcessPool(), list[str]()
        outcomes = [await pool.run(Ask(), tmp_path, said.append) for _ in range(2)]
        assert said == ["local", "local"]
        assert all(outcome.worker == "local" and outcome.seconds >= 0 for outcome in outcomes)
        await pool.close()
        return [Answer.model_validate(outcome.result) for outcome in outcomes]

    first, second = asyncio.run(run())
    assert first.threads >= 1
    assert (first.same_cache, second.same_cache) == (False, True)


def test_errors_come_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(InProcessPool().run(Stop(), tmp_path, lambda _: None))


@pytest.mark.timeout(30)
def test_a_cancelled_unit_is_waited_for(tmp_path: Path) -> None:
    async def run() -> None:
        task = asyncio.create_task(InProcessPool().run(Wait(), tmp_path, lambda _: None))
        await asyncio.to_thread(began.wait)
        task.cancel()
        await asyncio.sleep(0)
        ending.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert finished.is_set()

    asyncio.run(run())
