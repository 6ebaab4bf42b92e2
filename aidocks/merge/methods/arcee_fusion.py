"""Arcee fusion: only what matters of one model's changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidocks.merge import order
from aidocks.merge.inputs import Block, Inputs, Merged
from aidocks.merge.method import merge_method

if TYPE_CHECKING:
    import torch

_EPSILON = 1e-8


@merge_method("arcee_fusion", base="required", models=(1, 1))
def arcee_fusion(inputs: Inputs) -> Merged:
    """The base, with the other model's values where they matter most (Arcee AI, "Arcee Fusion", 2024).

    The importance of a value is |x - base| times its row's divergence, sum(p log(p / q)) with p = softmax(x) + 1e-8
    and q = softmax(base) + 1e-8 along the last axis. Those of at least median + 1.5 (q₃ - q₁) become x. The quartiles
    are the importances at the ranks int(q (n - 1)), from 0, of all n values. (https://www.arcee.ai)
    """
    size = inputs.num_values
    divergences = inputs.collect(_divergence)

    def importance(block: Block) -> torch.Tensor:
        return block.deltas[0].abs() * divergences[block.number]

    ranks = [int(share * (size - 1)) + 1 for share in (0.25, 0.5, 0.75)] if size else []
    (cuts,) = order.first(inputs, lambda block: [order.ascending(importance(block))], [ranks])
    low, middle, high = (order.value_of(cut.key, inputs.dtype) for cut in cuts) if cuts else (0.0, 0.0, 0.0)
    threshold = middle + 1.5 * (high - low)

    def make(block: Block) -> torch.Tensor:
        taken = importance(block) >= threshold
        return (block.deltas[0] * taken).add_(block.base)

    return inputs.map(make)


def _divergence(block: Block) -> torch.Tensor:
    """Return each row's divergence: [R, 1]."""
    import torch

    p = torch.softmax(block.models[0], dim=-1).add_(_EPSILON)
    q = torch.softmax(block.base, dim=-1).add_(_EPSILON)
    return (p / q).log_().mul_(p).sum(dim=-1, keepdim=True)
