"""Builds the trainer of an embedding model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from sentence_transformers import SentenceTransformerTrainingArguments

from aidocks.training.retriever import IN_BATCH_LOSSES, EmbeddingTraining
from train.distributed import Place
from train.retrieval.losses import embedding_loss
from train.retrieval.parts import examples_of, load_prepared, without_measuring
from train.retrieval.rows import LABEL, QUERY_COLUMNS, Examples
from train.retrieval.trainers import EmbeddingTrainer


def build(
    training: EmbeddingTraining,
    place: Place,
    arguments: dict[str, Any],
    callbacks: Sequence[transformers.TrainerCallback],
) -> EmbeddingTrainer:
    """See :func:`train.retrieval.build_trainer`."""
    train, held_out = examples_of(training)
    # Made before the model, as DeepSpeed wants it.
    configured = SentenceTransformerTrainingArguments(
        **without_measuring(arguments, held_out), prompts=prompts_of(training, train)
    )
    model = load_prepared(training, place)
    trainer = EmbeddingTrainer(
        model=model,
        args=configured,
        train_dataset=train,
        eval_dataset=held_out,
        loss=embedding_loss(training, model, place.world_size),
        callbacks=list(callbacks),
    )
    trainer.settle(in_batch=training.loss in IN_BATCH_LOSSES)
    return trainer


def prompts_of(training: EmbeddingTraining, examples: Examples) -> dict[str, str] | None:
    """Return what is put before the texts of each column; of two texts that are alike both are looked for."""
    prompts = training.retriever.prompts
    both = training.rows == "scored"
    found = {
        name: prompts.query if both or name in QUERY_COLUMNS else prompts.passage
        for name in examples.column_names
        if name != LABEL
    }
    return {name: prompt for name, prompt in found.items() if prompt} or None
