"""What a request may say, and what is answered to what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aidocks.errors import InvalidSpec
from aidocks.moe.operation import BuildMoE
from aidocks.specs.moe import MoESpec
from aidocks.specs.read import build_spec, parse_json, read_spec_file

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


def expert(**changes: Any) -> dict[str, Any]:
    return {"source_model": "a", "positive_prompts": ["chat"], **changes}


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
    nothing = {"negative_prompts": None, "positive_texts": None, "residual_scale": None, "noise_scale": None}
    fields = {"gate_mode": None, "dtype": None, "architecture": None, "shared_experts": None}
    spec = build_spec(MoESpec, body(**fields, experts=[expert(**nothing), expert(positive_prompts=["x"])]))
    assert (spec.gate_mode, spec.dtype, spec.num_experts_per_token) == ("hidden", None, 2)
    assert (spec.architecture, spec.shared_experts) == (None, ())
    first = spec.experts[0]
    assert (first.negative_prompts, first.positive_texts) == ((), ())
    assert (first.residual_scale, first.noise_scale) == (1.0, 0.0)


# A file of mergekit's mixture-of-experts script, with all that it may say.
MERGEKIT = """
base_model: org/base
gate_mode: cheap_embed  # one of "hidden", "cheap_embed", or "random"
dtype: bfloat16
experts_per_token: 2
architecture: qwen
shared_experts:
  - source_model: org/shared
    positive_prompts:  # required by gate modes that are made of prompts
      - "blah blah"
    residual_scale: 0.1
experts:
  - source_model: org/one
    positive_prompts:
      - "def f(x):"
    negative_prompts:
      - "chat"
    noise_scale: 0.01
  - source_model: org/two
    positive_prompts: ["question"]
"""


def test_a_mergekit_file_works_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(MERGEKIT)
    spec = build_spec(MoESpec, read_spec_file(path))
    assert (spec.gate_mode, spec.dtype, spec.architecture) == ("cheap_embed", "bfloat16", "qwen_moe")
    assert (spec.experts[0].noise_scale, spec.shared_experts[0].residual_scale) == (0.01, 0.1)
    assert spec.experts[0].negative_prompts == ("chat",)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("mixtral", "mixtral"),
        ("qwen", "qwen_moe"),
        ("qwen3", "qwen_moe"),
        ("qwen2_moe", "qwen_moe"),
        ("qwen3_moe", "qwen_moe"),
        (None, None),
    ],
)
def test_architectures_have_the_names_that_people_know(given: str | None, meant: str | None) -> None:
    assert build_spec(MoESpec, body(architecture=given)).architecture == meant


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"experts": []}, "experts", "2 to 256 experts, not 0"),
        ({"experts": [expert()]}, "experts", "2 to 256 experts, not 1"),
        ({"experts_per_token": 3}, "experts_per_token", "3 of 2 experts"),
        ({"experts_per_token": 0}, "experts_per_token", "1"),
        ({"dtype": "int8"}, "dtype", "bfloat16"),
        ({"gate_mode": "hiden"}, "gate_mode", "hidden"),
        (
            {"experts": [expert(), expert(positive_prompts=[])]},
            "experts[1].positive_prompts",
            "needs prompts",
        ),
        (
            {"gate_mode": "cheap_embed", "experts": [{"source_model": "a"}, expert()]},
            "experts[0].positive_prompts",
            "cheap_embed",
        ),
        ({"experts": [expert(positive_prompts=["x", " "])]}, "experts[0].positive_prompts", "blank"),
        ({"experts": [expert(), expert(source_model="b")]}, "experts[1].positive_prompts", "identical"),
        (
            {"gate_mode": "fitted", "experts": [expert(), {"source_model": "b"}]},
            "experts[1].positive_texts",
            "example",
        ),
        (
            {"gate_mode": "trained", "experts": [{"source_model": "b"}] * 2},
            "experts[0].positive_texts",
            "example",
        ),
        (
            {"gate_mode": "fitted", "experts": [expert(), expert(source_model="b")]},
            "experts[1].positive_texts",
            "same example texts",
        ),
        (
            {"gate_mode": "trained", "experts": [{"source_model": m, "dataset": "./a.txt"} for m in "ab"]},
            "experts[1].positive_texts",
            "same example texts",
        ),
        ({"experts": [expert(residual_scale=0), expert()]}, "experts[0].residual_scale", "0"),
        ({"experts": [expert(noise_scale=-1), expert()]}, "experts[0].noise_scale", "0"),
        ({"architecture": "deepseek"}, "architecture", "remote code"),
        ({"architecture": "llama"}, "architecture", "mixtral"),
        (
            {"architecture": "mixtral", "shared_experts": [{"source_model": "s", "positive_prompts": ["x"]}]},
            "shared_experts",
            "no place",
        ),
        (
            {"architecture": "qwen_moe", "shared_experts": [{"source_model": "s"}]},
            "shared_experts[0].positive_prompts",
            "needs prompts",
        ),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit", "not both"),
        ({"fit_tokens": 10}, "fit_tokens", "64"),
        ({"gate_steps": 0}, "gate_steps", "1"),
        ({"gate_learning_rate": 0}, "gate_learning_rate", "0"),
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
    shared = [{"source_model": "s", "positive_prompts": ["x"]}]
    inputs = BuildMoE().inputs(build_spec(MoESpec, body(architecture="qwen_moe", shared_experts=shared)))
    assert inputs == {
        "base_model": "base",
        "experts[0].source_model": "a",
        "experts[1].source_model": "b",
        "shared_experts[0].source_model": "s",
    }


def test_prompts_are_example_texts_of_gates_that_learn() -> None:
    for mode in ("fitted", "trained"):
        assert build_spec(MoESpec, body(gate_mode=mode)).gate_mode == mode
