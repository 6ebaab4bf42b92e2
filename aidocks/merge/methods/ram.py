"""Reinforced agent merging: what one model alone changed is kept whole, what several changed is averaged."""

from __future__ import annotations

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import Parameter, merge_method
from aidocks.merge.overlap import add_by_overlap


@merge_method(
    "ram",
    Parameter("epsilon", float, 1e-5, at_least=0, description="Changes up to it count as none."),
    base="required",
)
def ram(inputs: Inputs, epsilon: float) -> Merged:
    """Sum of changes of single models, mean of shared ones (arXiv 2601.13572, "Reinforced Agent Merging").

    A model takes part in a value where its difference d_i from the base is above ``epsilon`` in magnitude. The result
    is base + sum(d_i) / n over the n models that take part.
    """
    return add_by_overlap(inputs, epsilon, [1.0] * inputs.num_models)
