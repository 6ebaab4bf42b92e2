"""What is known of a model before it is loaded, and which models are refused because they would be served wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aidocks.errors import (
    AIDocksError,
    CorruptCheckpoint,
    IncompatibleModels,
    InvalidSpec,
    UnknownModel,
    UnsafeCheckpoint,
)
from aidocks.models.resolve import ModelResolver
from aidocks.retrieval.architecture import architecture_of
from aidocks.retrieval.opening import Choices, open_retriever
from aidocks.training.retriever import Retriever, RetrieverKind
from tests.support.tiny_retrievers import make_decoder, make_embedder, make_encoder, make_reranker


@pytest.fixture
def resolver(tmp_path: Path) -> ModelResolver:
    return ModelResolver(tmp_path / "registry", [tmp_path])


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | values))


def rename(directory: Path, changes: dict[str, str]) -> None:
    """Give tensors of a checkpoint other names."""
    from safetensors.torch import load_file, save_file

    stored = load_file(directory / "model.safetensors")
    renamed = {}
    for name, tensor in stored.items():
        for old, new in changes.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})


def test_what_is_stored_is_told(tmp_path: Path) -> None:
    embedder = architecture_of(make_embedder(tmp_path / "e", prompts={"query": "q: ", "document": "p: "}))
    encoder = architecture_of(make_encoder(tmp_path / "b"))
    reranker = architecture_of(make_reranker(tmp_path / "r"))
    decoder = architecture_of(make_decoder(tmp_path / "d"))

    assert (embedder.kind, embedder.family, embedder.pooling, embedder.normalize) == (
        "embedding",
        "encoder",
        "mean",
        True,
    )
    assert (embedder.prompts.query, embedder.prompts.passage) == ("q: ", "p: ")
    assert (embedder.dimensions, embedder.max_length, embedder.context) == (32, 64, 128)
    assert (encoder.kind, encoder.pooling, encoder.normalize, encoder.labels) == (None, None, None, None)
    assert (reranker.kind, reranker.labels) == ("reranker", 1)
    assert (decoder.kind, decoder.family) == (None, "decoder")
    assert decoder.linear == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert encoder.linear == reranker.linear == ("dense", "key", "query", "value")


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    directory = make_decoder(tmp_path / "d")
    code = f"""
