"""LoRA by TRL, by unsloth, and by a script as unsloth's makers write it: tokens a second, and peak memory.

The same rows in the same order, precision, batch and adapter; each in a process of its own, in turns; without Ray, so
it also runs where there is only a GPU. The model is SmolLM2-135M or, with ``AIDOCKS_BENCH_MODEL``, that directory.
Needs unsloth, which trains without a GPU from 2026.10.9 on (by stock transformers: then it shows only that both work).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aidocks.training.launch import read_outcome
from aidocks.training.run import AdapterSettings, History, LLMHyperparameters, LLMTraining, Rows
from benchmarks.comparison import Comparison, run_process
from benchmarks.peers import NotAtHand, scratch_dir
from benchmarks.small_model import smol_base
from benchmarks.train_plain import MODULES, Plain, run_plain

RUNS = 3
#: The first steps build kernels, and are not counted.
STEPS, UNCOUNTED = 12, 2
MOST_OF_THE_SCRIPT = 1 / 0.97
_LENGTH, _BATCH, _ACCUMULATED, _RATE, _SEED = 256, 4, 2, 1e-4, 0
_TEXT = "the price of three apples and four pears is seven coins so each of the children pays one coin and"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "UNSLOTH_DISABLE_STATISTICS": "1"}


@dataclass(frozen=True)
class Course:
    """What one training took after its first steps: seconds, the largest memory in MB, and the losses of all steps."""

    seconds: float
    peak_mb: float
    losses: tuple[float, ...]
    device: str


def run() -> list[Comparison]:
    if find_spec("unsloth") is None:
        raise NotAtHand("unsloth is not installed")
    base = Path(os.environ.get("AIDOCKS_BENCH_MODEL") or smol_base())
    place = Path(tempfile.mkdtemp(prefix="backends-", dir=scratch_dir()))
    rows = _write_rows(place / "rows.jsonl")
    courses: dict[str, list[Course]] = {"trl": [], "unsloth": [], "script": []}
    try:
        for number in range(RUNS + 1):  # after the first, all have their files in memory
            for name, found in courses.items():
                directory = place / f"{name}-{number}"
                course = (
                    _script(directory, base, rows) if name == "script" else _ours(directory, base, rows, name)
                )
                if number:
                    found.append(course)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    ours = courses["unsloth"]
    facts = {
        "device": ours[0].device,
        "precision": _precision(),
        "tokens a step": _BATCH * _ACCUMULATED * _LENGTH,
        "peak MB": round(max(course.peak_mb for course in ours)),
    }
    return [
        _beside(
            ours,
            courses["script"],
            "unsloth's own script",
            facts | {"must reach": f"{MOST_OF_THE_SCRIPT:.3f}"},
        ),
        _beside(ours, courses["trl"], "TRL", facts),
    ]


def _beside(ours: list[Course], others: list[Course], name: str, facts: dict[str, Any]) -> Comparison:
    tokens = _BATCH * _ACCUMULATED * _LENGTH * (STEPS - UNCOUNTED)
    differences = [
        abs(a - b) / abs(b)
        for one, other in zip(ours, others, strict=True)
        for a, b in zip(one.losses, other.losses, strict=True)
    ]
    return Comparison(
        f"LoRA by the backend unsloth, {STEPS - UNCOUNTED} steps",
        tuple(course.seconds for course in ours),
        tuple(course.seconds for course in others),
        name,
        facts=facts
        | {
            "tokens/s": round(max(tokens / course.seconds for course in ours)),
            f"tokens/s of {name}": round(max(tokens / course.seconds for course in others)),
            f"peak MB of {name}": round(max(course.peak_mb for course in others)),
            "losses differ by": f"{max(differences):.1e}",
        },
    )


def _write_rows(path: Path) -> Rows:
    """Write texts that all fill a row, so that none is padded and no order counts."""
    words = _TEXT.split()
    texts = [
        " ".join(words[(i * 7 + j * (i % 5 + 1)) % len(words)] for j in range(2 * _LENGTH)) for i in range(64)
    ]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(content)
    return Rows(path=path, sha256=hashlib.sha256(content).hexdigest(), count=len(texts))


def _ours(directory: Path, base: Path, rows: Rows, backend: str) -> Course:
    """Train as a process of the service does."""
    workspace = directory / "training"
    workspace.mkdir(parents=True)
    training = LLMTraining(
        job_id=directory.name,
        method="pretrain",
        base=base,
        base_name=base.name,
        tokenizer=base,
        train=rows,
        adapter=AdapterSettings(rank=16, alpha=32, target_modules=MODULES),
        hyper=LLMHyperparameters(
            max_steps=STEPS,
            save_steps=STEPS,
            per_device_train_batch_size=_BATCH,
            gradient_accumulation_steps=_ACCUMULATED,
            learning_rate=_RATE,
            max_length=_LENGTH,
            seed=_SEED,
        ),
        loss_on="all",
        backend=backend,  # type: ignore[arg-type]
        precision=_precision(),
        checkpoints=directory / "checkpoints",
        output=directory / "model",
        tensorboard=workspace / "tensorboard",
        story=workspace / "story.jsonl",
        history=workspace / "history.json",
    )
    file = workspace / "training.json"
    file.write_text(training.model_dump_json())
    run_process([sys.executable, "-m", "aidocks.training.process", file], workspace / "log.txt", _OFFLINE)
    outcome = read_outcome(workspace)
    assert outcome.backend == backend, outcome.backend_reason
    points = [
        p for p in History.model_validate_json(training.history.read_bytes()).points if p.loss is not None
    ]
    begun, ended = points[UNCOUNTED - 1].seconds, points[-1].seconds
    assert begun is not None
    assert ended is not None
    losses = tuple(point.loss or 0.0 for point in points)
    return Course(ended - begun, max(outcome.peak_bytes) / 1e6, losses, outcome.device)


def _script(directory: Path, base: Path, rows: Rows) -> Course:
    directory.mkdir()
    plain = Plain(
        base=str(base),
        rows=str(rows.path),
        precision=_precision(),
        steps=STEPS,
        batch=_BATCH,
        accumulated=_ACCUMULATED,
        learning_rate=_RATE,
        max_length=_LENGTH,
        seed=_SEED,
        unsloth=True,
    )
    said = run_plain(plain, directory, _OFFLINE)
    seconds = said["ended"][-1] - said["ended"][UNCOUNTED - 1]
    return Course(seconds, said["peak_bytes"] / 1e6, tuple(said["losses"]), said["device"])


def _precision() -> Any:
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"
