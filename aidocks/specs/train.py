"""The request of ``/train``: the original project's body, which stands for one of another operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import AliasChoices, ConfigDict, Field, JsonValue, ValidationError, model_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.aliases import with_aliases
from aidocks.specs.base import ModelName, ModelRef, PublishableSpec
from aidocks.specs.faults import invalid_spec
from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_fields import TrainSpec
from aidocks.specs.train_llm import LLMTrainSpec
from aidocks.specs.train_rerank import RerankerTrainSpec

EXAMPLE: dict[str, Any] = {
    "base_model_path": "smollm2-135m-instruct",
    "peft_model_name": "smollm2-polite",
    "category": "llm",
    "method": "dpo",
    "config": {
        "lora_rank": 64,
        "lora_alpha": 16,
        "max_steps": 200,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 7e-5,
        "max_prompt_length": 512,
        "max_total_length": 1024,
        "training_data": "llm_dpo_training_data.jsonl",
    },
}

# Their names here -> those in the request that this one stands for.
_TOP = {"base_model_path": "base_model", "peft_model_name": "name"}
_CATEGORIES: dict[str, type[EmbeddingTrainSpec] | type[RerankerTrainSpec]] = {
    "emb": EmbeddingTrainSpec,
    "rr": RerankerTrainSpec,
    "rerank": RerankerTrainSpec,
}
#: Methods that the original knew. Of models that find texts there is one: low-rank factors, by the loss of the rows.
_METHODS = ("peft", "dpo", "sft")
#: Fields of `config` that mean something to language models alone.
_OF_TEXTS = ("max_prompt_length",)


class OriginalTrainSpec(PublishableSpec):
    """Fine-tune a model, in the original words: as `/train/llm`, `/train/emb` or `/train/rerank` with `config`."""

    model_config = ConfigDict(json_schema_extra=with_aliases([EXAMPLE]))

    base_model_path: ModelRef = Field(
        validation_alias=AliasChoices("base_model_path", "base_model", "base_model_name"),
        description="Model to train, as `base_model` of `/train/llm`.",
        examples=["smollm2-135m-instruct"],
    )
    peft_model_name: ModelName | None = Field(
        None,
        validation_alias=AliasChoices("peft_model_name", "name"),
        description="Registry name of the result, as `name` of `/train/llm`.",
        examples=["smollm2-polite"],
    )
    category: Literal["llm", "emb", "rr", "rerank"] = Field(
        "llm",
        description="Kind of model: a language model, an embedding model (`emb`), or a reranker (`rr`, `rerank`).",
    )
    method: str = Field(
        "dpo",
        description="As `method` of `/train/llm`; `peft` is `sft`. Of embedding models and rerankers there is one.",
        examples=["dpo", "sft", "peft"],
    )
    config: dict[str, JsonValue] = Field(
        description="Further fields of `/train/llm` (`/train/emb`, `/train/rerank`); `training_data` is needed.",
        examples=[{"training_data": "llm_dpo_training_data.jsonl", "lora_rank": 64}],
    )

    @model_validator(mode="after")
    def _stands_for_one(self) -> OriginalTrainSpec:
        kind = self._kind
        if kind is not LLMTrainSpec and self.method.lower() not in _METHODS:
            raise InvalidSpec(
                f"The method {self.method!r} is one of language models.",
                field="method",
                value=self.method,
                hint="Use 'peft'; `config.loss` says what an embedding model or a reranker learns by.",
            )
        for name in self.config:
            if name in kind.model_fields and name in (*_TOP.values(), "method", "publish", "trainer"):
                raise InvalidSpec(
                    f"{name!r} stands beside `config`, not in it.", field=f"config.{name}", hint="Move it."
                )
        self.request()
        return self

    @property
    def _kind(self) -> type[LLMTrainSpec] | type[EmbeddingTrainSpec] | type[RerankerTrainSpec]:
        return _CATEGORIES.get(self.category, LLMTrainSpec)

    def request(self) -> LLMTrainSpec | EmbeddingTrainSpec | RerankerTrainSpec:
        """Return the request that this one stands for.

        Raises:
            InvalidSpec: Naming the fields as this request does.
        """
        kind = self._kind
        shared = {name: getattr(self, name) for name in PublishableSpec.model_fields}
        top: dict[str, Any] = {new: getattr(self, old) for old, new in _TOP.items()}
        config: Mapping[str, Any] = self.config
        if kind is LLMTrainSpec:
            top["method"] = "sft" if self.method == "peft" else self.method
        else:
            config = _of_retrieval(config)
        try:
            found: TrainSpec = kind.model_validate({**config, **shared, **top})
        except ValidationError as error:
            wrong = invalid_spec(error.errors(include_url=False), kind)
        else:
            assert isinstance(found, LLMTrainSpec | EmbeddingTrainSpec | RerankerTrainSpec)
            return found
        faults = [{**fault, "field": field_here(fault["field"])} for fault in wrong.errors]
        raise InvalidSpec(wrong.message, errors=faults)


def _of_retrieval(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration is for models that find texts; the original sent the rest with all kinds."""
    if config.get("load_in_4bit"):
        raise InvalidSpec(
            "Embedding models and rerankers are not trained in 4 bits: they fit as they are.",
            field="config.load_in_4bit",
            value=config["load_in_4bit"],
            hint="Leave it out.",
        )
    return {name: value for name, value in config.items() if name not in (*_OF_TEXTS, "load_in_4bit")}


def field_here(field: str) -> str:
    """Return what a field of the request that this one stands for is called here."""
    back = {new: old for old, new in _TOP.items()}
    first = field.split(".")[0].split("[")[0]
    if first in (*back, "method", *PublishableSpec.model_fields):
        return back.get(field, field)
    return f"config.{field}" if field else "config"
