"""How much of a matrix is kept: the rules by the names that a spec uses, each a function of the singular values.

- ``laserrmt``: the original's edge, from the interquartile range of the singular values.
- ``marchenko_pastur``: the edge of noise, sigma from the median singular value.
- ``gavish_donoho``: the hard threshold of the least error where sigma is unknown (M. Gavish and D. L. Donoho,
  arXiv 1305.5870, equation 4): omega(beta) times the median singular value.
- ``optimal_shrinkage``: as many directions as exceed the edge, with values shrunk so that the Frobenius error is the
  least possible (M. Gavish and D. L. Donoho, arXiv 1405.7511, section IV).
- ``screenot``: the hard threshold of the least error where the noise is correlated (see ``screenot``).
- ``fraction``: a share of the full rank, as LASER has it (P. Sharma, J. T. Ash and D. Misra, arXiv 2312.13558).
- ``energy``: as little as holds a share of the squared Frobenius norm.

Shapes: values_N all singular values of a matrix, float64, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from aidocks.laser import screenot as scree
from aidocks.laser.marchenko_pastur import (
    Decision,
    Values,
    above_rounding,
    decide_above,
    edge,
    laserrmt,
    marchenko_pastur,
    median,
    noise_sigma,
)
from aidocks.specs.laser import Rule

#: Rules that are told what share to keep.
SHARES: tuple[Rule, ...] = ("fraction", "energy")


def decide(rule: Rule, values_N: Values, shape: tuple[int, int], keep: float | None = None) -> Decision:
    """Return what a rule makes of a spectrum.

    Args:
        rule: Its name.
        values_N: All N = min(shape) singular values, in any order.
        shape: Shape of the matrix.
        keep: For ``fraction`` and ``energy``: the share to keep, above 0 and at most 1.
    """
    if rule == "fraction" or rule == "energy":
        assert keep is not None, f"the rule {rule} needs a share to keep"
        assert 0 < keep <= 1, f"the rule {rule} keeps a share, not {keep}"
        return (_fraction if rule == "fraction" else _energy)(values_N, shape, keep)
    assert keep is None, f"the rule {rule} decides itself what it keeps"
    return RULES[rule](values_N, shape)


def known_sigma_threshold(beta: float) -> float:
    """Return lambda*(beta): the optimal hard threshold in units of sigma * sqrt(M) (arXiv 1305.5870, equation 11)."""
    root = math.sqrt(beta * beta + 14 * beta + 1)
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))


def omega(beta: float) -> float:
    """Return the optimal hard threshold in units of the median singular value (arXiv 1305.5870, section III-E).

    It is lambda*(beta) / sqrt(mu_beta) itself, not the cubic that is often used for it.
    """
    return known_sigma_threshold(beta) / median(beta)


def gavish_donoho(values_N: Values, shape: tuple[int, int]) -> Decision:
    """Keep what exceeds omega(beta) times the median singular value."""
    cut = omega(min(shape) / max(shape)) * float(np.median(values_N))
    return decide_above(values_N, noise_sigma(values_N, shape), above_rounding(cut, values_N))


def shrink_factors(values_N: Values, shape: tuple[int, int]) -> Values:
    """Return, for each singular value s, eta(s) / s of the shrinker of the least Frobenius error; sigma by the median.

    With y = s / (sigma * sqrt(M)): eta(y) = sqrt((y^2 - beta - 1)^2 - 4 beta) / y above the edge, else 0
    (arXiv 1405.7511, equation 7).

    Returns:
        float64 [N], each at least 0 and at most 1, in the order of the values.
    """
    small, large = min(shape), max(shape)
    beta = small / large
    sigma = noise_sigma(values_N, shape)
    kept = values_N > above_rounding(edge(sigma, shape), values_N)
    unit = sigma * math.sqrt(large)
    # The inverse, so that no noise at all is no special case.
    inverse = np.divide(unit, values_N, out=np.zeros_like(values_N), where=kept)
    squared = np.square(1 - (beta + 1) * np.square(inverse)) - 4 * beta * inverse**4
    return np.where(kept, np.sqrt(np.clip(squared, 0.0, 1.0)), 0.0)


def optimal_shrinkage(values_N: Values, shape: tuple[int, int]) -> Decision:
    """Keep what exceeds the edge of the noise; the energy is that of the shrunk values."""
    decision = marchenko_pastur(values_N, shape)
    total = float(np.square(values_N).sum())
    kept = float(np.square(shrink_factors(values_N, shape) * values_N).sum())
    return Decision(
        decision.sigma, decision.threshold, decision.rank, decision.snr, kept / total if total else 0.0
    )


def screenot(values_N: Values, shape: tuple[int, int]) -> Decision:
    """Keep what exceeds the optimal threshold for correlated noise; of a side of two, that for independent noise."""
    cut = scree.threshold(values_N, shape)
    if cut is None:
        return gavish_donoho(values_N, shape)
    return decide_above(values_N, noise_sigma(values_N, shape), above_rounding(cut, values_N))


def _fraction(values_N: Values, shape: tuple[int, int], keep: float) -> Decision:
    # A share such as 0.29 of 100 is 29, whatever its binary fraction says.
    return _keep(values_N, shape, max(1, math.floor(keep * len(values_N) + 1e-9)))


def _energy(values_N: Values, shape: tuple[int, int], keep: float) -> Decision:
    energies = np.cumsum(np.sort(np.square(values_N))[::-1])
    if energies[-1] <= 0:
        return _keep(values_N, shape, 0)
    return _keep(values_N, shape, 1 + int(np.searchsorted(energies, keep * energies[-1] * (1 - 1e-12))))


def _keep(values_N: Values, shape: tuple[int, int], rank: int) -> Decision:
    """Return the decision for a given rank; its threshold is the largest value that is not kept."""
    descending = np.sort(values_N)[::-1]
    above, below = float(descending[:rank].sum()), float(descending[rank:].sum())
    total = float(np.square(descending).sum())
    return Decision(
        sigma=noise_sigma(values_N, shape),
        threshold=float(descending[rank]) if rank < len(descending) else 0.0,
        rank=rank,
        snr=above / below if below > 0 and math.isfinite(above / below) else None,
        energy=float(np.square(descending[:rank]).sum()) / total if total else 0.0,
    )


#: The rules that need nothing but the spectrum.
RULES: dict[Rule, Callable[[Values, tuple[int, int]], Decision]] = {
    "laserrmt": laserrmt,
    "marchenko_pastur": marchenko_pastur,
    "gavish_donoho": gavish_donoho,
    "optimal_shrinkage": optimal_shrinkage,
    "screenot": screenot,
}
