"""What must hold exactly: copies of one model are that model, and order means nothing but order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aidocks.checkpoints.files import hash_file
from aidocks.checkpoints.reader import Checkpoint

IDS = torch.arange(3, 3 + 2 * 40).view(2, 40) % 512


def logits(path: Path, dtype: str = "float32") -> torch.Tensor:
    """Return the logits of a fixed text, once it is sure that the weights are all that the model needs."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits.float()


def assert_same(path: Path, dense: Path) -> None:
    wanted = logits(dense)
    assert (logits(path) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "architecture", "model_type"),
    [
        ("llama", None, "mixtral"),
        ("llama", "qwen_moe", "qwen2_moe"),
        ("mistral", None, "mixtral"),
        ("mistral", "qwen_moe", "qwen2_moe"),
        ("phi3", None, "mixtral"),
        ("qwen2", None, "qwen2_moe"),
        ("qwen3", None, "qwen3_moe"),
    ],
)
def test_identical_experts_are_the_dense_model(
    family: str,
    architecture: str | None,
    model_type: str,
    tied: bool,
    tmp_path: Path,
    tiny_model: Any,
    assemble: Any,
) -> None:
    base = tiny_model(tmp_path / "base", family, tie_word_embeddings=tied)
    moe = assemble(base, [base, base, base], architecture=architecture)
    assert_same(moe.path, base)
    assert moe.target.architecture == model_type
    assert ("lm_head.weight" in Checkpoint(moe.path).entries) is not tied


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("experts_per_token", [1, 2, 3])
def test_whatever_the_gates_and_however_many_experts_serve_a_token(
    scale: float, experts_per_token: int, tmp_path: Path, tiny_model: Any, assemble: Any, plan: Any
) -> None:
    base = tiny_model(tmp_path / "base")
    experts = [base, base, base]
    routers = plan(base, experts).routers
    gates = {router.name: scale * torch.randn(router.shape) for router in routers}
    assert_same(assemble(base, experts, gates, experts_per_token=experts_per_token).path, base)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_identical_experts_are_the_dense_model_in_bfloat16(
    family: str, tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base", family, dtype=torch.bfloat16)
    moe = assemble(base, [base, base])
    dense = logits(base, "bfloat16")
    # The mixture adds two rounded parts, so the last bit may differ (it does not where the weights are equal).
    assert (logits(moe.path, "bfloat16") - dense).abs().max() <= 2**-6 * dense.abs().max()


def test_one_expert_a_token_is_the_dense_model_exactly_in_bfloat16(
    tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    moe = assemble(base, [base, base], experts_per_token=1)
    assert torch.equal(logits(moe.path, "bfloat16"), logits(base, "bfloat16"))


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_names_and_shapes_on_disk_are_what_transformers_writes(
    family: str, tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base", family)
    moe = assemble(base, [base, base, base])
    config = AutoModelForCausalLM.from_pretrained(moe.path).config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    theirs, ours = Checkpoint(tmp_path / "theirs").entries, Checkpoint(moe.path).entries
    assert {n: e.shape for n, e in ours.items()} == {n: e.shape for n, e in theirs.items()}


def dense_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a dense model by the names that Llama gives them, as transformers computes with them."""
    stored = Checkpoint(path)
    weights = {name: stored.tensor(name) for name in stored.entries}
    config = stored.config
    if config["model_type"] != "phi3":
        return weights
    head = config["hidden_size"] // config["num_attention_heads"]
    sizes = [config["num_attention_heads"] * head] + [config["num_key_value_heads"] * head] * 2
    for name in list(weights):
        if "qkv_proj" in name:
            for kind, part in zip("qkv", weights.pop(name).split(sizes), strict=True):
                weights[name.replace("qkv_proj", f"{kind}_proj")] = part
        elif "gate_up_proj" in name:
            for kind, part in zip(("gate_proj", "up_proj"), weights.pop(name).chunk(2), strict=True):
                weights[name.replace("gate_up_proj", kind)] = part
    return weights


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_every_weight_is_where_it_belongs(
    family: str, tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    paths = [tiny_model(tmp_path / f"model-{seed}", family, seed=seed) for seed in range(3)]
    moe = assemble(paths[0], paths[1:])
    stored = Checkpoint(moe.path)
    sources = [dense_weights(path) for path in paths]
    expected = {name: weight for name, weight in sources[0].items() if ".mlp." not in name}
    for layer in range(2):
        for number in range(2):
            for ours, theirs in moe.target.form.kinds.items():
                name = moe.target.form.expert_name(layer, number, ours)
                expected[name] = sources[1 + number][f"model.layers.{layer}.mlp.{theirs}.weight"]
    assert len(expected) == len(stored.entries) - sum(
        "gate.weight" in n or "shared" in n for n in stored.entries
    )
    for name, weight in expected.items():
        assert torch.equal(stored.tensor(name), weight), name


def test_permuted_experts_permute_router_rows_and_nothing_else(
    tmp_path: Path, tiny_model: Any, assemble: Any, plan: Any
) -> None:
    paths = [tiny_model(tmp_path / f"model-{seed}", seed=seed) for seed in range(3)]
    turned = [2, 0, 1]
    gates = {router.name: torch.randn(router.shape) for router in plan(paths[0], paths).routers}
    one = assemble(paths[0], paths, gates)
    rows = {name: gate[turned].contiguous() for name, gate in gates.items()}
    other = assemble(paths[0], [paths[i] for i in turned], rows)
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
    wanted = logits(one.path)
    assert (wanted - logits(other.path)).abs().max() < 1e-5 * wanted.abs().max()


def digest(path: Path) -> dict[str, str]:
    return {p.name: hash_file(p) for p in path.iterdir()}


@pytest.mark.parametrize(
    "order",
    [list, lambda units: units[::-1], lambda units: units + units],
    ids=["forward", "backward", "twice"],
)
def test_the_files_do_not_depend_on_the_order_of_units_or_the_files_of_the_sources(
    order: Callable[[list[Any]], list[Any]], tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    whole = [tiny_model(tmp_path / f"whole-{seed}", seed=seed) for seed in range(2)]
    parts = [tiny_model(tmp_path / f"parts-{seed}", seed=seed, max_shard_size="200KB") for seed in range(2)]
    one = assemble(whole[0], whole, max_shard_size="300KB")
    other = assemble(parts[0], parts, max_shard_size="300KB", order=order)
    assert len(list(other.path.glob("model-*-of-*.safetensors"))) > 3
    assert digest(one.path) == digest(other.path)
    entries = Checkpoint(one.path).entries.values()
    last = max(entry.file for entry in entries)
    assert {e.name for e in entries if e.file == last} == {
        e.name for e in entries if e.name.endswith("gate.weight")
    }
