"""Rank reduction by an orthonormal basis of a matrix's outputs, chosen by its weights or by what flows through it.

A linear layer computes y = W x. Every reduction here projects its output: W_k = U_k U_kᵀ W. With U the left singular
vectors of W this is the closest matrix of rank k (C. Eckart and G. Young, Psychometrika 1, 1936). With U the
eigenvectors of W C Wᵀ, where C = E[x xᵀ], it is the matrix of rank k with the least error of the output,
E|W x - W_k x|² = |(W - W_k) C^{1/2}|²: the truncated SVD of W C^{1/2}, as in ASVD (arXiv 2312.05821) and SVD-LLM
(arXiv 2403.07378, section 3.1), without the inverse of C^{1/2}.

Both come from the eigenvectors of the Gram matrix of the smaller side: in fp64 as exact as the SVD (to about 1e-14 in
W_k) at a third of its cost.

Shapes: w_OI a matrix as stored (of a linear layer: outputs x inputs), N = min(O, I), K the rank that is kept, B
matrices of a batch, u_ON the directions, s_N their singular values, c_II the second moments of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.writer import ShardPlan, ShardWriter, TensorPlan
from aidocks.laser.spectrum import stack

#: How a basis is computed. `mixed`: the decomposition in fp64, the directions rounded to fp32. `double`: fp64
#: throughout, the rank-k matrix then agrees with an fp64 SVD to 1e-12. `single`: fp32 throughout, at half the cost
#: and with the accuracy of an fp32 SVD; values below about 1e-3 of the largest are inexact.
Precision = Literal["single", "mixed", "double"]

#: Added to the diagonal of C, as a share of its mean, so that directions which the sample never showed still count.
RIDGE = 1e-4
#: How far from orthonormal directions may be. The error in W_k is smaller by the factor s_N / s_1.
_LOOSE: dict[Precision, float] = {"single": 1e-3, "mixed": 1e-7, "double": 1e-11}
_DIRECTIONS, _VALUES = "directions", "values"


class Basis(NamedTuple):
    """Directions of a matrix's output space in order of importance.

    Attributes:
        directions_ON: Orthonormal columns [O, N] whose span holds the columns of the matrix; float32 (float64 of
            precision `double`).
        values_N: Float64 [N], descending: singular values of W, or of W C^{1/2} where the basis knows the inputs.
    """

    directions_ON: torch.Tensor  # noqa: N815
    values_N: torch.Tensor  # noqa: N815


def weight_basis(w_OI: torch.Tensor, *, precision: Precision = "mixed") -> Basis:
    """Return the left singular vectors of a matrix, completed orthonormally where it is rank-deficient.

    Args:
        w_OI: Any floating-point type and device, on which the basis will be. Not changed.
        precision: See :data:`Precision`.
    """
    return bases([(w_OI, None)], precision=precision)[0]


def activation_basis(
    w_OI: torch.Tensor, covariance_II: torch.Tensor, *, precision: Precision = "mixed", ridge: float = RIDGE
) -> Basis:
    """Return the left singular vectors of W C^{1/2}: what it outputs most of, on inputs of these second moments.

    Args:
        w_OI: As for :func:`weight_basis`.
        covariance_II: Mean (or sum) of x xᵀ over inputs x; symmetric, of any floating-point type and device.
        precision: See :data:`Precision`.
        ridge: Added to the diagonal of C, as a share of the diagonal's mean. More is added where C is not
            positive definite even so, and its inverse matters (O > I).
    """
    return bases([(w_OI, covariance_II)], precision=precision, ridge=ridge)[0]


def bases(
    matrices: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    *,
    precision: Precision = "mixed",
    ridge: float = RIDGE,
) -> list[Basis]:
    """Return the bases of matrices of one shape on one device, whose eigenvectors are computed as one batch.

    Args:
        matrices: Each as for :func:`weight_basis`, with second moments as for :func:`activation_basis`, or None for a
            basis by weight.
        precision: See :data:`Precision`.
        ridge: As for :func:`activation_basis`.

    Returns:
        What each matrix alone would get, up to rounding.
    """
    problems = [_problem(_computed(w_OI, precision), c_II, ridge) for w_OI, c_II in matrices]
    eigenvalues_BN, vectors_BNN = torch.linalg.eigh(stack([problem.gram_NN for problem in problems]))
    made: list[Basis] = []
    for problem, eigenvalues_N, vectors_NN in zip(problems, eigenvalues_BN, vectors_BNN, strict=True):
        values_N, v_NN = eigenvalues_N.clamp_min(0).sqrt().flip(0), vectors_NN.flip(1)
        if problem.images is None:
            made.append(_basis(v_NN, values_N, precision))
        else:
            made.append(_from_inputs(problem.images(v_NN), values_N, precision))
    return made


def reduce(w_OI: torch.Tensor, basis: Basis, rank: int, *, shrink: bool = False) -> torch.Tensor:
    """Return U_k U_kᵀ W in the matrix's own shape, type and device: computed in fp32 or better, rounded once.

    Args:
        w_OI: The matrix that the basis was made of. Not changed.
        basis: On any device.
        rank: Directions to keep, 0 to min(O, I); all of them give the matrix back, bit for bit.
        shrink: Shrink each kept value optimally for the noise in it (M. Gavish and D. L. Donoho, arXiv 1405.7511).
    """
    full = _check(w_OI, basis, rank)
    if rank == full and not shrink:
        return w_OI.clone()
    u_ON = basis.directions_ON.to(w_OI.device)
    computed_OI = w_OI.to(u_ON.dtype)
    if rank > full // 2 and not shrink:
        dropped_OD = u_ON[:, rank:]
        reduced_OI = computed_OI - dropped_OD @ (dropped_OD.mT @ computed_OI)
    else:
        kept_OK = u_ON[:, :rank]
        inner_KI = kept_OK.mT @ computed_OI
        if shrink:
            inner_KI = inner_KI * _shrinkage(w_OI, basis)[:rank, None].to(inner_KI)
        reduced_OI = kept_OK @ inner_KI
    return reduced_OI.to(w_OI.dtype).contiguous()


def factors(
    w_OI: torch.Tensor, basis: Basis, rank: int, *, shrink: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a_OK, b_KI in the matrix's type and device, whose product is :func:`reduce`'s up to their rounding.

    Arguments as for :func:`reduce`; a is U_k, b is U_kᵀ W with shrunken values.
    """
    _check(w_OI, basis, rank)
    a_OK = basis.directions_ON[:, :rank].to(w_OI.device)
    b_KI = a_OK.mT @ w_OI.to(a_OK.dtype)
    if shrink:
        b_KI = b_KI * _shrinkage(w_OI, basis)[:rank, None].to(b_KI)
    return a_OK.to(w_OI.dtype).contiguous(), b_KI.to(w_OI.dtype).contiguous()


