"""Karcher mean of any number of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidocks.merge.inputs import Inputs, Merged
from aidocks.merge.method import Parameter, merge_method

if TYPE_CHECKING:
    import torch


@merge_method(
    "karcher",
    Parameter("max_iter", int, 10, at_least=0, description="Largest number of iterations."),
    Parameter("tol", float, 1e-5, at_least=0, description="Angles and norms below it count as 0."),
)
def karcher(inputs: Inputs, max_iter: int, tol: float) -> Merged:
    """Riemannian centre of mass of directions, as long as the tensors are in the mean (arXiv 2603.04972).

    Of the tensors x_i and u_i = x_i / |x_i| it is the m on the unit sphere whose squared angles θ_i to the u_i add up
    to least: from the normalised mean of the u_i on, m moves along v = mean((θ_i / sin θ_i) (u_i - cos θ_i m)) to
    cos|v| m + sin|v| v / |v|. The result is mean(|x_i|) m. A tensor shorter than ``tol`` has no direction.
    A single model is returned as it is.
    """
    import torch

    size = len(inputs.rows)
    if size == 1:
        return inputs.combine([1.0])
    g_NN = inputs.gram(lambda block: block.values)
    norms_N = g_NN.diagonal().sqrt()
    valid = (norms_N > tol).nonzero().flatten()
    coefficients = torch.zeros(size, dtype=torch.float64)
    if len(valid):
        u_NN = g_NN[valid][:, valid] / norms_N[valid] / norms_N[valid, None]
        coefficients[valid] = norms_N.mean() * _mean_direction(u_NN, max_iter, tol) / norms_N[valid]
    return inputs.combine(coefficients.tolist())


def _mean_direction(u_NN: torch.Tensor, max_iter: int, tol: float) -> torch.Tensor:
    """Return the mean of unit vectors, as coefficients of them: float64 [N].

    Args:
        u_NN: Their Gram matrix.
    """
    import torch

    size = len(u_NN)
    m_N = torch.full((size,), 1 / size, dtype=torch.float64)
    length = _norm(m_N, u_NN)
    m_N = m_N / length if length >= tol else torch.eye(size, dtype=torch.float64)[0]
    for _ in range(max_iter):
        cos_N = (u_NN @ m_N).clamp(-1, 1)
        theta_N = cos_N.acos()
        pull_N = torch.where(theta_N < tol, 0, theta_N / theta_N.sin() / size)
        v_N = pull_N - (pull_N @ cos_N) * m_N
        length = _norm(v_N, u_NN)
        if length < tol:
            break
        m_N = length.cos() * m_N + length.sin() / length * v_N
        m_N = m_N / _norm(m_N, u_NN)
    return m_N


def _norm(coefficients_N: torch.Tensor, u_NN: torch.Tensor) -> torch.Tensor:
    return (coefficients_N @ u_NN @ coefficients_N).clamp_min(0).sqrt()
