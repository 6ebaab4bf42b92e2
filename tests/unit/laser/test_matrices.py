from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import InvalidSpec
from aidocks.laser.matrices import Matrix, find_matrices, parse_address, select_matrices, stored_matrix


@dataclass(frozen=True)
class Entry:
    shape: tuple[int, ...]
    dtype: str = "BF16"


LLAMA = {
    "model.embed_tokens.weight": Entry((512, 64)),
    "model.layers.0.self_attn.q_proj.weight": Entry((64, 64)),
    "model.layers.0.self_attn.q_proj.bias": Entry((64,)),
    "model.layers.0.mlp.down_proj.weight": Entry((64, 176)),
    "model.layers.0.input_layernorm.weight": Entry((64,)),
    "model.layers.10.self_attn.q_proj.weight": Entry((64, 64)),
    "model.layers.2.self_attn.q_proj.weight": Entry((64, 64)),
    "lm_head.weight": Entry((512, 64)),
}


def names(entries: dict[str, Entry]) -> list[str]:
    return [matrix.name for matrix in find_matrices(entries)]  # type: ignore[arg-type]


def test_llama_in_the_order_of_its_layers() -> None:
    found = find_matrices(LLAMA)  # type: ignore[arg-type]
    assert [(m.layer, m.kind) for m in found] == [
        (0, "down_proj"),
        (0, "q_proj"),
        (2, "q_proj"),
        (10, "q_proj"),
    ]
    assert found[0] == Matrix(
        name="model.layers.0.mlp.down_proj.weight", layer=0, kind="down_proj", shape=(64, 176), dtype="BF16"
    )
    assert found[0].full_rank == 64


def test_other_architectures() -> None:
    assert names({"h.3.attn.c_attn.weight": Entry((128, 384)), "h.3.attn.bias": Entry((128, 128))}) == [
        "h.3.attn.c_attn.weight"
    ]
    # Two matrices of one kind in one layer, whose names end alike: both are addressed, each by its full name.
    bert = {
        "bert.encoder.layer.1.attention.output.dense.weight": Entry((128, 128)),
        "bert.encoder.layer.1.output.dense.weight": Entry((128, 512)),
        "bert.pooler.dense.weight": Entry((128, 128)),
    }
    assert len(names(bert)) == 2
    assert {m.kind for m in find_matrices(bert)} == {"dense"}  # type: ignore[arg-type]
    experts = {f"model.layers.4.block_sparse_moe.experts.{e}.w1.weight": Entry((64, 32)) for e in range(3)}
    assert {m.layer for m in find_matrices(experts)} == {4}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "entry", [Entry((4, 4), "I8"), Entry((4, 4), "F8_E4M3"), Entry((4,)), Entry((2, 4, 4)), Entry((1, 9))]
)
def test_what_cannot_be_reduced_is_left_out(entry: Entry) -> None:
    assert names({"layers.0.proj.weight": entry}) == []


def all_of(entries: dict[str, Entry]) -> list[Matrix]:
    return list(find_matrices(entries, all_weights=True))  # type: ignore[arg-type]


def test_all_weights_are_those_outside_of_layers_too() -> None:
    found = all_of(LLAMA)
    assert [m.address for m in found[-2:]] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert [m.layer for m in found] == [0, 0, 2, 10, None, None]
    assert [m.kind for m in found[-2:]] == ["lm_head", "embed_tokens"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("encoder.layers.1.self_attn.in_proj_weight", "in_proj_weight"),
        ("lstm.weight_ih_l0", "weight_ih_l0"),
        ("weight", "weight"),
    ],
)
def test_weights_of_other_names(name: str, kind: str) -> None:
    (found,) = all_of({name: Entry((6, 4))})
    assert (found.name, found.kind) == (name, kind)
    assert names({name: Entry((6, 4))}) == []


