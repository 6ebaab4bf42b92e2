"""The plan of a merge: what is written, of what, and what cannot be, all from headers and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.merge.members import Member
from aidocks.merge.target import Target
from tests.support.merging import HIDDEN, llama, llama_shapes, model, plan, with_dtypes

A, B, C = llama("a"), llama("b"), llama("c")
HALF = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: b}]\n"
SLERP = "merge_method: slerp\nparameters: {t: 0.5}\nbase_model: a\n"


def refused(text: str, *models: Member) -> InvalidSpec:
    with pytest.raises(InvalidSpec) as caught:
        plan(text, *models)
    return caught.value


def named(target: Target, name: str) -> Any:
    return next(tensor for tensor in target.tensors if tensor.name == name)


def test_tensors_come_in_the_order_in_which_a_model_uses_them() -> None:
    target = plan(HALF, A, B)
    names = [tensor.name for tensor in target.tensors]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == "model.norm.weight"
    layers = [int(name.split(".")[2]) for name in names[1:-1]]
    assert layers == sorted(layers)
    assert target.parameters == sum(_size(shape) for shape in llama_shapes().values())
    assert (target.class_name, target.num_layers, target.dtype) == ("LlamaForCausalLM", 5, "BF16")
    assert target.vocabulary_tensors == {"model.embed_tokens.weight"}
    assert target.tokenizer == A.tokenizer


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def test_a_base_that_is_not_listed_is_merged_all_the_same() -> None:
    target = plan(SLERP + "models: [{model: b}]", A, B)
    tensor = target.tensors[0]
    assert [target.sources[o.source].reference for o in tensor.operands] == ["b", "a"]
    assert tensor.base == 1


def test_a_method_without_a_base_treats_it_like_any_other_model() -> None:
    target = plan(HALF + "base_model: b\n", A, B)
    assert {tensor.base for tensor in target.tensors} == {None}
    error = refused(
        "merge_method: linear\nbase_model: c\nmodels: [{model: a, parameters: {weight: 1}}]\n", A, C
    )
    assert error.field == "models[1].parameters.weight"
    assert "'c'" in error.message


class TestTypes:
    def test_as_asked(self) -> None:
        target = plan(HALF + "dtype: float32\nout_dtype: float16\n", A, B)
        assert {tensor.dtype for tensor in target.tensors} == {"F16"}
        assert target.config["dtype"] == "float16"
        assert plan(HALF + "dtype: float32\n", A, B).dtype == "F32"

    def test_the_base_says_what_the_request_does_not(self) -> None:
        wide = with_dtypes(B, dict.fromkeys(B.tensors, "F32"))
        assert plan(HALF + "base_model: b\n", A, wide).dtype == "F32"
        assert plan(HALF, A, wide).dtype == "BF16"

    def test_numbers_that_are_no_weights_are_copied_from_the_base(self) -> None:
        shapes = llama_shapes() | {"model.layers.0.counter": (3,)}
        one, other = (
            with_dtypes(llama(name, shapes=shapes), {"model.layers.0.counter": "I64"}) for name in "ab"
        )
        tensor = named(plan(HALF + "base_model: b\ndtype: float16", one, other), "model.layers.0.counter")
        assert (tensor.method, tensor.dtype, tensor.shape) == (None, "I64", (3,))
        assert [operand.source for operand in tensor.operands] == [0, 1]  # the base is the first source
        error = refused(HALF, one, llama("b", shapes=shapes))
        assert "I64" in error.message
        assert "model.layers.0.counter" in error.message


class TestHeads:
    def test_none_where_the_embedding_is_the_head_of_all(self) -> None:
        copied = llama("b", shapes=llama_shapes(head=True))  # stored all the same
        target = plan(HALF, A, copied)
        assert "lm_head.weight" not in {tensor.name for tensor in target.tensors}
        assert target.config["tie_word_embeddings"] is True

    def test_one_where_any_model_has_one(self) -> None:
        target = plan(HALF, A, llama("b", head=True))
        head = named(target, "lm_head.weight")
        assert [o.tensor for o in head.operands] == ["model.embed_tokens.weight", "lm_head.weight"]
        assert target.config["tie_word_embeddings"] is False
        assert target.vocabulary_tensors == {"model.embed_tokens.weight", "lm_head.weight"}
        assert "'a'" in target.notes[0]

    def test_one_that_is_missing_is_refused(self) -> None:
        bare = llama("b", config={"tie_word_embeddings": False})
        error = refused(HALF, llama("a", head=True), bare)
        assert (error.field, error.value) == ("models[1].model", "b")
        assert "lm_head.weight" in error.message

    def test_last_layers_of_another_model_than_the_embedding_are_noted(self) -> None:
        target = plan(
            "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n"
            "- sources: [{model: b, layer_range: [2, 5]}]",
            A,
            B,
        )
        assert "'a'" in target.notes[0]
        assert "'b'" in target.notes[0]


class TestSlices:
    FRANKEN = (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 4]}]\n"
        "- sources: [{model: a, layer_range: [2, 5]}]\n"
    )

    def test_layers_are_numbered_anew(self) -> None:
        target = plan(self.FRANKEN, A)
        assert target.num_layers == 7
        tensor = named(target, "model.layers.4.mlp.up_proj.weight")
        assert tensor.operands[0].tensor == "model.layers.2.mlp.up_proj.weight"

    def test_what_a_configuration_lists_for_layers_goes_with_them(self) -> None:
        config = {
            "layer_types": ["full", "window", "full", "window", "full"],
            "no_rope_layers": [1, 1, 1, 0, 1],
            "mlp_only_layers": [0, 2],
            "eos_token_id": [1, 2, 3, 4, 5],
            "max_window_layers": 5,
            "first_k_dense_replace": 3,
        }
        target = plan(self.FRANKEN, llama("a", config=config))
        assert target.config["layer_types"] == ["full", "window", "full", "window", "full", "window", "full"]
        assert target.config["no_rope_layers"] == [1, 1, 1, 0, 1, 0, 1]
        assert target.config["mlp_only_layers"] == [0, 2, 4]
        assert target.config["eos_token_id"] == [1, 2, 3, 4, 5]
        assert target.config["max_window_layers"] == 7
        assert any("first_k_dense_replace" in note for note in target.notes)

    def test_sliding_windows_stay_with_their_layers(self) -> None:
        config = {"use_sliding_window": True, "max_window_layers": 3}
        target = plan(self.FRANKEN, llama("a", config=config))
        assert target.config["layer_types"] == [
            *("full_attention",) * 3,
            "sliding_attention",
            "full_attention",
            *("sliding_attention",) * 2,
        ]
        shorter = self.FRANKEN.replace("[0, 4]", "[1, 2]")
        assert plan(shorter, llama("a", config=config)).config["max_window_layers"] == 2

    def test_all_layers_as_slices_leave_the_configuration_as_it_is(self) -> None:
        config = {"layer_types": ["x"] * 5, "first_k_dense_replace": 3}
        text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 5]}]}]"
        member = llama("a", config=config)
        target = plan(text, member)
        assert target.config == member.config
        assert target.notes == ()

    @pytest.mark.parametrize(
        ("slices", "field", "value", "told"),
        [
            ("[{model: a, layer_range: [0, 6]}]", "slices[0].sources[0].layer_range", [0, 6], "[0, 5]"),
            (
                "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]",
                "slices[0].sources[1].layer_range",
                [0, 3],
                "3 of 'b', but 2 of 'a'",
            ),
            (
                "[{model: a, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]",
                "slices[0].sources[1].model",
                "a",
                "slices[0].sources[0].model",
            ),
        ],
    )
    def test_slices_that_cannot_be_are_refused(self, slices: str, field: str, value: Any, told: str) -> None:
        text = f"merge_method: linear\nparameters: {{weight: 1}}\nslices: [{{sources: {slices}}}]"
        error = refused(text, A, B)
        assert (error.field, error.value) == (field, value)
        assert told in str(error)

    def test_a_slice_needs_the_base_once(self) -> None:
        one = (
            SLERP + "slices: [{sources: [{model: b, layer_range: [0, 2]}, {model: c, layer_range: [0, 2]}]}]"
        )
        error = refused(one, A, B, C)
        assert (error.field, error.value) == ("slices[0].sources", ["b", "c"])
        twice = (
            SLERP + "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]}]"
        )
        assert "more than one" in refused(twice, A).message

    def test_a_slice_may_have_a_base_of_its_own(self) -> None:
        text = SLERP.replace("base_model: a\n", "") + (
            "slices: [{base_model: b, sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]}]"
        )
        assert {tensor.base for tensor in plan(text, A, B).tensors} == {1}

    def test_layers_of_which_one_has_other_tensors_are_refused(self) -> None:
        shapes = llama_shapes() | {"model.layers.3.self_attn.q_proj.bias": (HIDDEN,)}
        text = (
            "merge_method: linear\nparameters: {weight: 1}\n"
            "slices: [{sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [0, 2]}]}]"
        )
        error = refused(text, llama("a", shapes=shapes), B)
        assert (error.field, error.value) == ("slices[0].sources[1].model", "b")
        assert "model.layers.1.self_attn.q_proj.bias" in error.message
        assert "model.layers.3.self_attn.q_proj.bias" in error.message

    def test_a_model_whose_layers_cannot_be_told_is_only_merged_whole(self) -> None:
        shapes = {f"model.{side}.layers.{n}.w": (4, 4) for side in ("encoder", "decoder") for n in range(2)}
        config = {"model_type": "t", "architectures": ["T"], "num_hidden_layers": 2}
        one, other = model("a", shapes, config), model("b", shapes, config)
        text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]"
        error = refused(text, one)
        assert (error.field, error.value) == ("slices[0].sources[0].model", "a")
        assert "model.encoder.layers.* (2)" in error.message
        gradient = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [1, 3]}"
        target = plan(gradient, one, other)
        assert named(target, "model.decoder.layers.1.w").values["weight"] == (3, 3)

    def test_layers_that_keep_their_numbers_keep_their_kinds(self) -> None:
        one = llama("a", config={"layer_types": ["full"] * 5, "max_window_layers": 28})
        other = llama("b", config={"layer_types": ["window"] * 5, "max_window_layers": 20})
        text = "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
        text += "- sources: [{model: b, layer_range: [2, 5]}]"
        target = plan(text, one, other)
        assert target.config["layer_types"] == ["full"] * 2 + ["window"] * 3
        assert target.notes == plan(text, A, B).notes
        # What one of them does not say is not known to differ.
        silent = llama("b")
        assert plan(text, one, silent).config == {**one.config}


class TestMethods:
    def test_an_unknown_one_is_refused_with_the_known_ones(self) -> None:
        error = refused(HALF.replace("linear", "linaer"), A, B)
        assert (error.field, error.value) == ("merge_method", "linaer")
        assert "Did you mean 'linear'?" in str(error)
        assert "slerp" in str(error)

    def test_a_missing_base_is_named(self) -> None:
        error = refused(SLERP.replace("base_model: a\n", "") + "models: [{model: a}, {model: b}]", A, B)
        assert error.field == "base_model"
        assert "'a'" in str(error)

    @pytest.mark.parametrize(
        ("text", "field", "value", "told"),
        [
            (
                SLERP + "models: [{model: b}, {model: c}]",
                "models",
                ["b", "c", "a"],
                "1 model beside its base, not 2",
            ),
            (SLERP + "models: [{model: a}]", "models", ["a"], "1 model beside its base, not 0"),
            (
                "merge_method: passthrough\nmodels: [{model: a}, {model: b}]",
                "models",
                ["a", "b"],
                "1 model, not 2",
            ),
            (
                "merge_method: model_stock\nbase_model: a\nmodels: [{model: b}]",
                "models",
                ["b", "a"],
                "at least 2 models beside its base, not 1",
            ),
        ],
    )
    def test_a_wrong_number_of_models(self, text: str, field: str, value: list[str], told: str) -> None:
        error = refused(text, A, B, C)
        assert (error.field, error.value) == (field, value)
        assert told in error.message

    def test_a_missing_parameter_names_model_and_tensor(self) -> None:
        text = "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1}}, {model: c}]"
        error = refused(text, A, B, C)
        assert error.field == "models[1].parameters.weight"
        assert "'c'" in error.message
        assert "model.embed_tokens.weight" in error.message
        assert "parameters.weight for all" in str(error)
        filtered = refused(SLERP.replace("0.5", "{filter: mlp, value: 1}") + "models: [{model: b}]", A, B)
        assert filtered.field == "parameters.t"
        assert "without `filter`" in str(filtered)

    def test_a_model_that_is_listed_twice(self) -> None:
        error = refused(HALF.replace("model: b", "model: a"), A)
        assert (error.field, error.value) == ("models[1].model", "a")

    def test_notes_tell_of_what_has_no_effect(self) -> None:
        text = HALF.replace("weight: 0.5", "weight: 0.5, density: 0.3, embed_slerp: true")
        notes = plan(text, A, B).notes
        assert any("density" in note for note in notes)
        assert any("embed_slerp" in note for note in notes)

    def test_weights_that_do_not_sum_to_one(self) -> None:
        text = HALF.replace("weight: 0.5", "weight: 0.4, normalize: false")
        assert "0.8" in plan(text, A, B).notes[0]
        error = refused(HALF.replace("weight: 0.5", "weight: 0"), A, B)
        assert error.field == "models[0].parameters.weight"
        assert error.value == [0, 0]


class TestModelsThatDoNotFit:
    def blamed(self, other: Member) -> IncompatibleModels:
        error = refused(HALF, A, other)
        assert isinstance(error, IncompatibleModels)
        assert (error.field, error.value) == ("models[1].model", "b")
        return error

    def test_another_architecture(self) -> None:
        error = self.blamed(
            llama("b", config={"model_type": "mistral", "architectures": ["MistralForCausalLM"]})
        )
        assert "mistral" in error.message
        assert "llama" in error.message
        error = self.blamed(llama("b", config={"architectures": ["LlamaForSequenceClassification"]}))
        assert "LlamaForSequenceClassification" in error.message

    def test_another_number_of_layers(self) -> None:
        error = self.blamed(llama("b", layers=4))
        assert "4 layers" in error.message
        assert "5" in error.message
        assert "`slices`" in str(error)

    def test_another_shape_is_named_with_tensor_and_both_shapes(self) -> None:
        error = self.blamed(
            llama("b", shapes=llama_shapes() | {"model.layers.2.mlp.up_proj.weight": (80, 64)})
        )
        assert "model.layers.2.mlp.up_proj.weight" in error.message
        assert "[80, 64]" in error.message
        assert "[172, 64]" in error.message

    def test_equal_shapes_of_another_meaning(self) -> None:
        error = self.blamed(llama("b", config={"num_attention_heads": 4}))
        assert "num_attention_heads is 4 in 'b', but 8 in 'a'" in error.message

    def test_another_vocabulary_says_what_to_set(self) -> None:
        error = self.blamed(llama("b", rows=520))
        assert "[520, 64]" in error.message
        assert "[512, 64]" in error.message
        assert "tokenizer: {source: union}" in str(error)

    def test_a_tensor_that_only_one_has(self) -> None:
        extra = {"model.layers.1.self_attn.q_proj.bias": (64,)}
        error = self.blamed(llama("b", shapes=llama_shapes() | extra))
        assert "model.layers.1.self_attn.q_proj.bias" in error.message
        lacking = {name: shape for name, shape in llama_shapes().items() if name != "model.norm.weight"}
        assert "model.norm.weight" in self.blamed(llama("b", shapes=lacking)).message

    @pytest.mark.parametrize(
        ("key", "one", "other"),
        [
            ("rms_norm_eps", 1e-5, 1e-3),
            ("attn_logit_softcapping", 50.0, None),
            ("final_logit_softcapping", 30.0, 20.0),
            ("query_pre_attn_scalar", 256, 128),
            ("num_experts_per_tok", 2, 4),
        ],
    )
    def test_settings_that_a_model_was_trained_with_are_noted(self, key: str, one: Any, other: Any) -> None:
        (note,) = plan(HALF, llama("a", config={key: one}), llama("b", config={key: other})).notes
        assert note.startswith(f"{key} is {'null' if other is None else other} in 'b'")

    @pytest.mark.parametrize(
        "config",
        [
            {"rope_theta": 5e5},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"partial_rotary_factor": 0.5},
        ],
    )
    def test_another_rotation_is_noted_however_it_is_said(self, config: dict[str, Any]) -> None:
        for models in ((llama("a"), llama("b", config=config)), (llama("a", config=config), llama("b"))):
            (note,) = plan(HALF, *models).notes
            assert note.startswith("The rotation of positions is ")

    def test_the_same_rotation_in_other_words_is_no_difference(self) -> None:
        scaling = {"factor": 8.0, "low_freq_factor": 1.0}
        old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
        new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
        assert plan(HALF, llama("a", config=old), llama("b", config=new)).notes == ()
        assert plan(HALF, llama("a", config={"rope_theta": 1e4, "rope_scaling": None}), B).notes == ()

    def test_a_rotation_that_is_none_is_refused(self) -> None:
        error = self.blamed(llama("b", config={"rope_theta": "much"}))
        assert "rope_parameters" in error.message

    def test_layers_of_another_kind_are_noted(self) -> None:
        kinds = ["full_attention"] * 5
        one = llama("a", config={"layer_types": kinds, "no_rope_layers": [1] * 5})
        other = llama(
            "b",
            config={
                "layer_types": [*kinds[:3], "sliding_attention", "full_attention"],
                "no_rope_layers": [0] + [1] * 4,
            },
        )
        notes = plan(HALF, one, other).notes
        assert [note.partition(" of 'b'")[0] for note in notes] == [
            "layer_types says of the layers 3",
            "no_rope_layers says of the layers 0",
        ]
        assert plan(HALF, one, llama("b", config={"layer_types": kinds})).notes == ()
        sliced = "{merge_method: linear, parameters: {weight: 1}, slices: [{sources: [%s, %s]}]}"
        met = sliced % ("{model: a, layer_range: [0, 2]}", "{model: b, layer_range: [2, 4]}")
        (note,) = (note for note in plan(met, one, other).notes if note.startswith("layer_types"))
        assert note.startswith("layer_types says of the layers 3 of 'b'")


@dataclass(frozen=True)
class Words:
    size: int = 530
    special_ids: Mapping[str, Any] = field(default_factory=lambda: {"eos_token_id": 7})
    tokenizer: Path = Path("/models/b")


def test_a_vocabulary_policy_decides_the_rows() -> None:
    target = plan(HALF, A, llama("b", rows=520), vocabulary=Words())
    assert named(target, "model.embed_tokens.weight").shape == (530, 64)
    assert (target.config["vocab_size"], target.config["eos_token_id"]) == (530, 7)
    assert target.tokenizer == Path("/models/b")
    made = target.as_member("both", Path("/job/both"))
    assert (made.tokenizer, made.vocab_size) == (Path("/job/both"), 530)


def test_a_result_can_be_merged_again() -> None:
    made = plan(HALF + "dtype: float32\n", A, B).as_member("both", Path("/job/stages/both"))
    target = plan(SLERP + "models: [{model: both}]", A, made)
    source = target.sources[target.tensors[0].operands[0].source]
    assert (source.reference, source.checkpoint) == ("both", Path("/job/stages/both"))
    assert {tensor.dtype for tensor in target.tensors} == {"BF16"}


def test_the_tokenizer_of_a_result_is_its_own() -> None:
    # It may have another chat template, and it lasts no longer or shorter than the result.
    assert plan(HALF, A, B).as_member("both", Path("/job/both")).tokenizer == Path("/job/both")


def test_files_are_planned_with_every_tensor_once() -> None:
    target = plan(HALF, A, B)
    files = target.plan_files(200_000)
    assert len(files) == 3
    assert [t.name for file in files for t in file.tensors] == [tensor.name for tensor in target.tensors]
