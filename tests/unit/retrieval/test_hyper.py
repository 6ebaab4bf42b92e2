"""The hyper-parameters that a request leaves open, and what a training is estimated to need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.errors import InvalidSpec
from aidocks.retrieval.estimate import RetrieverSetup, fitted, tokens_of
from aidocks.retrieval.hyper import (
    batches,
    choose_loss,
    epochs,
    examples,
    hyperparameters,
    learning_rate,
    passes,
    steps,
)
from aidocks.specs.read import build_spec
from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_rerank import RerankerTrainSpec
from aidocks.specs.train_retrieval_result import RankingData
from aidocks.specs.train_settings import DeepSpeed
from aidocks.training.estimate import flops_per_token, memory_of
from aidocks.training.fitting import choose
from aidocks.training.retriever import RetrieverHyperparameters
from aidocks.training.run import AdapterSettings
from aidocks.training.shapes import ModelShape

#: As all-MiniLM-L6-v2.
MINILM = ModelShape(
    entries={},
    parameters=22_713_216,
    embedding=11_720_448,
    linear=(),
    hidden=384,
    keys=384,
    heads=12,
    mlp=1536,
    layers=6,
    vocabulary=30_522,
    context=512,
)


def embedding(**given: Any) -> EmbeddingTrainSpec:
    return build_spec(EmbeddingTrainSpec, {"base_model": "base", "dataset": "rows", **given})


def reranker(**given: Any) -> RerankerTrainSpec:
    return build_spec(RerankerTrainSpec, {"base_model": "base", "dataset": "rows", **given})


def data(**given: Any) -> RankingData:
    fields = {
        "dataset": "rows",
        "format": "query_lists",
        "detected": True,
        "rows": "ranking",
        "lines": 120,
        "train": 100,
        "held_out": 20,
        "positives": 150,
        "negatives": 300,
    }
    return RankingData(**(fields | given))


def setup(**given: Any) -> RetrieverSetup:
    hyper = {"learning_rate": 1e-4, "per_device_train_batch_size": 32, "max_length": 512, "negatives": 1}
    hyper |= {name: given.pop(name) for name in list(given) if name in RetrieverHyperparameters.model_fields}
    own = {
        "kind": "embedding",
        "loss": "mnrl",
        "shape": MINILM,
        "adapter": AdapterSettings(kind="full"),
        "hyper": RetrieverHyperparameters(**hyper),
        "precision": "float32",
        "decoder": False,
        "negatives": None,
        "head": 0,
        "new_head": 0,
    }
    return RetrieverSetup(**(own | given))


@pytest.mark.parametrize(
    ("spec", "rows", "loss"),
    [
        (embedding(), "ranking", "mnrl"),
        (embedding(), "scored", "cosent"),
        (embedding(distill_from="teacher"), "ranking", "distill_kl"),
        (embedding(loss="triplet"), "ranking", "triplet"),
        (reranker(), "ranking", "lambda"),
        (reranker(), "scored", "bce"),
        (reranker(distill_from="teacher"), "ranking", "mse"),
    ],
)
def test_the_loss_is_that_of_the_rows(spec: Any, rows: Any, loss: str) -> None:
    assert choose_loss(spec, rows) == loss


def test_losses_within_a_batch_take_large_batches_and_one_pass() -> None:
    assert batches(embedding(), "mnrl") == (32, 1)
    assert batches(embedding(workers=4), "cached_mnrl") == (256, 1)
    assert batches(embedding(per_device_train_batch_size=4), "mnrl") == (4, 1)
    assert batches(embedding(per_device_train_batch_size=4), "triplet") == (4, 4)
    assert batches(reranker(), "lambda") == (8, 2)
    assert batches(reranker(workers=2), "lambda") == (8, 1)
    assert batches(reranker(gradient_accumulation_steps=3), "lambda") == (8, 3)
    # A batch that had to be made smaller is seen more often in a step, unless other passes are of no use to it.
    assert [passes(reranker(), "lambda", size) for size in (8, 2, 1)] == [2, 8, 16]
    assert passes(embedding(), "mnrl", 2) == 1


def test_small_models_learn_faster_and_factors_faster_than_weights() -> None:
    rates = [learning_rate(adapter, size) for adapter in ("full", "lora") for size in (22_000_000, 4_000_000)]
    assert rates == [2e-5, 3e-4, 2e-4, 1e-3]


@pytest.mark.parametrize(
    ("loss", "count"),
    [("mnrl", 150), ("distill_kl", 150), ("triplet", 200), ("lambda", 100), ("bce", 350), ("mse", 350)],
)
def test_an_epoch_has_the_examples_that_the_loss_makes_of_the_rows(loss: Any, count: int) -> None:
    assert examples(loss, [data()], negatives=2) == count


def test_scored_pairs_are_examples() -> None:
    assert examples("cosent", [data(rows="scored", positives=0, negatives=0)], negatives=1) == 100


@given(st.integers(1, 5000), st.integers(1, 64), st.floats(0.1, 5), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_steps_and_epochs_agree(count: int, batch: int, wanted: float, workers: int) -> None:
    spec = embedding(num_train_epochs=wanted, per_device_train_batch_size=batch, workers=workers)
    hyper = hyperparameters(spec, "mnrl", parameters=10**8, max_length=128, negatives=False)
    number = steps(spec, hyper, count)
    assert number >= 1
    assert epochs(spec, hyper, count) == pytest.approx(wanted)
    fixed = hyper.model_copy(update={"max_steps": number})
    assert steps(spec, fixed, count) == number
    assert epochs(spec, fixed, count) >= wanted - 1e-9


def test_what_a_request_says_is_what_is_trained_with() -> None:
    spec = embedding(
        temperature=0.02, matryoshka=[64, 128], negatives=4, chunk_size=8, gather_negatives=False
    )
    hyper = hyperparameters(spec, "mnrl", parameters=10**8, max_length=77, negatives=True)
    assert (hyper.temperature, hyper.matryoshka, hyper.negatives, hyper.chunk) == (0.02, (128, 64), 4, 8)
    assert (hyper.max_length, hyper.gather_negatives, hyper.gradient_checkpointing) == (77, False, False)
    without = hyperparameters(spec, "mnrl", parameters=10**8, max_length=77, negatives=False)
    assert without.negatives == 0


def test_memory_grows_with_passages_and_not_with_a_cached_batch() -> None:
    assert memory_of(setup(negatives=4)).activations > 1.5 * memory_of(setup(negatives=1)).activations
    small, large = (
        memory_of(setup(loss="cached_mnrl", per_device_train_batch_size=size)) for size in (64, 4096)
    )
    assert small.activations == large.activations < memory_of(setup()).activations
    # All vectors are computed once more, without gradients.
    assert flops_per_token(setup(loss="cached_mnrl")) > flops_per_token(setup())


def test_an_embedding_is_looked_up_and_not_multiplied_by() -> None:
    inner = MINILM.parameters - MINILM.embedding
    a_token = flops_per_token(setup(max_length=8))
    assert a_token == pytest.approx(6 * inner, rel=0.02)


def test_a_list_takes_the_passages_that_its_row_has() -> None:
    wide = setup(kind="reranker", loss="lambda", per_device_train_batch_size=8, negatives=7)
    assert wide.sequences == 64
    own = replace(wide, negatives=2)
    assert own.sequences == 24
    assert own.tokens == 24 * 512
    assert tokens_of(100, "reranker") > tokens_of(100, "embedding") > 100


def test_a_head_is_trained_whole_beside_factors() -> None:
    lora = {"kind": "reranker", "loss": "lambda", "adapter": AdapterSettings(), "head": 1000}
    assert setup(**lora).trained == 1000 + setup(**(lora | {"head": 0})).trained
    stored, new = setup(head=1000), setup(head=1000, new_head=1000)
    assert (stored.trained, new.trained) == (MINILM.parameters, MINILM.parameters + 1000)


def test_an_open_batch_becomes_what_fits_and_a_given_one_is_refused() -> None:
    wanted = setup(per_device_train_batch_size=512)
    available = memory_of(
        replace(wanted, hyper=wanted.hyper.model_copy(update={"per_device_train_batch_size": 9}))
    ).total
    smaller = fitted(wanted, available, batch=True, checkpointing=False)
    assert smaller.hyper.per_device_train_batch_size == 9
    assert choose(smaller, DeepSpeed(), available).fits
    twice = fitted(wanted, available, batch=True, checkpointing=True)
    assert twice.hyper.gradient_checkpointing
    assert twice.hyper.per_device_train_batch_size > 9
    with pytest.raises(InvalidSpec, match="needs") as refused:
        choose(fitted(wanted, available, batch=False, checkpointing=False), DeepSpeed(), available)
    assert refused.value.field == "per_device_train_batch_size"
    assert "cached_mnrl" in (refused.value.hint or "")


def test_gpus_divide_at_most_gradients() -> None:
    large = setup(cuda=True, members=4, shape=replace(MINILM, parameters=10**10))
    with pytest.raises(InvalidSpec):
        choose(large, DeepSpeed(), 30 * 10**9)
    fit = choose(replace(large, precision="bfloat16"), DeepSpeed(), 100 * 10**9)
    assert fit.setup.stage in (None, 1, 2)
