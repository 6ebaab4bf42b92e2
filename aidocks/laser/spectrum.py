"""Singular values and rank reduction by way of the Gram matrix of the smaller side.

With G = W Wᵀ (N x N, N <= M) and G = U Λ Uᵀ the singular values are the roots of Λ, and the best rank-k
approximation (Eckart and Young) is W_k = U_k (U_kᵀ W): V is never needed. In fp64 this agrees with the SVD
to about 1e-14 in W_k at a third of its cost; in fp32 it is as exact as an fp32 SVD, far below the rounding
of a stored bfloat16 weight.

Shapes: w_OI a matrix as stored, w_NM the same with its smaller side first, s_N its singular values.
"""

from __future__ import annotations

import torch


def singular_values(w_OI: torch.Tensor) -> torch.Tensor:
    """Return the singular values of a matrix, descending: float64 [min(O, I)] on the CPU.

    Computed in fp64 (small values are squared in the Gram matrix; in fp32 those below 1e-3 of the largest
    are lost).
    """
    w_NM = _small_side_first(w_OI).to(torch.float64)
    eigenvalues = torch.linalg.eigvalsh(w_NM @ w_NM.mT)
    descending: torch.Tensor = eigenvalues.clamp_min(0).sqrt().flip(0)
    return descending.cpu()


def reduce_rank(w_OI: torch.Tensor, rank: int, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the best approximation of a matrix by one of smaller rank, in its own shape, dtype and device.

    Args:
        w_OI: The matrix. Not changed.
        rank: Rank to keep, 0 to min(O, I).
        compute: Precision of the decomposition.
    """
    full = min(w_OI.shape)
    assert 0 <= rank <= full, f"rank {rank} of a matrix of shape {tuple(w_OI.shape)}"
    if rank == full:
        return w_OI.clone()
    w_NM = _small_side_first(w_OI).to(compute)
    _, u_NN = torch.linalg.eigh(w_NM @ w_NM.mT)  # eigenvalues ascend: the leading directions are last
    if rank > full // 2:
        dropped_ND = u_NN[:, : full - rank]
        reduced_NM = w_NM - dropped_ND @ (dropped_ND.mT @ w_NM)
    else:
        kept_NK = u_NN[:, full - rank :]
        reduced_NM = kept_NK @ (kept_NK.mT @ w_NM)
    reduced_OI: torch.Tensor = reduced_NM if w_OI.shape[0] <= w_OI.shape[1] else reduced_NM.mT
    return reduced_OI.to(w_OI.dtype).contiguous()


def _small_side_first(w_OI: torch.Tensor) -> torch.Tensor:
    assert w_OI.ndim == 2, f"not a matrix: {tuple(w_OI.shape)}"
    return w_OI if w_OI.shape[0] <= w_OI.shape[1] else w_OI.mT
