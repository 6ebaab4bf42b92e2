"""Ranges in requests: found, checked, and replaced by numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.errors import InvalidSpec
from aidocks.merge.evolve.genome import checked_genome
from aidocks.specs.merge_evolve import EXAMPLE, MergeEvolveSpec
from aidocks.specs.read import build_spec
from aidocks.specs.search_space import Genome, lift_ranges, read_genome

RANGE = {"min": 0, "max": 1}


def request(weight: Any, **fields: Any) -> dict[str, Any]:
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": weight}}]
    return {"merge_method": "linear", "models": models, "objective": "perplexity:prose"} | fields


def genome(weight: Any, **fields: Any) -> Genome:
    return read_genome(*lift_ranges(request(weight, **fields)))


def weight_of(document: dict[str, Any]) -> Any:
    return document["models"][1]["parameters"]["weight"]


@given(
    low=st.floats(-1e3, 1e3),
    width=st.floats(1e-3, 1e3),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_values_survive_the_way_through_a_request(low: float, width: float, shares: list[float]) -> None:
    high = low + width
    found = genome({"min": low, "max": high, "points": 3})
    values = found.values(shares)
    assert all(low <= value <= high for value in values)
    assert found.shares(values) == pytest.approx(shares, abs=2e-6)
    # A value is its own nearest: what is written and read again is the same candidate.
    assert found.values(found.shares(values)) == pytest.approx(values, abs=1e-9 * max(1, abs(low)))
    document = found.express(values)
    assert weight_of(document) == list(values)
    assert found.document == genome({"min": low, "max": high, "points": 3}).document


@given(
    weight=st.recursive(st.floats(-5, 5), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=4)
)
def test_a_request_without_ranges_stays_as_it_is(weight: Any) -> None:
    given_request = request(weight)
    before = copy.deepcopy(given_request)
    assert lift_ranges(given_request) == (before, {})
    assert given_request == before


def test_numbers_stand_where_ranges_were() -> None:
    found = genome(
        [
            {"filter": "mlp", "value": [RANGE, 0.5, {"min": 0, "max": 2, "initial": 0.5}]},
            {"value": {"min": 0, "max": 1, "name": "rest"}},
        ]
    )
    assert [variable.name for variable in found.variables] == [
        "models[1].parameters.weight[0].value[0]",
        "models[1].parameters.weight[0].value[2]",
        "rest",
    ]
    assert found.initial == (0.5, 0.5, 0.5)
    written = weight_of(found.express((0.1, 1.9, 0.3)))
    assert written == [{"filter": "mlp", "value": [0.1, 0.5, 1.9]}, {"value": 0.3}]


def test_one_name_is_one_variable() -> None:
    shared = {"min": 0, "max": 1, "name": "w"}
    found = genome([{"filter": "mlp", "value": shared}, {"value": dict(shared)}])
    assert len(found.variables) == 1
    assert weight_of(found.express((0.25,))) == [{"filter": "mlp", "value": 0.25}, {"value": 0.25}]


def test_points_are_a_gradient() -> None:
    found = genome({"min": 0, "max": 1, "points": 4, "initial": [0, 0.2, 0.4, 1]})
    assert found.initial == (0, 0.2, 0.4, 1)
    assert [variable.name[-3:] for variable in found.variables] == ["[0]", "[1]", "[2]", "[3]"]


@pytest.mark.parametrize(
    ("weight", "field", "says"),
    [
        ({"min": 1, "max": 1}, "models[1].parameters.weight.max", "nothing to search"),
        ({"min": 0, "max": 1, "initial": 1.5}, "models[1].parameters.weight.initial", "outside of its range"),
        ({"max": 1}, "models[1].parameters.weight.min", "required"),
        ({"min": -1.7e308, "max": 1.7e308}, "models[1].parameters.weight.min", "greater than"),
        ({"min": 0, "max": [[[[]]]]}, "models[1].parameters.weight.max", "number"),
        ({"min": 0, "max": True}, "models[1].parameters.weight.max", "number"),
        ({"min": 0, "max": "much"}, "models[1].parameters.weight.max", "number"),
        ({"min": 0, "max": 1, "stop": 2}, "models[1].parameters.weight.stop", "no such field"),
        (
            {"min": 0, "max": 1, "points": 3, "initial": [0, 1]},
            "models[1].parameters.weight.initial",
            "2 values",
        ),
        ([{"min": 0, "max": 1, "points": 3}], "models[1].parameters.weight[0].points", "gradient"),
        (
            [
                {"filter": "a", "value": {**RANGE, "name": "w"}},
                {"value": {"min": 0, "max": 2, "name": "w"}},
            ],
            "models[1].parameters.weight[1].value",
            "differ",
        ),
    ],
)
def test_a_range_that_cannot_be_searched_is_named(weight: Any, field: str, says: str) -> None:
    with pytest.raises(InvalidSpec, match=says) as caught:
        build_spec(MergeEvolveSpec, request(weight))
    assert caught.value.field == field
    assert caught.value.hint


def test_only_numbers_that_the_method_takes_are_searched() -> None:
    with pytest.raises(InvalidSpec, match="is a switch, not a number") as caught:
        checked_genome(build_spec(MergeEvolveSpec, request(1, parameters={"normalize": RANGE})))
    assert caught.value.field == "parameters.normalize"
    with pytest.raises(InvalidSpec, match="no parameter of linear") as caught:
        checked_genome(build_spec(MergeEvolveSpec, request(1, parameters={"wieght": RANGE})))
    assert "weight" in str(caught.value.hint)
    with pytest.raises(InvalidSpec, match="no merge method 'liner'") as caught:
        checked_genome(build_spec(MergeEvolveSpec, request(RANGE, merge_method="liner")))
    assert caught.value.field == "merge_method"
    ties = request(1, merge_method="ties", parameters={"density": {"min": 0, "max": 1.5, "points": 2}})
    with pytest.raises(InvalidSpec, match="'density'") as caught:
        checked_genome(build_spec(MergeEvolveSpec, ties))
    assert caught.value.field == "parameters.density.max"


def test_whole_numbers_are_searched_where_the_method_takes_them() -> None:
    parameters = {"max_iter": {"min": 2, "max": 9, "initial": 3}, "tol": {"min": 0, "max": 1}}
    asked = build_spec(MergeEvolveSpec, request(1, merge_method="karcher", parameters=parameters))
    found = checked_genome(asked)
    assert [variable.is_whole for variable in found.variables] == [True, False]
    assert found.initial == (3, 0.5)
    assert found.values((0.5, 0.5)) == (6, 0.5)
    written = asked.merge(found.values((0.9, 0.5))).parameters["max_iter"]
    assert (written, type(written)) == (8, int)


def test_a_request_that_searches_nothing_is_told_how() -> None:
    with pytest.raises(InvalidSpec, match="Nothing is searched") as caught:
        build_spec(MergeEvolveSpec, request(0.5))
    assert "{min: 0, max: 1}" in str(caught.value.hint)


def test_ranges_may_stand_apart() -> None:
    inline = build_spec(MergeEvolveSpec, request({"min": 0, "max": 2, "initial": 0.5}))
    apart = build_spec(
        MergeEvolveSpec, request(0.5, search={"models[1].parameters.weight": {"min": 0, "max": 2}})
    )
    assert inline.genome == apart.genome
    for place in ("seed", "models[7].parameters.weight", "models[1].model", "models[1]", "merge_method"):
        with pytest.raises(InvalidSpec, match="no number") as caught:
            build_spec(MergeEvolveSpec, request(0.5, search={place: {"min": 0, "max": 2}}))
        assert caught.value.field == f"search.{place}"


def test_specs_round_trip_with_their_ranges() -> None:
    spec = build_spec(MergeEvolveSpec, EXAMPLE)
    again = MergeEvolveSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert again.genome == spec.genome
    assert spec.merge((1.25,)).models[1].parameters["weight"] == 1.25  # type: ignore[index]


def test_the_rest_of_a_request_is_checked_as_a_merge() -> None:
    for fields, field in (
        ({"objective": "bleu:x"}, "objective"),
        ({"guards": ["perplexity:prose"]}, "guards[0]"),
        ({"seed": RANGE}, "seed"),
        ({"generation": 3}, "generation"),
    ):
        with pytest.raises(InvalidSpec) as caught:
            build_spec(MergeEvolveSpec, request(RANGE, **fields))
        assert caught.value.field == field


@pytest.mark.parametrize("given_range", [5, [1], None, "0..1"])
def test_what_is_no_range_at_all_is_named(given_range: Any) -> None:
    place = "models[1].parameters.weight"
    with pytest.raises(InvalidSpec, match="Must be a range") as caught:
        build_spec(MergeEvolveSpec, request(1, search={place: given_range}))
    assert caught.value.field == f"search.{place}"
    assert "{min: 0, max: 1}" in str(caught.value.hint)


@pytest.mark.parametrize("inside", [lambda inner: [inner], lambda inner: {"value": inner}])
def test_a_request_of_any_depth_is_answered(inside: Any) -> None:
    weight: Any = RANGE
    for _ in range(5000):
        weight = inside(weight)
    for fields in ({"parameters": {"weight": weight}}, {"parameters": {"weight": {"min": weight, "max": 1}}}):
        with pytest.raises(InvalidSpec) as caught:
            build_spec(MergeEvolveSpec, request(1, **fields))
        assert str(caught.value.field).startswith("parameters.weight")
