"""Paired measurements as the scores that results hold."""

from __future__ import annotations

from aidocks.evaluate.measurements import Pairs
from aidocks.evaluate.objectives import ObjectiveSource, Part
from aidocks.specs.part_score import PartScore


def part_score(source: ObjectiveSource, part: Part, pairs: Pairs) -> PartScore:
    """Return the score of two states of a model on one part of one objective's data; not the calibration part."""
    change, before, after = pairs.comparison, pairs.value_before, pairs.value_after
    return PartScore(
        metric=source.metric,
        data=source.text.name,
        part=part,
        before=before.value,
        before_standard_error=before.standard_error,
        after=after.value,
        after_standard_error=after.standard_error,
        delta=change.delta,
        delta_standard_error=change.standard_error,
        z=change.z,
        items=len(pairs.positions),
        tokens=pairs.tokens,
    )
