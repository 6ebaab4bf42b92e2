"""The request and the result of ``/extract-lora``: a LoRA adapter that makes one model of another."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from aidocks.specs.base import ModelName, ModelRef, ModelResult, PublishableSpec
from aidocks.specs.patterns import MAX_PATTERN, MAX_PATTERNS, compile_pattern
from aidocks.specs.resources import ComputingSpec

DType = Literal["float32", "float16", "bfloat16"]
Decomposition = Literal["exact", "randomized"]


EXAMPLE: dict[str, Any] = {
    "model": "smollm2-135m-instruct-laser",
    "base_model": "smollm2-135m-instruct",
    "rank": 16,
    "name": "smollm2-laser-lora",
}


class ExtractLoraSpec(PublishableSpec, ComputingSpec):
    """Find the LoRA adapter that comes closest to turning one model into another of its shape.

    Of every matrix the difference is taken and its leading directions are kept: among all adapters of the rank none is
    closer. The result is a directory that PEFT loads, and that a merge takes as `base+adapter`.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: ModelRef = Field(
        description="The model that the adapter is to give: a registry name, a hub model `org/name[@revision]`, or a "
        "path below an allowed root.",
        examples=["smollm2-135m-instruct-laser"],
    )
    base_model: ModelRef = Field(
        description="The model that the adapter is for, of the same architecture and shape.",
        examples=["smollm2-135m-instruct"],
    )
    rank: int = Field(
        16, ge=1, le=8192, description="Largest rank of a matrix of the adapter.", examples=[16]
    )
    energy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Choose each matrix's rank, up to `rank`: the smallest that keeps this share of its squared "
        "difference. Default: all have `rank`.",
        examples=[0.9],
    )
    alpha: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="PEFT's `lora_alpha`: what is added is alpha / rank times the product of the factors, which are "
        "stored for it. The adapter is the same with any value; training it further is not. Default: `rank`.",
        examples=[32],
    )
    method: Decomposition = Field(
        "exact",
        description="`exact`: the best adapter there is. `randomized`: close to it where the differences have few "
        "strong directions, and faster on large matrices.",
        examples=["exact"],
    )
    include: tuple[str, ...] = Field(
        (),
        max_length=MAX_PATTERNS,
        description="Regular expressions: only tensors whose name has a match for one of them are looked at. "
        "Default: all.",
        examples=[["mlp", r"layers\.[0-9]\."]],
    )
    exclude: tuple[str, ...] = Field(
        (),
        max_length=MAX_PATTERNS,
        description="Regular expressions: tensors whose name has a match for one of them are left as the base's.",
        examples=[["lm_head"]],
    )
    embeddings: Literal["save", "skip"] = Field(
        "save",
        description="What becomes of embedding and head where they differ, or have another number of rows: `save` them "
        "whole (PEFT's `modules_to_save`), or `skip` them.",
        examples=["save"],
    )
    dtype: DType | None = Field(
        None, description="Type of the adapter's weights. Default: the model's.", examples=["float32"]
    )
    name: ModelName | None = Field(
        None,
        description="Registry name of the adapter. Default: the model's, `-lora-`, and the end of the job's id.",
        examples=["smollm2-laser-lora"],
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Of the method `randomized`.")

    @field_validator("include", "exclude")
    @classmethod
    def _can_be_compiled(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            compile_pattern(pattern[: MAX_PATTERN + 1])
        return patterns


class ExtractedMatrix(BaseModel):
    """What the adapter holds of one matrix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: str = Field(description="Its name.")
    rank: int = Field(description="Rank of its factors; 0 where the models have the same matrix.")
    full_rank: int = Field(description="Its smaller side.")
    difference: float = Field(description="Frobenius norm of the difference between the two models.")
    relative_difference: float = Field(description="The same, divided by that of the base's matrix.")
    error: float = Field(
        description="What is left of the difference: Frobenius norm, divided by that of the difference. The factors "
        "are those that are stored, rounding included."
    )
    energy: float = Field(description="Share of the squared difference that the kept directions have.")


class ExtractLoraResult(ModelResult):
    """An adapter, and how close it comes."""

    rank: int = Field(description="Largest rank of a matrix; 0 where all matrices are the same.")
    alpha: float = Field(description="`lora_alpha` of the adapter's configuration.")
    method: Decomposition
    matrices: tuple[ExtractedMatrix, ...] = Field(
        description="Every matrix, by layer and name.", json_schema_extra={"examples": [[]]}
    )
    error: float = Field(
        description="What is left of the difference of all matrices together: Frobenius norm, relative."
    )
    saved: tuple[str, ...] = Field((), description="Tensors that are stored whole.")
    lost: tuple[str, ...] = Field(
        (), description="Tensors that differ, but are neither in the adapter nor excluded by the request."
    )
    parameters: int = Field(description="Parameters of the adapter.")
    bytes: int = Field(description="Bytes of its weights.")
