"""LoRA adapters: what a model's tensors are with one, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aidocks.checkpoints.header import TensorEntry, read_header
from aidocks.errors import AIDocksError, CorruptCheckpoint, IncompatibleModels, UnknownModel, UnsafeCheckpoint
from aidocks.merge.adapter import AdaptedRows, Adapter, read_adapter
from aidocks.merge.rows import MemoryRows

PREFIX = "base_model.model."
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.k_proj"


def write(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base", **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    named = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors")
    return directory


def factors(module: str, rows: int, columns: int, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{module}.lora_B.weight": torch.randn(rows, rank, generator=generator),
    }


def entry(name: str, *shape: int) -> dict[str, TensorEntry]:
    return {name: TensorEntry(name, "F32", shape, Path("x"), 0, 0)}


def read(adapter: Adapter, tensor: str, weight: torch.Tensor | None, dtype: str = "float32") -> torch.Tensor:
    rows = adapter.apply(tensor, None if weight is None else MemoryRows(tensor, weight), dtype=dtype)
    return rows.read(0, rows.shape[0])


@given(
    st.integers(1, 40), st.integers(1, 30), st.integers(1, 6), st.integers(0, 99), st.booleans(), st.data()
)
@settings(max_examples=40, deadline=None)
def test_any_rows_are_those_of_the_sum(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    rank: int,
    seed: int,
    transposed: bool,
    data: st.DataObject,
) -> None:
    parts = factors(Q, rows, columns, rank, seed)
    directory = write(
        tmp_path_factory.mktemp("adapter"), parts, r=rank, lora_alpha=3, fan_in_fan_out=transposed
    )
    delta = (parts[f"{Q}.lora_B.weight"].double() @ parts[f"{Q}.lora_A.weight"].double()) * 3 / rank
    delta = delta.mT if transposed else delta
    weight = torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed + 1)).bfloat16()
    found = read_adapter(directory).apply(f"{Q}.weight", MemoryRows("w", weight), dtype="float64")
    begin = data.draw(st.integers(0, len(weight)))
    end = data.draw(st.integers(begin, len(weight)))
    wanted = (weight.double() + delta)[begin:end]
    assert torch.allclose(found.read(begin, end), wanted, rtol=1e-12, atol=1e-12)
    single = read_adapter(directory).apply(f"{Q}.weight", MemoryRows("w", weight)).read(begin, end)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("domain", ["python", "math", "story"])
def test_real_adapters_against_the_dense_sum(shared_data: Path, domain: str) -> None:
    directory = shared_data / "models" / f"expert-smol-{domain}-lora"
    adapter, stored = read_adapter(directory), load_file(directory / "adapter_model.safetensors")
    assert len(adapter.factors) == 90
    assert not adapter.replaced
    generator = torch.Generator().manual_seed(0)
    for name, found in list(adapter.factors.items())[::9]:
        a, b = (stored[f"{PREFIX}{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        weight = (0.1 * torch.randn(found.shape, generator=generator)).bfloat16()
        got = read(adapter, name, weight)
        delta = 2.0 * (b.double() @ a.double())
        dense = weight.double() + delta
        assert torch.allclose(got.double(), dense, rtol=1e-5, atol=1e-7)
        # PEFT rounds the product to the model's type, then the sum: half a last digit each.
        merged = weight + (b @ a) * 2.0
        roundings = 2.0**-8 * (delta.abs() + dense.abs())
        assert bool(((got.double() - merged.double()).abs() <= 1.02 * roundings + 1e-9).all())


def test_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    parts = factors(Q, 8, 6, 2) | factors(K, 8, 6, 4) | factors("model.layers.1.self_attn.k_proj", 8, 6, 4)
    directory = write(
        tmp_path,
        parts,
        rank_pattern={"q_proj": 2},
        alpha_pattern={Q: 6, r"layers\.\d+\.self_attn\.k_proj": 2, "k_proj": 100},
    )
    scales = {name: found.scale for name, found in read_adapter(directory).factors.items()}
    assert scales == {f"{Q}.weight": 3.0, f"{K}.weight": 0.5, "model.layers.1.self_attn.k_proj.weight": 0.5}
    rslora = write(tmp_path / "rs", factors(Q, 8, 6), use_rslora=True)
    assert read_adapter(rslora).factors[f"{Q}.weight"].scale == 8 / 2


def test_rows_of_dora_have_the_lengths_that_it_gives_them(tmp_path: Path) -> None:
    magnitude = torch.rand(8) + 0.5
    parts = factors(Q, 8, 6) | {f"{Q}.lora_magnitude_vector.weight": magnitude}
    adapter = read_adapter(write(tmp_path, parts, use_dora=True))
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    total = weight + 2 * parts[f"{Q}.lora_B.weight"] @ parts[f"{Q}.lora_A.weight"]
    wanted = magnitude[:, None] * total / total.norm(dim=1, keepdim=True)
    got = read(adapter, f"{Q}.weight", weight)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.allclose(got.norm(dim=1), magnitude, atol=1e-5)


def test_embeddings_biases_and_whole_modules(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = "model.embed_tokens"
    parts = {
        f"{embedding}.lora_embedding_A": torch.randn(4, 10, generator=generator),
        f"{embedding}.lora_embedding_B": torch.randn(6, 4, generator=generator),
        "model.norm.weight": torch.ones(6),
        f"{Q}.base_layer.bias": torch.full((8,), 2.0),
        "lm_head.modules_to_save.default.weight": torch.full((12, 6), 3.0),
    }
    adapter = read_adapter(write(tmp_path, parts, bias="all"))
    weight = torch.randn(10, 6, generator=generator)
    delta = 2 * (parts[f"{embedding}.lora_embedding_B"] @ parts[f"{embedding}.lora_embedding_A"]).mT
    assert torch.allclose(read(adapter, f"{embedding}.weight", weight), weight + delta, atol=1e-5)
    base = entry(f"{embedding}.weight", 10, 6) | entry("model.norm.weight", 6) | entry(f"{Q}.bias", 8)
    found = adapter.entries(base)
    assert found["lm_head.weight"].shape == (12, 6)
    assert float(read(adapter, "lm_head.weight", None).mean()) == 3.0
    norm = adapter.apply("model.norm.weight", MemoryRows("n", torch.zeros(6)))
    assert torch.equal(norm.read(0, 1), torch.ones(1, 6))
    plain = MemoryRows("other", torch.zeros(2, 2))
    assert adapter.apply("model.other.weight", plain) is plain
    assert adapter.changes(f"{Q}.bias")
    assert not adapter.changes("model.other.weight")


def test_checkpoints_that_leave_out_the_first_part_of_names(tmp_path: Path) -> None:
    module = "transformer.h.0.attn.c_attn"
    adapter = read_adapter(write(tmp_path, factors(module, 9, 6), fan_in_fan_out=True))
    assert adapter.entries(entry("h.0.attn.c_attn.weight", 6, 9)).keys() == {"h.0.attn.c_attn.weight"}
    assert isinstance(
        adapter.apply("h.0.attn.c_attn.weight", MemoryRows("w", torch.zeros(6, 9))), AdaptedRows
    )


def test_an_adapter_that_does_not_fit_says_where(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, factors(Q, 8, 6)))
    with pytest.raises(IncompatibleModels, match=r"no tensor '.*q_proj\.weight'.*'org/base'") as caught:
        adapter.entries({}, field="models[1].model.lora", reference="some-lora")
    assert (caught.value.field, caught.value.value) == ("models[1].model.lora", "some-lora")
    with pytest.raises(IncompatibleModels, match=r"shape \[8, 6\], but that is \[8, 7\]"):
        adapter.entries(entry(f"{Q}.weight", 8, 7))
    norm = read_adapter(write(tmp_path / "norm", {"model.norm.weight": torch.ones(3, 6)}))
    with pytest.raises(IncompatibleModels, match=r"its model\.norm\.weight is \[3, 6\]"):
        norm.entries(entry("model.norm.weight", 3, 7))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"use_dora": True}, "magnitudes"),
        ({"r": 5}, "their rank is not 5"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, config: dict[str, Any], part: str) -> None:
    directory = write(tmp_path, factors(Q, 8, 6), **config)
    with pytest.raises(IncompatibleModels, match=part) as caught:
        read_adapter(directory, field="models[0].model.lora")
    assert caught.value.field == "models[0].model.lora"


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{Q}.lora_A.weight": torch.ones(4, 6)},
        {f"{Q}.lora_B.bias": torch.ones(4)},
        {f"{Q}.lora_A.weight": torch.ones(4, 6, 3, 3), f"{Q}.lora_B.weight": torch.ones(8, 4, 1, 1)},
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 6)},
        {f"{Q}.ia3_l": torch.ones(8)},
        {"model.norm.weight": torch.ones(6), "model.norm.modules_to_save.weight": torch.zeros(6)},
        factors(Q, 8, 6) | {f"{Q}.lora_A.default.weight": torch.ones(4, 6)},
        {"model.norm.weight": torch.ones(6, dtype=torch.int8)},
    ],
    ids=["half", "bias-of-factor", "convolution", "tokens", "other-method", "twice", "factor-twice", "int8"],
)
def test_tensors_that_are_not_understood_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(IncompatibleModels, match="does not know what to do with"):
        read_adapter(write(tmp_path, tensors))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_adapter(tmp_path: Path, value: float) -> None:
    parts = factors(Q, 8, 6) | {"model.norm.weight": torch.ones(6)}
    for number, (name, part) in enumerate(parts.items()):
        bad = part.clone()
        bad.view(-1)[3] = value
        directory = write(tmp_path / f"style-{number}", parts | {name: bad})
        adapter = read_adapter(directory, field="models[0].model.lora")
        tensor = "model.norm.weight" if part.dim() == 1 else f"{Q}.weight"
        weight = torch.zeros(6 if part.dim() == 1 else (8, 6))
        with pytest.raises(CorruptCheckpoint, match=f"{name} of the adapter style-{number}") as caught:
            adapter.apply(tensor, MemoryRows(tensor, weight)).read(0, 1)
        assert caught.value.field == "models[0].model.lora"


def test_a_matrix_that_is_stored_whole_gets_its_factors_all_the_same(tmp_path: Path) -> None:
    # PEFT writes both for an embedding that it enlarged and trains factors of.
    parts = factors(Q, 8, 6)
    whole = torch.randn(8, 6)
    adapter = read_adapter(write(tmp_path, parts | {f"{Q}.base_layer.weight": whole}))
    total = whole + 2 * parts[f"{Q}.lora_B.weight"] @ parts[f"{Q}.lora_A.weight"]
    assert torch.allclose(read(adapter, f"{Q}.weight", torch.zeros(8, 6)), total, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "names", "brings"),
    [
        ({"modules_to_save": ["lm_head"]}, ("lm_head",), True),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, ("lm_head", "model.embed_tokens"), True),
        ({"ensure_weight_tying": True}, ("lm_head", "model.embed_tokens"), False),
        ({}, ("lm_head", "model.embed_tokens"), False),
        ({}, ("model.embed_tokens",), False),
    ],
)
def test_whose_head_an_adapter_brings(
    tmp_path: Path, config: dict[str, Any], names: tuple[str, ...], brings: bool
) -> None:
    tensors = {f"{name}.weight": torch.ones(8, 6) for name in names}
    assert read_adapter(write(tmp_path, tensors, **config)).brings_head is brings


def test_files_that_cannot_be_read_name_the_adapter(tmp_path: Path) -> None:
    directory = write(tmp_path / "style", factors(Q, 8, 6))
    (directory / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptCheckpoint, match="'style'") as caught:
        read_adapter(directory, field="models[0].model.lora")
    assert caught.value.field == "models[0].model.lora"


@pytest.mark.parametrize("alpha", ["x", float("nan")])
def test_a_scale_that_cannot_be_is_refused(tmp_path: Path, alpha: Any) -> None:
    with pytest.raises(AIDocksError):
        read_adapter(write(tmp_path, factors(Q, 8, 6), lora_alpha=alpha))


@pytest.mark.parametrize("rank", ["x", -1, True, 1 << 40, None])
def test_settings_that_cannot_be_are_refused(tmp_path: Path, rank: Any) -> None:
    with pytest.raises(AIDocksError):
        read_adapter(write(tmp_path, factors(Q, 8, 6), rank_pattern={"q_proj": rank}))


def test_directories_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    directory = write(tmp_path / "a", factors(Q, 8, 6))
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(UnsafeCheckpoint, match=r"only as adapter_model\.bin"):
        read_adapter(directory)
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(UnknownModel, match=r"no adapter_model\.safetensors"):
        read_adapter(directory)


def test_reading_needs_no_torch_before_values_do(tmp_path: Path) -> None:
    directory = write(tmp_path, factors(Q, 8, 6))
    stored, _ = read_header(directory / "adapter_model.safetensors")
    assert read_adapter(directory).factors[f"{Q}.weight"].a == stored[f"{PREFIX}{Q}.lora_A.weight"]
