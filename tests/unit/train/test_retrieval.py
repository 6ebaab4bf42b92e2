"""The training of embedding models and rerankers in one process: what it writes, learns, and begins again with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers")

import numpy as np
import safetensors.torch
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aidocks.errors import CorruptCheckpoint, InvalidSpec
from aidocks.plan import UnitContext
from aidocks.retrieval.loading import load_cross_encoder, load_embedding_model
from aidocks.retrieval.verifying import PROBE_FILE, VerifyFiles, read_probe, write_probe
from aidocks.training.launch import read_outcome
from aidocks.training.retriever import Prompts
from tests.support.small_retriever_training import rankings, scored, small_training
from tests.support.small_training import curve, points
from tests.support.tiny_retrievers import make_decoder, make_embedder, make_encoder, make_reranker
from train.loop import run
from train.reporter import LocalReporter
from train.retrieval.rows import SHAPES

_PICKLES = {".bin", ".pt", ".pth", ".pkl"}
_PROMPTS = Prompts(query="what is the ", passage="by the ")
_SCORED = ("cosent", "angle", "cosine")
_DISTILLED = ("margin_mse", "distill_kl", "mse")


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "embedder": make_embedder(root / "embedder"),
        "encoder": make_encoder(root / "encoder"),
        "reranker": make_reranker(root / "reranker"),
        "decoder": make_decoder(root / "decoder"),
    }


def _train(training: Any) -> Any:
    run(training, LocalReporter(training))
    return training


def _verify(training: Any) -> float:
    """Return by how much the files differ from the model in memory."""
    whole = training.merge or training.adapter.kind == "full"
    place = {"model": training.output} if whole else {"adapter": training.output}
    unit = VerifyFiles(retriever=training.retriever.model_copy(update=place), probe=training.story.parent)
    return unit.run(UnitContext(workspace=training.output.parent)).error


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> dict[str, Any]:
    """A training of each kind; the reranker is made of a plain encoder, so its head is made of nothing."""
    root = tmp_path_factory.mktemp("undisturbed")
    given: dict[str, Any] = {"held_out": rankings(50)[40:], "save_total_limit": 3}
    return {
        "embedding": _train(small_training(root / "embedding", bases["embedder"], **given)),
        "reranker": _train(small_training(root / "reranker", bases["encoder"], "reranker", **given)),
    }


def test_an_embedding_model_is_whole_and_loads_anywhere(undisturbed: dict[str, Any]) -> None:
    training = undisturbed["embedding"]
    trained = read_outcome(training.story.parent)
    names = {str(path.relative_to(training.output)) for path in trained.files}
    assert {"modules.json", "1_Pooling/config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names
    assert not {path.suffix for path in trained.files} & _PICKLES
    assert not [name for name in names if name.endswith("README.md")]
    adapter = json.loads((training.output / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "some/small-model"
    assert 0 < trained.trainable < trained.parameters
    assert (trained.backend, trained.steps) == ("sentence-transformers", 6)
    assert _verify(training) < 1e-6
    before, after = (
        SentenceTransformer(str(each), device="cpu", local_files_only=True).encode(["the city of the king"])
        for each in (training.base, training.output)
    )
    assert np.abs(after - before).max() > 1e-3
    assert np.linalg.norm(after) == pytest.approx(1)


def test_a_reranker_of_a_plain_encoder_keeps_its_head_everywhere(undisturbed: dict[str, Any]) -> None:
    training = undisturbed["reranker"]
    assert _verify(training) < 1e-6
    probe, values = read_probe(training.story.parent)
    tokenizer = AutoTokenizer.from_pretrained(training.output)
    plain = AutoModelForSequenceClassification.from_pretrained(training.output).eval()
    inputs = tokenizer(list(probe.queries), list(probe.passages), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = plain(**inputs).logits[:, 0].numpy()
    assert logits == pytest.approx(values, abs=1e-5)


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
    """From the middle of an epoch, of five steps, into the next one."""
    first = undisturbed[kind]
    training = small_training(tmp_path / "again", first.base, kind, held_out=rankings(50)[40:])
    shutil.copytree(first.checkpoints / "checkpoint-00000004", training.checkpoints / "checkpoint-00000004")
    _train(training)
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


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_an_adapter_alone_gives_the_same_model_on_its_base(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["embedder" if kind == "embedding" else "encoder"]
    training = _train(small_training(tmp_path / kind, base, kind, merge=False, prompts=_PROMPTS))
    assert _verify(training) < 1e-6
    assert not (training.output / "model.safetensors").exists()
    config = json.loads((training.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/small-model"
    retriever = training.retriever.model_copy(update={"adapter": training.output})
    load = load_embedding_model if kind == "embedding" else load_cross_encoder
    assert load(retriever, "cpu", torch.float32)


def test_prompts_are_trained_with_and_saved(bases: dict[str, Path], tmp_path: Path) -> None:
    training = _train(small_training(tmp_path / "prompts", bases["encoder"], pooling="cls", prompts=_PROMPTS))
    model = SentenceTransformer(str(training.output), device="cpu", local_files_only=True)
    assert model.prompts["query"] == _PROMPTS.query
    assert model.prompts["document"] == _PROMPTS.passage
    assert model[1].pooling_mode == "cls"
    assert _verify(training) < 1e-6
    plain = small_training(tmp_path / "plain", bases["encoder"], pooling="cls")
    assert curve(_train(plain))[0] != curve(training)[0]


def test_a_reranker_of_another_s_prompts_needs_nobody_to_name_them(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    training = small_training(
        tmp_path / "prompts", bases["reranker"], "reranker", prompts=_PROMPTS, max_steps=2
    )
    _train(training)
    assert _verify(training) < 1e-6
    model = CrossEncoder(str(training.output), device="cpu", local_files_only=True)
    probe, values = read_probe(training.story.parent)
    assert all(text.startswith(_PROMPTS.passage) for text in probe.passages)
    pairs = list(zip(probe.queries, probe.passages, strict=True))
    scores = model.predict(pairs, activation_fn=torch.nn.Identity())
    assert scores == pytest.approx(values, abs=1e-5)
    loaded = load_cross_encoder(training.retriever, "cpu", torch.float32)
    assert loaded.default_prompt_name is None


@pytest.mark.parametrize("adapter", ["dora", "full"])
@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_decoders_and_other_adapters_are_trained(
    kind: str, adapter: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    pooling = "lasttoken" if kind == "embedding" else None
    training = _train(
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
    assert _verify(training) < 1e-4


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
        max_steps=3,
        chunk=4,
        save_steps=3,
    )
    _train(training)
    assert all(np.isfinite(curve(training)))
    assert max(point.grad_norm or 0 for point in points(training)) > 0


@pytest.mark.parametrize("loss", ["mnrl", "cached_mnrl"])
def test_leading_parts_of_vectors_are_trained_too(loss: str, bases: dict[str, Path], tmp_path: Path) -> None:
    plain, nested = (
        _train(
            small_training(
                tmp_path / str(len(parts)), bases["embedder"], loss=loss, matryoshka=parts, max_steps=2
            )
        )
        for parts in ((), (8, 16))
    )
    # The sum of three losses, of which one is the plain one.
    assert curve(nested)[0] > 2 * curve(plain)[0]
    assert read_outcome(nested.story.parent).tokens == read_outcome(plain.story.parent).tokens


def test_the_cached_loss_is_the_plain_one_in_parts(bases: dict[str, Path], tmp_path: Path) -> None:
    plain, cached = (
        _train(small_training(tmp_path / loss, bases["embedder"], loss=loss, chunk=3))
        for loss in ("mnrl", "cached_mnrl")
    )
    assert curve(cached) == pytest.approx(curve(plain), rel=1e-4)
    # It reads every text twice, but learns from it once.
    assert read_outcome(cached.story.parent).tokens == read_outcome(plain.story.parent).tokens


def test_scored_pairs_train_a_reranker(bases: dict[str, Path], tmp_path: Path) -> None:
    training = small_training(tmp_path / "bce", bases["reranker"], "reranker", loss="bce", rows=scored())
    assert len(curve(_train(training))) == 6


def test_a_large_model_is_written_in_shards(bases: dict[str, Path], tmp_path: Path) -> None:
    training = _train(
        small_training(tmp_path / "shards", bases["embedder"], max_steps=1, max_shard_bytes=60_000)
    )
    assert len(list(training.output.glob("model-*.safetensors"))) > 1
    assert _verify(training) < 1e-6


def test_a_base_in_16_bits_stays_in_16_bits(bases: dict[str, Path], tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import BertModel

    base = tmp_path / "half"
    shutil.copytree(bases["embedder"], base)
    BertModel.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    training = _train(small_training(tmp_path / "training", base, max_steps=2))
    with safe_open(training.output / "model.safetensors", "pt") as found:
        assert {found.get_tensor(name).dtype for name in found.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert 0 < _verify(training) < 0.05


def test_an_adapter_of_another_training_is_gone_on_from(bases: dict[str, Path], tmp_path: Path) -> None:
    first = _train(small_training(tmp_path / "first", bases["embedder"], merge=False))
    second = small_training(tmp_path / "second", bases["embedder"])
    retriever = second.retriever.model_copy(update={"adapter": first.output})
    second = _train(second.model_copy(update={"retriever": retriever}))
    assert curve(second)[0] < curve(first)[0]
    whole = second.model_copy(update={"retriever": retriever.model_copy(update={"adapter": None})})
    assert _verify(whole) < 1e-6
    alone = small_training(tmp_path / "alone", bases["embedder"], merge=False)
    with pytest.raises(InvalidSpec, match="adapter already"):
        _train(alone.model_copy(update={"retriever": retriever}))


def test_files_that_are_another_model_are_found_out(
    undisturbed: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    """As after a head that was made anew on loading, which transformers does in silence."""
    training = undisturbed["reranker"]
    shutil.copytree(training.output, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["classifier.weight"] = -tensors["classifier.weight"]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    unit = VerifyFiles(
        retriever=training.retriever.model_copy(update={"model": tmp_path / "model"}),
        probe=training.story.parent,
    )
    with pytest.raises(CorruptCheckpoint, match="not the model that was trained"):
        unit.run(UnitContext(workspace=tmp_path))


def test_losses_that_need_scores_say_so(bases: dict[str, Path], tmp_path: Path) -> None:
    training = small_training(tmp_path / "none", bases["embedder"], loss="margin_mse")
    with pytest.raises(InvalidSpec, match="scores of a better model") as caught:
        _train(training)
    assert caught.value.field == "loss"


def test_rows_without_scores_are_counted(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = rankings(20, scores=True) + rankings(24)[20:]
    training = small_training(tmp_path / "some", bases["embedder"], loss="distill_kl", rows=rows, max_steps=1)
    _train(training)
    notes = read_outcome(training.story.parent).notes
    assert notes == ("4 of 24 rows are not trained on: they have nothing that this loss learns from.",)


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
        _train(training.model_copy(update={"adapter": adapter}))
    assert caught.value.field == "target_modules"
    assert "query" in (caught.value.hint or "")


def test_the_probe_reads_what_it_wrote(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    probe, values = read_probe(undisturbed["embedding"].story.parent)
    write_probe((probe, values), tmp_path)
    again, same = read_probe(tmp_path)
    assert again == probe
    assert (same == values).all()
    assert (tmp_path / PROBE_FILE).exists()
    assert values.shape == (16, 32)
    assert values.dtype == np.float32