import sys
from pathlib import Path
from aidocks.models.resolve import ModelResolver
from aidocks.retrieval.opening import open_retriever
resolver = ModelResolver(Path({str(tmp_path)!r}), [Path({str(tmp_path)!r})])
open_retriever({str(directory)!r}, "reranker", resolver, field="model")
heavy = {{"torch", "transformers", "sentence_transformers", "numpy", "scipy"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def open_it(
    directory: Path,
    kind: RetrieverKind,
    resolver: ModelResolver,
    remote_code: frozenset[str] = frozenset(),
    **choices: Any,
) -> Retriever:
    return open_retriever(
        str(directory), kind, resolver, Choices(**choices), field="base_model", remote_code=remote_code
    )


def test_every_choice_is_made(tmp_path: Path, resolver: ModelResolver) -> None:
    plain = open_it(make_encoder(tmp_path / "b"), "embedding", resolver, query_prompt="query: ")
    decoder = open_it(make_decoder(tmp_path / "d"), "embedding", resolver, normalize=False, max_length=64)
    own = open_it(
        make_embedder(tmp_path / "e", prompts={"query": "q "}), "embedding", resolver, passage_prompt="p "
    )
    long = open_it(tmp_path / "e", "embedding", resolver, max_length=5000)

    assert (plain.pooling, plain.normalize, plain.prompts.query, plain.max_length) == (
        "mean",
        True,
        "query: ",
        128,
    )
    assert (decoder.pooling, decoder.normalize, decoder.max_length) == ("lasttoken", False, 64)
    assert (own.pooling, own.normalize, own.prompts.query, own.prompts.passage) == (None, None, "q ", "p ")
    assert (own.max_length, long.max_length) == (64, 64)
    assert not plain.remote_code


def test_a_model_of_the_other_kind_is_refused(tmp_path: Path, resolver: ModelResolver) -> None:
    with pytest.raises(IncompatibleModels, match="is an embedding model, and not a reranker") as refused:
        open_it(make_embedder(tmp_path / "e"), "reranker", resolver)
    assert refused.value.field == "base_model"
    assert "/train/emb" in str(refused.value.hint)
    with pytest.raises(IncompatibleModels, match="is a reranker, and not an embedding model"):
        open_it(make_reranker(tmp_path / "r"), "embedding", resolver)
    change(tmp_path / "r" / "config.json", id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(IncompatibleModels, match="gives 3 scores"):
        open_it(tmp_path / "r", "reranker", resolver)
    with pytest.raises(InvalidSpec, match="pools its own way"):
        open_it(tmp_path / "e", "embedding", resolver, pooling="cls")
    with pytest.raises(InvalidSpec, match="no adapters for tasks"):
        open_it(tmp_path / "e", "embedding", resolver, task="retrieval")
    with pytest.raises(UnknownModel):
        open_it(tmp_path / "none", "embedding", resolver)


def test_a_decoder_that_cannot_say_yes_is_no_reranker(tmp_path: Path, resolver: ModelResolver) -> None:
    directory = make_decoder(tmp_path / "d")
    text = (directory / "tokenizer.json").read_text().replace('"yes"', '"certainly"')
    (directory / "tokenizer.json").write_text(text)

    with pytest.raises(IncompatibleModels, match="without a token for 'yes'"):
        open_it(directory, "reranker", resolver)
    assert open_it(directory, "embedding", resolver).kind == "embedding"


CODE = {"AutoModel": "modeling_bert.JinaBertModel"}


def jina_v2(directory: Path) -> Path:
    """A model as Jina v2 is stored: BERT by its type, with positions and layers of its own."""
    make_encoder(directory)
    change(directory / "config.json", auto_map=CODE, position_embedding_type="alibi")
    rename(directory, {"intermediate.dense": "mlp.gated_layers"})
    return directory


def jina_v3_of_the_authors(directory: Path) -> Path:
    """A model as the first Jina v3 is stored: XLM-RoBERTa by its type."""
    make_encoder(directory)
    code = {"AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA"}
    change(
        directory / "config.json",
        model_type="xlm-roberta",
        auto_map=code,
        lora_adaptations=["retrieval.query"],
    )
    rename(directory, {"attention.self.query": "mixer.Wqkv"})
    return directory


def new_type(directory: Path) -> Path:
    """A model as GTE is stored: of a type that transformers does not have."""
    make_encoder(directory)
    change(directory / "config.json", model_type="new", auto_map={"AutoModel": "modeling.NewModel"})
    return directory


def both_directions(directory: Path) -> Path:
    """A decoder whose own code lets every token see all others; its tensors have the usual names."""
    make_decoder(directory)
    change(directory / "config.json", is_causal=False, auto_map={"AutoModel": "modeling_qwen.Qwen3Model"})
    return directory


def alibi_alone(directory: Path) -> Path:
    make_encoder(directory)
    change(directory / "config.json", auto_map=CODE, position_embedding_type="alibi")
    return directory


def alibi_without_code(directory: Path) -> Path:
    make_encoder(directory)
    change(directory / "config.json", position_embedding_type="alibi")
    return directory


@pytest.mark.parametrize(
    "make", [jina_v2, jina_v3_of_the_authors, new_type, both_directions, alibi_alone, alibi_without_code]
)
def test_a_model_with_code_of_its_own_is_refused_and_not_served_as_another(
    tmp_path: Path, resolver: ModelResolver, make: Any
) -> None:
    directory = make(tmp_path / "m")

    with pytest.raises(UnsafeCheckpoint, match="Python code") as refused:
        open_it(directory, "embedding", resolver)

    hint = str(refused.value.hint)
    if make is jina_v3_of_the_authors:
        assert "jinaai/jina-embeddings-v3-hf" in hint
    else:
        assert "AIDOCKS_REMOTE_CODE_MODELS" in hint
    (directory / "modeling_bert.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(UnsafeCheckpoint):
        open_it(directory, "embedding", resolver, remote_code=frozenset({str(directory), "m"}))


def test_code_that_does_what_transformers_does_is_left_aside(tmp_path: Path, resolver: ModelResolver) -> None:
    encoder, decoder = make_encoder(tmp_path / "b"), make_decoder(tmp_path / "d")
    change(encoder / "config.json", auto_map={"AutoModel": "modeling.BertModel"})
    change(decoder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Qwen3ForCausalLM"})

    assert not open_it(encoder, "embedding", resolver).remote_code
    assert not open_it(decoder, "embedding", resolver).remote_code


@pytest.mark.parametrize(
    ("listed", "error", "match"),
    [
        (
            [{"path": "../other", "type": "sentence_transformers.models.Dense"}],
            CorruptCheckpoint,
            "leads out",
        ),
        (
            [{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}],
            IncompatibleModels,
            "StaticEmbedding",
        ),
        ([{"path": "", "type": "sentence_transformers.models.Router"}], IncompatibleModels, "Router"),
        (
            [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
            UnsafeCheckpoint,
            "safetensors",
        ),
        ("nothing", CorruptCheckpoint, "no list of modules"),
    ],
)
def test_modules_that_are_not_understood_are_named(
    tmp_path: Path, listed: Any, error: type[AIDocksError], match: str
) -> None:
    directory = make_embedder(tmp_path / "e")
    (directory / "2_Dense").mkdir()
    (directory / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    first = (
        []
        if listed == "nothing" or not listed[0]["path"]
        else [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    )
    (directory / "modules.json").write_text(json.dumps(listed if listed == "nothing" else first + listed))

    with pytest.raises(error, match=match):
        architecture_of(directory)


def test_no_more_is_read_than_there_are_places_for(tmp_path: Path) -> None:
    directory = make_embedder(tmp_path / "e")
    change(directory / "sentence_bert_config.json", max_seq_length=100_000)

    assert architecture_of(directory).max_length == 128


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("1_Pooling/config.json", {"word_embedding_dimension": [1], "embedding_dimension": [1]}),
        ("1_Pooling/config.json", {"embedding_dimension": "wide"}),
        ("config.json", {"hidden_size": "large"}),
        ("config.json", {"auto_map": {"AutoModel": 3}}),
    ],
)
def test_values_of_another_form_are_no_failure_of_ours(
    tmp_path: Path, resolver: ModelResolver, file: str, values: dict[str, Any]
) -> None:
    directory = make_embedder(tmp_path / "e")
    change(directory / file, **values)
    with suppress(AIDocksError):
        open_it(directory, "embedding", resolver)


def test_code_among_the_modules_is_refused(tmp_path: Path, resolver: ModelResolver) -> None:
    directory = make_embedder(tmp_path / "e")
    modules = json.loads((directory / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    (directory / "modules.json").write_text(json.dumps(modules))

    with pytest.raises(UnsafeCheckpoint, match=r"custom_st\.Transformer"):
        open_it(directory, "embedding", resolver)


def test_other_kinds_of_vectors_are_refused(tmp_path: Path) -> None:
    directory = make_embedder(tmp_path / "e")
    change(directory / "config_sentence_transformers.json", model_type="SparseEncoder")

    with pytest.raises(IncompatibleModels, match="SparseEncoder"):
        architecture_of(directory)


def test_a_directory_that_is_model_and_adapter_is_refused(tmp_path: Path) -> None:
    directory = make_encoder(tmp_path / "b")
    change(directory / "adapter_config.json", base_model_name_or_path="/somewhere/else")

    with pytest.raises(IncompatibleModels, match="both a model and an adapter"):
        architecture_of(directory)


def test_a_part_that_is_missing_is_named_without_its_directories(
    tmp_path: Path, resolver: ModelResolver
) -> None:
    directory = make_embedder(tmp_path / "e")
    (directory / "1_Pooling" / "config.json").unlink()

    with pytest.raises(CorruptCheckpoint, match=r"config\.json of 1_Pooling cannot be read") as refused:
        architecture_of(directory)
    assert str(tmp_path) not in str(refused.value)
