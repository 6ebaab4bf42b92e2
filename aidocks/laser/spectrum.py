"""Singular values by way of the Gram matrix of the smaller side.

With G = W Wᵀ (N x N, N <= M) the singular values are the roots of the eigenvalues of G. In fp64 those above 1e-7 of
the largest are as exact as an SVD's, at a quarter of its cost. (Directions, too: see ``truncation``.)

The Gram matrix is summed over blocks of the longer side, so that no more than a block is ever held in fp64, whatever
the matrix is stored in.

Shapes: w_OI a matrix as stored, w_NM the same with its smaller side first, w_BN a block of rows of its transpose, g_NN
the Gram matrix, s_N the singular values, B matrices of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

#: Bytes of a block in fp64: larger ones are no faster. But a Gram matrix that no cache holds is read and written once
#: for every block, which fewer rows than these are not worth.
_BLOCK_BYTES = 1 << 20
_LEAST_ROWS = 256


def singular_values(w_OI: torch.Tensor) -> torch.Tensor:
    """Return the singular values of a matrix, descending: float64 [min(O, I)] on the CPU.

    Computed in fp64 (small values are squared in the Gram matrix; in fp32 those below 1e-3 of the largest
    are lost), on the device of the matrix.

    Returns:
        The values; NaN, all of them, of a matrix with an entry that is not finite.
    """
    return values_of_grams([gram(blocks_of(w_OI), min(w_OI.shape))])[0]


def blocks_of(w_OI: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a matrix block by block along its longer side: views w_BN, in its own type."""
    w_MN = _small_side_first(w_OI).mT
    rows = rows_of_block(w_MN.shape[1])
    for begin in range(0, w_MN.shape[0], rows):
        yield w_MN[begin : begin + rows]


def rows_of_block(columns: int) -> int:
    """Return how many rows of so many columns a block has."""
    return max(_LEAST_ROWS, _BLOCK_BYTES // (8 * columns))


def gram(
    blocks_BN: Iterable[torch.Tensor], side: int, device: str | torch.device | None = None
) -> torch.Tensor:
    """Return the sum of w_BN^T w_BN over blocks: float64 [N, N].

    Args:
        blocks_BN: The blocks, of any floating-point type.
        side: N.
        device: Where to compute. Default: the device of the first block.
    """
    g_NN: torch.Tensor | None = None
    for block_BN in blocks_BN:
        w_BN = block_BN.to(device or block_BN.device, torch.float64)
        if g_NN is None:
            g_NN = torch.zeros(side, side, dtype=torch.float64, device=w_BN.device)
        g_NN.addmm_(w_BN.mT, w_BN)
    assert g_NN is not None, "a matrix has at least one block"
    return g_NN


def values_of_grams(grams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the roots of the eigenvalues of Gram matrices g_NN of one size, which are computed as one batch.

    Returns:
        Of each, descending: float64 [N] on the CPU; NaN, all of them, of one that has any.
    """
    values = [torch.full(g_NN.shape[:1], torch.nan, dtype=torch.float64) for g_NN in grams]
    finite = [place for place, g_NN in enumerate(grams) if bool(torch.isfinite(g_NN.diagonal()).all())]
    if finite:
        eigenvalues_BN = torch.linalg.eigvalsh(stack([grams[place] for place in finite]))
        for place, descending_N in zip(finite, eigenvalues_BN.clamp_min(0).sqrt().flip(1).cpu(), strict=True):
            values[place] = descending_N
    return values


def stack(grams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return matrices [N, N] as a batch [B, N, N]; a single one, which may be large, without a copy."""
    return grams[0][None] if len(grams) == 1 else torch.stack(tuple(grams))


def _small_side_first(w_OI: torch.Tensor) -> torch.Tensor:
    assert w_OI.ndim == 2, f"not a matrix: {tuple(w_OI.shape)}"
    return w_OI if w_OI.shape[0] <= w_OI.shape[1] else w_OI.mT
