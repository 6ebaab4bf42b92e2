"""Interpolation between two tensors along the arc of a circle, by their inner products alone.

What it returns is a linear combination of the two: nothing here sees a tensor, only inner products, from which it
makes two coefficients, in float64. Where there are many pairs (rows, columns), for all of them at once.

Shapes: P pairs, of any number of axes, none of them included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cosine(dot_P: torch.Tensor, norm_a_P: torch.Tensor, norm_b_P: torch.Tensor) -> torch.Tensor:
    """Return the cosine of the angle between a and b, within -1 and 1: float64 [P].

    Args:
        dot_P: Inner products of a and b.
        norm_a_P: Norms of a, none of them 0.
        norm_b_P: Norms of b, none of them 0.
    """
    return (dot_P.double() / norm_a_P.double() / norm_b_P.double()).clamp(-1, 1)


def slerp_coefficients(
    cosine_P: torch.Tensor, t: float, is_straight_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what to multiply a and b by: sin((1 - t) θ) / sin θ and sin(t θ) / sin θ, float64 [P] each.

    Exactly 1 and 0 for t = 0, exactly 0 and 1 for t = 1.

    Args:
        cosine_P: Of the angle θ between a and b.
        t: Where between a (0) and b (1).
        is_straight_P: Which pairs to interpolate along the straight line, 1 - t and t, since they point the same way
            or opposite ways, where there is no one arc.
    """
    import torch

    theta_P = torch.acos(cosine_P.masked_fill(is_straight_P, 0))
    arc = [torch.sin(share * theta_P) / torch.sin(theta_P) for share in (1 - t, t)]
    return (
        torch.where(is_straight_P, 1.0 - t, arc[0]),
        torch.where(is_straight_P, float(t), arc[1]),
    )
