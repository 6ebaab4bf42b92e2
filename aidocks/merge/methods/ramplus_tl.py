"""Reinforced agent merging plus, tensor by tensor: what one model alone changed is amplified."""

from __future__ import annotations

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import Parameter, merge_method
from aidocks.merge.overlap import add_by_overlap, count_overlaps


@merge_method(
    "ramplus_tl",
    Parameter("r", float, 0.1, description="How much to amplify by the share of shared changes."),
    Parameter("alpha", float, 0.2, at_least=0, description="Largest share that counts."),
    Parameter("epsilon", float, 1e-5, at_least=0, description="Changes up to it count as none."),
    base="required",
)
def ramplus_tl(inputs: Inputs, r: float, alpha: float, epsilon: float) -> Merged:
    """As ``ram``, with changes of single models amplified (arXiv 2601.13572, "Reinforced Agent Merging", RAM+).

    Where model i alone takes part its difference is multiplied by 1 + r · min(ρ_i, α), with ρ_i its number of values
    that others change too over those that only it changes: what averaging takes from it is given back elsewhere. All
    counts are of the tensor.
    """
    shared, unique = count_overlaps(inputs, epsilon)
    # Of a model that alone changes nothing it is the largest, or any: there is nothing to multiply.
    ratios = [s / max(u, 1) for s, u in zip(shared, unique, strict=True)]
    return add_by_overlap(inputs, epsilon, [1 + r * min(ratio, alpha) for ratio in ratios])
