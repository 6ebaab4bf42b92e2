"""What a request may say, and what is answered to what it may not."""

from __future__ import annotations

from typing import Any

import pytest

from aidocks.errors import InvalidSpec
from aidocks.moe.operation import BuildMoE
from aidocks.specs.moe import MoESpec
from aidocks.specs.read import build_spec, parse_json

# As it was printed where the endpoint was first described, missing commas included.
ORIGINAL_BODY = """
{
    "base_model": "cognitivecomputations/dolphin-2.6-mistral-7b-dpo",
    "gate_mode": "hidden",
    "dtype": "bfloat16",
    "experts":[
        {
            "source_model": "teknium/OpenHermes-2.5-Mistral-7B",
            "positive_prompts": [
                "instruction"
                "solutions"
            ]
        },
        {
            "source_model": "openaccess-ai-collective/DPOpenHermes-7B",
            "positive_prompts": [
                "mathematics"
                "code"
            ],
            "negative_prompts": [
                "chat"
                "questions"
            ]
        }
    ]
}
"""


def body(**changes: Any) -> dict[str, Any]:
    experts = [
        {"source_model": "a", "positive_prompts": ["chat"]},
        {"source_model": "b", "positive_prompts": ["code"]},
    ]
    return {"base_model": "base", "experts": experts, **changes}


def test_the_original_body_works_as_it_is() -> None:
    spec = build_spec(MoESpec, parse_json(ORIGINAL_BODY))
    assert spec.experts[0].positive_prompts == ("instruction", "solutions")
    assert spec.experts[0].negative_prompts == ()
    assert (spec.gate_mode, spec.dtype, spec.num_experts_per_token) == ("hidden", "bfloat16", 2)


def test_null_stands_for_the_default() -> None:
    experts = [{"source_model": "a", "positive_prompts": ["x"], "negative_prompts": None}]
    spec = build_spec(MoESpec, body(gate_mode=None, dtype=None, experts=experts))
    assert (spec.gate_mode, spec.dtype, spec.num_experts_per_token) == ("hidden", None, 1)


def expert(**changes: Any) -> dict[str, Any]:
    return {"source_model": "a", "positive_prompts": ["chat"], **changes}


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"experts": []}, "experts", "1 to 256 experts"),
        ({"experts_per_token": 3}, "experts_per_token", "3 of 2 experts"),
        ({"experts": [expert()], "experts_per_token": 2}, "experts_per_token", "1 expert"),
        ({"dtype": "int8"}, "dtype", "bfloat16"),
        ({"gate_mode": "hiden"}, "gate_mode", "hidden"),
        (
            {"experts": [expert(), expert(positive_prompts=[])]},
            "experts[1].positive_prompts",
            "needs prompts",
        ),
        (
            {"gate_mode": "cheap_embed", "experts": [{"source_model": "a"}]},
            "experts[0].positive_prompts",
            "cheap_embed",
        ),
        ({"experts": [expert(positive_prompts=["x", " "])]}, "experts[0].positive_prompts", "blank"),
        ({"experts": [expert(), expert(source_model="b")]}, "experts[1].positive_prompts", "identical"),
        ({"publish": True}, "trainer", "needs `trainer`"),
        ({"expert": 1}, "expert", "no such field"),
        ({"name": "../up"}, "name", "letters, digits"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        build_spec(MoESpec, body(**changes))
    assert caught.value.field == field
    assert words in str(caught.value)


def test_only_wrong_elements_of_a_list_are_reported() -> None:
    with pytest.raises(InvalidSpec) as caught:
        build_spec(MoESpec, body(experts=[expert(), {"source_model": ""}]))
    assert [error["field"] for error in caught.value.errors] == ["experts[1].source_model"]


def test_random_gates_need_no_prompts() -> None:
    spec = build_spec(MoESpec, body(gate_mode="random", experts=[{"source_model": "a"}] * 2))
    assert spec.num_experts_per_token == 2


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("smollm2", "smollm2-moe-deadbeef"),
        ("org/Model.7B@main", "Model.7B-moe-deadbeef"),
        ("/models/my model/", "my-model-moe-deadbeef"),
        ("/models/...", "model-moe-deadbeef"),
        ("x" * 200, "x" * 83 + "-moe-deadbeef"),
    ],
)
def test_a_name_is_derived_from_base_and_job(base: str, name: str) -> None:
    spec = build_spec(MoESpec, body(base_model=base))
    assert BuildMoE().output_name(spec, "job-0193a7b1c2d-deadbeef") == name
    assert build_spec(MoESpec, body(name=name)).name == name


def test_inputs_are_named_by_field() -> None:
    inputs = BuildMoE().inputs(build_spec(MoESpec, body()))
    assert inputs == {
        "base_model": "base",
        "experts[0].source_model": "a",
        "experts[1].source_model": "b",
    }
