"""The request of ``/merge/evolve``: a merge in which numbers are searched, and what decides which are best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.base import ModelName, PublishableSpec
from aidocks.specs.merge import ComputeDType, MergeSpec
from aidocks.specs.merge_config import MergeConfig
from aidocks.specs.objective import Objective
from aidocks.specs.resources import ComputingSpec
from aidocks.specs.search_range import SearchRange
from aidocks.specs.search_space import Genome, Number, lift_ranges, read_genome

EXAMPLE: dict[str, Any] = {
    "merge_method": "linear",
    "models": [
        {"model": "smollm2-135m-instruct", "parameters": {"weight": 1}},
        {
            "model": "smollm2-135m-instruct-laser",
            "parameters": {"weight": {"min": 0, "max": 2, "initial": 1}},
        },
    ],
    "dtype": "bfloat16",
    "objective": "accuracy:capitals",
    "generations": 10,
    "name": "smollm2-evolved",
}

#: Fields of a merge's request that this one has too, beside mergekit's own.
_SHARED = ("name", "compute_dtype", "seed", "max_shard_size", "publish", "trainer", "private")


class MergeEvolveSpec(MergeConfig, PublishableSpec, ComputingSpec):
    """Search parameters of a merge by evolution (CMA-ES), and write the merge that measurably is the best.

    A mergekit file in which any number of `parameters` may be a range, `{min: 0, max: 1}`, with what decides.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    objective: Objective = Field(
        description="What decides, as `metric:data`. Metrics: `perplexity` of a text, `accuracy` or `log_likelihood` "
        "of a set of questions, `preference` of chosen over rejected answers.",
        examples=["accuracy:capitals"],
    )
    guards: tuple[Objective, ...] = Field(
        (),
        max_length=8,
        description="Further objectives that must not get worse than they are with the initial values.",
        examples=[["perplexity:prose"]],
    )
    search: dict[str, SearchRange] = Field(
        {},
        max_length=256,
        description="Ranges by place, for whoever does not want to write them in place of the numbers.",
        examples=[{"models[1].parameters.weight": {"min": 0, "max": 2}}],
    )
    generations: int = Field(
        20, ge=1, le=10_000, description="Generations of candidates, at most.", examples=[20]
    )
    population: int | None = Field(
        None,
        ge=4,
        le=10_000,
        description="Candidates of a generation: so many workers can measure at once. Default: 4 + 3 ln of the number "
        "of searched values.",
        examples=[8],
    )
    step: float = Field(
        0.3,
        gt=0,
        le=1,
        description="How far around the initial values the search looks first: a standard deviation, as a share of "
        "each range.",
    )
    patience: int = Field(
        8,
        ge=1,
        le=10_000,
        description="Stop after so many generations that add nothing: less than a hundredth of what was gained.",
    )
    z_threshold: float = Field(
        1.645,
        gt=0,
        le=100,
        description="What was found is kept when it is better than the initial values on held-out data by so many "
        "paired standard errors; else the initial merge is the result.",
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
    seed: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Of the search, of methods that draw random numbers, and of which data belong to which part.",
    )
    name: ModelName | None = Field(
        None,
        description="Registry name of the result, of letters, digits, '.', '_' and '-'. Default: the first model's, "
        "the method, and the end of the job's id.",
        examples=["smollm2-evolved"],
    )
    compute_dtype: ComputeDType = Field(
        "float32",
        description="Type that is computed in; inputs are not rounded before it, the result is rounded once.",
        examples=["float32"],
    )
    max_shard_size: str = Field(
        "5GB", description="Largest weight file of the result, such as 500MB or 5GB.", examples=["5GB"]
    )

    @model_validator(mode="before")
    @classmethod
    def _lift_ranges(cls, given: Any) -> Any:
        """Let numbers stand where ranges are, as a merge's own fields want it, and keep the ranges apart."""
        if not isinstance(given, dict):
            return given
        known = given.get("search")
        plain, ranges = lift_ranges({key: value for key, value in given.items() if key != "search"})
        return {**plain, "search": {**known, **ranges} if isinstance(known, dict) else known or ranges}

    @model_validator(mode="after")
    def _can_be_searched(self) -> MergeEvolveSpec:
        self.merge(self.genome.initial)
        known = [self.objective]
        for number, guard in enumerate(self.guards):
            if guard in known:
                raise InvalidSpec(
                    f"'{guard}' is {'what decides' if guard == self.objective else 'one of the guards'} already.",
                    field=f"guards[{number}]",
                    value=str(guard),
                    hint="Leave it out.",
                )
            known.append(guard)
        return self

    @property
    def genome(self) -> Genome:
        """What is searched, and the merge around it in mergekit's language; the method may know better.

        See :func:`aidocks.merge.evolve.genome.checked_genome`.
        """
        return read_genome(self.model_dump(mode="json", include=set(MergeConfig.model_fields)), self.search)

    def merge(self, values: Sequence[Number]) -> MergeSpec:
        """Return the request of the merge that has these values."""
        shared = {name: getattr(self, name) for name in _SHARED}
        return MergeSpec.model_validate({**self.genome.express(values), **shared})
