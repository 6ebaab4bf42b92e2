"""A training that takes a second: a few rows of text, a very small model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from aidocks.training.run import AdapterSettings, History, LLMHyperparameters, LLMTraining, Point, Rows

_SENTENCE = "once there was a little cat who liked to play in the big green park with her friend"
_WORDS = _SENTENCE.split()


def write_rows(path: Path, count: int = 16) -> Rows:
    """Write texts of different lengths."""
    texts = [
        " ".join(_WORDS[(i + j * (i % 5 + 1)) % len(_WORDS)] for j in range(8 + i % 9)) for i in range(count)
    ]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(content)
    return Rows(path=path, sha256=hashlib.sha256(content).hexdigest(), count=count)


def small_training(
    directory: Path,
    model: Path,
    *,
    adapter: str = "lora",
    adapter_settings: AdapterSettings | None = None,
    **given: Any,
) -> LLMTraining:
    """Return a training below ``directory``; keywords of `LLMHyperparameters` and of `LLMTraining` change it."""
    workspace = directory / "training"
    workspace.mkdir(parents=True)
    names = LLMHyperparameters.model_fields.keys()
    hyper: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_length": 64,
        "save_steps": 2,
        "eval_steps": 3,
    }
    hyper |= {name: given.pop(name) for name in list(given) if name in names}
    settings: dict[str, Any] = {
        "job_id": directory.name,
        "method": "pretrain",
        "base": model,
        "base_name": "some/small-model",
        "tokenizer": model,
        "train": write_rows(directory / "rows.jsonl"),
        "adapter": adapter_settings or AdapterSettings(kind=adapter, rank=4, alpha=8),  # type: ignore[arg-type]
        "hyper": LLMHyperparameters(**hyper),
        "loss_on": "all",
        "precision": "float32",
        "checkpoints": directory / "checkpoints",
        "output": directory / "model",
        "tensorboard": workspace / "tensorboard",
        "story": workspace / "story.jsonl",
        "history": workspace / "history.json",
    }
    return LLMTraining(**(settings | given))


def curve(training: LLMTraining) -> list[float]:
    """Return the losses of all steps, in their order."""
    return [point.loss for point in points(training) if point.loss is not None]


def points(training: LLMTraining) -> tuple[Point, ...]:
    return History.model_validate_json(training.history.read_bytes()).points
