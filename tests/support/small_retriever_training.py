"""A training of a very small model that finds texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aidocks.training.retriever import (
    EmbeddingTraining,
    Prompts,
    RerankerTraining,
    Retriever,
    RetrieverHyperparameters,
)
from aidocks.training.run import AdapterSettings, Rows
from tests.support.tiny_retrievers import questions


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Rows:
    """Write rows in the training's own format."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return Rows(path=path, sha256=hashlib.sha256(content).hexdigest(), count=len(rows))


def rankings(count: int = 40, *, scores: bool = False) -> list[dict[str, Any]]:
    """Return queries with a right passage and two wrong ones, maybe with the scores of a better model."""
    return [
        {"query": row["query"], "positives": row["pos"], "negatives": row["neg"]}
        | ({"scores": [5.0, -1.0 - number % 3, -4.0]} if scores else {})
        for number, row in enumerate(questions(count))
    ]


def scored(count: int = 40) -> list[dict[str, Any]]:
    """Return two texts each, and how alike they are."""
    rows = questions(count)
    return [
        {"first": row["query"], "second": (row["pos"] + row["neg"])[number % 3], "score": 1 - number % 3 / 2}
        for number, row in enumerate(rows)
    ]


def small_training(
    directory: Path,
    base: Path,
    kind: str = "embedding",
    *,
    adapter: str = "lora",
    rows: Sequence[dict[str, Any]] | None = None,
    held_out: Sequence[dict[str, Any]] | None = None,
    prompts: Prompts | None = None,
    pooling: str | None = None,
    **given: Any,
) -> Any:
    """Return a training below ``directory``; keywords of its hyper-parameters and of itself change it."""
    workspace = directory / "training"
    workspace.mkdir(parents=True)
    names = RetrieverHyperparameters.model_fields.keys()
    hyper: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "max_length": 64,
        "negatives": 1,
        "save_steps": 2,
        "eval_steps": 3,
    }
    hyper |= {name: given.pop(name) for name in list(given) if name in names}
    own = rankings() if rows is None else rows
    settings: dict[str, Any] = {
        "job_id": directory.name,
        "base": base,
        "base_name": "some/small-model",
        "retriever": Retriever(
            kind=kind,  # type: ignore[arg-type]
            name="some/small-model",
            model=base,
            prompts=prompts or Prompts(),
            pooling=pooling,  # type: ignore[arg-type]
            max_length=hyper["max_length"],
        ),
        "rows": "scored" if "first" in own[0] else "ranking",
        "train": write_rows(directory / "rows.jsonl", own),
        "held_out": write_rows(directory / "held_out.jsonl", held_out) if held_out else None,
        "adapter": AdapterSettings(kind=adapter, rank=4, alpha=8),  # type: ignore[arg-type]
        "hyper": RetrieverHyperparameters(**hyper),
        "loss": "mnrl" if kind == "embedding" else "lambda",
        "precision": "float32",
        "checkpoints": directory / "checkpoints",
        "output": directory / "model",
        "tensorboard": workspace / "tensorboard",
        "story": workspace / "story.jsonl",
        "history": workspace / "history.json",
    }
    made = EmbeddingTraining if kind == "embedding" else RerankerTraining
    return made(**(settings | given))


def train_here(training: Any) -> Any:
    """Run a training in this process; return it."""
    from train.loop import run
    from train.reporter import LocalReporter

    run(training, LocalReporter(training))
    return training


def difference(training: Any) -> float:
    """Return by how much the files of a training differ from the model in memory."""
    from aidocks.plan import UnitContext
    from aidocks.retrieval.verifying import VerifyFiles

    whole = training.merge or training.adapter.kind == "full"
    place = {"model": training.output} if whole else {"adapter": training.output}
    unit = VerifyFiles(retriever=training.retriever.model_copy(update=place), probe=training.story.parent)
    return unit.run(UnitContext(workspace=training.output.parent)).error
