"""The request of ``/laser``: rank reduction of matrices, kept where it measurably helps."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from aidocks.specs.base import ModelName, ModelRef, PublishableSpec
from aidocks.specs.objective import Objective

#: Candidates that are tried when the request does not say how many.
DEFAULT_CANDIDATES = 30

Rule = Literal[
    "laserrmt", "marchenko_pastur", "gavish_donoho", "optimal_shrinkage", "screenot", "fraction", "energy"
]
Truncation = Literal["activation_aware", "weight"]
Selection = Literal["gradient", "snr", "backward", "exhaustive"]
Output = Literal["dense", "factored"]

#: What `keep` is when the request does not say: a grid of fractions, for one more costs a gradient pass next to
#: nothing, and one share of the energy.
DEFAULT_FRACTIONS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01)
DEFAULT_ENERGIES = (0.9,)
DEFAULT_RULES: tuple[Rule, ...] = ("laserrmt", "marchenko_pastur", "gavish_donoho", "fraction")


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


def _split(given: Any) -> Any:
    """Read ``"a, b"`` as the words that it lists."""
    return tuple(word.strip() for word in given.split(",")) if isinstance(given, str) else given


Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_parse_layers)]


Rules = Annotated[tuple[Rule, ...], BeforeValidator(_split), Field(min_length=1)]
Truncations = Annotated[tuple[Truncation, ...], BeforeValidator(_split), Field(min_length=1)]
Kinds = Annotated[tuple[str, ...] | None, BeforeValidator(_split)]

EXAMPLE: dict[str, Any] = {
    "base_model_name": "smollm2-135m-instruct",
    "laser_model_name": "smollm2-135m-instruct-laser",
    "kinds": ["k_proj", "v_proj"],
    "rule": ["laserrmt", "marchenko_pastur"],
    "guards": ["accuracy:capitals"],
}


class LaserSpec(PublishableSpec):
    """Reduce the rank of weight matrices where that measurably makes the model better.

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
        description=f"How many reductions to measure. Default: {DEFAULT_CANDIDATES}, or all of them for `backward` "
        "and `exhaustive`.",
        examples=[30],
    )
    top_k_layers: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="The original name of `candidates`: how many matrices to try (not a range of layers).",
        examples=[15],
    )
    mode: Literal["perplexity"] = Field(
        "perplexity", description="The original name of what decides; use `objective` for anything else."
    )
    objective: Objective | None = Field(
        None,
        description="What decides, as `metric:data`. Metrics: `perplexity` of a text, `accuracy` or `log_likelihood` "
        "of a set of questions, `preference` of chosen over rejected answers. Default: perplexity of `text`.",
        examples=["accuracy:capitals"],
    )
    guards: tuple[Objective, ...] | None = Field(
        None,
        max_length=8,
        description="Further objectives that must not get worse. Default: perplexity of the shipped `prose`, unless "
        "that is the objective itself; an empty list for none.",
        examples=[["accuracy:capitals"]],
    )
    text: str = Field(
        "prose",
        min_length=1,
        max_length=4096,
        description="Text to measure perplexity on: `prose` (shipped, public domain), or the path of a .txt or .jsonl "
        "file (with a `text` field) below an allowed root.",
        examples=["prose"],
    )
    seqlen: int = Field(
        128, ge=8, le=32_768, description="Length of a chunk of text, in tokens.", examples=[128]
    )
    chunks: int | None = Field(
        None,
        ge=8,
        le=100_000,
        description="Chunks of text that the search measures on; as many others (128 at most) verify the result, and "
        "as many again report it. Default: up to 128, as the text allows.",
        examples=[64],
    )
    layers: Layers = Field(
        None,
        min_length=1,
        description="Layers to consider, counted from 0, as a list or as ranges ('16-25,28'). Default: all.",
        examples=[[16, 17, 18]],
    )
    kinds: Kinds = Field(
        None,
        min_length=1,
        description="Kinds of matrices to consider: the last module name of a weight. Default: all.",
        examples=[["k_proj", "v_proj"]],
    )
    rule: Rules = Field(
        DEFAULT_RULES,
        description="How ranks are chosen; of several rules, each gives a candidate for every matrix. `laserrmt` is "
        "the original's; `marchenko_pastur`, `gavish_donoho` and `screenot` are thresholds of random matrix theory; "
        "`optimal_shrinkage` also shrinks what it keeps; `fraction` and `energy` keep the shares in `keep`.",
        examples=[["laserrmt", "marchenko_pastur"]],
    )
    keep: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = Field(
        None,
        min_length=1,
        max_length=32,
        description="For `fraction`: shares of the full rank; for `energy`: shares of the squared Frobenius norm.",
        examples=[[0.8, 0.4, 0.1]],
    )
    truncation: Truncations | None = Field(
        None,
        description="Which components are dropped: those that matter least for the layer's output on real inputs "
        "(`activation_aware`), or those of the smallest singular values (`weight`); of both, each is a candidate. "
        "Default: `activation_aware`; for `optimal_shrinkage`, which shrinks a matrix's own singular values, `weight`.",
        examples=[["activation_aware"]],
    )
    selection: Selection = Field(
        "gradient",
        description="Which reductions are measured: those that one gradient pass predicts to help most (`gradient`), "
        "those of the noisiest matrices (`snr`), all from the last layer to the first (`backward`), or all of them, "
        "the best first (`exhaustive`).",
        examples=["gradient"],
    )
    output: Output = Field(
        "dense",
        description="How reduced matrices are stored: as they were (`dense`), or as two factors with fewer parameters "
        "(`factored`; loads with `aidocks.laser.factored`).",
        examples=["dense"],
    )
    max_accepted: int | None = Field(
        None, ge=1, description="Stop after so many accepted reductions. Default: no limit.", examples=[5]
    )
    z_threshold: float = Field(
        3.0,
        gt=0,
        le=100,
        description="A reduction is accepted when the objective improves by so many paired standard errors.",
        examples=[3.0],
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Chooses which data belong to which part.")
    max_shard_size: str = Field(
        "5GB", description="Largest weight file of the result, such as 500MB or 5GB.", examples=["5GB"]
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _only_perplexity(cls, mode: object) -> object:
        if mode == "benchmark":
            raise ValueError(
                "mode 'benchmark' is not available: the original scored generated answers by embedding similarity, "
                "which does not measure quality; give `objective` 'preference:<pairs.jsonl>' for chosen and rejected "
                "answers, or 'accuracy:<questions.jsonl>'"
            )
        return mode

    @model_validator(mode="after")
    def _agree(self) -> LaserSpec:
        if self.candidates is not None and self.top_k_layers is not None:
            raise ValueError("give either `candidates` or its original name `top_k_layers`, not both")
        if self.selection == "exhaustive" and (self.candidates or self.top_k_layers):
            raise ValueError(
                "`exhaustive` measures everything: leave `candidates` out, or select by `gradient`"
            )
        if self.keep is not None and not {"fraction", "energy"} & set(self.rule):
            raise ValueError("`keep` belongs to the rules `fraction` and `energy`; add one of them to `rule`")
        if "optimal_shrinkage" in self.rule and self.truncation and "weight" not in self.truncation:
            raise ValueError(
                "`optimal_shrinkage` shrinks the matrix's own singular values: add 'weight' to `truncation`"
            )
        return self

    @property
    def num_candidates(self) -> int | None:
        """How many reductions to measure; None stands for all of them."""
        if self.selection == "exhaustive":
            return None
        given = self.candidates or self.top_k_layers
        return given if self.selection == "backward" else given or DEFAULT_CANDIDATES

    def truncations_of(self, rule: Rule) -> tuple[Truncation, ...]:
        """How a rank that this rule gives is realised."""
        if rule == "optimal_shrinkage":
            return ("weight",)
        return self.truncation or ("activation_aware",)

    @property
    def decisive(self) -> Objective:
        """What decides."""
        return self.objective or Objective(metric="perplexity", data=self.text)

    @property
    def guarding(self) -> tuple[Objective, ...]:
        """What must not get worse: what makes one text more probable makes others less so."""
        general = Objective(metric="perplexity", data="prose")
        return ((general,) if self.decisive != general else ()) if self.guards is None else self.guards

    @property
    def decisions(self) -> tuple[tuple[Rule, float | None], ...]:
        """The rules, each with every share that it shall keep (None for rules that find the rank themselves)."""
        shares = {"fraction": self.keep or DEFAULT_FRACTIONS, "energy": self.keep or DEFAULT_ENERGIES}
        return tuple((rule, share) for rule in self.rule for share in shares.get(rule, (None,)))
