"""Builds the trainer of a reranker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from sentence_transformers import CrossEncoderTrainingArguments

from aidocks.training.retriever import IN_BATCH_LOSSES, RerankerTraining
from train.distributed import Place
from train.retrieval.losses import reranker_loss
from train.retrieval.parts import examples_of, load_prepared, without_measuring
from train.retrieval.trainers import RerankerTrainer


def build(
    training: RerankerTraining,
    place: Place,
    arguments: dict[str, Any],
    callbacks: Sequence[transformers.TrainerCallback],
) -> RerankerTrainer:
    """See :func:`train.retrieval.build_trainer`."""
    train, held_out = examples_of(training)
    # Made before the model, as DeepSpeed wants it.
    configured = CrossEncoderTrainingArguments(
        **without_measuring(arguments, held_out), prompts=training.retriever.prompts.query or None
    )
    model = load_prepared(training, place)
    trainer = RerankerTrainer(
        model=model,
        args=configured,
        train_dataset=train,
        eval_dataset=held_out,
        loss=reranker_loss(training, model),
        callbacks=list(callbacks),
    )
    trainer.settle(in_batch=training.loss in IN_BATCH_LOSSES)
    return trainer
