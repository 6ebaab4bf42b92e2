"""The trainers of all methods, those of TRL. What belongs to a method is here; the loop around it is ``train.loop``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aidocks.training.methods import require_adapter, require_loss
from aidocks.training.run import ONLINE_METHODS, Backend, LLMTraining, Method

if TYPE_CHECKING:
    from pathlib import Path

    import transformers

    from train.distributed import Place

#: Where the trainer of each method is built. Imported only when it is: TRL's modules take seconds.
_MODULES: dict[Method, str] = {
    "sft": "supervised",
    "pretrain": "supervised",
    "dpo": "preference",
    "orpo": "preference",
    "kto": "preference",
    "reward": "reward_model",
    "grpo": "online",
    "rloo": "online",
}


def choose_backend(training: LLMTraining, place: Place) -> tuple[Backend, str]:
    """See :func:`train.backend.choose`."""
    from train.backend import choose

    return choose(training, place)


def build_trainer(
    training: LLMTraining,
    place: Place,
    backend: Backend,
    arguments: dict[str, Any],
    callbacks: list[transformers.TrainerCallback],
) -> transformers.Trainer:
    """Load model, tokenizer and rows, apply the adapter, and return the trainer, ready to train.

    Args:
        training: What is trained.
        place: Which process this is, and its device.
        backend: What :func:`train.backend.choose` chose.
        arguments: Of TrainingArguments, those that belong to the place and the loop: directories, devices, batches,
            steps, learning rate, logging. The method adds its own.
        callbacks: For the trainer.

    Raises:
        InvalidSpec: Model, rows, adapter and method do not fit together; says what does not.
    """
    if backend == "unsloth":
        importlib.import_module("train.unsloth_backend")  # before trl, transformers and peft
    require_loss(training.method, training.hyper.loss_type, training.hyper.label_smoothing)
    require_adapter(training.method, training.adapter.kind)

    from train.methods.parts import Request

    if not place.gpu:
        from train import token_log_probs

        token_log_probs.install()
    module = importlib.import_module(f"train.methods.{_MODULES[training.method]}")
    trainer: transformers.Trainer = module.build(Request(training, place, backend, arguments, callbacks))
    return trainer


def rows_left_out(trainer: Any, training: LLMTraining) -> tuple[str, ...]:
    """Say how many rows the trainer has left out because nothing of them could be learned.

    The data were looked through before, but of large ones only a part is counted in tokens.
    """
    notes = []
    # Of packed rows the trainer knows no number.
    if not training.hyper.packing:
        notes += _left_out(training.train.count, len(trainer.train_dataset), "rows are not trained on")
    if training.held_out is not None and training.method not in ONLINE_METHODS:
        measured = len(trainer.eval_dataset) if trainer.eval_dataset is not None else 0
        notes += _left_out(
            training.held_out.count, measured, "held-out rows are not measured during the training"
        )
    return tuple(notes)


def _left_out(given: int, left: int, what: str) -> list[str]:
    return [f"{given - left} of {given} {what}: they are too long."] if left < given else []


def save_result(trainer: Any, training: LLMTraining) -> tuple[Path, ...]:
    """See :func:`train.saving.save_result`."""
    from train.saving import save_result

    return save_result(trainer, training)
