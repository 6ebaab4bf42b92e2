"""Weighted mean of models."""

from __future__ import annotations

from collections.abc import Sequence

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import Parameter, merge_method


@merge_method(
    "linear",
    Parameter("weight", float, scope="input", description="Weight of the model."),
    Parameter("normalize", bool, True, description="Divide by the sum of the weights."),
)
def linear(inputs: Inputs, weight: Sequence[float], normalize: bool) -> Merged:
    """Weighted mean (model soups, https://arxiv.org/abs/2203.05482, section 2).

    sum(w_i x_i), divided by sum(w_i) where ``normalize``.
    """
    total = sum(weight)
    # Nothing to divide by: as the sum is.
    scale = 1 / total if normalize and abs(total) >= 1e-8 else 1.0
    return inputs.combine([w * scale for w in weight])