@pytest.mark.parametrize(
    "name", ["layers.0.proj.weight_scale_inv", "layers.0.proj.bias", "layers.0.A_log", "layers.0.weights"]
)
def test_what_is_no_weight(name: str) -> None:
    assert all_of({name: Entry((6, 4))}) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.experts.gate_up_proj", "gate_up_proj"),
        ("model.layers.3.mlp.experts.down_proj.weight", "down_proj"),
        ("model.layers.3.block_sparse_moe.input_linear.weight", "input_linear"),
    ],
)
def test_experts_of_one_tensor_are_matrices_of_their_own(name: str, kind: str) -> None:
    found = find_matrices({name: Entry((3, 8, 4))})  # type: ignore[dict-item]
    assert [m.address for m in found] == [f"{name}[{expert}]" for expert in range(3)]
    assert {(m.name, m.layer, m.kind, m.shape, m.expert is not None) for m in found} == {
        (name, 3, kind, (8, 4), True)
    }
    assert all_of({name: Entry((3, 8, 4))}) == list(found)
    assert all_of({name: Entry((3, 1, 4))}) == []
    assert all_of({name: Entry((3, 8, 4), "U8")}) == []
    assert all_of({name.replace("experts", "conv").replace("moe", "conv"): Entry((3, 8, 4))}) == []


def test_addresses_are_read_as_they_are_written() -> None:
    entries = LLAMA | {"model.layers.3.mlp.experts.down_proj": Entry((12, 8, 4))}
    for matrix in all_of(entries):
        assert parse_address(matrix.address) == (matrix.name, matrix.expert)


def test_a_stored_matrix_is_a_tensor_or_a_slice_of_one(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    fused = torch.randn(3, 8, 4).bfloat16()
    plain = torch.randn(6, 5)
    save_file({"layers.0.experts.up": fused, "layers.1.proj.weight": plain}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    *experts, matrix = find_matrices(checkpoint.entries)
    assert torch.equal(stored_matrix(checkpoint, matrix), plain)
    for number, expert in enumerate(experts):
        stored: Any = stored_matrix(checkpoint, expert)
        assert stored.dtype is torch.bfloat16
        assert torch.equal(stored, fused[number])


def test_layers_and_kinds_select() -> None:
    matrices = find_matrices(LLAMA)  # type: ignore[arg-type]
    chosen = select_matrices(matrices, (0, 2), ("q_proj",), "m")
    assert [m.layer for m in chosen] == [0, 2]
    assert select_matrices(matrices, None, None, "m") == matrices


@pytest.mark.parametrize(
    ("layers", "kinds", "field", "value", "hint"),
    [
        ((0, 3), None, "layers", 3, "0, 2, 10"),
        (None, ("q_proj", "proj"), "kinds", "proj", "down_proj, q_proj"),
        ((2, 10), ("down_proj",), "kinds", "down_proj", "Kinds in layers 2, 10: q_proj."),
    ],
)
def test_unknown_layers_and_kinds_name_the_known_ones(
    layers: tuple[int, ...] | None, kinds: tuple[str, ...] | None, field: str, value: object, hint: str
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        select_matrices(find_matrices(LLAMA), layers, kinds, "m")  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.value) == (field, value)
    assert hint in str(caught.value.hint)


def test_a_model_without_matrices() -> None:
    with pytest.raises(InvalidSpec) as caught:
        select_matrices((), None, None, "m")
    assert caught.value.field == "base_model_name"


def test_the_field_that_is_blamed_is_the_requests_own() -> None:
    with pytest.raises(InvalidSpec) as caught:
        select_matrices((), None, None, "m", field="model")
    assert caught.value.field == "model"
    outside = all_of({"embed.weight": Entry((9, 4))})
    with pytest.raises(InvalidSpec, match="no matrices in layer 0") as caught:
        select_matrices(outside, (0,), None, "m", field="model")
    assert "None of its weights belongs to a layer" in str(caught.value.hint)
    assert select_matrices(outside, None, ("embed",), "m", field="model") == tuple(outside)
