"""The training of embedding models and rerankers, by the trainers and losses of sentence-transformers.

See `train.loop.Family` for what the loop takes from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aidocks.retrieval.trainable import require_stage
from aidocks.training.retriever import EmbeddingTraining, RerankerTraining
from aidocks.training.run import Backend

if TYPE_CHECKING:
    from pathlib import Path

    import transformers

    from train.distributed import Place

RetrieverTraining = EmbeddingTraining | RerankerTraining


def choose_backend(training: RetrieverTraining, place: Place) -> tuple[Backend, str]:
    """Return what trains, and why in a sentence: there is but one."""
    return "sentence-transformers", "sentence-transformers trains."


def build_trainer(
    training: RetrieverTraining,
    place: Place,
    backend: Backend,
    arguments: dict[str, Any],
    callbacks: list[transformers.TrainerCallback],
) -> transformers.Trainer:
    """Load model and rows, apply the adapter, and return the trainer, ready to train.

    Args:
        training: What is trained.
        place: Which process this is, and its device.
        backend: What :func:`choose_backend` chose.
        arguments: Of TrainingArguments, those that belong to the place and the loop.
        callbacks: For the trainer.

    Raises:
        InvalidSpec: Model, rows, adapter and loss do not fit together; says what does not.
    """
    require_stage(training.zero_stage, training.loss, deepspeed=training.deepspeed is not None)
    if isinstance(training, EmbeddingTraining):
        from train.retrieval.embedding import build
    else:
        from train.retrieval.reranking import build
    return build(training, place, arguments, callbacks)


def rows_left_out(trainer: Any, training: RetrieverTraining) -> tuple[str, ...]:
    """Say how many rows the trainer has left out, and why."""
    notes = [trainer.train_dataset.left_out("are not trained on")]
    if trainer.eval_dataset is not None:
        notes.append(trainer.eval_dataset.left_out("are not measured during the training"))
    elif training.held_out is not None and training.held_out.count:
        notes.append("The held-out loss is not measured: no held-out row has what this loss learns from.")
    return tuple(note for note in notes if note)


def save_result(trainer: Any, training: RetrieverTraining) -> tuple[Path, ...]:
    """See :func:`train.retrieval.saving.save_result`."""
    from train.retrieval.saving import save_result

    return save_result(trainer, training)
