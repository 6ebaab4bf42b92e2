"""LoRA of SmolLM2-135M by one worker of Ray Train, beside a plain TRL script: the loop, and what comes before it.

The same steps on the same rows in the same order, in turns. Needs ``AIDOCKS_BENCH_DATA`` and cores that nobody else
uses. Ours has curves, checkpoints and TensorBoard, the script has nothing of the kind.
"""

from __future__ import annotations

import os
import time
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison
from benchmarks.peers import data_dir, scratch_dir
from benchmarks.small_model import smol_base
from benchmarks.train_plain import Plain, run_plain
from benchmarks.train_service import Course, service, train_there

RUNS = 3
STEPS = 6
MUST_REACH = 1.05
#: Seconds from the start of the unit to the loop, beyond what the script takes to come there.
MOST_START_S = 20.0
_LENGTH, _RATE, _BATCH, _ACCUMULATED, _SEED = 256, 1e-4, 4, 4, 0


def run() -> list[Comparison]:
    cores = os.cpu_count() or 1
    numbers = count()
    ours: list[Course] = []
    plain: list[dict[str, Any]] = []
    with service(workers=1) as settings:
        for number in range(RUNS + 1):  # after the first, both have their files in memory
            course = train_there(settings, _request(cores) | {"name": f"ray-{next(numbers)}"})
            script = _plain(course, cores)
            if number:
                ours.append(course)
                plain.append(script)
    differences = [
        abs(a - b) / abs(b)
        for course, script in zip(ours, plain, strict=True)
        for a, b in zip(course.losses, script["losses"], strict=True)
    ]
    facts = {
        "steps": STEPS,
        "tokens": ours[0].result.tokens or 0,
        "precision": str(ours[0].result.precision),
        "losses differ by": f"{max(differences):.1e}",
    }
    return [
        Comparison(
            "LoRA of SmolLM2, loop",
            tuple(course.loop_seconds for course in ours),
            tuple(script["loop"] for script in plain),
            "plain TRL",
            facts={**facts, "must reach": MUST_REACH},
        ),
        Comparison(
            "LoRA of SmolLM2, from the start of the unit to its loop, less the script's",
            tuple(course.start_seconds - script["start"] for course, script in zip(ours, plain, strict=True)),
            facts={
                "ours s": round(min(course.start_seconds for course in ours), 1),
                "plain TRL s": round(min(script["start"] for script in plain), 1),
                "target s": MOST_START_S,
            },
        ),
    ]


def _rows() -> Path:
    """Return the rows that both train on: a training without measuring keeps none of them back, nor their order."""
    target = scratch_dir() / "train-ray.jsonl"
    lines = data_dir("domain_math.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[:400]), encoding="utf-8")
    return target


def _request(cores: int) -> dict[str, Any]:
    return {
        "base_model": str(smol_base()),
        "dataset": str(_rows()),
        "eval_split": 0,
        "method": "pretrain",
        "workers": 1,
        "resources": {"cpus": cores},
        "max_steps": STEPS,
        "save_steps": STEPS,
        "max_length": _LENGTH,
        "learning_rate": _RATE,
        "per_device_train_batch_size": _BATCH,
        "gradient_accumulation_steps": _ACCUMULATED,
        "seed": _SEED,
    }


def _plain(course: Course, cores: int) -> dict[str, Any]:
    """Run the script; returns its loop's seconds and losses, and the seconds that it took to come there."""
    plain = Plain(
        base=str(smol_base()),
        rows=str(_rows()),
        precision=str(course.result.precision),
        steps=STEPS,
        batch=_BATCH,
        accumulated=_ACCUMULATED,
        learning_rate=_RATE,
        max_length=_LENGTH,
        seed=_SEED,
    )
    environment = {"OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    begin = time.time()
    said = run_plain(plain, scratch_dir(), environment)
    return said | {"start": said["begun"] - begin}
