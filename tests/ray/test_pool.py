"""The pool of workers on a real cluster; each test is a driver with a pool of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

PRELUDE = """
import asyncio, os, signal, time
from pathlib import Path
from aidocks.errors import AIDocksError, WorkerLost
from cluster.pool import RayPool
from tests.support.trivial_operation import SquareUnit

traces = Path(sys.argv[1])

def square(number, **more):
    return SquareUnit(number=number, traces=traces, **more)

async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)
"""


@pytest.fixture
def with_pool(drive: Callable[..., Any], tmp_path: Path) -> Callable[[str], Any]:
    """Run the body of an async function that has ``pool`` of two workers; returns what it returns."""

    def run(body: str) -> Any:
        lines = "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
        main = f"async def main():\n    pool = RayPool(2)\n{lines}\nanswer = asyncio.run(main())"
        return drive(f"{PRELUDE}\n{main}", tmp_path)

    return run


def test_units_share_two_workers(with_pool: Callable[[str], Any], tmp_path: Path) -> None:
    values, workers, said, listed = with_pool(
        """
said = []
runs = [pool.run(square(n, seconds=0.2), traces, said.append) for n in range(6)]
outcomes = await asyncio.gather(*runs)
listed = pool.workers()
await pool.close()
return [o.result.value for o in outcomes], sorted({o.worker for o in outcomes}), sorted(set(said)), listed
"""
    )
    assert values == [0, 1, 4, 9, 16, 25]
    assert workers == said == ["worker-1", "worker-2"]
    assert [worker["unit"] for worker in listed] == [None, None]
    assert all(worker["pid"] > 0 for worker in listed)


def test_errors_come_through_as_themselves(with_pool: Callable[[str], Any], tmp_path: Path) -> None:
    kind, field, value, alive = with_pool(
        """
try:
    await pool.run(square(3, fails=True), traces, lambda _: None)
except AIDocksError as error:
    caught = error
return type(caught).__name__, caught.field, caught.value, len(pool.workers())
"""
    )
    assert (kind, field, value, alive) == ("InvalidSpec", "units", 3, 1)


def test_a_killed_worker_is_named_and_replaced(with_pool: Callable[[str], Any], tmp_path: Path) -> None:
    lost, workers = with_pool(
        """
said = []
task = asyncio.create_task(pool.run(square(1, seconds=60), traces, said.append))
await until(lambda: said)
os.kill(pool.workers()[0]["pid"], signal.SIGKILL)
try:
    await task
except WorkerLost as error:
    lost = error.value
outcomes = await asyncio.gather(*(pool.run(square(n), traces, said.append) for n in range(2)))
return lost, sorted({o.worker for o in outcomes})
"""
    )
    assert lost == "worker-1"
    assert set(workers) <= {"worker-1", "worker-2"}


def test_a_cancelled_unit_is_stopped_at_once(with_pool: Callable[[str], Any], tmp_path: Path) -> None:
    seconds, gone, value = with_pool(
        """
said = []
task = asyncio.create_task(pool.run(square(1, seconds=60), traces, said.append))
await until(lambda: said)
pid = pool.workers()[0]["pid"]
begin = time.monotonic()
task.cancel()
try:
    await task
except asyncio.CancelledError:
    seconds = time.monotonic() - begin
try:
    os.kill(pid, 0)
    gone = False
except ProcessLookupError:
    gone = True
outcome = await pool.run(square(2), traces, said.append)
return seconds, gone, outcome.result.value
"""
    )
    assert seconds < 5
    assert gone
    assert value == 4


def test_idle_workers_are_released(with_pool: Callable[[str], Any], tmp_path: Path) -> None:
    before, after = with_pool(
        """
await pool.run(square(1), traces, lambda _: None)
pool.release_idle()
before = len(pool.workers())
pool._idle_release_s = 0.0
pool.release_idle()
return before, len(pool.workers())
"""
    )
    assert (before, after) == (1, 0)
