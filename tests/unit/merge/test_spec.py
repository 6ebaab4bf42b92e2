"""What a request for a merge may say: mergekit's files as they are, and what is answered to mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from aidocks.errors import InvalidSpec
from aidocks.merge.method import find_method, known_methods
from aidocks.merge.parameters import read_settings
from aidocks.specs.merge import EXAMPLE, MergeSpec
from aidocks.specs.merge_config import ModelToken, ZeroToken
from aidocks.specs.merge_settings import split_reference
from aidocks.specs.merge_yaml import shown_reference, to_public_yaml
from aidocks.specs.read import DOCUMENTS, build_spec, parse_yaml
from tests.support.documentation import blocks_of_all_pages

LINEAR: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}

# Files as people publish them with their models, each with some key or form that the others do not have.
WILD = {
    "slerp of two fine-tunes": """
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: OpenPipe/mistral-ft-optimized-1218
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "ties with a base that has no parameters": """
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: OpenPipe/mistral-ft-optimized-1218
    parameters:
      density: 0.5
      weight: 0.5
  - model: mlabonne/NeuralHermes-2.5-Mistral-7B
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "ties with gradients": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "frankenmerge with scales": """
slices:
- sources:
  - layer_range: [0, 8]
    model: org/llama-8b@main
- sources:
  - layer_range: [4, 12]
    model: org/llama-8b@main
    parameters:
      scale:
      - filter: o_proj
        value: 0.0
      - filter: down_proj
        value: 0.0
      - value: 1.0
merge_method: passthrough
dtype: bfloat16
""",
    "adapters, union of tokens": """
models:
  - model: org/base+org/adapter
    parameters: {weight: 1}
  - model:
      model: {path: org/other, revision: v2}
      lora: {path: org/adapter-2}
      override_architecture: null
    parameters:
      weight: 1e-1
merge_method: linear
tokenizer_source: union
chat_template: chatml
dtype: torch.bfloat16
out_dtype: float16
parameters:
""",
    "policies of tokens": """
merge_method: dare_ties
base_model: org/base
models:
  - model: org/one
  - model: org/two
parameters:
  lambda: 1
  weight: 0.5
  density: [0.4, 0.6]
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <|im_start|>:
      source: org/one
      force: true
    <|im_end|>:
      source: {kind: model_token, model: org/two, token_id: 2}
    <|unused|>:
      source:
        kind: zero
""",
    "what a search leaves behind": """
base_model: org/base
dtype: bfloat16
merge_method: della_linear
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 40]
        model: org/one
        parameters:
          density: 0.5
          epsilon: 0.4
          weight: [0.9, 0.2, 0.2, 0.95]
      - layer_range: [0, 40]
        model: org/base
parameters:
  lambda: 1.0
  normalize: 1.0
tokenizer: {}
""",
    "a module": """
modules:
  text_decoder:
    slices:
      - sources: [{model: org/one, layer_range: [0, 2]}]
        residual_weight: 0.1
merge_method: passthrough
parameters: {}
""",
}


@pytest.mark.parametrize("name", WILD)
def test_files_from_the_wild_are_requests(name: str) -> None:
    spec = build_spec(MergeSpec, parse_yaml(WILD[name]))
    assert MergeSpec.model_validate_json(spec.model_dump_json()) == spec
    assert build_spec(MergeSpec, parse_yaml(spec.as_yaml())) == spec


def test_references_in_long_form_are_the_short_ones() -> None:
    spec = build_spec(MergeSpec, parse_yaml(WILD["adapters, union of tokens"]))
    assert [model.model for model in spec.models or ()] == [
        "org/base+org/adapter",
        "org/other@v2+org/adapter-2",
    ]
    assert spec.inputs() == {
        "models[0].model": "org/base",
        "models[0].model.lora": "org/adapter",
        "models[1].model": "org/other@v2",
        "models[1].model.lora": "org/adapter-2",
    }
    assert (spec.dtype, spec.out_dtype) == ("bfloat16", "float16")
    assert spec.vocabulary is not None
    assert spec.vocabulary.source == "union"
    assert spec.parameters == {}


LOCAL = """
stages:
- name: mixed
  merge_method: linear
  models: [{model: /home/me/one+~/adapters/two}, {model: ./three}]
  parameters: {weight: 0.5}
merge_method: slerp
base_model: mixed
slices:
- base_model: ../four
  sources:
  - {model: mixed, layer_range: [0, 2]}
  - {model: ../four, layer_range: [0, 2]}
parameters: {t: [{filter: /home/me, value: 0.5}, {value: 0.1}]}
tokenizer:
  source: /home/me/one
  tokens:
    a: {source: ./three}
    model: {source: {kind: model_token, model: /home/me/one, token: ./b}}
