"""Spherical linear interpolation of two models or of their differences from a base, as a whole or by rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aidocks.merge.inputs import Block, Inputs, Merged
from aidocks.merge.method import Parameter, merge_method
from aidocks.merge.rows import as_matrix
from aidocks.merge.spherical import cosine, slerp_coefficients

if TYPE_CHECKING:
    import torch

#: Smaller norms count as this.
_LEAST_NORM = 1e-7
#: A pair whose squared sine is no larger is interpolated along the straight line.
_STRAIGHT = 1e-16


@merge_method(
    "nuslerp",
    Parameter(
        "weight", float, scope="model", description="Weight of the model; the second's share of both is t."
    ),
    Parameter("nuslerp_flatten", bool, True, description="Take the tensor as one vector."),
    Parameter(
        "nuslerp_row_wise",
        bool,
        False,
        description="Without nuslerp_flatten: take as vectors what runs along the first axis, not along the last.",
    ),
    base="optional",
    models=(2, 2),
)
def nuslerp(inputs: Inputs, weight: Sequence[float], nuslerp_flatten: bool, nuslerp_row_wise: bool) -> Merged:
    """Point on the arc between two models, or between their differences from a base, at t = w₂ / (w₁ + w₂).

    As slerp (Shoemake 1985), but for the vectors: whole tensors, or each [C] along the last axis, or each along the
    first. t is 1/2 where the weights add up to 0. With a base that is added to the interpolated differences.
    """
    import torch

    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    if nuslerp_flatten:
        gram = inputs.gram()
        first, second = _coefficients(gram[tuple(torch.triu_indices(2, 2))], t)
        return inputs.combine_deltas([float(first), float(second)])
    if nuslerp_row_wise and len(inputs.shape) > 1:
        return _along_the_first_axis(inputs, t)

    def make(block: Block) -> torch.Tensor:
        first, second = _coefficients(_products(block).sum(dim=-1, keepdim=True), t)
        return _mixed(block, first, second)

    return inputs.map(make)


def _along_the_first_axis(inputs: Inputs, t: float) -> Merged:
    """Interpolate the vectors along the first axis: with I = rows / shape[0], row r belongs to those of r mod I."""
    import torch

    height, width = as_matrix(inputs.shape)
    inner = height // max(1, inputs.shape[0])

    def places(begin: int, rows: int) -> torch.Tensor:
        return torch.arange(begin, begin + rows) % inner

    def products(block: Block) -> tuple[int, torch.Tensor]:
        found = _products(block)
        rows = found.shape[1]
        sums = found.new_zeros((3, min(inner, rows), width), dtype=torch.float64)
        # What repeats within the block is added up in it; the rest is one row for each of the block's.
        sums.index_add_(1, (torch.arange(rows) % inner).to(found.device), found.double())
        return block.begin, sums.cpu()

    totals = torch.zeros((3, inner, width), dtype=torch.float64)
    # Added up while walking: the parts of all blocks together are larger than the tensor.
    for begin, found in inputs.walk(products):
        totals.index_add_(1, places(begin, found.shape[1]), found)

    def make(block: Block) -> torch.Tensor:
        of_block = totals[:, places(block.begin, len(block.values[0]))]
        first, second = _coefficients(of_block.to(inputs.device), t)
        return _mixed(block, first, second)

    return inputs.map(make)


def _products(block: Block) -> torch.Tensor:
    """Return the products of both deltas with themselves and each other: aa, ab, bb, [3, R, C]."""
    import torch

    a, b = block.deltas
    return torch.stack([a * a, a * b, b * b])


def _coefficients(products_3P: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what to multiply vectors a and b by: float64 [P] each.

    Args:
        products_3P: Their inner products aa, ab and bb.
    """
    aa_P, ab_P, bb_P = products_3P.double()
    cos_P = cosine(ab_P, *(square_P.sqrt().clamp_min(_LEAST_NORM) for square_P in (aa_P, bb_P)))
    return slerp_coefficients(cos_P, t, 1 - cos_P.square() <= _STRAIGHT)


def _mixed(block: Block, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the deltas, times coefficients that fit [R, C], and the base."""
    a, b = block.deltas
    mixed = a.mul_(first.to(a.dtype)).addcmul_(b, second.to(b.dtype))
    return mixed if block.base_index is None else mixed.add_(block.base)
