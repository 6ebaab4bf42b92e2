"""Which tensors belong to which layer, of any architecture that names them so."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.merge.layers import Layout, find_layout, interpolation
from tests.support.merging import llama, model


def layout(names: Iterable[str], **config: object) -> Layout:
    return find_layout(model("m", dict.fromkeys(names, (4, 4)), config))


def test_a_llama() -> None:
    found = find_layout(llama("m", head=True))
    assert found.before == ("model.embed_tokens.weight",)
    assert found.after == ("model.norm.weight", "lm_head.weight")
    assert found.main is not None
    assert (found.main.prefix, len(found.main)) == ("model.layers.", 5)
    assert found.main.name(7, "mlp.up_proj.weight") == "model.layers.7.mlp.up_proj.weight"


def test_a_gpt2() -> None:
    found = layout(
        ["wte.weight", "wpe.weight", "h.0.ln_1.bias", "h.1.ln_1.bias", "ln_f.weight"],
        n_layer=2,
    )
    assert found.before == ("wte.weight", "wpe.weight")
    assert found.after == ("ln_f.weight",)
    assert found.main is not None
    assert found.main.layers == (("ln_1.bias",), ("ln_1.bias",))


def test_a_mixture_of_experts_has_one_list_of_layers() -> None:
    names = [f"model.layers.{n}.mlp.experts.{e}.w1.weight" for n in range(2) for e in range(3)]
    found = layout(names, num_hidden_layers=2)
    assert [(part.prefix, len(part)) for part in found.lists] == [("model.layers.", 2)]


def test_a_vision_tower_is_not_the_language_model() -> None:
    names = [f"vision_tower.layers.{n}.w" for n in range(3)] + [
        f"language_model.layers.{n}.w" for n in range(2)
    ]
    found = layout(names, text_config={"num_hidden_layers": 2}, num_hidden_layers=9)
    assert found.main is not None
    assert found.main.prefix == "language_model.layers."
    assert len(found.lists) == 2


@pytest.mark.parametrize(
    ("name", "is_before"),
    [
        ("gpt_neox.embed_in.weight", True),
        ("embed_out.weight", False),
        ("bert.embeddings.LayerNorm.weight", True),
        ("bert.pooler.dense.weight", False),
        ("transformer.word_embeddings.weight", True),
        ("score.weight", False),
    ],
)
def test_what_comes_before_the_layers_and_what_after(name: str, is_before: bool) -> None:
    found = layout([name, "layers.0.w"], num_hidden_layers=1)
    assert (found.before, found.after) == (((name,), ()) if is_before else ((), (name,)))


def test_numbers_that_are_not_all_there_are_no_list() -> None:
    found = layout(["classifier.0.weight", "classifier.3.weight", "layers.0.w"], num_hidden_layers=1)
    assert found.after == ("classifier.0.weight", "classifier.3.weight")


@given(st.integers(1, 200))
def test_gradients_go_from_the_first_layer_to_the_last(layers: int) -> None:
    places = [interpolation(layer, layers) for layer in range(layers)]
    assert places == sorted(places)
    assert places[-1] == 1
    assert places[0] == (0 if layers > 1 else 1)
