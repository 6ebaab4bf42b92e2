"""NearSwap: the base moves to the other model where the two are close."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidocks.merge.inputs import Block, Inputs, Merged
from aidocks.merge.method import Parameter, merge_method

if TYPE_CHECKING:
    import torch

#: Smaller distances count as this.
_LEAST_DISTANCE = 1e-6


@merge_method(
    "nearswap",
    Parameter("t", float, description="Distance up to which a value becomes the other model's."),
    base="required",
    models=(1, 1),
)
def nearswap(inputs: Inputs, t: float) -> Merged:
    """Value by value w b + (1 - w) a, with w = t / |a - b| within 0 and 1 (alchemonaut, "QuartetAnemoi-70B", 2024).

    a is the base, b the other model. So a value moves towards b by ``t``, no further than to b.
    (https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001)
    """

    def make(block: Block) -> torch.Tensor:
        base, (other,) = block.base, block.models
        w = (base - other).abs_().clamp_min_(_LEAST_DISTANCE).reciprocal_().mul_(t).clamp_(0, 1)
        return other.mul_(w).add_(base.mul_(1 - w))

    return inputs.map(make)
