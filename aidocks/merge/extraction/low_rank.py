"""Two factors of small rank whose product comes close to a matrix: exactly, or by a random projection.

Exact: the leading singular vectors, which no matrix of their rank comes closer than (C. Eckart and G. Young,
Psychometrika 1, 1936). Randomised: the range of the matrix is found by its products with a few random vectors,
sharpened by powers of D Dᵀ, and only the projection on it is decomposed (N. Halko, P.-G. Martinsson and J. A. Tropp,
arXiv 0909.4061, algorithms 4.4 and 5.1).

Besides the matrix, in float32, no more is held than the Gram matrix of its smaller side, in float64.

Shapes: d_OI a matrix, d_NM the same or its transpose, N its smaller side, B some of its columns, K the rank that is
kept, L directions to choose from: N, or K and a few more; u_NL these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import torch

#: Random vectors beyond the rank, and powers (Halko et al., sections 4.2 and 4.5): the error is then within a percent
#: of the least one on spectra that decay.
_OVERSAMPLING, _POWERS = 16, 3
#: Singular values below this share of the largest are rounding.
_ROUNDING = 1e-6
#: Values that are held in float64 at a time.
_PART_VALUES = 1 << 22


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
        d_OI: The matrix, of a floating-point type, on any device; no value of it may be infinite or NaN. Of another
            type than float32 it is copied.
        rank: Largest rank. One that is not needed is not used: directions whose values are rounding are left out.
        energy: Choose the smallest rank that keeps this share of the squared norm.
        method: See the top of this module.
        seed: Of the random vectors.
        name: Of the matrix: each has random vectors of its own, whatever the order in which matrices come.
    """
    d_OI = d_OI.float()
    # Of the smaller side, so that all there is beside the matrix is small.
    is_tall = d_OI.shape[0] > d_OI.shape[1]
    d_NM = d_OI.mT if is_tall else d_OI
    total = sum(float(part_NB.square().sum()) for part_NB in _parts(d_NM))
    if total == 0:
        return LowRank(d_OI.new_zeros(d_OI.shape[0], 0), d_OI.new_zeros(0, d_OI.shape[1]), 1.0)
    if method == "exact" or 2 * (rank + _OVERSAMPLING) >= len(d_NM):
        u_NL, values_L = _exact_basis(d_NM)
    else:
        u_NL, values_L = _random_basis(d_NM, rank + _OVERSAMPLING, seed, name)
    kept = _choose_rank(values_L, rank, energy, total)
    u_NK = u_NL[:, -kept:].flip(1)
    roots_K = values_L[:kept].sqrt().to(d_OI.device)
    left_NK = (u_NK * roots_K).float()
    right_KM = torch.cat(
        [((u_NK.mT @ part_NB) / roots_K[:, None]).float() for part_NB in _parts(d_NM)], dim=1
    )
    share = float(values_L[:kept].square().sum()) / total
    b_OK, a_KI = (right_KM.mT, left_NK.mT) if is_tall else (left_NK, right_KM)
    return LowRank(b_OK.contiguous(), a_KI.contiguous(), min(1.0, share))


def _parts(d_NM: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a matrix in float64, some columns at a time: [N, B] each."""
    columns = max(1, _PART_VALUES // len(d_NM))
    return (d_NM[:, begin : begin + columns].double() for begin in range(0, d_NM.shape[1], columns))


def _exact_basis(d_NM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the left singular vectors u_NN of a matrix, float64 by ascending value, and the values, descending."""
    gram_NN = d_NM.new_zeros((len(d_NM),) * 2, dtype=torch.float64)
    for part_NB in _parts(d_NM):
        gram_NN.addmm_(part_NB, part_NB.mT)
    squares_N, u_NN = torch.linalg.eigh(gram_NN)
    return u_NN, squares_N.clamp_min(0).sqrt().flip(0).cpu()


def _choose_rank(values_N: torch.Tensor, rank: int, energy: float | None, total: float) -> int:
    kept = min(rank, int((values_N > _ROUNDING * values_N[0]).sum()))
    if energy is None:
        return kept
    shares = values_N.square().cumsum(0) / total
    # Rounding must not ask for one more direction when all of the norm is asked for.
    return min(kept, int((shares < energy - 1e-12).sum()) + 1)


def _random_basis(
    d_NM: torch.Tensor, vectors: int, seed: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return directions u_NL and values as :func:`_exact_basis`, of the projection on a range found at random."""
    digest = sha256(f"{seed}\n{name}".encode()).digest()
    # Drawn on the CPU, so that a GPU gets the same.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    omega_ML = torch.randn(d_NM.shape[1], vectors, generator=generator).to(d_NM.device)
    q_NL = torch.linalg.qr(d_NM @ omega_ML).Q
    for _ in range(_POWERS):
        q_ML = torch.linalg.qr(d_NM.mT @ q_NL).Q
        q_NL = torch.linalg.qr(d_NM @ q_ML).Q
    p_LM = (q_NL.mT @ d_NM).double()
    squares_L, rotation_LL = torch.linalg.eigh(p_LM @ p_LM.mT)
    return q_NL.double() @ rotation_LL, squares_L.clamp_min(0).sqrt().flip(0).cpu()
