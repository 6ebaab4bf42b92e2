"""Which models change a value: one, or several. What the reinforced-agent methods share.

Shapes: R rows and C columns of a block, N models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from aidocks.merge.inputs import Block, Inputs, Merged


def add_by_overlap(inputs: Inputs, epsilon: float, factors: Sequence[float]) -> Merged:
    """Return the base and each value's mean change over the models that change it.

    Args:
        inputs: With a base.
        epsilon: Changes up to it count as none.
        factors: Of every model's changes where it is the only one.
    """

    def make(block: Block) -> torch.Tensor:
        changed = _changed(block, epsilon)
        models = _number(changed)
        alone = models == 1
        merged = block.base.new_zeros(block.base.shape)
        for delta, here, factor in zip(block.deltas, changed, factors, strict=True):
            part = delta.mul_(here)
            merged.add_(part.add_(part * alone, alpha=factor - 1) if factor != 1 else part)
        return merged.div_(models.clamp_min_(1)).add_(block.base)

    return inputs.map(make)


def count_overlaps(inputs: Inputs, epsilon: float) -> tuple[list[int], list[int]]:
    """Return for each model how many values it changes as others do, and how many it alone changes."""
    import torch

    def counts(block: Block) -> torch.Tensor:
        changed = _changed(block, epsilon)
        models = _number(changed)
        shared, alone = models > 1, models == 1
        return torch.stack(
            [torch.stack([(here & which).sum() for here in changed]) for which in (shared, alone)]
        )

    shared, alone = inputs.sum(counts).tolist()
    return shared, alone


def _changed(block: Block, epsilon: float) -> list[torch.Tensor]:
    """Return where each model changes the base: bool [R, C]."""
    return [delta.abs() > epsilon for delta in block.deltas]


def _number(changed: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return how many models change each value: [R, C]."""
    import torch

    return torch.stack(list(changed)).sum(dim=0)
