"""The original project's body of ``/train``."""

from __future__ import annotations

from typing import Any

import pytest

from aidocks.errors import InvalidSpec
from aidocks.specs.read import build_spec
from aidocks.specs.train import OriginalTrainSpec
from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_llm import LLMTrainSpec
from aidocks.specs.train_rerank import RerankerTrainSpec

#: With the original's own defaults, but for a checkpoint that it never had.
CONFIG: dict[str, Any] = {
    "lora_rank": 64,
    "lora_alpha": 16,
    "max_steps": 4263,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 7e-5,
    "max_prompt_length": 2048,
    "max_total_length": 4096,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "resume_from_checkpoint": None,
    "use_gradient_checkpointing": True,
    "load_in_4bit": False,
    "max_seq_length": 8192,
    "training_data": "llm_dpo_training_data.jsonl",
    "eval_data": None,
    "optim_fn": "adamw_8bit",
}
BODY: dict[str, Any] = {
    "base_model_path": "tiny",
    "peft_model_name": "tiny-dpo",
    "category": "llm",
    "method": "dpo",
    "config": CONFIG,
}


def refusal(**fields: Any) -> InvalidSpec:
    with pytest.raises(InvalidSpec) as caught:
        build_spec(OriginalTrainSpec, BODY | fields)
    return caught.value


def test_the_body_stands_for_a_request_of_train_llm() -> None:
    spec = build_spec(OriginalTrainSpec, BODY | {"publish": True, "trainer": "me"})
    meant = build_spec(
        LLMTrainSpec,
        {
            **CONFIG,
            "base_model": "tiny",
            "name": "tiny-dpo",
            "method": "dpo",
            "publish": True,
            "trainer": "me",
        },
    )
    assert spec.request() == meant
    assert meant.max_length == 4096
    assert build_spec(OriginalTrainSpec, spec.model_dump(mode="json")) == spec


def test_peft_is_supervised() -> None:
    assert build_spec(OriginalTrainSpec, BODY | {"method": "peft"}).request().method == "sft"


@pytest.mark.parametrize(
    ("category", "kind"),
    [("emb", EmbeddingTrainSpec), ("rr", RerankerTrainSpec), ("rerank", RerankerTrainSpec)],
)
@pytest.mark.parametrize("method", ["peft", "dpo"])
def test_other_categories_stand_for_the_requests_of_models_that_find_texts(
    category: str, kind: type[Any], method: str
) -> None:
    spec = build_spec(OriginalTrainSpec, BODY | {"category": category, "method": method})
    meant = spec.request()
    assert type(meant) is kind
    assert (meant.base_model, meant.name, meant.dataset) == ("tiny", "tiny-dpo", CONFIG["training_data"])
    assert (meant.lora_rank, meant.lora_alpha, meant.max_steps, meant.max_length) == (64, 16, 4263, 4096)
    assert build_spec(OriginalTrainSpec, spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"method": "kto"}, "method"),
        ({"config": CONFIG | {"load_in_4bit": True}}, "config.load_in_4bit"),
        ({"config": CONFIG | {"beta": 0.1}}, "config.beta"),
        ({"config": CONFIG | {"loss": "nll"}}, "config.loss"),
        ({"config": CONFIG | {"base_model": "x"}}, "config.base_model"),
    ],
)
def test_refusals_of_other_categories_name_the_field_of_this_body(fields: dict[str, Any], field: str) -> None:
    assert refusal(category="emb", **fields).field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"base_model_path": ""}, "base_model_path"),
        ({"method": "sftt"}, "method"),
        ({"config": {}}, "config.dataset"),
        ({"config": CONFIG | {"lora_rank": 0}}, "config.lora_rank"),
        ({"config": CONFIG | {"lora_rnk": 1}}, "config.lora_rnk"),
        ({"config": CONFIG | {"name": "x"}}, "config.name"),
        ({"config": CONFIG | {"beta": 0}}, "config.beta"),
        ({"config": CONFIG | {"resume_from_checkpoint": "checkpoint-3500"}}, "config.resume_from_checkpoint"),
    ],
)
def test_refusals_name_the_field_of_this_body(fields: dict[str, Any], field: str) -> None:
    assert refusal(**fields).field == field


def test_several_mistakes_are_listed_one_by_one() -> None:
    refused = refusal(config=CONFIG | {"lora_rank": 0, "learning_rate": 7})
    assert {fault["field"] for fault in refused.errors} == {"config.lora_rank", "config.learning_rate"}
