"""The result of ``/merge/evolve``: the values that were found, and what the merge with them is worth."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from aidocks.specs.base import ModelResult
from aidocks.specs.part_score import PartScore


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FoundValue(_Part):
    """One searched number."""

    name: str = Field(description="As the request calls it, or the place where it stands.")
    places: tuple[str, ...] = Field(
        description="Where it stands in the request, such as `models[1].parameters.weight`."
    )
    min: float
    max: float
    initial: int | float
    found: int | float = Field(description="In the best merge that was found, whether it was kept or not.")
    value: int | float = Field(description="In the result.")


class InputScores(_Part):
    """The result beside one of the models that it is made of."""

    model: str = Field(description="Its reference in the request.")
    scores: tuple[PartScore, ...] = Field(
        description="Of the objective on held-out and report data; before: this model alone, after: the result."
    )


class MergeEvolveResult(ModelResult):
    """What a ``/merge/evolve`` job returns."""

    accepted: bool = Field(
        description="Whether the result has the values that were found; else it is the merge with the initial ones."
    )
    objection: str | None = Field(None, description="Why what was found is not the result.")
    values: tuple[FoundValue, ...] = Field(description="The searched numbers, in the order of the request.")
    config: str = Field(
        "", description="The result's merge as a mergekit file, with models as the request names them."
    )
    search: PartScore | None = Field(
        None,
        description="The objective on the items that the search used. Of all scores: before, the initial values; "
        "after, the result.",
    )
    held_out: PartScore | None = Field(
        None, description="The objective on items that the search never saw, and that had to confirm it."
    )
    report: PartScore | None = Field(
        None, description="The objective on items that had no part in any decision: the figures to tell."
    )
    guards: tuple[PartScore, ...] = Field(
        (), description="What must not get worse, on the held-out and the report part of its data."
    )
    inputs: tuple[InputScores, ...] = Field((), description="Every model of the merge, alone.")
    generations: int = Field(description="Generations that were measured.")
    candidates: int = Field(description="Merges that were measured on the search data.")
    stopped_because: str = Field(description="Why the search ended.")
    merge_method: str
    architecture: str
    dtype: str = Field(description="Type of most of the result's weights.")
    parameters: int = Field(description="Parameters of the result.")
    bytes: int = Field(description="Bytes of its weights.")
    notes: tuple[str, ...] = Field((), description="What one should know.")
