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
from aidocks.executor import Claim
from aidocks.specs.resources import Resources
from cluster.pool import RayPool
from tests.support.pool_units import HoldInterpreter, Large
from tests.support.trivial_operation import SquareUnit

traces = Path(sys.argv[1])

def square(number, **more):
    return SquareUnit(number=number, traces=traces, **more)

async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)

def ended(pid):
    # Its parent may not have noticed yet.
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "zombie" in status.read_text()
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
    seconds, gone = time.monotonic() - begin, ended(pid)
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


def test_a_silent_worker_is_replaced_and_one_that_only_computes_is_not(
    with_pool: Callable[[str], Any], tmp_path: Path
) -> None:
    reason, gone, value, worker = with_pool(
        """
pool = RayPool(2, silence_s=1.5)
said = []
computing = asyncio.create_task(pool.run(HoldInterpreter(seconds=5), traces, said.append))
await until(lambda: said)
held = {worker["pid"] for worker in pool.workers()}
task = asyncio.create_task(pool.run(square(1, seconds=60), traces, said.append))
await until(lambda: len(said) == 2)
(pid,) = {worker["pid"] for worker in pool.workers()} - held
os.kill(pid, signal.SIGSTOP)
try:
    await task
except WorkerLost as error:
    reason = error.message
gone = ended(pid)
again = await pool.run(square(3), traces, said.append)
return reason, gone, again.result.value, (await computing).worker
"""
    )
    assert reason == "worker-2 gave no sign of life for 1.5 s and was killed."
    assert gone
    assert (value, worker) == (9, "worker-1")


def test_two_units_that_do_not_fit_beside_each_other_take_turns(
    with_pool: Callable[[str], Any], tmp_path: Path
) -> None:
    workers, small = with_pool(
        """
(node,) = [node for node in ray.nodes() if node["Alive"]]
most = int(node["Resources"]["memory"] * 0.7)
runs = [pool.run(Large(number=n, bytes=most, traces=traces), traces, lambda _: None) for n in range(3)]
outcomes = await asyncio.gather(*runs)
# What needs no memory runs on the same worker, or beside it.
small = await pool.run(square(2), traces, lambda _: None)
return sorted({outcome.worker for outcome in outcomes}), small.result.value
"""
    )
    assert len(workers) == 1, "the one that became free was handed on"
    assert small == 4


def test_a_worker_gets_what_the_request_asks_for_or_a_word(
    with_pool: Callable[[str], Any], tmp_path: Path
) -> None:
    threads, refused, lost, told = with_pool(
        """
import cluster.crew
cluster.crew.SAY_AFTER_S = 0
two = await pool.run(HoldInterpreter(seconds=0), traces, print, Claim(resources=Resources(cpus=2)))
try:
    await pool.run(square(1), traces, print, Claim(resources=Resources(cpus=64)))
except AIDocksError as error:
    refused = error.field, error.value, error.message
told = []
hopeful = RayPool(growth=2, patience_s=2, tell=lambda job, text: told.append((job, text)))
try:
    await hopeful.run(square(1), traces, print, Claim("job-1", resources=Resources(cpus=64)))
except WorkerLost as error:
    lost = error.message
return two.result.threads, refused, lost, told
"""
    )
    assert threads == 2
    assert refused[:2] == ["resources.cpus", 64]
    assert "No node of the cluster can hold a worker of 64 CPU. It has 1 node: 4 CPU" in refused[2]
    assert "No worker came up for 2 s: it takes 64 CPU, the cluster has 1 node: 4 CPU" in lost
    assert [job for job, _ in told] == ["job-1"]
    assert told[0][1].startswith("It waits for a worker: it takes 64 CPU")
