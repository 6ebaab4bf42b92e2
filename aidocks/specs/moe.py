"""The request of ``/byo-moe``: a Mixture-of-Experts of a base and fine-tunes of its shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.base import ModelName, ModelRef, PublishableSpec, Spec
from aidocks.specs.resources import ComputingSpec

GateMode = Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "fitted", "trained"]
DType = Literal["float32", "float16", "bfloat16"]
Architecture = Literal["mixtral", "qwen_moe"]

#: Gate modes that need nothing of the experts, those that are made of prompts, and those that learn from texts.
RANDOM_MODES: tuple[GateMode, ...] = ("random", "uniform_random")
PROMPT_MODES: tuple[GateMode, ...] = ("hidden", "hidden_avg", "cheap_embed")
LEARNED_MODES: tuple[GateMode, ...] = ("fitted", "trained")

#: Experts that a token is sent to when the request does not say.
DEFAULT_EXPERTS_PER_TOKEN = 2
MIN_EXPERTS, MAX_EXPERTS = 2, 256
MAX_SHARED_EXPERTS = 8

Prompt = Annotated[str, Field(min_length=1, max_length=100_000)]
Prompts = Annotated[tuple[Prompt, ...], Field(max_length=4096)]

# What mergekit-moe's files call the forms of an MoE, beside ours.
_ARCHITECTURE_NAMES = {
    "qwen": "qwen_moe",
    "qwen3": "qwen_moe",
    "qwen2_moe": "qwen_moe",
    "qwen3_moe": "qwen_moe",
}

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


class SharedExpertSpec(Spec):
    """An expert that serves every token, with a gate of its own: what a Qwen MoE calls a shared expert."""

    source_model: ModelRef = Field(
        description="Model whose MLPs become this expert: a registry name, a hub model "
        "`org/name[@revision]`, or a path below an allowed root. It has the base's shape and tokenizer.",
        examples=["smollm2-135m-instruct-laser"],
    )
    positive_prompts: Prompts = Field(
        (),
        description="Texts that this expert is for. Needed by the gate modes `hidden`, `hidden_avg` and "
        "`cheap_embed`; `fitted` and `trained` take them as example texts.",
        examples=[["mathematics", "step-by-step", "Solve the equation"]],
    )
    negative_prompts: Prompts = Field(
        (), description="Texts that it is not for.", examples=[["chat", "questions"]]
    )
    residual_scale: float = Field(
        1.0,
        gt=0,
        le=1e4,
        description="Factor of the expert's contribution; it is multiplied into `down_proj`.",
    )
    noise_scale: float = Field(
        0.0,
        ge=0,
        le=1e3,
        description="Standard deviation of Gaussian noise that is added to the expert's weights, from `seed`.",
    )

    @field_validator("positive_prompts", "negative_prompts", mode="before")
    @classmethod
    def _null_is_none(cls, prompts: object) -> object:
        return () if prompts is None else prompts

    @field_validator("residual_scale", "noise_scale", mode="before")
    @classmethod
    def _null_is_default(cls, value: object, info: ValidationInfo) -> object:
        return cls.model_fields[info.field_name or ""].default if value is None else value

    @field_validator("positive_prompts", "negative_prompts")
    @classmethod
    def _not_blank(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for number, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {number} is blank")
        return prompts


class ExpertSpec(SharedExpertSpec):
    """One expert: a model whose feed-forward weights are taken, and the texts that are to reach it."""

    positive_texts: Prompts = Field(
        (),
        description="Longer example texts of the expert's domain, for the gate modes `fitted` and `trained`, "
        "and to measure on.",
    )
    dataset: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="A .txt or .jsonl file (with a `text` field) of example texts, below an allowed root, or "
        "a shipped text's name. Used like `positive_texts`.",
        examples=["./python.jsonl"],
    )

    @field_validator("positive_texts", mode="before")
    @classmethod
    def _null_is_no_text(cls, texts: object) -> object:
        return () if texts is None else texts

    @property
    def prompts(self) -> tuple[frozenset[str], frozenset[str]]:
        """What distinguishes this expert from another for a router that is made of prompts."""
        return frozenset(self.positive_prompts), frozenset(self.negative_prompts)

    @property
    def examples(self) -> tuple[frozenset[str], str | None]:
        """What distinguishes this expert from another for a router that learns."""
        return frozenset((*self.positive_texts, *self.positive_prompts)), self.dataset


class MoESpec(PublishableSpec, ComputingSpec):
    """Combine the attention of a base model with the MLPs of experts into one Mixture-of-Experts.

    The original body (``base_model``, ``gate_mode``, ``dtype``, ``experts`` with ``source_model``,
    ``positive_prompts`` and ``negative_prompts``) works as it is, and so does a mergekit-moe file.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    base_model: ModelRef = Field(
        description="Model that gives attention, norms, embeddings and tokenizer: a registry name, a hub "
        "model `org/name[@revision]`, or a path below an allowed root. Llama, Mistral, Phi-3, Qwen2 or Qwen3.",
        examples=["smollm2-135m-instruct"],
    )
    gate_mode: GateMode = Field(
        "hidden",
        description="How the router is made: from prompts by `hidden` (the base's hidden states of their last "
        "tokens, one row per layer), `hidden_avg` (of all their tokens) or `cheap_embed` (their token "
        "embeddings, the same in all layers); `random` or `uniform_random`; or from the experts' example texts "
        "by `fitted` (a classifier in closed form) or `trained` (fitted, then trained by gradient descent).",
        examples=["hidden"],
    )
    dtype: DType | None = Field(
        None, description="Type of the result's weights. Default: the base's.", examples=["bfloat16"]
    )
    experts: tuple[ExpertSpec, ...] = Field(
        # The lengths are checked below: pydantic would report a wrong one whenever an element is wrong.
        json_schema_extra={"minItems": MIN_EXPERTS, "maxItems": MAX_EXPERTS},
        description="The experts, in the order of the router's rows. The base may be one of them.",
        examples=[EXAMPLE["experts"]],
    )
    shared_experts: tuple[SharedExpertSpec, ...] = Field(
        (),
        max_length=MAX_SHARED_EXPERTS,
        description="Experts that serve every token, in the architecture `qwen_moe` of Qwen2-type models.",
    )
    architecture: Architecture | None = Field(
        None,
        description="Form of the result: `mixtral` (of Llama, Mistral and Phi-3 models) or `qwen_moe` (Qwen2-MoE "
        "of Qwen2, Llama or Mistral models, Qwen3-MoE of Qwen3 models). Default: `qwen_moe` for Qwen models, "
        "else `mixtral`.",
        examples=["mixtral"],
    )
    experts_per_token: int | None = Field(
        None,
        ge=1,
        le=MAX_EXPERTS,
        description=f"Experts that every token is sent to. Default: {DEFAULT_EXPERTS_PER_TOKEN}.",
        examples=[2],
    )
    tokenizer_source: str = Field(
        "base",
        min_length=1,
        max_length=1024,
        description="Whose tokenizer the result has: `base`, `union` (the largest, which must extend all others), "
        "or the `source_model` of an expert whose tokenizer extends the base's.",
        examples=["base"],
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        max_length=100_000,
        description="Chat template of the result: `alpaca`, `chatml`, `llama3`, `mistral`, or a Jinja template. "
        "Default: that of the tokenizer.",
        examples=["chatml"],
    )
    load_in_8bit: bool = Field(
        False, description="Load the base in 8 bits to compute the gates, where the worker has a CUDA GPU."
    )
    load_in_4bit: bool = Field(
        False, description="Load the base in 4 bits to compute the gates, where the worker has a CUDA GPU."
    )
    fit_tokens: int = Field(
        4096,
        ge=64,
        le=65_536,
        description="Tokens of every expert's example texts that the gate modes `fitted` and `trained` fit the "
        "router on, at most. They pass through the model together: memory grows with them.",
        examples=[4096],
    )
    gate_steps: int = Field(
        200, ge=1, le=1_000_000, description="Steps of gradient descent of the gate mode `trained`."
    )
    gate_learning_rate: float = Field(
        3e-2, gt=0, le=10, description="Their largest step size, relative to the size of a router's weights."
    )
    router_aux_loss_coef: float = Field(
        1e-3,
        ge=0,
        le=10,
        description="Weight of the load-balancing loss beside the language-modelling loss in the gate mode "
        "`trained`; the result's configuration carries it for later training.",
    )
    name: ModelName | None = Field(
        None,
        description="Registry name of the result, of letters, digits, '.', '_' and '-'. Default: the "
        "base's, `-moe-`, and the end of the job's id.",
        examples=["smollm2-2x135m"],
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Of random gates, of noise, of training, and of the choice of evaluation chunks.",
    )
    max_shard_size: str = Field(
        "5GB", description="Largest weight file of the result, such as 500MB or 5GB.", examples=["5GB"]
    )
    evaluate: bool = Field(
        True,
        description="Load and run the result, and measure the perplexity of the base, of every expert, of the "
        "experts' plain average and of the result. Without it the result is assembled and nothing else.",
        examples=[True],
    )
    text: str = Field(
        "prose",
        min_length=1,
        max_length=4096,
        description="Text to measure on, beside the experts' own example texts: `prose` (shipped, public domain), "
        "or the path of a .txt or .jsonl file (with a `text` field) below an allowed root.",
        examples=["prose"],
    )
    chunks: int = Field(32, ge=2, le=100_000, description="Evaluation chunks of every text.", examples=[32])
    seqlen: int = Field(
        128, ge=8, le=32_768, description="Length of an evaluation chunk, in tokens.", examples=[128]
    )

    @field_validator("gate_mode", mode="before")
    @classmethod
    def _null_is_default(cls, mode: object) -> object:
        return "hidden" if mode is None else mode

    @field_validator("architecture", mode="before")
    @classmethod
    def _by_other_names(cls, architecture: object) -> object:
        if architecture == "deepseek":
            raise ValueError("a DeepSeek MoE needs remote code to be loaded; use 'mixtral' or 'qwen_moe'")
        return (
            _ARCHITECTURE_NAMES.get(architecture, architecture)
            if isinstance(architecture, str)
            else architecture
        )

    @field_validator("shared_experts", mode="before")
    @classmethod
    def _null_is_none(cls, experts: object) -> object:
        return () if experts is None else experts

    @field_validator("experts")
    @classmethod
    def _some_but_not_too_many(cls, experts: tuple[ExpertSpec, ...]) -> tuple[ExpertSpec, ...]:
        if not MIN_EXPERTS <= len(experts) <= MAX_EXPERTS:
            raise ValueError(f"must be {MIN_EXPERTS} to {MAX_EXPERTS} experts, not {len(experts)}")
        return experts

    @model_validator(mode="after")
    def _agree(self) -> MoESpec:
        if self.experts_per_token is not None and self.experts_per_token > len(self.experts):
            raise InvalidSpec(
                f"A token cannot be sent to {self.experts_per_token} of {len(self.experts)} experts.",
                field="experts_per_token",
                value=self.experts_per_token,
                hint=f"At most {len(self.experts)}.",
            )
        if self.shared_experts and self.architecture == "mixtral":
            raise InvalidSpec(
                "A Mixtral model has no place for shared experts.",
                field="shared_experts",
                value=[expert.source_model for expert in self.shared_experts],
                hint="Use the architecture 'qwen_moe'.",
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise InvalidSpec(
                "The base is loaded in 4 bits or in 8 bits, not both.", field="load_in_8bit", value=True
            )
        if self.gate_mode in PROMPT_MODES:
            self._check_prompts()
        if self.gate_mode in LEARNED_MODES:
            self._check_examples()
        return self

    def _check_prompts(self) -> None:
        lists = {"experts": self.experts, "shared_experts": self.shared_experts}
        for field, experts in lists.items():
            for index, expert in enumerate(experts):
                if not expert.positive_prompts:
                    raise InvalidSpec(
                        f"The gate mode {self.gate_mode!r} needs prompts of every expert.",
                        field=f"{field}[{index}].positive_prompts",
                        value=[],
                        hint="Give a few texts of its domain, or use the gate mode 'random'.",
                    )
        if len({expert.prompts for expert in self.experts}) == 1:
            raise InvalidSpec(
                "All experts have the same prompts: their router rows would be identical, so every token "
                "would go to the same experts in equal shares and nothing would be routed.",
                field="experts[1].positive_prompts",
                value=list(self.experts[1].positive_prompts),
                hint="Give every expert texts of its own domain, or use the gate mode 'random'.",
            )

    def _check_examples(self) -> None:
        for index, expert in enumerate(self.experts):
            if not expert.examples[0] and expert.dataset is None:
                raise InvalidSpec(
                    f"The gate mode {self.gate_mode!r} needs example texts of every expert.",
                    field=f"experts[{index}].positive_texts",
                    value=[],
                    hint="Give `dataset` (a file), `positive_texts` or `positive_prompts`.",
                )
        if len({expert.examples for expert in self.experts}) == 1:
            raise InvalidSpec(
                "All experts have the same example texts, so that there is nothing to tell them apart by.",
                field="experts[1].positive_texts",
                value=list(self.experts[1].positive_texts)[:3],
                hint="Give every expert texts of its own domain, or use the gate mode 'random'.",
            )

    @property
    def num_experts_per_token(self) -> int:
        return self.experts_per_token or DEFAULT_EXPERTS_PER_TOKEN