compute_dtype: float64
seed: 3
name: result
text: [/home/me/book.txt]
chunks: 4
seqlen: 16
evaluate: true
dry_run: true
max_shard_size: 1GB
"""


def test_what_is_published_of_a_merge_is_the_merge_alone() -> None:
    spec = build_spec(MergeSpec, parse_yaml(LOCAL))
    public = yaml.safe_load(to_public_yaml(spec))
    expected = parse_yaml(
        LOCAL.replace("/home/me/one+~/adapters/two", "one+two")
        .replace(": /home/me/one", ": one")
        .replace("model: ./", "model: ")
        .replace("source: ./", "source: ")
        .replace(": ../", ": ")
    )
    about_the_job = ("text", "chunks", "seqlen", "evaluate", "dry_run", "max_shard_size")
    assert public == {name: value for name, value in expected.items() if name not in about_the_job}
    assert build_spec(MergeSpec, public).inputs().keys() == spec.inputs().keys()
    # What people keep for themselves runs where they are.
    again = build_spec(MergeSpec, parse_yaml(spec.as_yaml()))
    assert again == spec.model_copy(update={"dry_run": False})


def test_references_are_shown_as_people_read_them() -> None:
    for reference, shown in {
        "org/name@main": "org/name@main",
        "/a/b/c": "c",
        "~/a+org/b": "a+org/b",
        "one+./a/b": "one+b",
        "./c+++": "c+++",
        "/": "/",
    }.items():
        assert shown_reference(reference) == shown


def test_a_path_with_a_plus_is_no_adapter_in_long_form() -> None:
    spec = build_spec(
        MergeSpec, LINEAR | {"models": [{"model": {"model": {"path": "./c++"}}}, {"model": "b"}]}
    )
    assert spec.models is not None
    assert split_reference(spec.models[0].model) == ("./c++", None)
    assert split_reference("./a+b+c/d") == ("./a+b", "c/d")
    assert split_reference("a") == ("a", None)


def test_policies_of_tokens_are_told_apart() -> None:
    spec = build_spec(MergeSpec, parse_yaml(WILD["policies of tokens"]))
    assert spec.vocabulary is not None
    sources = {token: policy.source for token, policy in spec.vocabulary.tokens.items()}
    assert sources["<|im_start|>"] == "org/one"
    assert isinstance(sources["<|im_end|>"], ModelToken)
    assert isinstance(sources["<|unused|>"], ZeroToken)
    assert "org/two" in spec.inputs().values()


def test_the_description_names_every_method() -> None:
    described = MergeSpec.model_fields["merge_method"].description or ""
    assert not [name for name in known_methods() if f"`{name}`" not in described]


def test_defaults() -> None:
    spec = build_spec(MergeSpec, LINEAR)
    assert (spec.compute_dtype, spec.seed, spec.evaluate, spec.dry_run, spec.text) == (
        "float32",
        0,
        False,
        False,
        ("prose",),
    )
    assert build_spec(MergeSpec, LINEAR | {"text": "./a.txt"}).text == ("./a.txt",)
    assert yaml.safe_load(spec.as_yaml()) == LINEAR


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"merge_metod": "slerp"}, "merge_metod", "'merge_method'"),
        ({"models": [{"model": "a", "weight": 1}]}, "models[0].weight", "model, parameters"),
        ({"models": [{"parameters": {}}]}, "models[0].model", "required"),
        ({"models": []}, "models", "slices"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}, "slices", "`models`"),
        (
            {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [3, 3]}]}]},
            "slices[0].sources[0].layer_range",
            "[3, 4]",
        ),
        (
            {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [1]}]}]},
            "slices[0].sources[0].layer_range",
            "two numbers",
        ),
        ({"models": None, "slices": [{"sources": []}]}, "slices[0].sources", "at least one source"),
        (
            {
                "models": None,
                "modules": {"x": {"models": [{"model": "a"}]}, "y": {"models": [{"model": "a"}]}},
            },
            "modules",
            "one module",
        ),
        ({"models": None, "modules": {"x": {}}}, "modules.x.models", "`slices`"),
        ({"dtype": "bf16"}, "dtype", "'bfloat16'"),
        ({"parameters": {"weight": None}}, "parameters.weight", "gradient"),
        ({"parameters": {"weight": {"fliter": "a", "value": 1}}}, "parameters.weight.fliter", "'filter'"),
        ({"parameters": {"weight": [{"value": {}}]}}, "parameters.weight[0].value", "number"),
        ({"parameters": {"weight": [1, {"value": 1}]}}, "parameters.weight", "alone or in a list"),
        ({"tokenizer_source": "union", "tokenizer": {}}, "tokenizer_source", "either"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "nil"}}}}},
            "tokenizer.tokens.x.source",
            "kind: zero",
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}},
            "tokenizer.tokens.x.source.token",
            "`token_id`",
        ),
        ({"models": [{"model": {"path": "a"}}]}, "models[0].model.path", "model, lora"),
        (
            {"models": [{"model": {"model": "a", "override_architecture": "X"}}]},
            "models[0].model.override_architecture",
            "config.json",
        ),
        ({"publish": True}, "trainer", "trainer"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], field: str, told: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        build_spec(MergeSpec, LINEAR | changes)
    assert refused.value.field == field
    assert told in str(refused.value)


class TestStages:
    def stage(self, name: str, *models: str, **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "merge_method": "linear",
            "models": [{"model": model} for model in models],
            **more,
        }

    def test_earlier_results_are_no_inputs(self) -> None:
        spec = build_spec(
            MergeSpec,
            LINEAR | {"stages": [self.stage("x", "c"), self.stage("y", "x+l")], "models": [{"model": "y"}]},
        )
        assert spec.inputs() == {"stages[0].models[0].model": "c", "stages[1].models[0].model.lora": "l"}
        assert [(path, name) for path, name, _ in spec.merges()] == [
            ("stages[0].", "x"),
            ("stages[1].", "y"),
            ("", None),
        ]

    @pytest.mark.parametrize(
        ("stages", "field", "told"),
        [
            ([("y", "x"), ("x", "c")], "stages[0].models[0].model", "those before it"),
            ([("x", "x")], "stages[0].models[0].model", "not made yet"),
            ([("x", "c"), ("x", "c")], "stages[1].name", "Two stages"),
            ([("x", "c"), ("a", "c")], "stages[0].name", "Nothing uses"),
        ],
    )
    def test_stages_that_cannot_be(self, stages: list[tuple[str, str]], field: str, told: str) -> None:
        with pytest.raises(InvalidSpec) as refused:
            build_spec(MergeSpec, LINEAR | {"stages": [self.stage(*names) for names in stages]})
        assert refused.value.field == field
        assert told in str(refused.value)

    def test_documents_are_put_in_order(self) -> None:
        documents = [LINEAR | {"models": [{"model": "z"}]}, self.stage("z", "y"), self.stage("y", "c")]
        spec = build_spec(MergeSpec, parse_yaml(yaml.safe_dump_all(documents)))
        assert [stage.name for stage in spec.stages] == ["y", "z"]
        assert spec.name is None
        assert build_spec(MergeSpec, {DOCUMENTS: documents, "seed": 3, "name": "n"}).name == "n"

    def test_the_last_of_named_documents_is_the_result(self) -> None:
        spec = MergeSpec.from_documents([self.stage("z", "y"), self.stage("y", "c")])
        assert (spec.name, [stage.name for stage in spec.stages]) == ("z", ["y"])

    @pytest.mark.parametrize(
        ("names", "told"),
        [
            ([("x", "y"), ("y", "x")], "x -> y -> x"),
            ([("x", "x")] * 1 + [(None, "x")], "x -> x"),
            ([("x", "c"), ("x", "c")], "both called 'x'"),
            ([(None, "c"), (None, "c")], "no name"),
        ],
    )
    def test_documents_that_cannot_be_put_in_order(self, names: list[tuple[Any, str]], told: str) -> None:
        with pytest.raises(InvalidSpec) as refused:
            MergeSpec.from_documents([self.stage(*pair) for pair in names])
        assert refused.value.field == "name"
        assert told in str(refused.value)

    def test_what_is_wrong_in_a_document_is_named(self) -> None:
        documents = [self.stage("x", "c", dtyp="float16"), LINEAR | {"models": [{"model": "x"}]}]
        with pytest.raises(InvalidSpec) as refused:
            build_spec(MergeSpec, {DOCUMENTS: documents})
        assert refused.value.field == "stages[0].dtyp"
        with pytest.raises(InvalidSpec):
            build_spec(MergeSpec, {DOCUMENTS: [LINEAR, "text"]})
        with pytest.raises(InvalidSpec):
            build_spec(MergeSpec, {DOCUMENTS: [self.stage(f"s{number}", "c") for number in range(100)]})


def test_the_example_is_a_request() -> None:
    assert build_spec(MergeSpec, EXAMPLE).name == "smollm2-slerp"


def of_pages() -> list[Any]:
    blocks = [block for block in blocks_of_all_pages() if block.language == "yaml" and "merge" in block.marks]
    return [pytest.param(block.text, id=block.name) for block in blocks]


@pytest.mark.parametrize("text", of_pages())
def test_what_the_pages_show_has_methods_and_parameters_that_there_are(text: str) -> None:
    spec = build_spec(MergeSpec, parse_yaml(text))
    for path, _, merge in spec.merges():
        method = find_method(merge.merge_method)
        _, module = merge.module
        parts = [part for piece in module.slices or () for part in (piece, *piece.sources)]
        for place in (merge, *(module.models or ()), *parts):
            settings, notes = read_settings(method, place.parameters, path)
            assert notes == []
            assert set(settings.rules) == set(place.parameters)
