"""What a request's parameters are worth for every tensor, as mergekit's own planner resolved the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.errors import InvalidSpec
from aidocks.merge.method import Method, Parameter, find_method
from aidocks.merge.parameters import WeightSums, find_value, read_settings
from tests.support.merging import llama, plan

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "merge_plan"
NAMES = ("math", "story", "python", "stories")
WEIGHT = Parameter("weight", float, scope="model", at_least=-10, at_most=10)
ROUNDS = Parameter("rounds", int, 3, at_least=1)
SURE = Parameter("sure", bool, False)
METHOD = Method("mine", lambda: None, (WEIGHT, ROUNDS, SURE), base="required", ignored=("old",))


def value(parameter: Parameter, setting: Any, tensor: str = "x", t: float = 0.0) -> Any:
    from aidocks.specs.merge_config import ModelInput

    parameters = ModelInput(model="a", parameters={parameter.name: setting}).parameters
    settings, _ = read_settings(METHOD, parameters, "parameters")
    return find_value(parameter, [settings], tensor, t)


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("*.yaml")))
def test_every_tensor_gets_the_values_that_mergekit_gives_it(case: str) -> None:
    expected = json.loads((GOLDEN / f"{case}.json").read_text())
    target = plan((GOLDEN / f"{case}.yaml").read_text(), *map(llama, NAMES))
    assert target.config["num_hidden_layers"] == expected["layers"]
    assert {tensor.name for tensor in target.tensors} == set(expected["tensors"])
    for tensor in target.tensors:
        wanted = expected["tensors"][tensor.name]
        assert [target.sources[o.source].reference for o in tensor.operands] == wanted["models"]
        assert [o.tensor for o in tensor.operands] == wanted.get(
            "tensors", [tensor.name] * len(tensor.operands)
        )
        if find_method(tensor.method or "").base != "none":
            assert tensor.base == wanted.get("base")
        for name, given_value in tensor.values.items():
            theirs = wanted["values"][name]
            if name == "scale":  # none given is a factor of one
                theirs = [1.0 if number is None else number for number in theirs]
            ours = list(given_value) if isinstance(given_value, tuple) else given_value
            assert ours == theirs, (tensor.name, name)


def test_numbers_are_interpolated_and_choices_picked() -> None:
    assert [value(WEIGHT, [0, 1, 0], t=t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]
    assert [value(SURE, [True, False, True], t=t) for t in (0, 0.4, 0.5, 0.99, 1)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert [value(ROUNDS, [1, 4], t=t) for t in (0, 0.5, 1)] == [1, 2, 4]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_between_its_values(values: list[float], t: float) -> None:
    found = value(WEIGHT, values, t=t)
    assert min(values) - 1e-12 <= found <= max(values) + 1e-12
    assert value(WEIGHT, values, t=0) == values[0]
    assert value(WEIGHT, values, t=1) == pytest.approx(values[-1])


def test_the_first_filter_that_fits_counts_and_none_leaves_it_to_the_next_level() -> None:
    setting = [{"filter": "attn", "value": 1}, {"filter": "attn.q", "value": 2}, {"filter": "*", "value": 3}]
    assert value(WEIGHT, setting, "layers.0.attn.q") == 1
    assert value(WEIGHT, setting, "norm") == 3
    assert value(WEIGHT, {"filter": "attn", "value": 1}, "norm") is None
    assert value(ROUNDS, {"filter": "attn", "value": 1}, "norm") == 3


@pytest.mark.parametrize(("text", "number"), [("1e-1", 0.1), ("1e1", 10), ("-.5", -0.5)])
def test_texts_that_are_numbers_count_as_such(text: Any, number: float) -> None:
    assert value(WEIGHT, text) == number


@pytest.mark.parametrize(
    ("parameter", "setting", "field", "wrong"),
    [
        (WEIGHT, 11, "parameters.weight", 11),
        (WEIGHT, "much", "parameters.weight", "much"),
        (WEIGHT, "nan", "parameters.weight", "nan"),
        (WEIGHT, [0, 11], "parameters.weight[1]", 11),
        (WEIGHT, {"value": "x"}, "parameters.weight.value", "x"),
        (WEIGHT, [{"filter": "a", "value": 0}, {"value": [1, -11]}], "parameters.weight[1].value[1]", -11),
        (ROUNDS, 1.5, "parameters.rounds", 1.5),
        (ROUNDS, 0, "parameters.rounds", 0),
        (WEIGHT, True, "parameters.weight", True),
        (SURE, "maybe", "parameters.sure", "maybe"),
        (SURE, 2, "parameters.sure", 2),
    ],
)
def test_a_wrong_value_is_refused_where_it_stands(
    parameter: Parameter, setting: Any, field: str, wrong: Any
) -> None:
    with pytest.raises(InvalidSpec) as refused:
        value(parameter, setting)
    assert (refused.value.field, refused.value.value) == (field, wrong)
    ranges = {"weight": "from -10 to 10", "rounds": "a whole number of at least 1", "sure": "true or false"}
    assert ranges[parameter.name] in refused.value.message


def test_an_unknown_parameter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidSpec) as refused:
        read_settings(METHOD, {"wieght": 0.5}, "models[1].parameters")
    assert (refused.value.field, refused.value.value) == ("models[1].parameters.wieght", 0.5)
    assert "'weight'" in str(refused.value)
    assert "weight, rounds, sure" in str(refused.value)


@pytest.mark.parametrize("name", ["old", "t", "normalize", "int8_mask", "embed_slerp", "rectify_embed"])
def test_what_other_methods_have_or_had_is_accepted_with_a_note(name: str) -> None:
    settings, notes = read_settings(METHOD, {name: True}, "parameters")
    assert settings.rules == {}
    assert len(notes) == 1
    assert f"parameters.{name} has no effect" in notes[0]
    assert "'mine'" in notes[0]


def test_a_parameter_of_the_tensor_has_no_effect_beside_a_model() -> None:
    settings, notes = read_settings(METHOD, {"sure": True}, "models[0].parameters", of_model=True)
    assert settings.rules == {}
    assert "models[0].parameters.sure" in notes[0]


def test_weights_that_nothing_can_be_divided_by_are_refused() -> None:
    sums = WeightSums(find_method("linear"))
    with pytest.raises(InvalidSpec) as refused:
        sums.add(
            "model.norm.weight", {"weight": (1.0, -1.0), "normalize": True}, "models[0].parameters.weight"
        )
    assert refused.value.field == "models[0].parameters.weight"
    assert refused.value.value == [1.0, -1.0]
    assert "model.norm.weight" in refused.value.message
    assert "normalize: false" in str(refused.value)


def test_weights_that_do_not_sum_to_one_are_noted_where_nothing_divides() -> None:
    sums = WeightSums(find_method("linear"))
    for number, weights in enumerate([(0.5, 0.5), (0.5, 0.3), (1.0, 1.0)]):
        sums.add(f"tensor{number}", {"weight": weights, "normalize": False}, "x")
    (note,) = sums.notes()
    assert "tensor1" in note
    assert "0.8" in note
    assert "1 more" in note
    silent = WeightSums(find_method("ties"))
    silent.add("x", {"weight": (0.0, 0.0), "normalize": True}, "x")
    assert silent.notes() == []
