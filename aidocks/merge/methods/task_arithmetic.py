"""Task arithmetic: the weighted sum of what models differ from their base in."""

from __future__ import annotations

from collections.abc import Sequence

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import Parameter, merge_method


@merge_method(
    "task_arithmetic",
    Parameter("weight", float, scope="model", description="Weight of the model's difference from the base."),
    Parameter("lambda", float, 1.0, description="Factor of the merged difference."),
    Parameter("normalize", bool, False, description="Divide by the sum of the weights."),
    base="required",
    ignored=("density", "rescale", "int8_mask"),
)
def task_arithmetic(inputs: Inputs, weight: Sequence[float], lambda_: float, normalize: bool) -> Merged:
    """Base and weighted task vectors (Ilharco et al., arXiv 2212.04089, section 2).

    base + λ sum(w_i (x_i - base)), the sum divided by sum(w_i) where ``normalize``.
    """
    total = sum(weight)
    # Nothing to divide by: as the sum is.
    scale = lambda_ / total if normalize and abs(total) >= 1e-8 else lambda_
    return inputs.combine_deltas([w * scale for w in weight])
