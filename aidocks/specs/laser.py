"""The request and the result of ``/laser``: rank reduction of matrices, kept where it measurably helps."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from aidocks.specs.base import ModelName, ModelRef, ModelResult, PublishableSpec

#: Candidates that are tried when the request does not say how many: what the original LaserRMT tries.
DEFAULT_CANDIDATES = 15

Rule = Literal["marchenko_pastur", "laserrmt"]
Selection = Literal["snr", "exhaustive"]


def _parse_layers(layers: Any) -> Any:
    """Read ``"16-25,28"`` (alone or as an item of a list) as the numbers that it stands for."""
    if layers is None or isinstance(layers, int):
        return layers if layers is None else (layers,)
    parts = layers.split(",") if isinstance(layers, str) else layers
    if not isinstance(parts, list | tuple):
        return layers
    numbers: list[Any] = []
    for part in parts:
        span = re.fullmatch(r"\s*(\d{1,5})\s*-\s*(\d{1,5})\s*", part) if isinstance(part, str) else None
        if span and int(span[1]) > int(span[2]):
            raise ValueError(f"the range {part!r} runs backwards; write the lower layer first")
        numbers += range(int(span[1]), int(span[2]) + 1) if span else [part]
    return tuple(numbers)


Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_parse_layers)]


EXAMPLE: dict[str, Any] = {
    "base_model_name": "smollm2-135m-instruct",
    "laser_model_name": "smollm2-135m-instruct-laser",
    "layers": "11-18",
    "kinds": ["v_proj"],
    "rule": "laserrmt",
    "chunks": 64,
}


class LaserSpec(PublishableSpec):
    """Reduce the rank of weight matrices where that lowers perplexity significantly.

    The original body (``base_model_name``, ``laser_model_name``, ``publish``, ``trainer``,
    ``top_k_layers``, ``mode``, ``seqlen``) works as it is.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    base_model_name: ModelRef = Field(
        description="Model to optimise: a registry name, a hub model `org/name[@revision]`, or a path below "
        "an allowed root. It must be a causal language model in safetensors format.",
        examples=["smollm2-135m-instruct"],
    )
    laser_model_name: ModelName = Field(
        description="Registry name of the result.", examples=["smollm2-135m-instruct-laser"]
    )
    candidates: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description=f"How many matrices to try. Default: {DEFAULT_CANDIDATES}.",
        examples=[15],
    )
    top_k_layers: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="The original name of `candidates`: how many matrices to try (not a range of layers).",
        examples=[15],
    )
    mode: Literal["perplexity"] = Field(
        "perplexity", description="What decides: perplexity on `text`, measured on paired chunks."
    )
    seqlen: int = Field(
        128, ge=8, le=32_768, description="Length of an evaluation chunk, in tokens.", examples=[128]
    )
    layers: Layers = Field(
        None,
        min_length=1,
        description="Layers to consider, counted from 0, as a list or as ranges ('16-25,28'). Default: all.",
        examples=[[16, 17, 18]],
    )
    kinds: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Kinds of matrices to consider: the last module name of a weight. Default: all.",
        examples=[["k_proj", "v_proj"]],
    )
    rule: Rule = Field(
        "marchenko_pastur",
        description="How the kept rank is chosen: the Marchenko-Pastur edge with sigma from the median "
        "singular value, or `laserrmt`, the original rule (interquartile range of the singular values).",
        examples=["marchenko_pastur"],
    )
    selection: Selection = Field(
        "snr",
        description="Which matrices are tried: the `candidates` of lowest signal-to-noise ratio, or all "
        "(`exhaustive`).",
        examples=["snr"],
    )
    text: str = Field(
        "prose",
        min_length=1,
        max_length=4096,
        description="Text to measure on: `prose` (shipped, public domain), or the path of a .txt or .jsonl "
        "file (with a `text` field) below an allowed root.",
        examples=["prose"],
    )
    chunks: int = Field(
        32,
        ge=2,
        le=100_000,
        description="Evaluation chunks of the search; as many others are held out to verify the result.",
        examples=[32],
    )
    max_accepted: int | None = Field(
        None, ge=1, description="Stop after so many accepted matrices. Default: no limit.", examples=[5]
    )
    z_threshold: float = Field(
        3.0,
        gt=0,
        le=100,
        description="A matrix is accepted when the mean loss falls by so many paired standard errors.",
        examples=[3.0],
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Chooses which chunks belong to which split.")
    max_shard_size: str = Field(
        "5GB", description="Largest weight file of the result, such as 500MB or 5GB.", examples=["5GB"]
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _only_perplexity(cls, mode: object) -> object:
        if mode == "benchmark":
            raise ValueError(
                "mode 'benchmark' is not available: the original scored generated answers by embedding "
                "similarity, which does not measure quality; use 'perplexity'"
            )
        return mode

    @field_validator("kinds", mode="before")
    @classmethod
    def _split_kinds(cls, kinds: object) -> object:
        return tuple(kind.strip() for kind in kinds.split(",")) if isinstance(kinds, str) else kinds

    @model_validator(mode="after")
    def _agree(self) -> LaserSpec:
        if self.candidates is not None and self.top_k_layers is not None:
            raise ValueError("give either `candidates` or its original name `top_k_layers`, not both")
        if self.selection == "exhaustive" and (self.candidates or self.top_k_layers):
            raise ValueError("`exhaustive` tries every matrix: leave `candidates` out, or select by `snr`")
        return self

    @property
    def num_candidates(self) -> int | None:
        """How many matrices to try; None stands for all of them."""
        if self.selection == "exhaustive":
            return None
        return self.candidates or self.top_k_layers or DEFAULT_CANDIDATES


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AcceptedReduction(_Part):
    """One matrix of the result whose rank was reduced, with the evidence for it."""

    name: str = Field(description="Full parameter name.")
    layer: int
    kind: str
    rank: int = Field(description="Rank that was kept.")
    full_rank: int = Field(description="Rank before: the smaller side of the matrix.")
    delta: float = Field(description="Change of the mean loss (nats per token) when it was accepted.")
    standard_error: float = Field(description="Paired standard error of that change.")
    z: float = Field(description="delta / standard_error.")


class BeforeAfter(_Part):
    """Perplexity of base and result on the same chunks; None stands for a loss that is not finite."""

    before: float | None
    before_standard_error: float | None
    after: float | None
    after_standard_error: float | None
    delta: float | None = Field(description="Mean change of the loss in nats per token; negative is better.")
    delta_standard_error: float | None = Field(description="Paired standard error of the change.")
    z: float | None = Field(description="delta / its standard error; None when nothing changed.")
    tokens: int = Field(description="Tokens that were predicted.")


class LaserResult(ModelResult):
    """What a ``/laser`` job returns."""

    accepted: tuple[AcceptedReduction, ...] = Field(
        (), description="Reduced matrices, in order of acceptance."
    )
    search: BeforeAfter = Field(description="On the chunks that the search used.")
    held_out: BeforeAfter = Field(description="On chunks that the search never saw.")
    withdrawn: bool = Field(
        False, description="True when the held-out chunks contradicted the search, so the result is the base."
    )
    candidates_tried: int = Field(description="Matrices whose reduction was measured.")
    matrices_scanned: int = Field(description="Matrices whose spectrum was computed.")
    parameters: int = Field(description="Parameters of the result (its storage is dense).")
