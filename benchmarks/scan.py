"""The spectral scan beside its limits and beside the decompositions of the original recipe on the same matrices.

The original, laserRMT, computes `svdvals` in float64 for its ranking, then a full float64 `svd` again, of which it
takes the part of the rank that its rule keeps. The scan needs the values alone; where a matrix is reduced, values and
directions come from one decomposition of the Gram matrix.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import Comparison, in_turns
from benchmarks.small_model import smollm2

if TYPE_CHECKING:
    import torch

    from aidocks.laser.truncation import Precision

#: Layers that are decomposed for the comparison of processor time: all would take minutes for the original recipe.
LAYERS = range(0, 30, 6)
LIMIT_S = 7.0
#: Peak memory over that of what is imported, in sizes of the largest matrix.
LIMIT_MEMORY = 4.0
RUNS = 3

# A process of its own, since its peak is measured: from where torch has multiplied and decomposed once, so that what
# its libraries reserve for good counts as imported.
_SCAN = """
import json, re, sys, time
from pathlib import Path
import numpy, torch
from aidocks.laser import marchenko_pastur, rules, spectrum
from aidocks.laser.matrices import find_matrices
from aidocks.laser.scan import ScanMatrix, open_checkpoint
from aidocks.plan import UnitContext

def resident(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

model, cache, everything = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "all"
spectrum.singular_values(torch.randn(300, 300))
context = UnitContext(cache)
checkpoint = open_checkpoint(model, context)
matrices = find_matrices(checkpoint.entries, all_weights=everything)
Path("/proc/self/clear_refs").write_text("5")
before, begin, cpu = resident("VmHWM"), time.perf_counter(), time.process_time()
for matrix in matrices:
    ScanMatrix(checkpoint=model, matrix=matrix, file_sha256="-", cache_dir=cache).run(context)
print(json.dumps({
    "seconds": time.perf_counter() - begin,
    "cpu": time.process_time() - cpu,
    "peak": resident("VmHWM") - before,
    "matrices": len(matrices),
    "largest": max(checkpoint.entries[matrix.name].nbytes for matrix in matrices),
}))
"""


def run() -> list[Comparison]:
    with smollm2() as (scratch, model):
        return [_wall(model, scratch), *_recipe(model), _memory(model, scratch), _again(scratch)]


def _wall(model: Path, scratch: Path) -> Comparison:
    found = [_scan(model, scratch / f"wall-{run}", "layers") for run in range(RUNS)]
    return Comparison(
        "spectral scan of all layers, after import",
        tuple(one["seconds"] for one in found),
        (LIMIT_S,) * RUNS,
        "the limit",
        facts={"matrices": found[0]["matrices"], "CPU seconds": round(found[0]["cpu"], 2)},
    )


def _memory(model: Path, scratch: Path) -> Comparison:
    found = _scan(model, scratch / "memory", "all")
    return Comparison(
        "spectral scan, peak memory above what is imported",
        (found["peak"] / 1e6,),
        (LIMIT_MEMORY * found["largest"] / 1e6,),
        f"{LIMIT_MEMORY:g} times the largest matrix",
        unit="MB",
        facts={"matrices": found["matrices"], "largest matrix, MB": round(found["largest"] / 1e6, 1)},
    )


def _scan(model: Path, cache: Path, which: str) -> dict[str, Any]:
    # As the command line has it: see aidocks.executor.let_threads_sleep.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", _SCAN, str(model), str(cache), which]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _again(scratch: Path) -> Comparison:
    from aidocks.jobs.runner import run_locally
    from aidocks.settings import Settings
    from aidocks.specs.laser_scan import LaserScanSpec

    settings = Settings(home=scratch)

    def ask() -> float:
        begin = time.perf_counter()
        job = run_locally("laser-scan", LaserScanSpec(model="smollm2-135m-instruct"), settings)
        assert job.result is not None, job.error
        return time.perf_counter() - begin

    first = ask()
    later = tuple(ask() for _ in range(RUNS))
    facts = {"must reach": "at once: the answer of the first request, read from its files"}
    return Comparison(
        "the whole scan asked for again", later, (first,) * RUNS, "the first request", facts=facts
    )


def _recipe(model: Path) -> Iterator[Comparison]:
    """Yield processor time of values, directions and the rank-k matrix of each matrix, in fp64 and in fp32."""
    import torch

    torch.set_num_threads(1)
    weights = list(_weights(model))
    for precision, ratio, error in (("double", 0.4, "1e-12"), ("single", 0.222, "that of an SVD in fp32")):
        ours, other = in_turns(
            _cpu_time(lambda precision=precision: [_ours(w, k, precision) for w, k in weights]),
            _cpu_time(lambda: [_original(w, k) for w, k in weights]),
            runs=RUNS,
        )
        facts = {
            "matrices": len(weights),
            "threads": 1,
            "largest error": f"{max(_error(_ours(w, k, precision), w, k) for w, k in weights):.1e}",
            "must reach": f"ratio {ratio}, error {error}",
        }
        if precision == "single":
            facts["error of an SVD in fp32"] = f"{max(_error(_svd32(w, k), w, k) for w, k in weights):.1e}"
        name = f"values and rank-k matrix, {'fp64' if precision == 'double' else 'fp32'}, CPU"
        yield Comparison(name, ours, other, "laserRMT's svdvals and svd in fp64, CPU", facts=facts)


def _cpu_time(work: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    return timed


def _weights(model: Path) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield matrices as they are stored, with the rank that the original's rule keeps of each."""
    from aidocks.checkpoints.reader import Checkpoint
    from aidocks.laser.marchenko_pastur import laserrmt
    from aidocks.laser.matrices import find_matrices, select_matrices, stored_matrix
    from aidocks.laser.spectrum import singular_values

    checkpoint = Checkpoint(model)
    for matrix in select_matrices(find_matrices(checkpoint.entries), tuple(LAYERS), None, model.name):
        weight = stored_matrix(checkpoint, matrix)
        yield weight, laserrmt(singular_values(weight).numpy(), matrix.shape).rank


def _ours(weight: torch.Tensor, rank: int, precision: Precision) -> torch.Tensor:
    import torch

    from aidocks.laser.truncation import reduce, weight_basis

    computed = weight.to(torch.float32 if precision == "single" else torch.float64)
    return reduce(computed, weight_basis(computed, precision=precision), rank)


def _original(weight: torch.Tensor, rank: int) -> torch.Tensor:
    import torch

    computed = weight.double()
    torch.linalg.svdvals(computed)
    return _cut(computed, rank)


def _svd32(weight: torch.Tensor, rank: int) -> torch.Tensor:
    return _cut(weight.float(), rank)


def _cut(computed: torch.Tensor, rank: int) -> torch.Tensor:
    import torch

    u, s, vh = torch.linalg.svd(computed, full_matrices=False)
    cut: torch.Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return cut


def _error(reduced: torch.Tensor, weight: torch.Tensor, rank: int) -> float:
    exact = _cut(weight.double(), rank)
    return float((reduced.double() - exact).norm() / exact.norm())
