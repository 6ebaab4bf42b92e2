"""Model stock: how far to go from the base to the mean, by the angle between the models."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from aidocks.merge.inputs import Block, Inputs, Merged
from aidocks.merge.method import Parameter, merge_method

if TYPE_CHECKING:
    import torch

#: Products of norms below it count as this, so that a model that is the base has the cosine 0 with all.
_LEAST_PRODUCT = 1e-6
#: Where the denominator is no further from 0, the base is kept.
_SINGULAR = 1e-6


@merge_method(
    "model_stock",
    Parameter("filter_wise", bool, False, description="An angle for each row, not one for the tensor."),
    base="required",
    models=(2, None),
)
def model_stock(inputs: Inputs, filter_wise: bool) -> Merged:
    """Base and mean of the models, mixed by the models' angle (Jang et al., arXiv 2403.19522, section 4, equation 5).

    With cos θ the mean cosine of the N models' differences from the base, pair by pair, and
    t = N cos θ / (1 + (N - 1) cos θ): t · mean(x_i) + (1 - t) · base. ``filter_wise``: a θ and a t for every vector
    [C] along the last axis.
    """
    if not filter_wise:
        share = float(_ratio(inputs.gram())) / inputs.num_models
        return inputs.combine_deltas([share] * inputs.num_models)

    def make(block: Block) -> torch.Tensor:
        import torch

        d_NRC = torch.stack(block.deltas)
        # Products in the blocks' type, added up in pairs: as exact as rows need.
        t_R = _ratio(torch.stack([(d_NRC * one).sum(dim=-1) for one in d_NRC]).movedim(-1, 0))
        return d_NRC.mean(dim=0).mul_(t_R.to(d_NRC.dtype)[:, None]).add_(block.base)

    return inputs.map(make)


def _ratio(g_NN: torch.Tensor) -> torch.Tensor:
    """Return t of Gram matrices of differences: float64, without their last two axes."""
    import torch

    g_NN = g_NN.double()
    size = g_NN.shape[-1]
    norms_N = g_NN.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = [
        (g_NN[..., i, j] / (norms_N[..., i] * norms_N[..., j]).clamp_min(_LEAST_PRODUCT)).clamp(-1, 1)
        for i, j in combinations(range(size), 2)
    ]
    cos = torch.stack(cosines).mean(dim=0)
    below = 1 + (size - 1) * cos
    return torch.where(below.abs() < _SINGULAR, 0, size * cos / below)
