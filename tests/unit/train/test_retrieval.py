"""The training of embedding models and rerankers in one process: what it learns, and begins again with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers")

import numpy as np

from aidocks.errors import InvalidSpec
from aidocks.retrieval.architecture import architecture_of
from aidocks.retrieval.estimate import head_of, shape_in_training
from aidocks.training.launch import read_outcome
from tests.support.small_retriever_training import difference, rankings, scored, small_training, train_here
from tests.support.small_training import curve, points
from tests.support.tiny_retrievers import (
    write_tokenizer,
)
from train.retrieval.rows import SHAPES

pytestmark = pytest.mark.usefixtures("own_environment", "quick_collection")

_SCORED = ("cosent", "angle", "cosine")
_DISTILLED = ("margin_mse", "distill_kl", "mse")


def test_what_was_measured_is_told(undisturbed: dict[str, Any]) -> None:
    for training in undisturbed.values():
        found = points(training)
        assert [point.step for point in found if point.loss is not None] == [1, 2, 3, 4, 5, 6]
        assert [point.step for point in found if point.eval_loss is not None] == [3, 6]
        assert all(point.tokens_per_s for point in found if point.loss is not None)
        tokens = [point.tokens or 0 for point in found if point.loss is not None]
        assert tokens == sorted(tokens)
        assert read_outcome(training.story.parent).tokens == tokens[-1]


def test_an_embedding_model_learns(undisturbed: dict[str, Any]) -> None:
    held_out = [point.eval_loss for point in points(undisturbed["embedding"]) if point.eval_loss is not None]
    assert held_out[-1] < held_out[0]


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_a_training_that_died_goes_on_as_if_it_had_not(
    kind: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """In the middle of an epoch, and beyond its end: it has five steps."""
    first = undisturbed[kind]
    training = small_training(tmp_path / "again", first.base, kind, held_out=rankings(50)[40:])
    shutil.copytree(first.checkpoints / "checkpoint-00000004", training.checkpoints / "checkpoint-00000004")
    train_here(training)
    assert curve(training) == curve(first)
    assert [point.tokens for point in points(training)] == [point.tokens for point in points(first)]
    assert read_outcome(training.story.parent).resumed_from == 4
    names = ("adapter/adapter_model.safetensors", "model.safetensors")
    for one, other in (((each.output / name).read_bytes() for each in (training, first)) for name in names):
        assert one == other


def test_a_checkpoint_holds_what_is_trained_and_no_pickled_weights(undisturbed: dict[str, Any]) -> None:
    checkpoint = undisturbed["reranker"].checkpoints / "checkpoint-00000006"
    names = {path.name for path in checkpoint.iterdir()}
    assert names <= {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "points.json",
    }
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as found:
        held = set(found.keys())
    assert any("classifier" in name for name in held)
    assert all("lora_" in name or "classifier" in name or "pooler" in name for name in held)


@pytest.mark.parametrize("adapter", ["dora", "full"])
@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_decoders_and_other_adapters_are_trained(
    kind: str, adapter: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    pooling = "lasttoken" if kind == "embedding" else None
    training = train_here(
        small_training(
            tmp_path / "decoder",
            bases["decoder"],
            kind,
            adapter=adapter,
            pooling=pooling,
            max_steps=2,
            gradient_checkpointing=adapter == "full",
        )
    )
    assert difference(training) < 1e-4


@pytest.mark.parametrize(("kind", "loss"), sorted(SHAPES))
def test_every_loss_trains(kind: str, loss: str, bases: dict[str, Path], tmp_path: Path) -> None:
    rows = scored() if loss in _SCORED else rankings(scores=loss in _DISTILLED)
    training = small_training(
        tmp_path / loss,
        bases["embedder" if kind == "embedding" else "reranker"],
        kind,
        loss=loss,
        rows=rows,
        negatives=2,
        max_steps=2,
        chunk=4,
    )
    train_here(training)
    assert all(np.isfinite(curve(training)))
    assert max(point.grad_norm or 0 for point in points(training)) > 0


def test_the_cached_loss_is_the_plain_one_in_parts_also_of_leading_parts_of_vectors(
    undisturbed: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    plain = undisturbed["embedding"]
    cached = train_here(small_training(tmp_path / "cached", bases["embedder"], loss="cached_mnrl", chunk=3))
    assert curve(cached) == pytest.approx(curve(plain), rel=1e-4)
    # It reads every text twice, but learns from it once.
    assert read_outcome(cached.story.parent).tokens == read_outcome(plain.story.parent).tokens

    given = {"matryoshka": (8, 16), "max_steps": 2}
    nested, both = (
        train_here(small_training(tmp_path / f"nested-{loss}", bases["embedder"], loss=loss, **given))
        for loss in ("mnrl", "cached_mnrl")
    )
    # The sum of three losses, of which one is the plain one.
    assert curve(nested)[0] > 2 * curve(plain)[0]
    assert curve(both) == pytest.approx(curve(nested), rel=1e-4)
    tokens = [[point.tokens for point in points(each)][:2] for each in (plain, nested, both)]
    assert tokens[0] == tokens[1] == tokens[2]


def test_scored_pairs_train_a_reranker(bases: dict[str, Path], tmp_path: Path) -> None:
    given = {"loss": "bce", "rows": scored(), "max_steps": 2}
    assert (
        len(curve(train_here(small_training(tmp_path / "bce", bases["reranker"], "reranker", **given)))) == 2
    )


def test_losses_that_need_scores_say_so(bases: dict[str, Path], tmp_path: Path) -> None:
    training = small_training(tmp_path / "none", bases["embedder"], loss="margin_mse")
    with pytest.raises(InvalidSpec, match="scores of a better model") as caught:
        train_here(training)
    assert caught.value.field == "loss"


def test_rows_without_scores_are_counted_and_held_out_ones_may_have_none(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Held-out rows have no wrong passages where those are looked for: these are found for what is trained on."""
    rows = rankings(20, scores=True) + rankings(24)[20:]
    held_out = [row | {"negatives": [], "scores": [5.0]} for row in rankings(30)[24:]]
    given = {"loss": "distill_kl", "rows": rows, "held_out": held_out, "max_steps": 1}
    training = train_here(small_training(tmp_path / "some", bases["embedder"], **given))
    assert read_outcome(training.story.parent).notes == (
        "4 of 24 rows are not trained on: they have nothing that this loss learns from.",
        "The held-out loss is not measured: no held-out row has what this loss learns from.",
    )


