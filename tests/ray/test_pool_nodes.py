"""The pool on two nodes: it follows the cluster, uses all of it, and reaches what runs elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.gang_jobs import until
from tests.support.second_node import SecondNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

PROGRAM = """
import asyncio, os, signal, time
from pathlib import Path
from aidocks.errors import WorkerLost
from cluster import pool as pools
from cluster.pool import RayPool
from tests.support.trivial_operation import SquareUnit

traces = Path(sys.argv[1])
pools.REFRESH_S = pools.REST_S = 0.2

def square(number, **more):
    return SquareUnit(number=number, traces=traces, **more)

async def until(condition, pool):
    while not condition():
        pool.release_idle()
        await asyncio.sleep(0.01)

def gone(pid):
    return not Path(f"/proc/{pid}").exists() or "State:\\tZ" in Path(f"/proc/{pid}/status").read_text()

async def main():
    here = ray.get_runtime_context().get_node_id()
    pool, following = RayPool(4), RayPool()
    before = following.parallelism
    said = []
    tasks = [asyncio.create_task(pool.run(square(n, seconds=3600), traces, said.append)) for n in range(4)]
    await until(lambda: len(said) == 4, pool)
    slots = [slot for slot in pool._crew.slots.values() if slot.place.node != here]
    spread = len(slots)
    pid = slots[0].place.pid
    # Cancelled there: the process has ended when that is said.
    for task in tasks:
        task.cancel()
    begin = time.monotonic()
    await asyncio.gather(*tasks, return_exceptions=True)
    seconds, ended = time.monotonic() - begin, gone(pid)
    # The node dies under a unit, which is lost, and runs again on what there is.
    said.clear()
    runs = [asyncio.create_task(pool.run(square(n, seconds=3600), traces, said.append)) for n in range(4)]
    await until(lambda: len(said) == 4, pool)
    Path(sys.argv[2]).touch()
    begin = time.monotonic()
    await until(lambda: any(run.done() for run in runs), pool)
    lost = [run.exception() for run in runs if run.done()]
    after_s = time.monotonic() - begin
    await until(lambda: following.parallelism < before, following)
    rest = following.parallelism
    for run in runs:
        run.cancel()
    await asyncio.gather(*runs, return_exceptions=True)
    again = await pool.run(square(7), traces, print)
    kinds = sorted({type(error).__name__ for error in lost})
    return before, spread, seconds, ended, kinds, after_s, rest, again.result.value
answer = asyncio.run(main())
"""


def test_the_pool_follows_the_cluster_and_ends_what_runs_on_another_node(
    drive: Callable[..., Any], two_nodes: SecondNode, tmp_path: Path
) -> None:
    with ThreadPoolExecutor() as threads:
        traces = tmp_path / "traces"
        traces.mkdir()
        driver = threads.submit(drive, PROGRAM, traces, tmp_path / "up")
        until(lambda: driver.done() or (tmp_path / "up").exists(), "units on both nodes")
        two_nodes.kill()
        before, spread, seconds, ended, kinds, after_s, rest, value = driver.result()
    assert (before, rest) == (7, 4)
    assert spread, "both nodes were used"
    assert ended
    assert seconds < 15, "a process has to be started there first, to look"
    assert kinds == ["WorkerLost"]
    assert after_s < 40
    assert value == 49
    print(f"cancelled in {seconds:.1f} s, lost after {after_s:.1f} s")
