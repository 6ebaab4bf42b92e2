"""The spectral scan of SmolLM2-135M on two Ray workers, beside one.

A private Ray on loopback; workers have imported what they need before the time is taken, and every run scans anew.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.comparison import Comparison, in_turns
from benchmarks.small_model import smollm2

if TYPE_CHECKING:
    from aidocks.laser.matrices import Matrix

RUNS = 3
#: Two workers must do this part of twice the work of one in the same time.
LEAST = 0.8


def run() -> list[Comparison]:
    import ray

    from aidocks.checkpoints.reader import Checkpoint
    from aidocks.laser.matrices import find_matrices

    root = str(Path(__file__).resolve().parents[1])
    environment = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with smollm2() as (scratch, model):
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment}
        )
        try:
            matrices = sorted(find_matrices(Checkpoint(model).entries), key=lambda m: (-m.cost, m.order))
            caches = (scratch / f"cache-{number}" for number in itertools.count())
            two, one = in_turns(
                lambda: scan(model, matrices, 2, next(caches)),
                lambda: scan(model, matrices, 1, next(caches)),
                runs=RUNS,
            )
        finally:
            ray.shutdown()
    facts = {
        "matrices": len(matrices),
        "cores": os.cpu_count() or 1,
        "must reach": f"ratio {0.5 / LEAST:.3f}",
    }
    return [Comparison("spectral scan, two workers", two, one, "one worker", facts=facts)]


def scan(model: Path, matrices: Sequence[Matrix], workers: int, cache: Path) -> float:
    """Return the seconds that a pool of so many workers takes, once each has scanned a matrix."""
    from aidocks.laser.scan import ScanMatrix
    from cluster.pool import RayPool

    def units(chosen: Sequence[Matrix], place: Path) -> list[ScanMatrix]:
        return [
            ScanMatrix(checkpoint=model, matrix=matrix, file_sha256="-", cache_dir=place) for matrix in chosen
        ]

    async def work() -> float:
        pool = RayPool(workers)
        try:
            for begun in range(2):  # first, every worker imports what it needs
                chosen = matrices if begun else matrices[-2 * workers :]
                begin = time.perf_counter()
                runs = (pool.run(unit, cache, lambda _: None) for unit in units(chosen, cache / str(begun)))
                await asyncio.gather(*runs)
            return time.perf_counter() - begin
        finally:
            await pool.close()

    return asyncio.run(work())
