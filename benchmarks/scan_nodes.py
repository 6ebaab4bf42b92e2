"""The spectral scan of SmolLM2-135M on two nodes of one core each, beside one node of two cores.

Both are raylets of this machine. A cluster is started for every run; its workers have imported what they need before
the time is taken.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.comparison import Comparison, in_turns
from benchmarks.scan_workers import scan
from benchmarks.small_model import smollm2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aidocks.laser.matrices import Matrix

RUNS = 3
WORKERS = 2
#: Two nodes may take so much more time than one.
MOST = 1.15


def run() -> list[Comparison]:
    from aidocks.checkpoints.reader import Checkpoint
    from aidocks.laser.matrices import find_matrices

    with smollm2() as (scratch, model):
        matrices = sorted(find_matrices(Checkpoint(model).entries), key=lambda m: (-m.cost, m.order))
        caches = (scratch / f"cache-{number}" for number in itertools.count())
        two, one = in_turns(
            lambda: _on_nodes(model, matrices, (1, 1), next(caches)),
            lambda: _on_nodes(model, matrices, (2,), next(caches)),
            runs=RUNS,
        )
    facts = {"matrices": len(matrices), "cores": os.cpu_count() or 1, "must reach": f"ratio {MOST}"}
    return [Comparison("spectral scan, two nodes", two, one, "one node of as many cores", facts=facts)]


def _on_nodes(model: Path, matrices: Sequence[Matrix], cores: tuple[int, ...], cache: Path) -> float:
    """Return the seconds that two workers take on a cluster of nodes with so many cores each."""
    import ray
    from ray.cluster_utils import Cluster

    root = str(Path(__file__).resolve().parents[1])
    environment = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    cluster = Cluster()
    try:
        for count in cores:
            cluster.add_node(num_cpus=count, include_dashboard=False)
        ray.init(cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
        return scan(model, matrices, WORKERS, cache)
    finally:
        ray.shutdown()
        cluster.shutdown()
