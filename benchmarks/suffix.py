"""Measuring candidates from the layer that they change, with the outputs below kept, beside whole forwards of them.

Ten candidates spread evenly over the layers of SmolLM2-135M, of all kinds, on the same batch; processor seconds of one
thread. The losses of both are compared and must be identical. The base's own forward, which fills what is kept, is
left out: a search does it once for hundreds of candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.comparison import Comparison, in_turns
from benchmarks.small_model import smollm2

if TYPE_CHECKING:
    from aidocks.evaluate.objectives import ObjectiveSource
    from aidocks.laser.matrices import Reduction
    from aidocks.laser.workbench import Workbench

#: Evenly spread, so that their mean is the middle of the model.
LAYERS = range(1, 30, 3)
CHUNKS = 8
RUNS = 3

Losses = list[list[float]]


def run() -> list[Comparison]:
    import torch

    torch.set_num_threads(1)
    with smollm2() as (scratch, model):
        return [_compare(scratch, model)]


def _compare(scratch: Path, model: Path) -> Comparison:
    from aidocks.checkpoints.reader import Checkpoint
    from aidocks.evaluate.causal_lm import load
    from aidocks.evaluate.objectives import resolve_objective, size_objective
    from aidocks.laser.workbench import Workbench
    from aidocks.specs.objective import Objective

    loaded, checkpoint = load(model, None, "cpu"), Checkpoint(model)
    whole = Workbench(loaded, checkpoint)
    source = resolve_objective(Objective(metric="perplexity", data="prose"), ())
    source = size_objective(source, model, chunks=CHUNKS)
    candidates = _candidates(scratch, model)
    found: dict[str, Losses] = {}
    facts: dict[str, str | float | int] = {
        "candidates": len(candidates),
        "tokens": CHUNKS * source.seq_length,
        "type": str(loaded.dtype).removeprefix("torch."),
        "losses": "identical",
    }

    def take(name: str, measure: Callable[[], Losses]) -> float:
        begin = time.process_time()
        losses = measure()
        seconds = time.process_time() - begin
        if found.setdefault(name, losses) != losses:
            raise AssertionError(f"{name}: the same candidates gave other losses")
        return seconds

    def by_suffix() -> float:
        # A workbench measures nothing twice, so every turn has a fresh one, which knows the base alone.
        bench = Workbench(loaded, checkpoint)
        bench.measure(source, "search")
        seconds = take("suffix", lambda: _by_suffix(bench, source, candidates))
        bench.apply(())
        facts["MB kept"] = round(bench.suffix.kept_bytes / 1e6)
        return seconds

    def by_whole() -> float:
        seconds = take("whole", lambda: _by_whole(whole, source, candidates))
        whole.apply(())
        return seconds

    ours, other = in_turns(by_suffix, by_whole, runs=RUNS)
    if found["suffix"] != found["whole"]:
        raise AssertionError("the losses are not identical")
    return Comparison("candidates by suffix", ours, other, "whole forwards", "CPU s", facts=facts)


def _candidates(scratch: Path, model: Path) -> list[Reduction]:
    """Reduce one matrix of each layer to half its rank, kind after kind."""
    from aidocks.checkpoints.reader import Checkpoint
    from aidocks.laser.matrices import Reduction, find_matrices, stored_matrix
    from aidocks.laser.truncation import save_basis, weight_basis

    checkpoint = Checkpoint(model)
    matrices = find_matrices(checkpoint.entries)
    kinds = sorted({matrix.kind for matrix in matrices})
    made = []
    for number, layer in enumerate(LAYERS):
        kind = kinds[number % len(kinds)]
        matrix = next(m for m in matrices if (m.layer, m.kind) == (layer, kind))
        file = scratch / f"{matrix.address}.safetensors"
        written = save_basis(file, weight_basis(stored_matrix(checkpoint, matrix)))
        made.append(
            Reduction(address=matrix.address, rank=matrix.full_rank // 2, basis=file, sha256=written.sha256)
        )
    return made


def _by_suffix(bench: Workbench, source: ObjectiveSource, candidates: list[Reduction]) -> Losses:
    return [
        [loss for loss in bench.measure(source, "search", (candidate,)).after if loss is not None]
        for candidate in candidates
    ]


def _by_whole(bench: Workbench, source: ObjectiveSource, candidates: list[Reduction]) -> Losses:
    import torch

    from aidocks.evaluate.scoring import load_task, plain_forward

    task = load_task(source, "search", bench.model.tokenizer)
    forward = plain_forward(bench.model.network)
    found = []
    for candidate in candidates:
        bench.apply((candidate,))
        with torch.inference_mode():
            found.append([loss for batch in task.batches for loss in task.losses(batch, forward).tolist()])
    return found
