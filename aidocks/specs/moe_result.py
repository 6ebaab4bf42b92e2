"""The result of ``/byo-moe``: what was measured of a Mixture-of-Experts, and of everything it competes with."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from aidocks.specs.base import ModelResult
from aidocks.specs.moe import GateMode
from aidocks.specs.perplexities import ModelPerplexity


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ExpertShare(_Part):
    """How much one expert served of the experts' texts, or of the common text where there are no others."""

    source_model: str
    load: float = Field(description="Share of all choices that fell on it, mean over layers; they sum to 1.")
    weight: float = Field(
        description="Share of the mixture that it supplied, mean over layers; they sum to 1."
    )
    domains: dict[str, float] = Field(
        default_factory=dict, description="Domain -> share of the mixture that it supplied there."
    )
    preferred_layers: tuple[int, ...] = Field(
        (), description="Layers in which it supplied more than any other expert."
    )
    idle_layers: int = Field(description="Layers in which no token was sent to it.")
    dead: bool = Field(False, description="Whether it supplied hardly anything of the mixture on any text.")


class GateTraining(_Part):
    """How the gates were trained."""

    steps: int
    tokens: int = Field(description="Tokens that were learned from.")
    loss_before: float = Field(description="Of the validation chunks, in nats per token, mean over domains.")
    loss_after: float
    aux_loss_before: float = Field(
        description="Load-balancing loss on them; 1 is even, times experts_per_token."
    )
    aux_loss_after: float


class MoEResult(ModelResult):
    """What a ``/byo-moe`` job returns."""

    architecture: str = Field(description="`mixtral`, `qwen2_moe` or `qwen3_moe`.")
    experts: tuple[ExpertShare, ...] = Field(
        (), description="In the order of the request; empty if unmeasured."
    )
    experts_per_token: int
    gate_mode: GateMode
    gate_condition: float | None = Field(
        None, description="Worst condition number of a layer's router; None where rows are identical."
    )
    gate_scale: float | None = Field(
        None, description="Of fitted gates: the factor that was best on the validation part."
    )
    training: GateTraining | None = None
    perplexities: tuple[ModelPerplexity, ...] = Field(
        (), description="Base, every distinct expert, the experts' average, and the MoE."
    )
    parameters: int = Field(description="Parameters of the result.")
    active_parameters: int = Field(description="Parameters that one token passes through.")
    bytes: int = Field(description="Bytes of its weights.")
    warnings: tuple[str, ...] = Field(
        (), description="What the job said that one should know before using it."
    )
