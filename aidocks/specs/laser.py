"""The request of ``/laser``: rank reduction of matrices, kept where it measurably helps."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.base import ModelName, ModelRef, PublishableSpec
from aidocks.specs.objective import Objective
from aidocks.specs.resources import ComputingSpec

#: Matrices that are tried when the request does not say how many.
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
#: The same where every rank that a rule proposes is measured, as the original does.
ORIGINAL_RULES: tuple[Rule, ...] = ("laserrmt",)

_LAST_LAYER = 9999
_MOST_LAYERS = 1000
_MOST_LISTED = 64


def _parse_layers(layers: Any) -> Any:
    """Read ``"16-25,28"`` (alone or as an item of a list) as the numbers that it stands for."""
    if layers is None or isinstance(layers, int):
        return layers if layers is None else (layers,)
    parts = layers.split(",") if isinstance(layers, str) else layers
    if not isinstance(parts, list | tuple):
        return layers
    numbers: list[Any] = []
    for part in parts:
        numbers += _span(part) if isinstance(part, str) else [part]
        if len(numbers) > _MOST_LAYERS:
            raise ValueError(f"more than {_MOST_LAYERS} layers are listed")
    return tuple(numbers)


def _span(text: str) -> range:
    """Read ``"16-25"`` or ``"28"``."""
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", text)
    if not found:
        raise ValueError(
            f"{text[:40]!r} names no layers; write a range such as '16-25', or a list of numbers"
        )
    low, high = int(found[1]), int(found[2] or found[1])
    if low > high:
        raise ValueError(f"the range {text!r} runs backwards; write the lower layer first")
    if high > _LAST_LAYER:
        raise ValueError(f"{text!r} goes beyond layer {_LAST_LAYER}, which no model has")
    return range(low, high + 1)


def _listed(given: Any) -> Any:
    """Read ``"a, b"`` as what it lists, and a single number as a list of one."""
    if isinstance(given, str):
        return tuple(word.strip() for word in given.split(","))
    return (given,) if isinstance(given, int | float) and not isinstance(given, bool) else given


ItemT = TypeVar("ItemT")


def _once_each(items: tuple[ItemT, ...]) -> tuple[ItemT, ...]:
    return tuple(dict.fromkeys(items))


#: A list without repeats, which people may also write as words separated by commas.
Listed = Annotated[
    tuple[ItemT, ...],
    Field(min_length=1, max_length=_MOST_LISTED),
    BeforeValidator(_listed),
    AfterValidator(_once_each),
]
Layers = Annotated[
    tuple[Annotated[int, Field(ge=0, le=_LAST_LAYER)], ...],
    Field(min_length=1),
    BeforeValidator(_parse_layers),
    AfterValidator(_once_each),
]

EXAMPLE: dict[str, Any] = {
    "base_model_name": "smollm2-135m-instruct",
    "laser_model_name": "smollm2-135m-instruct-laser",
    "kinds": ["k_proj", "v_proj"],
    "rule": ["laserrmt", "marchenko_pastur"],
    "guards": ["accuracy:capitals"],
}


class LaserSpec(PublishableSpec, ComputingSpec):
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
        description="How many matrices to try: of each, `gradient` measures the one reduction that promises most, "
        "`snr` and `backward` measure all that `rule` proposes. "
        f"Default: {DEFAULT_CANDIDATES}, or all of them for `backward` and `exhaustive`.",
        examples=[30],
    )
    top_k_layers: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="The original name of `candidates`: how many matrices to try, not a range of layers.",
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
        description="Further objectives that must not get worse. Default: perplexity, of `text` beside an `objective`, "
        "else of the shipped `prose`, unless that is what decides; an empty list for none.",
        examples=[["accuracy:capitals"]],
    )
    text: str = Field(
        "prose",
        min_length=1,
        max_length=4096,
        description="Text to measure perplexity on: `prose` (shipped, public domain), or the path of a .txt or .jsonl "
        "file (with a `text` field) below an allowed root. It decides; beside an `objective`, it is what the default "
        "guard measures.",
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
    layers: Layers | None = Field(
        None,
        description="Layers to consider, counted from 0, as a list or as ranges ('16-25,28'). Default: all.",
        examples=[[16, 17, 18]],
    )
    kinds: Listed[str] | None = Field(
        None,
        description="Kinds of matrices to consider: the last module name of a weight. Default: all.",
        examples=[["k_proj", "v_proj"]],
    )
    rule: Listed[Rule] | None = Field(
        None,
        description="How ranks are chosen; of several rules, each gives a candidate for every matrix. `laserrmt` is "
        "the original's; `marchenko_pastur`, `gavish_donoho` and `screenot` are thresholds of random matrix theory; "
        "`optimal_shrinkage` also shrinks what it keeps; `fraction` and `energy` keep the shares in `keep`. "
        f"Default: {', '.join(f'`{rule}`' for rule in DEFAULT_RULES)}; where `selection` is `snr` or `backward`, which "
        f"measure all that the rules propose, `{ORIGINAL_RULES[0]}` alone.",
        examples=[["laserrmt", "marchenko_pastur"]],
    )
    keep: Listed[Annotated[float, Field(gt=0, lt=1)]] | None = Field(
        None,
        description="For `fraction`: shares of the full rank; for `energy`: shares of the squared Frobenius norm.",
        examples=[[0.8, 0.4, 0.1]],
    )
    truncation: Listed[Truncation] | None = Field(
        None,
        description="Which components are dropped: those that matter least for the layer's output on real inputs "
        "(`activation_aware`), or those of the smallest singular values (`weight`); of both, each is a candidate. "
        "Default: `activation_aware`; for `optimal_shrinkage`, which shrinks a matrix's own singular values, `weight`.",
        examples=[["activation_aware"]],
    )
    selection: Selection = Field(
        "gradient",
        description="Which reductions are measured: those that one gradient pass predicts to help most, of each matrix "
        "one at most (`gradient`), those of the noisiest matrices (`snr`), those from the last layer to the first "
        "(`backward`), or all of them, the best first (`exhaustive`).",
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
        if self.keep is not None and not {"fraction", "energy"} & set(self.rules):
            raise ValueError("`keep` belongs to the rules `fraction` and `energy`; add one of them to `rule`")
        if "optimal_shrinkage" in self.rules and self.truncation and "weight" not in self.truncation:
            raise ValueError(
                "`optimal_shrinkage` shrinks the matrix's own singular values: add 'weight' to `truncation`"
            )
        return self

    @model_validator(mode="after")
    def _judge_by_each_once(self) -> LaserSpec:
        known = [self.decisive]
        for number, guard in enumerate(self.guards or ()):
            if guard in known:
                what = "what decides" if guard == self.decisive else "one of the guards"
                raise InvalidSpec(
                    f"'{guard}' is {what} already.",
                    field=f"guards[{number}]",
                    value=str(guard),
                    hint="Leave it out.",
                )
            known.append(guard)
        return self

    @property
    def rules(self) -> tuple[Rule, ...]:
        """How ranks are chosen."""
        return self.rule or (ORIGINAL_RULES if self.selection in ("snr", "backward") else DEFAULT_RULES)

    @property
    def num_candidates(self) -> int | None:
        """How many matrices to try; None stands for all of them."""
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
        general = Objective(metric="perplexity", data=self.text if self.objective else "prose")
        return ((general,) if self.decisive != general else ()) if self.guards is None else self.guards

    @property
    def decisions(self) -> tuple[tuple[Rule, float | None], ...]:
        """The rules, each with every share that it shall keep (None for rules that find the rank themselves)."""
        shares = {"fraction": self.keep or DEFAULT_FRACTIONS, "energy": self.keep or DEFAULT_ENERGIES}
        return tuple((rule, share) for rule in self.rules for share in shares.get(rule, (None,)))
