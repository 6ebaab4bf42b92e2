"""SCE: select, calculate, erase."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidocks.merge import order
from aidocks.merge.inputs import Block, Inputs, Merged
from aidocks.merge.method import Parameter, merge_method
from aidocks.merge.task_vectors import elected_sign

if TYPE_CHECKING:
    import torch

#: Mean squares that add up to less give all models the same weight; weights that add up to less are divided by it.
_LEAST_SUM = 1e-6


@merge_method(
    "sce",
    Parameter("select_topk", float, 1.0, at_least=0, at_most=1, description="Share of the values to change."),
    base="required",
    ignored=("int8_mask",),
)
def sce(inputs: Inputs, select_topk: float) -> Merged:
    """Changes that vary most between models, weighted by their squares (Wan et al., arXiv 2408.07990, section 3.3).

    Select: of the values whose variance over the models' differences d_i from the base is not 0, the share
    ``select_topk`` of the largest variance. Calculate: a weight for each model, the mean square of its selected d_i
    over the sum of all models'; the same for all where that sum is below 1e-6. Erase: the values whose sign is not
    that of their sum (0 counts as +). The result is base + sum(w_i d_i) / sum(w_i) over those left.
    """
    import torch

    selected = _selected(inputs, select_topk)
    squares = inputs.sum(lambda block: _squares(_chosen(block, selected))) / max(1, inputs.num_values)
    total = float(squares.sum())
    weights = [float(each) / total if total >= _LEAST_SUM else 1 / len(squares) for each in squares]

    def make(block: Block) -> torch.Tensor:
        deltas = _chosen(block, selected)
        sign = elected_sign(deltas)
        # Turned to the elected sign, what is left is positive.
        merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta, w in zip(deltas, weights, strict=True):
            turned = delta.mul_(sign).relu_()
            divisor.add_(turned.sign(), alpha=w)
            merged.add_(turned, alpha=w)
        return merged.mul_(sign).div_(divisor.clamp_min_(_LEAST_SUM)).add_(block.base)

    return inputs.map(make)


def _selected(inputs: Inputs, share: float) -> order.Cut | bool:
    """Return which values to change: those before a cut in the order of their variances, all, or none."""
    if share >= 1:
        return True
    varying = int(inputs.sum(lambda block: _variance(block).count_nonzero()))
    count = int(varying * share)
    if count == 0:
        return False
    return order.first(inputs, lambda block: [_keys(block)], [[count]])[0][0]


def _keys(block: Block) -> torch.Tensor:
    return order.by_magnitude(_variance(block), largest_first=True)


def _variance(block: Block) -> torch.Tensor:
    """Return the variance of the differences over the models: [R, C]; exactly 0 where all are equal."""
    first, *others = block.deltas
    # From the first one, which leaves nothing where all are equal.
    apart = [other - first for other in others]
    mean = sum(apart, first.new_zeros(())) / len(block.deltas)
    return sum(((one - mean).square_() for one in apart), mean.square().expand_as(first)) / len(block.deltas)


def _chosen(block: Block, selected: order.Cut | bool) -> list[torch.Tensor]:
    """Return the differences, 0 where they are not selected."""
    if selected is True:
        return list(block.deltas)
    mask = selected if selected is False else selected.first(_keys(block), block.number)
    return [delta * mask for delta in block.deltas]


def _squares(deltas: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack([delta.square().sum() for delta in deltas])
