"""The result of ``/laser``: which matrices were reduced, and what that was measured to be worth."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from aidocks.specs.base import ModelResult
from aidocks.specs.laser import Output, Truncation
from aidocks.specs.part_score import PartScore


class AcceptedReduction(BaseModel):
    """One matrix of the result whose rank was reduced, with the evidence for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description="Full parameter name; with the expert's number in brackets where a tensor holds several."
    )
    layer: int | None = Field(description="None for what belongs to no numbered layer.")
    kind: str = Field(description="Name of its module, such as `v_proj`.")
    rank: int = Field(description="Rank that was kept.")
    full_rank: int = Field(description="Rank before: the smaller side of the matrix.")
    truncation: Truncation = Field(
        description="Which directions were kept: those of the weight, or of its output on the calibration data."
    )
    shrink: bool = Field(False, description="Whether the kept values were shrunk, too.")
    rule: str = Field(description="What proposed the rank, such as `laserrmt` or `fraction 0.1`.")
    energy: float | None = Field(
        None,
        description="Share that the components kept have, before any shrinking: by `weight` of the squared Frobenius "
        "norm; by `activation_aware` of the energy of the layer's output on the calibration data.",
    )
    group: int | None = Field(
        None,
        description="Number of the group with which it was accepted, because they help together; None when it helped "
        "on its own. Change, standard error and z are those of the whole group.",
    )
    delta: float = Field(
        description="Change of the mean loss per item when it was accepted; negative is better."
    )
    standard_error: float = Field(description="Paired standard error of that change.")
    z: float = Field(description="delta / standard_error.")


class LaserResult(ModelResult):
    """What a ``/laser`` job returns."""

    accepted: tuple[AcceptedReduction, ...] = Field(
        (), description="Reduced matrices, in order of acceptance; empty when the result is the base."
    )
    search: PartScore | None = Field(None, description="The objective on the items that the search used.")
    held_out: PartScore | None = Field(
        None, description="The objective on items that the search never saw, and that had to confirm it."
    )
    report: PartScore | None = Field(
        None, description="The objective on items that had no part in any decision: the figures to tell."
    )
    guards: tuple[PartScore, ...] = Field(
        (), description="What must not get worse, on the held-out and the report part of its data."
    )
    taken_back: tuple[str, ...] = Field(
        (), description="Matrices whose reduction the search had accepted, until held-out data objected."
    )
    taken_back_because: str | None = Field(None, description="The first objection.")
    candidates_tried: int = Field(description="Reductions that were measured.")
    candidates_screened: int = Field(0, description="Reductions of which a gradient predicted the effect.")
    matrices_scanned: int = Field(description="Matrices whose spectrum was computed.")
    output: Output = Field("dense", description="How reduced matrices are stored.")
    parameters: int = Field(description="Parameters of the result, as stored.")
    parameters_before: int = Field(description="Parameters of the base.")
    bytes: int = Field(0, description="Bytes of the result's weights.")
    bytes_before: int = Field(0, description="Bytes of the base's weights.")
