"""The request and the result of ``/byo-moe``: a Mixture-of-Experts of a base and fine-tunes of its shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.base import ModelName, ModelRef, ModelResult, PublishableSpec, Spec

GateMode = Literal["hidden", "cheap_embed", "random"]
DType = Literal["float32", "float16", "bfloat16"]

#: Experts that a token is sent to when the request does not say, and there are as many.
DEFAULT_EXPERTS_PER_TOKEN = 2
MAX_EXPERTS = 256

Prompt = Annotated[str, Field(min_length=1, max_length=100_000)]
Prompts = Annotated[tuple[Prompt, ...], Field(max_length=4096)]


EXAMPLE: dict[str, Any] = {
    "base_model": "smollm2-135m-instruct",
    "gate_mode": "hidden",
    "dtype": "bfloat16",
    "experts": [
        {
            "source_model": "smollm2-135m-instruct",
            "positive_prompts": ["Tell me a story", "chat", "questions"],
        },
        {
            "source_model": "smollm2-135m-instruct-laser",
            "positive_prompts": ["mathematics", "step-by-step", "code"],
            "negative_prompts": ["chat"],
        },
    ],
    "name": "smollm2-2x135m",
}


class ExpertSpec(Spec):
    """One expert: a model whose feed-forward weights are taken, and the prompts that are to reach it."""

    source_model: ModelRef = Field(
        description="Model whose MLPs become this expert: a registry name, a hub model "
        "`org/name[@revision]`, or a path below an allowed root. It has the base's shape and tokenizer.",
        examples=["smollm2-135m-instruct-laser"],
    )
    positive_prompts: Prompts = Field(
        (),
        description="Texts that this expert is for. Needed by the gate modes `hidden` and `cheap_embed`.",
        examples=[["mathematics", "step-by-step", "Solve the equation"]],
    )
    negative_prompts: Prompts = Field(
        (), description="Texts that it is not for.", examples=[["chat", "questions"]]
    )

    @field_validator("positive_prompts", "negative_prompts", mode="before")
    @classmethod
    def _null_is_none(cls, prompts: object) -> object:
        return () if prompts is None else prompts

    @field_validator("positive_prompts", "negative_prompts")
    @classmethod
    def _not_blank(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for number, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {number} is blank")
        return prompts

    @property
    def prompts(self) -> tuple[frozenset[str], frozenset[str]]:
        """What distinguishes this expert from another for the router."""
        return frozenset(self.positive_prompts), frozenset(self.negative_prompts)


class MoESpec(PublishableSpec):
    """Combine the attention of a base model with the MLPs of experts into one Mixtral model.

    The original body (``base_model``, ``gate_mode``, ``dtype``, ``experts`` with ``source_model``,
    ``positive_prompts`` and ``negative_prompts``) works as it is.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    base_model: ModelRef = Field(
        description="Model that gives attention, norms, embeddings and tokenizer: a registry name, a hub "
        "model `org/name[@revision]`, or a path below an allowed root. A Llama or Mistral model.",
        examples=["smollm2-135m-instruct"],
    )
    gate_mode: GateMode = Field(
        "hidden",
        description="How the router is initialised: `hidden` (the base's hidden states of the prompts, one "
        "row per layer), `cheap_embed` (their token embeddings, the same in all layers) or `random`.",
        examples=["hidden"],
    )
    dtype: DType | None = Field(
        None, description="Type of the result's weights. Default: the base's.", examples=["bfloat16"]
    )
    experts: tuple[ExpertSpec, ...] = Field(
        # The lengths are checked below: pydantic would report a wrong one whenever an element is wrong.
        json_schema_extra={"minItems": 1, "maxItems": MAX_EXPERTS},
        description="The experts, in the order of the router's rows. The base may be one of them.",
        examples=[EXAMPLE["experts"]],
    )
    experts_per_token: int | None = Field(
        None,
        ge=1,
        le=MAX_EXPERTS,
        description=f"Experts that every token is sent to. Default: {DEFAULT_EXPERTS_PER_TOKEN}, or 1 of 1.",
        examples=[2],
    )
    name: ModelName | None = Field(
        None,
        description="Registry name of the result, of letters, digits, '.', '_' and '-'. Default: the "
        "base's, `-moe-`, and the end of the job's id.",
        examples=["smollm2-2x135m"],
    )
    seed: int = Field(
        0, ge=0, le=2**31 - 1, description="Of random gates, and of the choice of evaluation chunks."
    )
    max_shard_size: str = Field(
        "5GB", description="Largest weight file of the result, such as 500MB or 5GB.", examples=["5GB"]
    )
    evaluate: bool = Field(
        True,
        description="Measure the perplexity of the base, of every expert and of the result.",
        examples=[True],
    )
    text: str = Field(
        "prose",
        min_length=1,
        max_length=4096,
        description="Text to measure on: `prose` (shipped, public domain), or the path of a .txt or .jsonl "
        "file (with a `text` field) below an allowed root.",
        examples=["prose"],
    )
    chunks: int = Field(32, ge=2, le=100_000, description="Evaluation chunks.", examples=[32])
    seqlen: int = Field(
        128, ge=8, le=32_768, description="Length of an evaluation chunk, in tokens.", examples=[128]
    )

    @field_validator("gate_mode", mode="before")
    @classmethod
    def _null_is_default(cls, mode: object) -> object:
        return "hidden" if mode is None else mode

    @field_validator("experts")
    @classmethod
    def _some_but_not_too_many(cls, experts: tuple[ExpertSpec, ...]) -> tuple[ExpertSpec, ...]:
        if not 1 <= len(experts) <= MAX_EXPERTS:
            raise ValueError(f"must be 1 to {MAX_EXPERTS} experts, not {len(experts)}")
        return experts

    @model_validator(mode="after")
    def _agree(self) -> MoESpec:
        if self.experts_per_token is not None and self.experts_per_token > len(self.experts):
            raise InvalidSpec(
                f"A token cannot be sent to {self.experts_per_token} of {_experts(len(self.experts))}.",
                field="experts_per_token",
                value=self.experts_per_token,
                hint=f"At most {len(self.experts)}.",
            )
        if self.gate_mode != "random":
            self._check_prompts()
        return self

    def _check_prompts(self) -> None:
        for index, expert in enumerate(self.experts):
            if not expert.positive_prompts:
                raise InvalidSpec(
                    f"The gate mode {self.gate_mode!r} needs prompts of every expert.",
                    field=f"experts[{index}].positive_prompts",
                    value=[],
                    hint="Give a few texts of its domain, or use the gate mode 'random'.",
                )
        if len(self.experts) > 1 and len({expert.prompts for expert in self.experts}) == 1:
            raise InvalidSpec(
                "All experts have the same prompts: their router rows would be identical, so every token "
                "would go to the same experts in equal shares and nothing would be routed.",
                field="experts[1].positive_prompts",
                value=list(self.experts[1].positive_prompts),
                hint="Give every expert texts of its own domain, or use the gate mode 'random'.",
            )

    @property
    def num_experts_per_token(self) -> int:
        return self.experts_per_token or min(DEFAULT_EXPERTS_PER_TOKEN, len(self.experts))


