"""The files of trained embedding models and rerankers: everybody loads them, and they are what was trained."""

from __future__ import annotations

import json
import shutil
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
from tests.support.small_retriever_training import difference, small_training, train_here
from tests.support.small_training import curve

pytestmark = pytest.mark.usefixtures("own_environment", "quick_collection")

_PICKLES = {".bin", ".pt", ".pth", ".pkl"}
_PROMPTS = Prompts(query="what is the ", passage="by the ")


def _in_a_folder(base: Path, copy: Path) -> Path:
    """Copy an embedding model, with its transformer in a folder of its own, as the first versions have it."""
    shutil.copytree(base, copy)
    inner = copy / "0_Transformer"
    inner.mkdir()
    for path in [path for path in copy.iterdir() if path.is_file()]:
        if path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(inner / path.name)
    modules = json.loads((copy / "modules.json").read_text())
    modules[0]["path"] = inner.name
    (copy / "modules.json").write_text(json.dumps(modules))
    return copy


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
    assert difference(training) < 1e-6
    before, after = (
        SentenceTransformer(str(each), device="cpu", local_files_only=True).encode(["the city of the king"])
        for each in (training.base, training.output)
    )
    assert np.abs(after - before).max() > 1e-3
    assert np.linalg.norm(after) == pytest.approx(1)


def test_a_reranker_of_a_plain_encoder_keeps_its_head_everywhere(undisturbed: dict[str, Any]) -> None:
    training = undisturbed["reranker"]
    assert difference(training) < 1e-6
    probe, values = read_probe(training.story.parent)
    tokenizer = AutoTokenizer.from_pretrained(training.output)
    plain = AutoModelForSequenceClassification.from_pretrained(training.output).eval()
    inputs = tokenizer(list(probe.queries), list(probe.passages), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = plain(**inputs).logits[:, 0].numpy()
    assert logits == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_an_adapter_alone_gives_the_same_model_on_its_base(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["encoder"] if kind == "reranker" else _in_a_folder(bases["embedder"], tmp_path / "base")
    training = small_training(tmp_path / kind, base, kind, merge=False, prompts=_PROMPTS, max_steps=2)
    train_here(training)
    assert difference(training) < 1e-6
    assert not (training.output / "model.safetensors").exists()
    config = json.loads((training.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/small-model"
    retriever = training.retriever.model_copy(update={"adapter": training.output})
    load = load_embedding_model if kind == "embedding" else load_cross_encoder
    assert load(retriever, "cpu", torch.float32)


def test_prompts_are_trained_with_and_saved(bases: dict[str, Path], tmp_path: Path) -> None:
    given = {"pooling": "cls", "max_steps": 2}
    training = train_here(small_training(tmp_path / "prompts", bases["encoder"], prompts=_PROMPTS, **given))
    model = SentenceTransformer(str(training.output), device="cpu", local_files_only=True)
    assert model.prompts["query"] == _PROMPTS.query
    assert model.prompts["document"] == _PROMPTS.passage
    assert model[1].pooling_mode == "cls"
    assert difference(training) < 1e-6
    plain = train_here(small_training(tmp_path / "plain", bases["encoder"], **given))
    assert curve(plain)[0] != curve(training)[0]


def test_a_reranker_of_another_s_prompts_needs_nobody_to_name_them(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    training = small_training(
        tmp_path / "prompts", bases["reranker"], "reranker", prompts=_PROMPTS, max_steps=2
    )
    train_here(training)
    assert difference(training) < 1e-6
    model = CrossEncoder(str(training.output), device="cpu", local_files_only=True)
    probe, values = read_probe(training.story.parent)
    assert all(text.startswith(_PROMPTS.passage) for text in probe.passages)
    pairs = list(zip(probe.queries, probe.passages, strict=True))
    scores = model.predict(pairs, activation_fn=torch.nn.Identity())
    assert scores == pytest.approx(values, abs=1e-5)
    loaded = load_cross_encoder(training.retriever, "cpu", torch.float32)
    assert loaded.default_prompt_name is None


def test_a_base_is_written_in_its_own_type_in_shards_and_for_everybody(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import BertModel

    base = _in_a_folder(bases["embedder"], tmp_path / "half")
    inner = base / "0_Transformer"
    BertModel.from_pretrained(inner).to(torch.bfloat16).save_pretrained(inner)
    training = train_here(small_training(tmp_path / "training", base, max_steps=2, max_shard_bytes=20_000))
    shards = list(training.output.glob("model-*.safetensors"))
    assert len(shards) > 1
    types = {tensor.dtype for path in shards for tensor in safetensors.torch.load_file(path).values()}
    assert types == {torch.bfloat16}
    assert 0 < difference(training) < 0.05


def test_an_adapter_of_another_training_is_gone_on_from(
    undisturbed: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    first = undisturbed["embedding"]
    second = small_training(tmp_path / "second", bases["embedder"], max_steps=2)
    retriever = second.retriever.model_copy(update={"adapter": first.output / "adapter"})
    second = train_here(second.model_copy(update={"retriever": retriever}))
    assert curve(second)[0] < curve(first)[0]
    assert not (second.output / "adapter").exists()
    whole = second.model_copy(update={"retriever": retriever.model_copy(update={"adapter": None})})
    assert difference(whole) < 1e-6
    alone = small_training(tmp_path / "alone", bases["embedder"], merge=False)
    with pytest.raises(InvalidSpec, match="an adapter already"):
        train_here(alone.model_copy(update={"retriever": retriever}))


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


def test_the_probe_reads_what_it_wrote(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    probe, values = read_probe(undisturbed["embedding"].story.parent)
    write_probe((probe, values), tmp_path)
    again, same = read_probe(tmp_path)
    assert again == probe
    assert (same == values).all()
    assert (tmp_path / PROBE_FILE).exists()
    assert values.shape == (16, 32)
    assert values.dtype == np.float32
