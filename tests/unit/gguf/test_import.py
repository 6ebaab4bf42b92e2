"""A real GGUF file becomes a model that says the same; what cannot be brought back exactly is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import AIDocksError, CorruptCheckpoint, IncompatibleModels, MissingExtra, NotFound
from aidocks.models import gguf_import
from aidocks.models.gguf_import import import_gguf, locate_smollm2
from aidocks.models.gguf_tokenizer import PROBES, build_tokenizer
from aidocks.models.registry import Registry

HEADS, KEY_HEADS, WIDTH, INNER, LAYERS = 4, 2, 32, 64, 2


@pytest.fixture(scope="session")
def smollm2() -> Path:
    try:
        return locate_smollm2()
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def imported(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    registry = Registry(tmp_path_factory.mktemp("registry") / "models")
    info = import_gguf(smollm2, registry, "smollm2")
    assert info == import_gguf(smollm2, registry, "smollm2")
    assert (info.parameters, info.dtype) == (134_515_008, "BF16")
    assert registry.manifest("smollm2").parents[0].license == "apache-2.0"
    return info.path


@pytest.mark.slow
def test_every_token_is_the_files_own(smollm2: Path, imported: Path) -> None:
    from transformers import AutoTokenizer

    fields = {key: field.contents() for key, field in GGUFReader(str(smollm2)).fields.items()}
    tokenizer = AutoTokenizer.from_pretrained(imported)
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert tokenizer.chat_template == fields["tokenizer.chat_template"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    for probe in PROBES:
        assert tokenizer.decode(tokenizer(probe)["input_ids"]) == probe
    # Digits are cut apart before blanks are attached: two blanks stay one token.
    assert tokenizer.convert_ids_to_tokens(tokenizer("x =  5")["input_ids"]) == ["x", "Ġ=", "ĠĠ", "5"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")


@pytest.mark.slow
def test_the_imported_model_answers(imported: Path) -> None:
    from aidocks.evaluate.generate import answer

    pieces: list[str] = []
    said = answer(imported, "What is the capital of France?", max_new_tokens=24, on_text=pieces.append)
    assert "Paris" in said.text
    assert "".join(pieces).strip() == said.text
    assert 0 < said.tokens <= 24
    assert said.tokens_per_s == pytest.approx(said.tokens / said.seconds)


def write_gguf(path: Path, **changes: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Write a tiny Llama as GGUF (query and key rows interleaved, as it wants) and return its tensors."""
    rng = np.random.default_rng(0)
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = changes.pop("tokens", ["<s>", "</s>", *alphabet])
    architecture = changes.pop("architecture", "llama")
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    writer.add_tokenizer_model(changes.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.pop("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    for add, value in changes.pop("settings", {}).items():
        getattr(writer, add)(value)
    shapes = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (WIDTH // 2, WIDTH),
        "attn_v": (WIDTH // 2, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    named = {f"blk.{layer}.{kind}.weight": shape for layer in range(LAYERS) for kind, shape in shapes.items()}
    named |= {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
    named |= changes.pop("tensors", {"output.weight": (len(tokens), WIDTH)})
    assert not changes
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in named.items()}
    for name, values in tensors.items():
        if name.endswith("ffn_up.weight"):
            kind = GGMLQuantizationType.Q8_0
            packed = quants.quantize(values, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            tensors[name] = quants.dequantize(packed, kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Bring rows from transformers' order (halves of a head apart) into the format's (pairs side by side)."""
    half = weight.shape[0] // heads // 2
    order = [
        head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)
    ]
    return weight[order]


def test_weights_configuration_and_tokenizer_come_over(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    info = import_gguf(tmp_path / "tiny.gguf", Registry(tmp_path / "models"), "tiny")
    stored = Checkpoint(info.path)
    for source, name, heads in [
        ("blk.1.attn_q", "model.layers.1.self_attn.q_proj", HEADS),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj", KEY_HEADS),
    ]:
        found = interleaved(stored.tensor(f"{name}.weight"), heads)
        assert torch.equal(found, torch.from_numpy(tensors[f"{source}.weight"]).bfloat16())
    for source, name in [
        ("blk.1.ffn_up", "model.layers.1.mlp.up_proj"),
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj"),
        ("output", "lm_head"),
        ("token_embd", "model.embed_tokens"),
    ]:
        assert torch.equal(
            stored.tensor(f"{name}.weight"), torch.from_numpy(tensors[f"{source}.weight"]).bfloat16()
        )
    config = json.loads((info.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-05, 50_000.0, 8)
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, loading = AutoModelForCausalLM.from_pretrained(info.path, output_loading_info=True)
    assert not loading["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(info.path)
    assert tokenizer("a")["input_ids"][0] == 0
    assert tokenizer.decode(tokenizer("2  ü", add_special_tokens=False)["input_ids"]) == "2  ü"


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"architecture": "qwen2"}, IncompatibleModels, "'qwen2'"),
        ({"tokenizer": "llama"}, IncompatibleModels, "'llama'"),
        ({"pre": "deepseek-llm"}, IncompatibleModels, "'deepseek-llm'"),
        ({"settings": {"add_expert_count": 8}}, IncompatibleModels, "Mixture-of-Experts"),
        ({"tensors": {"rope_freqs.weight": (4,)}}, IncompatibleModels, "rotary"),
        ({"tensors": {"blk.0.attn_q.bias": (WIDTH,)}}, IncompatibleModels, "blk.0.attn_q.bias"),
        ({"tokens": ["<s>", "</s>", "a", "b"]}, CorruptCheckpoint, "unchanged"),
        ({"tokens": ["<s>", "</s>", "a", "a"]}, CorruptCheckpoint, "twice"),
    ],
)
def test_what_cannot_be_brought_back_is_refused(
    changes: dict[str, Any], kind: type[AIDocksError], words: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "odd.gguf", **changes)
    registry = Registry(tmp_path / "models")
    with pytest.raises(kind) as caught:
        import_gguf(tmp_path / "odd.gguf", registry, "odd")
    assert words in str(caught.value)
    assert registry.names() == []


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models")
    with pytest.raises(NotFound):
        import_gguf(tmp_path / "none.gguf", registry, "none")
    write_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for name, content in (("text", b"not a model"), ("empty", b""), ("cut", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(CorruptCheckpoint):
            import_gguf(tmp_path / f"{name}.gguf", registry, name)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_import, "SMOLLM2_DISTRIBUTION", "no-such-package-here")
    with pytest.raises(MissingExtra, match="no-such-package-here"):
        locate_smollm2()


def test_a_merge_must_be_a_pair() -> None:
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": ["ab"],
    }
    with pytest.raises(CorruptCheckpoint, match="not a pair"):
        build_tokenizer(fields)
