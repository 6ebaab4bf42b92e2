from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from aidocks.errors import InvalidSpec
from aidocks.specs.laser import LaserSpec
from aidocks.specs.read import build_spec

BASE = {"base_model_name": "m", "laser_model_name": "m-laser"}


def spec(**fields: Any) -> LaserSpec:
    return LaserSpec.model_validate(BASE | fields)


def test_the_original_bodies_work() -> None:
    original = LaserSpec.model_validate(
        {
            "base_model_name": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            "laser_model_name": "tiny-laser",
            "top_k_layers": 15,
        }
    )
    assert original.num_candidates == 15
    assert original.layers is None
    full = spec(publish=True, trainer="LHC88", top_k_layers=2, seqlen=64, mode="perplexity")
    assert (full.num_candidates, full.seqlen, full.trainer) == (2, 64, "LHC88")


def test_defaults_survive_json() -> None:
    assert spec().num_candidates == 30
    assert spec(candidates=3).num_candidates == 3
    assert spec(selection="exhaustive").num_candidates is None
    given = spec(layers="16-18,3", kinds="k_proj, v_proj")
    assert LaserSpec.model_validate_json(given.model_dump_json()) == given


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ("16-18", (16, 17, 18)),
        ("0, 2-3", (0, 2, 3)),
        ([1, "4-5"], (1, 4, 5)),
        ([7], (7,)),
        (7, (7,)),
        (None, None),
    ],
)
def test_layers_are_numbers_or_ranges(given: Any, layers: tuple[int, ...] | None) -> None:
    assert spec(layers=given).layers == layers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidates": 1, "top_k_layers": 1}, "not both"),
        ({"selection": "exhaustive", "candidates": 3}, "exhaustive"),
        ({"publish": True}, "trainer"),
        ({"mode": "benchmark"}, "not available"),
        ({"mode": "other"}, "perplexity"),
        ({"z_threshold": 0}, "greater than 0"),
        ({"z_threshold": float("nan")}, "finite number"),
        ({"layers": []}, "at least 1"),
        ({"layers": "9-3"}, "backwards"),
        ({"layers": "a-b"}, "'a-b' names no layers; write a range such as '16-25', or a list of numbers"),
        ({"layers": ["3", "x"]}, "'x' names no layers"),
        ({"layers": ["0-99999"]}, "'0-99999' goes beyond layer 9999"),
        ({"layers": [10_000]}, "less than or equal to 9999"),
        ({"layers": ["0-600"] * 1000}, "more than 1000 layers"),
        ({"layers": [-1]}, "greater than or equal to 0"),
        ({"kinds": []}, "at least 1"),
        ({"kinds": ["q_proj"] * 65}, "at most 64"),
        ({"chunks": 1}, "greater than or equal to 8"),
        ({"rule": "gut_feeling"}, "marchenko_pastur"),
        ({"laser_model_name": "../x"}, "pattern"),
        ({"trainer": "a/b"}, "pattern"),
        ({"unknown": 1}, "not permitted"),
        ({"rule": []}, "at least 1"),
        ({"keep": [0.5], "rule": "laserrmt"}, "fraction"),
        ({"keep": [1.5], "rule": "fraction"}, "less than 1"),
        ({"keep": "half", "rule": "fraction"}, "number"),
        ({"keep": 0.5, "selection": "snr"}, "fraction"),
        ({"rule": "optimal_shrinkage", "truncation": "activation_aware"}, "add 'weight'"),
        ({"objective": "beauty:prose"}, "known: perplexity"),
        ({"objective": "preference"}, "needs data"),
        ({"guards": ["accuracy:"] * 9}, "at most 8"),
        ({"guards": ["accuracy", "accuracy:capitals"]}, "'accuracy:capitals' is one of the guards already"),
        ({"guards": ["perplexity:prose"]}, "'perplexity:prose' is what decides already"),
        ({"output": "sparse"}, "factored"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**fields)


def test_lists_hold_everything_once() -> None:
    given = spec(
        layers=["3-5", 4, "1"],
        kinds="k_proj,q_proj,k_proj",
        rule="fraction, laserrmt, fraction",
        keep="0.5, 0.3,0.5",
        truncation=["weight", "weight"],
    )
    assert (given.layers, given.kinds) == ((3, 4, 5, 1), ("k_proj", "q_proj"))
    assert (given.rule, given.keep, given.truncation) == (("fraction", "laserrmt"), (0.5, 0.3), ("weight",))
    assert spec(rule="energy", keep=0.5).keep == (0.5,)
    assert LaserSpec.model_validate_json(given.model_dump_json()) == given


def test_where_everything_proposed_is_measured_the_original_rule_proposes() -> None:
    several = ("laserrmt", "marchenko_pastur", "gavish_donoho", "fraction")
    assert spec().rules == spec(selection="exhaustive").rules == several
    assert spec(selection="snr").rules == spec(selection="backward").rules == ("laserrmt",)
    assert spec(selection="snr", rule="screenot").rules == ("screenot",)


@pytest.mark.parametrize(("guards", "field"), [
    (["accuracy:x", "preference:y", "accuracy:x"], "guards[2]"), (["accuracy:x", "perplexity"], "guards[1]"),
])  # fmt: skip
def test_an_objective_twice_is_blamed_on_the_second(guards: list[str], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        build_spec(LaserSpec, BASE | {"guards": guards})
    assert caught.value.field == field


def test_rules_and_the_shares_that_they_keep() -> None:
    assert spec(rule="laserrmt").decisions == (("laserrmt", None),)
    given = spec(rule="fraction, energy, screenot", keep=[0.5, 0.9])
    assert given.decisions == (
        ("fraction", 0.5),
        ("fraction", 0.9),
        ("energy", 0.5),
        ("energy", 0.9),
        ("screenot", None),
    )
    assert spec(rule="optimal_shrinkage").truncations_of("optimal_shrinkage") == ("weight",)
    assert spec().truncations_of("laserrmt") == ("activation_aware",)


def test_objectives_in_short_and_in_full() -> None:
    given = spec(objective="accuracy:facts.jsonl", guards=["perplexity", {"metric": "accuracy", "data": "x"}])
    assert str(given.decisive) == "accuracy:facts.jsonl"
    assert [str(guard) for guard in given.guarding] == ["perplexity:prose", "accuracy:x"]
    assert str(spec(text="/a/b.txt").decisive) == "perplexity:/a/b.txt"
    assert LaserSpec.model_validate_json(given.model_dump_json()) == given
    assert spec().guarding == ()
    assert [str(guard) for guard in spec(text="/a/b.txt").guarding] == ["perplexity:prose"]
    assert spec(text="/a/b.txt", guards=[]).guarding == ()


def test_a_text_beside_an_objective_guards() -> None:
    questions = spec(objective="accuracy:facts.jsonl", text="/a/b.txt")
    assert str(questions.decisive) == "accuracy:facts.jsonl"
    assert [str(guard) for guard in questions.guarding] == ["perplexity:/a/b.txt"]
    assert [str(guard) for guard in spec(objective="accuracy").guarding] == ["perplexity:prose"]
    assert spec(objective="perplexity:/a/b.txt", text="/a/b.txt").guarding == ()
    assert [str(g) for g in spec(objective="accuracy", text="/a", guards=["perplexity"]).guarding] == [
        "perplexity:prose"
    ]


def test_every_field_explains_itself() -> None:
    for name, field in LaserSpec.model_json_schema()["properties"].items():
        assert field.get("description"), name
