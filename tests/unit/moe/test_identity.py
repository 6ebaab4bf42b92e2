"""What must hold exactly: copies of one model are that model, and order means nothing but order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MixtralForCausalLM

from aidocks.checkpoints.reader import Checkpoint
from aidocks.moe.mixtral import find_source

IDS = torch.arange(3, 3 + 2 * 40).view(2, 40) % 512


def logits(path: Path, dtype: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gate_mode", ["hidden", "cheap_embed", "random"])
def test_identical_experts_are_the_dense_model(
    tied: bool, gate_mode: str, tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    built = build(base, experts_of(base, base, base), gate_mode=gate_mode)
    dense = logits(base, "float32")
    difference = (logits(built.path, "float32") - dense).abs().max()
    assert difference < 1e-5 * dense.abs().max()
    assert ("lm_head.weight" in Checkpoint(built.path).entries) is not tied


def test_identical_experts_are_the_dense_model_in_bfloat16(
    tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    built = build(base, experts_of(base, base))
    dense = logits(base, "bfloat16")
    # The mixture adds two rounded halves, so the last bit may differ (it does not where this was measured).
    assert (logits(built.path, "bfloat16") - dense).abs().max() <= 2**-7 * dense.abs().max()


def test_one_expert_alone_is_the_dense_model(tmp_path: Path, tiny_llama: Any, build: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    built = build(base, [{"source_model": str(base), "positive_prompts": ["anything"]}])
    assert built.result.experts_per_token == 1
    dense = logits(base, "float32")
    assert (logits(built.path, "float32") - dense).abs().max() < 1e-5 * dense.abs().max()


def make_mistral(directory: Path, tiny_llama: Any, **overrides: Any) -> Path:
    """Save a Mistral with random weights; the tokenizer is the tiny Llama's."""
    tiny_llama(directory)
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "head_dim": 16,
    }
    torch.manual_seed(1)
    MistralForCausalLM(MistralConfig(**(settings | overrides))).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("window", [16, None])
def test_mistral_keeps_its_window_head_size_and_rotation(
    window: int | None, tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    base = make_mistral(tmp_path / "base", tiny_llama, sliding_window=window)
    built = build(base, experts_of(base, base))
    dense = logits(base, "float32")
    assert (logits(built.path, "float32") - dense).abs().max() < 1e-5 * dense.abs().max()
    config = AutoModelForCausalLM.from_pretrained(built.path).config
    assert (config.model_type, config.sliding_window, config.head_dim) == ("mixtral", window, 16)
    assert config.rope_parameters["rope_theta"] == 1e6


def test_scaled_rotation_is_kept(tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    base = tiny_llama(tmp_path / "base", rope_parameters=rope)
    built = build(base, experts_of(base, base))
    dense = logits(base, "float32")
    assert (logits(built.path, "float32") - dense).abs().max() < 1e-5 * dense.abs().max()


def test_every_weight_is_where_it_belongs(
    tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    paths = [tiny_llama(tmp_path / f"model-{seed}", seed=seed) for seed in range(3)]
    built = build(paths[0], experts_of(*paths[1:]))
    stored = Checkpoint(built.path)
    sources = [Checkpoint(path) for path in paths]
    for name in stored.entries:
        source = find_source(name)
        if source.model != "router":
            origin = sources[0] if source.model == "base" else sources[1 + int(source.model)]
            assert torch.equal(stored.tensor(name), origin.tensor(source.name)), name


def test_names_and_shapes_on_disk_are_what_transformers_writes(
    tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=False)
    built = build(base, experts_of(base, base, base))
    model, info = MixtralForCausalLM.from_pretrained(built.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    MixtralForCausalLM(model.config).save_pretrained(tmp_path / "theirs")
    theirs, ours = Checkpoint(tmp_path / "theirs").entries, Checkpoint(built.path).entries
    assert {n: e.shape for n, e in ours.items()} == {n: e.shape for n, e in theirs.items()}
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in ours


@pytest.mark.parametrize("gate_mode", ["hidden", "cheap_embed"])
def test_permuted_experts_permute_router_rows_and_nothing_else(
    gate_mode: str, tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    paths = [tiny_llama(tmp_path / f"model-{seed}", seed=seed) for seed in range(3)]
    experts = experts_of(*paths)
    turned = [2, 0, 1]
    one = build(paths[0], experts, gate_mode=gate_mode)
    other = build(paths[0], [experts[i] for i in turned], gate_mode=gate_mode)
    first, second = Checkpoint(one.path), Checkpoint(other.path)
    for name in first.entries:
        if name.endswith("gate.weight"):
            assert torch.equal(first.tensor(name)[turned], second.tensor(name)), name
        elif ".experts." in name:
            place = next(i for i in range(3) if f".experts.{i}." in name)
            moved = name.replace(f".experts.{place}.", f".experts.{turned.index(place)}.")
            assert torch.equal(first.tensor(name), second.tensor(moved)), name
        else:
            assert torch.equal(first.tensor(name), second.tensor(name)), name
    difference = (logits(one.path, "float32") - logits(other.path, "float32")).abs().max()
    assert difference < 1e-5 * logits(one.path, "float32").abs().max()


def digest(path: Path) -> dict[str, str]:
    from aidocks.checkpoints.files import hash_file

    # The picture library promises nothing about its bytes.
    files = [p for p in path.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json")]
    return {p.relative_to(path).as_posix(): hash_file(p) for p in files if p.name != "aidocks.json"}


@pytest.mark.parametrize("order", [list, lambda units: units[::-1]], ids=["forward", "backward"])
def test_sharded_output_does_not_depend_on_the_order_of_units(
    order: Callable[[list[Any]], list[Any]], tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    paths = [tiny_llama(tmp_path / f"model-{seed}", seed=seed, max_shard_size="200KB") for seed in range(2)]
    whole = build(paths[0], experts_of(*paths))
    parts = build(paths[0], experts_of(*paths), max_shard_size="300KB", order=order)
    again = build(paths[0], experts_of(*paths), max_shard_size="300KB")
    assert len(list(parts.path.glob("model-*-of-*.safetensors"))) > 3
    assert digest(parts.path) == digest(again.path)
    assert torch.equal(logits(parts.path, "float32"), logits(whole.path, "float32"))


def test_units_that_run_twice_leave_the_same_bytes(
    tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    base = tiny_llama(tmp_path / "base")

    def twice(units: list[Any]) -> list[Any]:
        return units + units

    once, repeated = build(base, experts_of(base, base)), build(base, experts_of(base, base), order=twice)
    assert digest(once.path) == digest(repeated.path)