def _experts(number: int) -> str:
    return "1 expert" if number == 1 else f"{number} experts"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelPerplexity(_Part):
    """Perplexity of one model on the evaluation chunks; all models see the same chunks."""

    model: str = Field(description="`base`, `experts[i]` or `moe`.")
    reference: str = Field(
        description="The model reference of the request; the result's registry name for the MoE."
    )
    perplexity: float | None = Field(description="None when the loss is not finite.")
    standard_error: float | None = Field(description="Standard error of the perplexity over chunks.")
    tokens: int = Field(description="Tokens that were predicted.")


class ExpertShare(_Part):
    """How much of the evaluated text one expert served."""

    source_model: str
    load: float = Field(description="Share of all choices that fell on it, mean over layers; they sum to 1.")
    weight: float = Field(
        description="Share of the mixture that it supplied, mean over layers; they sum to 1."
    )
    idle_layers: int = Field(description="Layers in which no token was sent to it.")


class MoEResult(ModelResult):
    """What a ``/byo-moe`` job returns."""

    experts: tuple[ExpertShare, ...] = Field(description="In the order of the request.")
    experts_per_token: int
    gate_mode: GateMode
    gate_condition: float | None = Field(
        None, description="Worst condition number of a layer's router; None where rows are identical."
    )
    perplexities: tuple[ModelPerplexity, ...] = Field(
        (), description="Base, every distinct expert, and the MoE."
    )
    parameters: int = Field(description="Parameters of the result.")
    active_parameters: int = Field(description="Parameters that one token passes through.")
    bytes: int = Field(description="Bytes of its weights.")
