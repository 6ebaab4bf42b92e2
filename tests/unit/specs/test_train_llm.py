"""The request of a training: its names, what its fields must agree on, and what it leaves open."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aidocks.cli.flags import flags_of, given_fields
from aidocks.errors import InvalidSpec
from aidocks.specs.aliases import names_of
from aidocks.specs.read import build_spec
from aidocks.specs.train_data import held_out_count
from aidocks.specs.train_hyper import GLOBAL_BATCH, batches, fewer_workers, learning_rate, steps
from aidocks.specs.train_llm import LLMTrainSpec
from aidocks.specs.train_settings import ScannedLayers
from aidocks.training.run import ONLINE_METHODS, AdapterKind, Method

BODY: dict[str, Any] = {"base_model": "tiny", "dataset": "rows.jsonl"}
MATCH = [{"kind": "match", "field": "answer"}]

#: A value other than the default of every field that has further names.
VALUES: dict[str, Any] = {
    "base_model": "other",
    "dataset": "others.jsonl",
    "eval_dataset": "held.jsonl",
    "eval_split": 0.2,
    "adapter": "dora",
    "lora_rank": 4,
    "rslora": True,
    "target_modules": ["q_proj"],
    "virtual_tokens": 7,
    "layers": ["mlp"],
    "num_train_epochs": 3,
    "per_device_train_batch_size": 3,
    "lr_scheduler_type": "linear",
    "optim": "sgd",
    "max_length": 96,
    "gradient_checkpointing": True,
    "workers": 3,
    "resume_from_checkpoint": "job-0199c2f3a41-5d1c02aa",
    "packing": True,
    "fields": {"prompt": "question"},
}
RENAMED = [
    (name, other) for name, field in LLMTrainSpec.model_fields.items() for other in names_of(name, field)[1:]
]


def spec_of(**fields: Any) -> LLMTrainSpec:
    return build_spec(LLMTrainSpec, BODY | fields)


def refusal(**fields: Any) -> InvalidSpec:
    with pytest.raises(InvalidSpec) as caught:
        spec_of(**fields)
    return caught.value


def body_of(method: Method, adapter: AdapterKind) -> dict[str, Any]:
    """Return fields with which a method and an adapter are complete."""
    rewards = {"rewards": MATCH} if method in ONLINE_METHODS else {}
    layers = {"layers": ["mlp"]} if adapter == "layers" else {}
    return {"method": method, "adapter": adapter, **rewards, **layers}


@pytest.mark.parametrize(("name", "other"), RENAMED)
def test_another_name_is_the_same_field(name: str, other: str) -> None:
    more = {"adapter": "layers"} if name == "layers" else {}
    body = {field: value for field, value in (BODY | more).items() if field != name}
    value = VALUES[name]
    assert build_spec(LLMTrainSpec, body | {other: value}) == build_spec(LLMTrainSpec, body | {name: value})
    # Said twice alike is said once; said twice differently is a mistake.
    assert getattr(build_spec(LLMTrainSpec, body | {other: value, name: value}), name) is not None
    with pytest.raises(InvalidSpec) as caught:
        build_spec(LLMTrainSpec, body | {other: value, name: "another"})
    assert caught.value.field == other
    assert "two names of one field" in caught.value.message


def test_the_names_of_the_original_body_work() -> None:
    spec = build_spec(
        LLMTrainSpec,
        {
            "base_model_name": "tiny",
            "training_data": "train.jsonl",
            "eval_data": "held.jsonl",
            "lora_rank": 64,
            "lora_alpha": 16,
            "max_steps": 7,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "learning_rate": 7e-5,
            "max_prompt_length": 100,
            "max_total_length": 300,
            "max_seq_length": 200,
            "num_train_epochs": 2,
            "resume_from_checkpoint": None,
            "use_gradient_checkpointing": True,
            "load_in_4bit": True,
            "optim_fn": "adamw_8bit",
        },
    )
    assert (spec.dataset, spec.eval_dataset, spec.adapter) == ("train.jsonl", "held.jsonl", "qlora")
    hyper = spec.hyperparameters(1000)
    assert (hyper.max_steps, hyper.learning_rate, hyper.optim) == (7, 7e-5, "adamw_8bit")
    assert (hyper.per_device_train_batch_size, hyper.gradient_accumulation_steps) == (2, 3)
    assert hyper.max_length == 200, "both limits hold"
    assert hyper.gradient_checkpointing
    assert spec.adapter_settings().alpha == 16


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("max_seq_lenght", "max_seq_length"),
        ("learning_rat", "learning_rate"),
        ("lora_rnk", "lora_rank"),
        ("trainin_data", "training_data"),
    ],
)
def test_unknown_fields_name_the_nearest_one(typed: str, meant: str) -> None:
    refused = refusal(**{typed: 1})
    assert (refused.field, refused.hint) == (typed, f"Did you mean {meant!r}?")


def test_a_wrong_value_is_blamed_on_the_name_that_was_used() -> None:
    refused = refusal(max_seq_length="long")
    assert refused.field == "max_seq_length"
    assert refused.hint is not None
    assert refused.hint.startswith("Tokens of an example")


@pytest.mark.parametrize(
    ("word", "method"),
    [("PPO", "rloo"), ("cpt", "pretrain"), ("supervised", "sft"), ("preference", "dpo"), ("rm", "reward")],
)
def test_other_words_for_methods(word: str, method: Method) -> None:
    assert spec_of(**(body_of(method, "lora") | {"method": word})).method == method


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("adapter", get_args(AdapterKind))
def test_every_method_and_adapter_is_whole_or_refused(method: Method, adapter: AdapterKind) -> None:
    body = body_of(method, adapter)
    if adapter in ("prompt_tuning", "prefix_tuning") and method not in ("sft", "pretrain"):
        assert refusal(**body).field == "adapter"
        return
    spec = spec_of(**body)
    assert build_spec(LLMTrainSpec, spec.model_dump(mode="json")) == spec
    hyper = spec.hyperparameters(100)
    assert hyper.learning_rate == learning_rate(method, adapter)
    assert (hyper.beta is not None) == (method in ("dpo", "orpo", "kto", "grpo", "rloo"))
    assert spec.adapter_settings().kind == adapter
    assert spec.makes_adapter == (adapter in ("prompt_tuning", "prefix_tuning"))


def test_low_rank_factors_learn_faster_than_whole_weights() -> None:
    for method in get_args(Method):
        assert learning_rate(method, "lora") >= 10 * learning_rate(method, "full")
    assert learning_rate("sft", "lora") == 2e-4


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"adapter": "prompt_tuning", "merge_adapter": True}, "merge_adapter"),
        ({"adapter": "prefix_tuning", "gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"method": "reward", "neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ({"method": "dpo", "packing": True}, "packing"),
        ({"method": "dpo", "loss_on": "assistant"}, "loss_on"),
        ({"method": "dpo", "assistant_only_loss": True}, "loss_on"),
        ({"method": "pretrain", "loss_on": "completion"}, "loss_on"),
        ({"loss_on": "all", "assistant_only_loss": True}, "assistant_only_loss"),
        ({"method": "sft", "rewards": MATCH}, "rewards"),
        ({"method": "grpo"}, "rewards"),
        ({"method": "grpo", "rewards": [{"kind": "regex"}]}, "rewards[0].pattern"),
        ({"method": "grpo", "rewards": [{"kind": "regex", "pattern": "(a*)*"}]}, "rewards[0].pattern"),
        ({"method": "grpo", "rewards": [{"kind": "contains"}]}, "rewards[0].words"),
        ({"method": "sft", "num_generations": 4}, "num_generations"),
        ({"method": "sft", "beta": 0.2}, "beta"),
        ({"method": "dpo", "beta": 0}, "beta"),
        ({"method": "sft", "label_smoothing": 0.1}, "label_smoothing"),
        ({"method": "dpo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"method": "dpo", "loss_type": "exo_pair"}, "label_smoothing"),
        ({"method": "dpo", "loss_type": "aot"}, "loss_type"),
        ({"method": "grpo", "rewards": MATCH, "loss_type": "sapo"}, "loss_type"),
        ({"method": "dpo", "desirable_weight": 2}, "desirable_weight"),
        ({"method": "dpo", "loss_type": "nll"}, "loss_type"),
        ({"method": "orpo", "loss_type": "sigmoid"}, "loss_type"),
        ({"method": "kto", "per_device_train_batch_size": 1}, "per_device_train_batch_size"),
        ({"adapter": "qlora", "deepspeed": 3}, "deepspeed"),
        ({"adapter": "qlora", "load_in_4bit": False}, "load_in_4bit"),
        ({"adapter": "full", "load_in_4bit": True}, "load_in_4bit"),
        ({"adapter": "full", "target_modules": ["q_proj"]}, "target_modules"),
        ({"adapter": "layers"}, "layers"),
        ({"layers": ["mlp"]}, "layers"),
        ({"adapter": "layers", "layers": []}, "layers"),
        ({"adapter": "layers", "layers": ["(a*)*"]}, "layers"),
        ({"backend": "unsloth", "method": "reward"}, "backend"),
        ({"backend": "unsloth", "workers": 2}, "workers"),
        ({"backend": "unsloth", "adapter": "dora"}, "backend"),
        ({"backend": "unsloth", "deepspeed": 3}, "deepspeed"),
        ({"workers": 2, "min_workers": 3}, "min_workers"),
        ({"workers": 2, "min_workers": 1, "deepspeed": 2}, "min_workers"),
        ({"workers": 3, "min_workers": 2, "gradient_accumulation_steps": 1}, "min_workers"),
        ({"eval_dataset": "held.jsonl", "eval_split": 0.1}, "eval_split"),
        ({"eval_split": 1.0}, "eval_split"),
        ({"eval_split": 1.5}, "eval_split"),
        (
            {"method": "grpo", "rewards": MATCH, "max_length": 64, "max_prompt_length": 64},
            "max_prompt_length",
        ),
        ({"dataset": "a/b", "eval_dataset": "a/b"}, "eval_dataset"),
        ({"dataset_split": "train[5]"}, "dataset_split"),
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint"),
        ({"dataset": [{"text": "one"}]}, "dataset"),
        ({"dataset": "  "}, "dataset"),
        ({"resources": {"gpus": 2}}, "resources.gpus"),
        ({"resume_from_checkpoint": "checkpoint-3500"}, "resume_from_checkpoint"),
        ({"fields": {"promt": "question"}}, "fields.promt"),
        ({"deepspeed": "4"}, "deepspeed"),
        ({"deepspeed": {"stage": 0, "offload": True}}, "deepspeed.offload"),
        ({"deepspeed": {"csv_monitor": {"output_path": "/etc"}}}, "deepspeed.config.csv_monitor"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}},
            "deepspeed.config.zero_optimization.offload_param",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 9}}}, "deepspeed"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_field(fields: dict[str, Any], field: str) -> None:
    refused = refusal(**fields)
    assert refused.field == field
    assert refused.message


@pytest.mark.parametrize(
    ("given", "stage", "offload"),
    [
        ("auto", "auto", False),
        ("off", "off", False),
        (False, "off", False),
        (None, "off", False),
        (2, 2, False),
        ("3", 3, False),
        ("zero2-offload", 2, True),
        ("3-offload", 3, True),
        ({"stage": 2, "offload": True}, 2, True),
        ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}, 3, False),
    ],
)
def test_deepspeed_in_one_word_or_in_its_own(given: Any, stage: Any, offload: bool) -> None:
    spec = spec_of(deepspeed=given)
    assert (spec.deepspeed.stage, spec.deepspeed.offload) == (stage, offload)
    assert build_spec(LLMTrainSpec, spec.model_dump(mode="json")) == spec


def test_online_methods_name_further_columns() -> None:
    spec = spec_of(**body_of("grpo", "lora"), fields={"prompt": "question", "key": "solution"})
    assert spec.fields == {"prompt": "question", "key": "solution"}
    assert refusal(fields={"key": "solution"}).field == "fields.key"


def test_all_linear_modules_are_the_default() -> None:
    assert spec_of(lora_target="all").target_modules is None
    assert spec_of(target_modules="all-linear").target_modules is None
    assert spec_of(target_modules="q_proj, v_proj").target_modules == ("q_proj", "v_proj")


def test_layers_of_a_scan() -> None:
    spec = spec_of(adapter="layers", layers={"scan": "job-1", "fraction": 0.5})
    assert spec.layers == ScannedLayers(scan="job-1", fraction=0.5)
    assert spec.adapter_settings(("mlp",)).layers == ("mlp",)
    assert spec_of(adapter="layers", unfrozen_parameters=["a", "b"]).adapter_settings().layers == ("a", "b")


@hypothesis_settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(get_args(Method)),
    st.integers(1, 40),
    st.none() | st.integers(2, 9),
    st.none() | st.integers(1, 9),
    st.integers(2, 16),
)
def test_batches_are_whole(
    method: Method, workers: int, per_device: int | None, accumulated: int | None, group: int
) -> None:
    fields = body_of(method, "lora") | {"workers": workers}
    fields |= {"num_generations": group} if method in ONLINE_METHODS else {}
    fields |= {"per_device_train_batch_size": per_device} if per_device else {}
    fields |= {"gradient_accumulation_steps": accumulated} if accumulated else {}
    group = group if method in ONLINE_METHODS else 1
    if per_device and accumulated and per_device * accumulated * workers % group:
        assert refusal(**fields).field == "num_generations"
        return
    spec = spec_of(**fields)
    passes, more = batches(spec)
    assert passes == (per_device or passes)
    assert more == (accumulated or more)
    assert passes * more * workers % group == 0
    if per_device is None and accumulated is None and method not in (*ONLINE_METHODS, "kto"):
        assert passes * more * workers >= GLOBAL_BATCH or workers > GLOBAL_BATCH
        assert passes * more * workers < GLOBAL_BATCH + 4 * workers


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"workers": 4}, ()),
        ({"workers": 4, "min_workers": 4}, ()),
        ({"workers": 4, "min_workers": 1, "gradient_accumulation_steps": 1}, (2, 1)),
        ({"workers": 4, "min_workers": 2, "gradient_accumulation_steps": 3}, (3, 2)),
        ({"workers": 8, "min_workers": 3, "gradient_accumulation_steps": 1}, (4,)),
    ],
)
def test_fewer_workers_divide_a_step(fields: dict[str, Any], counts: tuple[int, ...]) -> None:
    assert fewer_workers(spec_of(**fields)) == counts


@hypothesis_settings(max_examples=80, deadline=None)
@given(st.integers(2, 100_000), st.none() | st.floats(0, 0.99) | st.integers(0, 1000))
def test_held_out_rows_leave_rows_to_train_on(rows: int, split: float | int | None) -> None:
    held_out = held_out_count(rows, split)
    assert 0 <= held_out <= rows // 2
    if split is None:
        assert held_out <= 500
        assert held_out >= min(8, rows // 2)
    elif 0 < split < 1:
        assert held_out >= 1


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.floats(0.1, 5), st.none() | st.integers(1, 300))
def test_steps_and_checkpoints(rows: int, epochs: float, most: int | None) -> None:
    spec = spec_of(num_train_epochs=epochs, max_steps=most)
    total = steps(spec, rows)
    assert total == (most or math.ceil(epochs * math.ceil(rows / GLOBAL_BATCH)))
    hyper = spec.hyperparameters(rows)
    assert 20 <= hyper.save_steps <= 500
    assert hyper.eval_steps == hyper.save_steps
    assert spec_of(save_steps=3).hyperparameters(rows).eval_steps == 3


def test_what_the_model_and_the_machine_decide() -> None:
    spec = spec_of(max_length=1024)
    assert spec.hyperparameters(10, longest=512).max_length == 512
    assert spec.hyperparameters(10, longest=4096).max_length == 1024
    assert [spec.hyperparameters(10, gpus=gpus).gradient_checkpointing for gpus in (False, True)] == [
        False,
        True,
    ]
    assert not spec_of(gradient_checkpointing=False).hyperparameters(10, gpus=True).gradient_checkpointing


def test_settings_without_effect_are_noted() -> None:
    assert spec_of().notes() == ()
    found = spec_of(adapter="full", lora_rank=4, max_steps=3, num_train_epochs=2).notes()
    assert len(found) == 2
    assert "`lora_rank`" in found[0]
    assert "`num_train_epochs`" in found[1]
    # Prompts of their own length are online methods' alone.
    (cut,) = spec_of(method="dpo", max_prompt_length=512, max_length=256).notes()
    assert "`max_prompt_length`" in cut
    assert spec_of(**body_of("grpo", "lora"), max_prompt_length=512).notes() == ()


@pytest.mark.parametrize("given", [None, False, ""])
def test_going_on_from_nothing_is_beginning_anew(given: Any) -> None:
    assert spec_of(resume_from_checkpoint=given).resume_from_checkpoint is None


def test_a_directory_of_checkpoints_is_refused_with_what_to_name_instead() -> None:
    refused = refusal(resume_from_checkpoint="checkpoint-3500")
    assert refused.field == "resume_from_checkpoint"
    assert "job-" in str(refused.hint)


def test_a_prefix_is_trained_without_checkpointing() -> None:
    assert not spec_of(adapter="prefix_tuning").hyperparameters(100, gpus=True).gradient_checkpointing
    assert spec_of(adapter="prompt_tuning").hyperparameters(100, gpus=True).gradient_checkpointing


def test_the_schema_knows_all_names() -> None:
    properties = LLMTrainSpec.model_json_schema()["properties"]
    assert set(LLMTrainSpec.model_fields) | {other for _, other in RENAMED} == set(properties)
    assert properties["training_data"]["description"] == "Another name of `dataset`."


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [
        ("dataset", "rows.jsonl", "rows.jsonl"),
        ("dataset", '[{"text": "a"}, {"text": "b"}]', [{"text": "a"}, {"text": "b"}]),
        ("deepspeed", "2-offload", "2-offload"),
        ("deepspeed", '{"stage": 2}', {"stage": 2}),
        ("eval_split", "0.1", "0.1"),
        ("fields", '{"prompt": "question"}', {"prompt": "question"}),
    ],
)
def test_on_the_command_line_a_word_is_a_word_and_json_is_json(field: str, given: str, value: Any) -> None:
    (flag,) = (flag for flag in flags_of(LLMTrainSpec) if flag.field == field)
    assert given_fields([flag], {field: given}) == {field: value}
    spec_of(**{field: value})


def test_inputs_are_the_base_and_the_judges() -> None:
    spec = spec_of(method="rloo", rewards=[*MATCH, {"kind": "model", "model": "judge"}])
    assert spec.inputs() == {"base_model": "tiny", "rewards[1].model": "judge"}