def save_basis(path: Path, basis: Basis) -> OutputFile:
    """Write a basis as a safetensors file, which appears whole or not at all: directions in fp32, values in fp64.

    Each direction lies in one piece, so that some of them can be read without the others.

    Raises:
        InsufficientDisk: When it does not fit.
    """
    u_NO = basis.directions_ON.float().mT
    plans = (
        TensorPlan(name=_VALUES, dtype="F64", shape=(len(u_NO),)),
        TensorPlan(name=_DIRECTIONS, dtype="F32", shape=tuple(u_NO.shape)),
    )
    with ShardWriter(path.parent, ShardPlan(file_name=path.name, tensors=plans)) as writer:
        writer.write(_VALUES, basis.values_N.double())
        writer.write(_DIRECTIONS, u_NO)
    return writer.output


def load_basis(path: Path, device: str = "cpu") -> Basis:
    """Read what :func:`save_basis` wrote: directions on a device, values on the CPU."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return Basis(file.get_tensor(_DIRECTIONS).to(device).mT, file.get_tensor(_VALUES))


def load_values(path: Path) -> torch.Tensor:
    """Read the values of a basis alone: float64 [N] on the CPU."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        values_N: torch.Tensor = file.get_tensor(_VALUES)
        return values_N


def load_directions(path: Path, first: int) -> torch.Tensor:
    """Read the directions of a basis from the given one on, and no others: float32 [O, N - first] on the CPU."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        u_KO: torch.Tensor = file.get_slice(_DIRECTIONS)[first:]
        return u_KO.mT


def _computed(w_OI: torch.Tensor, precision: Precision) -> torch.Tensor:
    assert w_OI.ndim == 2, f"not a matrix: {tuple(w_OI.shape)}"
    return w_OI.to(torch.float32 if precision == "single" else torch.float64)


class _Problem(NamedTuple):
    """What the basis of a matrix comes from.

    Attributes:
        gram_NN: Its eigenvectors, by descending eigenvalue, are v_NN.
        images: v_NN -> multiples of the directions [O, N]; None where they are the directions themselves.
    """

    gram_NN: torch.Tensor  # noqa: N815
    images: Callable[[torch.Tensor], torch.Tensor] | None


def _problem(w_OI: torch.Tensor, covariance_II: torch.Tensor | None, ridge: float) -> _Problem:
    wide = w_OI.shape[0] <= w_OI.shape[1]
    if covariance_II is not None:
        c_II = covariance_II.to(w_OI.device, w_OI.dtype)  # may be the largest by far, and is not copied again
        assert c_II.shape == (w_OI.shape[1],) * 2, f"{tuple(c_II.shape)} for a matrix {tuple(w_OI.shape)}"
        mean = float(c_II.diagonal().mean())
        if mean > 0:
            return _informed(w_OI, c_II, ridge * mean, wide=wide)
        # Nothing ever came in: every output error is zero, whatever is kept.
    if wide:
        return _Problem(w_OI @ w_OI.mT, None)
    return _Problem(w_OI.mT @ w_OI, lambda v_IN: w_OI @ v_IN)


def _informed(w_OI: torch.Tensor, c_II: torch.Tensor, ridge: float, *, wide: bool) -> _Problem:
    if wide:
        g_OO = (w_OI @ c_II).add_(w_OI, alpha=ridge) @ w_OI.mT
        return _Problem((g_OO + g_OO.mT) / 2, None)
    # With C = L Lᵀ the singular vectors of W L are those of W C^{1/2}, and the small side's Gram matrix is Lᵀ WᵀW L.
    l_II = _cholesky(c_II, ridge).to(w_OI.dtype)
    return _Problem(l_II.mT @ (w_OI.mT @ w_OI) @ l_II, lambda v_IN: w_OI @ (l_II @ v_IN))


def _cholesky(c_II: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return L with L Lᵀ = C + ridge I, float64; where that is indefinite, of C with as little more as it takes."""
    c_II = c_II.to(torch.float64, copy=True)
    c_II.diagonal().add_(ridge)
    more = RIDGE * float(c_II.diagonal().mean())
    while True:
        l_II: torch.Tensor
        l_II, failed = torch.linalg.cholesky_ex(c_II)
        if not int(failed):
            return l_II
        c_II.diagonal().add_(more)
        more *= 10