@pytest.mark.parametrize(("kind", "base"), [("embedding", "embedder"), ("reranker", "encoder")])
def test_what_is_trained_is_what_was_estimated(
    kind: Any, base: str, undisturbed: dict[str, Any], bases: dict[str, Path]
) -> None:
    training, found = undisturbed[kind], architecture_of(bases[base])
    factors = shape_in_training(found).trained(training.adapter)
    assert factors + head_of(found, kind)[0] == read_outcome(training.story.parent).trainable


def test_a_head_that_is_stored_or_of_another_architecture_is_estimated_too(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    other = tmp_path / "distilbert"
    tokenizer = write_tokenizer(other)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 128}
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(other)
    assert architecture_of(other).dimensions == 32
    for base in (bases["reranker"], bases["decoder"], other):
        training = train_here(small_training(tmp_path / f"of-{base.name}", base, "reranker", max_steps=1))
        found = architecture_of(base)
        factors = shape_in_training(found).trained(training.adapter)
        assert factors + head_of(found, "reranker")[0] == read_outcome(training.story.parent).trainable


@pytest.mark.parametrize(("stage", "loss"), [(3, "mnrl"), (2, "cached_mnrl")])
def test_what_deepspeed_cannot_do_is_refused(
    stage: int, loss: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    from train.distributed import Place
    from train.retrieval import build_trainer

    training = small_training(
        tmp_path / "stage",
        bases["embedder"],
        loss=loss,
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    place = Place(rank=0, world_size=1, local_rank=0, device="cpu", gpu=False)
    with pytest.raises(InvalidSpec) as caught:
        build_trainer(training, place, "sentence-transformers", {}, [])
    assert caught.value.field == "deepspeed"


def test_modules_that_the_model_does_not_have_are_named(bases: dict[str, Path], tmp_path: Path) -> None:
    training = small_training(tmp_path / "targets", bases["embedder"])
    adapter = training.adapter.model_copy(update={"target_modules": ("q_proj",)})
    with pytest.raises(InvalidSpec, match="q_proj") as caught:
        train_here(training.model_copy(update={"adapter": adapter}))
    assert caught.value.field == "target_modules"
    assert "query" in (caught.value.hint or "")
