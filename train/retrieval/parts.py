"""What the trainers of both kinds of model are made of: examples, and the base."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from aidocks.errors import InvalidSpec
from aidocks.retrieval.loading import load_cross_encoder, load_embedding_model
from aidocks.training.retriever import EmbeddingTraining, RerankerTraining
from train.distributed import Place
from train.retrieval.adapters import prepare
from train.retrieval.rows import SHAPES, Examples, load_examples


def examples_of(training: EmbeddingTraining | RerankerTraining) -> tuple[Examples, Examples | None]:
    """Return what is trained on, and what the held-out loss is measured on or None.

    Raises:
        InvalidSpec: No row has what the loss learns from. (Held-out ones need not: nothing is looked for, for them.)
    """
    hyper, kind = training.hyper, training.retriever.kind
    # A reranker reads both texts as one, of which collators know no second prompt.
    before = training.retriever.prompts.passage if kind == "reranker" else ""
    settings = (kind, training.loss, hyper.negatives, hyper.seed, before)
    train = load_examples(training.train, *settings)
    if train is None:
        raise _nothing_to_learn(training)
    return train, load_examples(training.held_out, *settings) if training.held_out is not None else None


def _nothing_to_learn(training: EmbeddingTraining | RerankerTraining) -> InvalidSpec:
    learns_scores = SHAPES[training.retriever.kind, training.loss].values == "scores"
    what, hint = "passages that answer a query or do not", "Give rows with passages."
    if learns_scores:
        what = "scores of a better model, of right passages and wrong ones"
        hint = (
            "Name the better model (`distill_from`), and have wrong passages looked for (`mine_negatives`)."
        )
    return InvalidSpec(
        f"No row of the data has what the loss {training.loss!r} learns from: {what}.",
        field="loss",
        value=training.loss,
        hint=hint,
    )


def without_measuring(arguments: dict[str, Any], held_out: Examples | None) -> dict[str, Any]:
    """Return arguments that ask for no held-out loss where there is nothing to measure."""
    return arguments if held_out is not None else arguments | {"eval_strategy": "no"}


def load_prepared(training: EmbeddingTraining | RerankerTraining, place: Place) -> Any:
    """Return the base on a device, with what is trained added: the same in every process.

    Weights that are all trained are float32; frozen ones are as the training's precision says.

    Raises:
        InvalidSpec: As :func:`train.retrieval.adapters.prepare`.
        AIDocksError: As `aidocks.retrieval.loading`.
    """
    exact = training.adapter.kind == "full" or training.precision != "bfloat16"
    model = load(training, place.device, torch.float32 if exact else torch.bfloat16)
    prepare(model, training)
    return model


def load(training: EmbeddingTraining | RerankerTraining, device: str, dtype: torch.dtype) -> Any:
    """Return the base, the same in every process: also a head that is made of nothing, and factors added later."""
    transformers.set_seed(training.hyper.seed)
    if isinstance(training, EmbeddingTraining):
        return load_embedding_model(training.retriever, device, dtype)
    return load_cross_encoder(training.retriever, device, dtype)
