"""LoRA of all-MiniLM-L6-v2 by two workers of one core each, beside one worker of two: tokens a second, and the losses.

The same batch of all workers together, whose passages are all negatives for all. Needs ``AIDOCKS_BENCH_DATA``,
``AIDOCKS_BENCH_EMBEDDER`` and two cores that nobody else uses.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison, Facts, in_turns
from benchmarks.peers import NotAtHand, data_dir, embedding_model
from benchmarks.train_service import Course, service, train_there

RUNS = 3
STEPS = 8
CORES = 2
#: Examples of a step, of all workers together.
BATCH = 32
#: Tokens a second of two workers over those of one; times are compared, so the ratio is its reciprocal.
LEAST = 0.9
#: Relative difference of a loss.
MOST_DIFFERENCE = 1e-3


def run() -> list[Comparison]:
    if (os.cpu_count() or 1) < CORES:
        raise NotAtHand(f"this machine has fewer than {CORES} cores")
    request = _request()
    curves: dict[int, list[list[float]]] = {1: [], CORES: []}
    with service(workers=CORES) as settings:

        def seconds_per_token(workers: int) -> float:
            fields: dict[str, Any] = {
                "workers": workers,
                "resources": {"cpus": CORES / workers},
                "per_device_train_batch_size": BATCH // workers,
            }
            course = train_there(settings, {**request, **fields}, "train-emb")
            assert course.result.tokens_per_s is not None
            assert course.result.workers == workers
            curves[workers].append(_losses(course))
            return 1e3 / course.result.tokens_per_s

        two, one = in_turns(
            lambda: seconds_per_token(CORES), lambda: seconds_per_token(1), runs=RUNS, warm_up=0
        )
    facts: Facts = {"steps": STEPS, "examples a step": BATCH, "must reach": f"ratio {1 / LEAST:.3f}"}
    speed = Comparison("LoRA of MiniLM-L6, two workers of a core", two, one, "one of two", "ms/token", facts)
    return [speed, _compare(curves[CORES], curves[1])]


def _request() -> dict[str, Any]:
    return {
        "base_model": str(embedding_model()),
        "dataset": str(data_dir("rerank_squad.jsonl")),
        "eval_split": 0,
        "loss": "mnrl",
        "gather_negatives": True,
        "max_steps": STEPS,
        "max_length": 128,
        "gradient_accumulation_steps": 1,
        "save_steps": STEPS,
    }


def _losses(course: Course) -> list[float]:
    """Return the loss of every step, from the report that the result has beside its weights."""
    assert course.result.path is not None
    history = json.loads((Path(course.result.path) / "report" / "history.json").read_text(encoding="utf-8"))
    losses = [point["loss"] for point in history["points"] if "loss" in point]
    assert len(losses) == STEPS
    return losses


def _compare(two: list[list[float]], one: list[list[float]]) -> Comparison:
    pairs = [pair for a, b in zip(two, one, strict=True) for pair in zip(a, b, strict=True)]
    return Comparison(
        "LoRA of MiniLM-L6 by two workers and by one, largest relative difference of a loss",
        (max(abs(a - b) / abs(b) for a, b in pairs),),
        (MOST_DIFFERENCE,),
        "must reach",
        unit="",
        facts={"steps": STEPS, "runs": len(one), "first": one[0][0], "last": one[0][-1]},
    )