def _from_inputs(images_ON: torch.Tensor, values_N: torch.Tensor, precision: Precision) -> Basis:
    """Return the basis of which ``images_ON`` are multiples, where O > I.

    Divided by their lengths, columns i and j are orthonormal up to eps * s_1² / (s_i s_j). Where that is too much, the
    orthogonal factor of a QR decomposition leaves the leading directions and their spans as they are, and replaces
    what is rounding by something orthonormal.
    """
    lengths_N = images_ON.norm(dim=0).clamp_min(torch.finfo(images_ON.dtype).tiny)
    scaled_ON = images_ON / lengths_N
    if precision != "double":
        scaled_ON = scaled_ON.float()
    first, last = float(values_N[0]), float(values_N[-1])
    if torch.finfo(images_ON.dtype).eps * first**2 >= _LOOSE[precision] * last**2:
        scaled_ON = torch.linalg.qr(scaled_ON).Q
    return _basis(scaled_ON, values_N, precision)


def _basis(u_ON: torch.Tensor, values_N: torch.Tensor, precision: Precision) -> Basis:
    directions = u_ON if precision == "double" else u_ON.float()
    return Basis(directions.contiguous(), values_N.double().cpu())


def _shrinkage(w_OI: torch.Tensor, basis: Basis) -> torch.Tensor:
    from aidocks.laser.rules import shrink_factors

    rows, columns = w_OI.shape
    return torch.from_numpy(shrink_factors(basis.values_N.numpy(), (rows, columns)))


def _check(w_OI: torch.Tensor, basis: Basis, rank: int) -> int:
    full = min(w_OI.shape)
    assert tuple(basis.directions_ON.shape) == (w_OI.shape[0], full), "the basis is another matrix's"
    assert 0 <= rank <= full, f"rank {rank} of a matrix of shape {tuple(w_OI.shape)}"
    return full
