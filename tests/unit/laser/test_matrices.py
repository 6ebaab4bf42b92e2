from __future__ import annotations

from dataclasses import dataclass

import pytest

from aidocks.errors import InvalidSpec
from aidocks.laser.matrices import Matrix, find_matrices, select_matrices


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
        ((2,), ("down_proj",), "kinds", None, None),
    ],
)
def test_unknown_layers_and_kinds_name_the_known_ones(
    layers: tuple[int, ...] | None, kinds: tuple[str, ...] | None, field: str, value: object, hint: str | None
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        select_matrices(find_matrices(LLAMA), layers, kinds, "m")  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.value) == (field, value)
    assert hint is None or hint in str(caught.value.hint)


def test_a_model_without_matrices() -> None:
    with pytest.raises(InvalidSpec) as caught:
        select_matrices((), None, None, "m")
    assert caught.value.field == "base_model_name"
