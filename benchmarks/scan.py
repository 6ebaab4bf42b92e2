"""The spectral scan of all matrices (both rules) beside the original recipe's decompositions of the same matrices.

The original, laserRMT, computes `svdvals` in float64 for its ranking and a full float64 `svd` again to cut; the scan
needs the values alone, and takes them from the Gram matrix. One thread each.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.comparison import Comparison, in_turns
from benchmarks.small_model import smollm2

#: Layers that are decomposed: all would take minutes for the original recipe.
LAYERS = range(0, 30, 6)


def run() -> list[Comparison]:
    import torch

    torch.set_num_threads(1)
    with smollm2() as (scratch, model):
        ours, other = in_turns(lambda: _scan(model, scratch), lambda: _original(model), runs=3)
    facts = {"layers": len(LAYERS), "matrices": 7 * len(LAYERS), "threads": 1}
    return [Comparison("spectral scan", ours, other, "laserRMT's decompositions", facts=facts)]


def _scan(model: Path, scratch: Path) -> None:
    from aidocks.laser.matrices import find_matrices, select_matrices
    from aidocks.laser.scan import ScanMatrix, open_checkpoint
    from aidocks.plan import UnitContext

    context = UnitContext(scratch)
    matrices = find_matrices(open_checkpoint(model, context).entries)
    for matrix in select_matrices(matrices, tuple(LAYERS), None, model.name):
        ScanMatrix(checkpoint=model, matrix=matrix).run(context)


def _original(model: Path) -> None:
    import torch

    from aidocks.checkpoints.reader import Checkpoint

    checkpoint = Checkpoint(model)
    for name, entry in checkpoint.entries.items():
        parts = name.split(".")
        if len(entry.shape) == 2 and "layers" in parts and int(parts[2]) in LAYERS:
            weight = checkpoint.tensor(name).double()
            torch.linalg.svdvals(weight)
            torch.linalg.svd(weight, full_matrices=False)
