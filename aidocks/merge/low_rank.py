"""Two factors of small rank whose product comes close to a matrix: exactly, or by a random projection.

Exact: the leading singular vectors, which no matrix of their rank comes closer than (C. Eckart and G. Young,
Psychometrika 1, 1936). Randomised: the range of the matrix is found by its products with a few random vectors,
sharpened by powers of D Dᵀ, and only the projection on it is decomposed (N. Halko, P.-G. Martinsson and J. A. Tropp,
arXiv 0909.4061, algorithms 4.4 and 5.1).

Shapes: d_OI a matrix, N its smaller side, K the rank that is kept, L = K and a few more, u_ON directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import torch

from aidocks.laser.truncation import weight_basis

#: Random vectors beyond the rank, and powers (Halko et al., sections 4.2 and 4.5): the error is then within a percent
#: of the least one on spectra that decay.
_OVERSAMPLING, _POWERS = 16, 3
#: Singular values below this share of the largest are rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class LowRank:
    """Two factors.

    Attributes:
        b_OK: Left factor, float32.
        a_KI: Right factor, float32.
        energy: Share of the matrix's squared norm that the kept directions have.
    """

    b_OK: torch.Tensor  # noqa: N815
    a_KI: torch.Tensor  # noqa: N815
    energy: float

    @property
    def rank(self) -> int:
        return self.a_KI.shape[0]


def decompose(
    d_OI: torch.Tensor,
    rank: int,
    *,
    energy: float | None = None,
    method: Literal["exact", "randomized"] = "exact",
    seed: int = 0,
    name: str = "",
) -> LowRank:
    """Return factors of at most a rank; their columns and rows have the roots of the singular values for lengths.

    Args:
        d_OI: The matrix, of a floating-point type, on any device; no value of it may be infinite or NaN.
        rank: Largest rank. One that is not needed is not used: directions whose values are rounding are left out.
        energy: Choose the smallest rank that keeps this share of the squared norm.
        method: See the top of this module.
        seed: Of the random vectors.
        name: Of the matrix: each has random vectors of its own, whatever the order in which matrices come.
    """
    d_OI = d_OI.double() if method == "exact" else d_OI.float()
    total = float(d_OI.double().square().sum())
    if total == 0:
        return LowRank(
            d_OI.new_zeros(d_OI.shape[0], 0).float(), d_OI.new_zeros(0, d_OI.shape[1]).float(), 1.0
        )
    if method == "exact" or 2 * (rank + _OVERSAMPLING) >= min(d_OI.shape):
        basis = weight_basis(d_OI)
        u_ON, values_N = basis.directions_ON, basis.values_N
    else:
        u_ON, values_N = _random_basis(d_OI, rank + _OVERSAMPLING, seed, name)
    kept = _choose_rank(values_N, rank, energy, total)
    u_OK = u_ON[:, :kept].to(d_OI.dtype)
    roots_K = values_N[:kept].sqrt().to(d_OI.device, d_OI.dtype)
    a_KI = (u_OK.mT @ d_OI) / roots_K[:, None]
    share = float(values_N[:kept].square().sum()) / total
    return LowRank((u_OK * roots_K).float(), a_KI.float(), min(1.0, share))


def _choose_rank(values_N: torch.Tensor, rank: int, energy: float | None, total: float) -> int:
    kept = min(rank, int((values_N > _ROUNDING * values_N[0]).sum()))
    if energy is None:
        return kept
    shares = values_N.square().cumsum(0) / total
    # Rounding must not ask for one more direction when all of the norm is asked for.
    return min(kept, int((shares < energy - 1e-12).sum()) + 1)


def _random_basis(
    d_OI: torch.Tensor, vectors: int, seed: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return directions u_OL and singular values [L] of the projection of a matrix on a range found at random."""
    digest = sha256(f"{seed}\n{name}".encode()).digest()
    # Drawn on the CPU, so that a GPU gets the same.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    omega_IL = torch.randn(d_OI.shape[1], vectors, generator=generator).to(d_OI.device)
    q_OL = torch.linalg.qr(d_OI @ omega_IL).Q
    for _ in range(_POWERS):
        q_IL = torch.linalg.qr(d_OI.mT @ q_OL).Q
        q_OL = torch.linalg.qr(d_OI @ q_IL).Q
    p_LI = (q_OL.mT @ d_OI).double()
    squares_L, rotation_LL = torch.linalg.eigh(p_LI @ p_LI.mT)
    u_OL = q_OL.double() @ rotation_LL.flip(1)
    return u_OL.float(), squares_L.clamp_min(0).sqrt().flip(0).cpu()
