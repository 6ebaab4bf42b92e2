"""The hyper-parameters that a request of ``/train/emb`` or ``/train/rerank`` leaves open."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_hyper import GLOBAL_BATCH
from aidocks.specs.train_rerank import RerankerTrainSpec
from aidocks.specs.train_retrieval_result import RankingData
from aidocks.training.retriever import (
    IN_BATCH_LOSSES,
    EmbeddingLoss,
    RerankerLoss,
    RetrieverHyperparameters,
    RowKind,
)

RetrieverSpec = EmbeddingTrainSpec | RerankerTrainSpec
Loss = EmbeddingLoss | RerankerLoss

#: Losses of a reranker whose example is a query with all its passages; of the others it is one query and one passage.
LIST_LOSSES: tuple[Loss, ...] = ("ranknet", "lambda", "listnet", "listmle", "plistmle")
#: Losses of an embedding model whose example is a query, a right passage, and hard negatives.
CONTRASTING: tuple[Loss, ...] = ("mnrl", "cached_mnrl", "margin_mse", "distill_kl")

#: Examples of a forward pass of one worker, when the request does not say.
_BATCH, _CACHED_BATCH, _LISTS = 32, 256, 8
#: Below so many parameters a model is small, and learns at a higher rate.
_SMALL = 10_000_000
#: Highest learning rate of all weights, and of factors; of a small model.
_RATES, _SMALL_RATES = (2e-5, 2e-4), (3e-4, 1e-3)


def learning_rate(adapter: str, parameters: int) -> float:
    """Return the highest learning rate of a training that names none.

    All weights: 2e-5, as in the examples of sentence-transformers for embedding models and cross-encoders alike.
    Low-rank factors want about ten times that, whatever the size of the model (Schulman et al., *LoRA Without Regret*,
    2025). Small models bear more: those of I. Turc et al. (arXiv 1908.08962) were fine-tuned at up to 3e-4, as their
    release notes say. Their factors get 1e-3: less than ten times that, for nobody has published more.

    Args:
        adapter: `lora`, `dora` or `full`.
        parameters: Of the model.
    """
    full, factors = _SMALL_RATES if parameters < _SMALL else _RATES
    return full if adapter == "full" else factors


def choose_loss(spec: RetrieverSpec, rows: RowKind) -> Loss:
    """Return the loss: that of the request, or the usual one of such rows."""
    if spec.loss != "auto":
        return spec.loss
    if isinstance(spec, EmbeddingTrainSpec):
        if spec.distill_from is not None:
            return "distill_kl"
        return "cosent" if rows == "scored" else "mnrl"
    if spec.distill_from is not None:
        return "mse"
    return "bce" if rows == "scored" else "lambda"


def batches(spec: RetrieverSpec, loss: Loss) -> tuple[int, int]:
    """Return examples of a forward pass of one worker, and forward passes of a step."""
    per_device = spec.per_device_train_batch_size or default_batch(loss)
    return per_device, passes(spec, loss, per_device)


def passes(spec: RetrieverSpec, loss: Loss, per_device: int) -> int:
    """Return the forward passes of a step, each of so many examples of every worker."""
    if spec.gradient_accumulation_steps is not None:
        return spec.gradient_accumulation_steps
    if loss in IN_BATCH_LOSSES:  # passages of another pass are no negatives
        return 1
    return max(1, math.ceil(GLOBAL_BATCH / (per_device * spec.workers)))


def default_batch(loss: Loss) -> int:
    """Return the examples of a forward pass of one worker, where the request does not say and memory is no matter.

    In-batch negatives get better with their number (L. Gao et al., arXiv 2101.06983, section 5), which is what
    `cached_mnrl` is for.
    """
    if loss in LIST_LOSSES:
        return _LISTS
    return _CACHED_BATCH if loss == "cached_mnrl" else _BATCH


def passages_of(loss: Loss, negatives: int) -> int:
    """Return the passages of one example, its negatives included; of scored pairs, the second text."""
    if loss == "triplet":
        return 2
    if loss in LIST_LOSSES:
        return 1 + max(1, negatives)
    return 1 + negatives if loss in CONTRASTING else 1


def examples(loss: Loss, data: Sequence[RankingData], negatives: int) -> int:
    """Return how many examples an epoch has, about: as `train.retrieval.rows` makes them of the rows.

    Args:
        loss: The loss.
        data: What is in each data set that is trained on.
        negatives: Wrong passages of a query that a step takes, at most.
    """
    queries, positives = sum(one.train for one in data), sum(one.positives for one in data)
    if all(one.rows == "scored" for one in data) or loss in LIST_LOSSES:
        return queries
    if loss not in ("bce", "mse", "triplet"):
        return positives
    wrong = min(sum(one.negatives for one in data) or queries, max(1, negatives) * queries)
    # A triplet has one of them each, a pair one passage, right or wrong.
    return max(positives, wrong) if loss == "triplet" else positives + wrong


def steps(spec: RetrieverSpec, hyper: RetrieverHyperparameters, count: int) -> int:
    """Return the optimiser steps of a training on so many examples."""
    if hyper.max_steps is not None:
        return hyper.max_steps
    return max(1, math.ceil(hyper.num_train_epochs * _an_epoch(spec, hyper, count)))


def epochs(spec: RetrieverSpec, hyper: RetrieverHyperparameters, count: int) -> float:
    """Return how often each example is seen."""
    if hyper.max_steps is None:
        return hyper.num_train_epochs
    return hyper.max_steps / _an_epoch(spec, hyper, count)


def _an_epoch(spec: RetrieverSpec, hyper: RetrieverHyperparameters, count: int) -> int:
    a_step = hyper.per_device_train_batch_size * hyper.gradient_accumulation_steps * spec.workers
    return max(1, count // a_step)  # what does not fill a step waits for another epoch


def hyperparameters(
    spec: RetrieverSpec, loss: Loss, *, parameters: int, max_length: int, negatives: bool
) -> RetrieverHyperparameters:
    """Return all hyper-parameters, the open ones chosen; :func:`with_intervals` does so for those between steps.

    Args:
        spec: The request.
        loss: As :func:`choose_loss` returns it.
        parameters: Of the model.
        max_length: Tokens of a text, as far as the model reads.
        negatives: Whether the rows have wrong passages.
    """
    per_device, accumulated = batches(spec, loss)
    chosen = RetrieverHyperparameters(
        max_steps=spec.max_steps,
        num_train_epochs=spec.num_train_epochs,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        gradient_accumulation_steps=accumulated,
        learning_rate=spec.learning_rate or learning_rate(spec.adapter, parameters),
        lr_scheduler_type=spec.lr_scheduler_type,
        warmup_ratio=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim=spec.optim,
        max_length=max_length,
        gradient_checkpointing=bool(spec.gradient_checkpointing),
        logging_steps=spec.logging_steps,
        save_total_limit=spec.save_total_limit,
        seed=spec.seed,
        negatives=spec.negatives if negatives else 0,
    )
    if isinstance(spec, EmbeddingTrainSpec):
        chosen = chosen.model_copy(
            update={
                "temperature": spec.temperature,
                "margin": spec.margin,
                "chunk": spec.chunk_size,
                "gather_negatives": spec.gather_negatives,
                "matryoshka": spec.matryoshka,
            }
        )
    return chosen


def with_intervals(
    spec: RetrieverSpec, hyper: RetrieverHyperparameters, count: int
) -> RetrieverHyperparameters:
    """Return hyper-parameters with the steps between checkpoints, and between held-out losses.

    Args:
        spec: The request.
        hyper: All others are settled, the batch too.
        count: Examples of an epoch.
    """
    saved = spec.save_steps or min(max(steps(spec, hyper, count) // 10, 20), 500)
    return hyper.model_copy(update={"save_steps": saved, "eval_steps": spec.eval_steps or saved})
