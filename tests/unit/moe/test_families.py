"""What is particular to one family of models, or to one form of an MoE: computed as the dense model, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels, InvalidSpec

IDS = torch.arange(3, 3 + 2 * 48).view(2, 48) % 512
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}


def logits(path: Path, length: int = IDS.shape[1]) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        return model.eval()(input_ids=IDS[:, :length]).logits


def assert_same(path: Path, dense: Path, length: int = IDS.shape[1]) -> None:
    wanted = logits(dense, length)
    assert (logits(path, length) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def edit(path: Path, **changes: Any) -> Path:
    file = path / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return path


@pytest.mark.parametrize(
    ("family", "architecture", "overrides"),
    [
        ("llama", None, {"rope_parameters": LLAMA3}),
        ("llama", "qwen_moe", {"rope_parameters": LLAMA3}),
        ("llama", None, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        (
            "llama",
            None,
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "max_position_embeddings": 16,
            },
        ),
        ("qwen2", None, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}),
        ("qwen3", None, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}),
        ("llama", None, {"head_dim": 16}),
        ("llama", "qwen_moe", {"head_dim": 16}),
        ("mistral", None, {"head_dim": 16, "num_key_value_heads": 1}),
        ("mistral", None, {"sliding_window": None}),
        (
            "phi3",
            None,
            {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        ),
        ("phi3", None, {"num_key_value_heads": 8}),
        ("qwen2", None, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen2", None, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        (
            "qwen2",
            None,
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        ("qwen3", None, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("qwen3", None, {"attention_bias": True}),
    ],
    ids=str,
)
def test_settings_that_are_kept(
    family: str,
    architecture: str | None,
    overrides: dict[str, Any],
    tmp_path: Path,
    tiny_model: Any,
    assemble: Any,
) -> None:
    base = tiny_model(tmp_path / "base", family, **overrides)
    plain = tiny_model(tmp_path / "plain", family)
    moe = assemble(base, [base, base], architecture=architecture)
    assert_same(moe.path, base)
    if overrides.keys() & {"rope_parameters", "sliding_window"}:
        assert not torch.allclose(logits(plain), logits(base), rtol=1e-3), "the setting would not be noticed"


@pytest.mark.parametrize("length", [12, 40], ids=["short factors", "long factors"])
def test_longrope_is_computed_as_by_phi3(length: int, tmp_path: Path, tiny_model: Any, assemble: Any) -> None:
    overrides = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    base = tiny_model(tmp_path / "base", "phi3", rope_parameters=LONGROPE, **overrides)
    moe = assemble(base, [base, base])
    assert_same(moe.path, base, length)
    assert any("longrope" in note for note in moe.target.notes)


def test_longrope_as_the_first_releases_wrote_it(tmp_path: Path, tiny_model: Any, assemble: Any) -> None:
    overrides = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    base, old = (
        tiny_model(tmp_path / name, "phi3", rope_parameters=LONGROPE, **overrides) for name in ("base", "old")
    )
    factors = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
    edit(old, rope_parameters=..., rope_scaling={"type": "su", **factors}, rope_theta=1e4)
    assert_same(assemble(old, [old, old]).path, base)


def test_defaults_that_a_configuration_leaves_out(tmp_path: Path, tiny_model: Any, assemble: Any) -> None:
    base = tiny_model(
        tmp_path / "base",
        "mistral",
        sliding_window=4096,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
    )
    edit(
        base,
        sliding_window=...,
        num_key_value_heads=...,
        head_dim=...,
        max_position_embeddings=...,
        eos_token_id=...,
    )
    moe = assemble(base, [base, base])
    assert_same(moe.path, base)
    expected = {"sliding_window": 4096, "num_key_value_heads": 8, "head_dim": 8, "eos_token_id": 2}
    assert {key: moe.target.config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "phi3",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4}},
            ["partial_rotary_factor", "0.5"],
        ),
        ("llama", {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, ["rope_type", "spiral"]),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope_parameters"]),
        ("llama", {"mlp_bias": True}, ["mlp_bias", "model.layers.0.mlp.gate_proj.bias"]),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, ["layer_types"]),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, ["layer_types", "window 16"]),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, ["layer_types", "linear"]),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
            ["max_window_layers", "qwen3_moe"],
        ),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ["architecture", "Sequence"]),
        ("llama", {"model_type": "gemma"}, ["'gemma'", "norms", "Llama, Mistral, Phi-3, Qwen2 and Qwen3"]),
        ("llama", {"model_type": "gemma3_text"}, ["'gemma3_text'", "norms"]),
        ("llama", {"model_type": "phi"}, ["'phi'", "only Phi-3"]),
        ("llama", {"model_type": "mixtral"}, ["'mixtral'", "MoE already"]),
        ("llama", {"model_type": "gpt2"}, ["'gpt2'", "'qwen3'"]),
    ],
)
def test_what_no_form_computes_is_refused(
    family: str, changes: dict[str, Any], words: list[str], tmp_path: Path, tiny_model: Any, plan: Any
) -> None:
    base = edit(tiny_model(tmp_path / "base", family), **changes)
    with pytest.raises(IncompatibleModels) as caught:
        plan(base, [base, base])
    assert (caught.value.field, caught.value.value) == ("base_model", str(base))
    for word in words:
        assert word in str(caught.value)


def test_a_real_gemma_is_refused_by_name(tmp_path: Path, tiny_model: Any, plan: Any) -> None:
    base = tiny_model(tmp_path / "base", "gemma")
    with pytest.raises(IncompatibleModels, match="'gemma'"):
        plan(base, [base, base])


@pytest.mark.parametrize(("architecture", "kind"), [("mixtral", "q_proj"), ("qwen_moe", "o_proj")])
def test_biases_that_have_no_place(
    architecture: str, kind: str, tmp_path: Path, tiny_model: Any, plan: Any
) -> None:
    base = tiny_model(tmp_path / "base", attention_bias=True)
    with pytest.raises(IncompatibleModels) as caught:
        plan(base, [base, base], architecture=architecture)
    assert f"model.layers.0.self_attn.{kind}.bias" in str(caught.value)
    assert "attention_bias" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "architecture", "word"),
    [
        ("phi3", "qwen_moe", "Phi-3"),
        ("qwen2", "mixtral", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3", "mixtral", "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_forms_that_a_family_cannot_take(
    family: str, architecture: str, word: str, tmp_path: Path, tiny_model: Any, plan: Any
) -> None:
    base = tiny_model(tmp_path / "base", family)
    with pytest.raises(InvalidSpec) as caught:
        plan(base, [base, base], architecture=architecture)
    assert (caught.value.field, caught.value.value) == ("architecture", architecture)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("family", "hint"), [("llama", "'qwen_moe'"), ("qwen3", "routed experts"), ("phi3", "routed experts")]
)
def test_shared_experts_where_there_is_no_place_for_them(
    family: str, hint: str, tmp_path: Path, tiny_model: Any, plan: Any
) -> None:
    base = tiny_model(tmp_path / "base", family)
    with pytest.raises(InvalidSpec) as caught:
        plan(base, [base, base], shared_experts=[base])
    assert (caught.value.field, caught.value.value) == ("shared_experts", [str(base)])
    assert hint in str(caught.value.hint)


def block_output(path: Path, states: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = model.model.layers[1].mlp(states)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("number", [1, 2])
def test_shared_experts_add_their_sum_times_the_sigmoid_of_their_gate(
    number: int, family: str, tmp_path: Path, tiny_model: Any, assemble: Any, plan: Any
) -> None:
    base, *others = (tiny_model(tmp_path / f"m{seed}", family, seed=seed) for seed in range(1 + number))
    request = {"architecture": "qwen_moe", "shared_experts": others}
    gates = {router.name: torch.randn(router.shape) for router in plan(base, [base, base], **request).routers}
    moe = assemble(base, [base, base], gates, **request)
    assert moe.target.num_shared_experts == number
    assert moe.target.config["shared_expert_intermediate_size"] == number * 176
    states = torch.randn(1, 7, 64)
    weight = torch.sigmoid(states @ gates[moe.target.shared_gate_name(1)].T)
    expected = block_output(base, states) + weight * sum(block_output(path, states) for path in others)
    torch.testing.assert_close(block_output(moe.path, states), expected, rtol=1e-4, atol=1e-7)
    logits(moe.path)


def test_without_shared_experts_the_one_that_the_form_has_is_small_and_zero(
    tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base", "qwen2", intermediate_size=320)
    moe = assemble(base, [base, base])
    stored = Checkpoint(moe.path)
    shared = [name for name in stored.entries if ".shared_expert." in name]
    assert len(shared) == 3 * 2
    assert not any(stored.tensor(name).any() for name in shared)
    assert moe.target.config["shared_expert_intermediate_size"] == 256
    assert moe.target.config["norm_topk_prob"] is True


@pytest.mark.parametrize(
    ("family", "architecture", "shared"),
    [
        ("llama", "mixtral", 0),
        ("phi3", "mixtral", 0),
        ("llama", "qwen_moe", 0),
        ("qwen2", "qwen_moe", 2),
        ("qwen3", "qwen_moe", 0),
    ],
)
def test_names_are_those_that_converters_to_gguf_know(
    family: str, architecture: str, shared: int, tmp_path: Path, tiny_model: Any, plan: Any
) -> None:
    gguf = pytest.importorskip("gguf")
    base = tiny_model(tmp_path / "base", family)
    target = plan(base, [base, base, base], architecture=architecture, shared_experts=[base] * shared)
    arch = {"mixtral": "LLAMA", "qwen2_moe": "QWEN2MOE", "qwen3_moe": "QWEN3MOE"}[target.architecture]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], target.num_layers)
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[arch]]}
    for tensor in (*target.tensors, *target.routers):
        # Converters stack the experts of a layer; the stack is called like its members, less the number.
        stacked = re.sub(r"\.experts\.\d+\.", ".experts.", tensor.name)
        if target.architecture == "mixtral" and ".experts." in stacked:
            stacked = re.sub(r"model\.(layers\.\d+)\.block_sparse_moe", r"\1.feed_forward", stacked)
        found = names.get_name(stacked, try_suffixes=(".weight", ".bias"))
        assert found, tensor.name
        assert re.sub(r"\.(weight|bias)$", "", re.sub(r"blk\.\d+", "blk.{bid}", found)) in known


def test_what_llama_cpp_does_not_compute_is_said(tmp_path: Path, tiny_model: Any, plan: Any) -> None:
    base = tiny_model(tmp_path / "base", "qwen2")
    assert any("norm_topk_prob" in note for note in plan(base, [base] * 3).notes)
    # All experts serve every token: their weights sum to one anyway.
    assert not plan(base, [base] * 3, experts_per_token=3).notes
    tied = tiny_model(tmp_path / "tied", "qwen2", tie_word_embeddings=True)
    assert any("tie_word_embeddings" in note for note in plan(tied, [tied] * 2).notes)
