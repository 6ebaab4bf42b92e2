"""The Marchenko-Pastur law of singular values, and the rank rules that rest on it.

A matrix has sides N <= M, beta = N/M, and independent noise entries of standard deviation sigma. Divided by
sigma * sqrt(M), the singular values of pure noise fill [1 - sqrt(beta), 1 + sqrt(beta)] (V. A. Marchenko and
L. A. Pastur, Mat. Sb. 72, 1967; the median as scale estimate: M. Gavish and D. L. Donoho, arXiv 1305.5870,
section III-E).

``laserrmt`` is the rule of the laserRMT project (cognitivecomputations), kept for compatibility: it takes the
interquartile range of the singular values, as if they were Gaussian, for sigma * sqrt(M), which depends on
the shape and calls 24 % to 100 % of pure noise signal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from aidocks.specs.laser import Rule

Values = NDArray[np.float64]

#: Interquartile range of the standard normal distribution, as the original rounds it.
_GAUSSIAN_IQR = 1.349
_GRID = 4097


@dataclass(frozen=True)
class Decision:
    """What a rule makes of one spectrum.

    Attributes:
        sigma: Estimated noise scale. For ``marchenko_pastur`` the standard deviation of the entries; for
            ``laserrmt`` the normalised interquartile range of the singular values.
        threshold: Singular values above it are kept.
        rank: How many those are.
        snr: Sum of the kept singular values over the sum of the others; None when there are no others.
        energy: Share of the squared Frobenius norm that is kept.
    """

    sigma: float
    threshold: float
    rank: int
    snr: float | None
    energy: float


def density(x: Values, beta: float) -> Values:
    """Return the density of singular values of pure noise at ``x`` (in units of sigma * sqrt(M))."""
    low, high = 1 - math.sqrt(beta), 1 + math.sqrt(beta)
    squared = np.clip((high**2 - x**2) * (x**2 - low**2), 0.0, None)
    inside = (x > 0) & (x >= low) & (x <= high)
    return np.where(inside, np.sqrt(squared) / (math.pi * beta * np.where(x > 0, x, 1.0)), 0.0)


@lru_cache(maxsize=256)
def _distribution(beta: float) -> tuple[Values, Values]:
    """Return a grid over the support and the distribution function on it.

    With x = 1 - sqrt(beta) * cos(t) both edges of the density become smooth, so the trapezoidal rule
    converges fast.
    """
    t = np.linspace(0.0, math.pi, _GRID)
    x = 1.0 - math.sqrt(beta) * np.cos(t)
    rate = density(x, beta) * math.sqrt(beta) * np.sin(t)
    cumulated = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2)]) * (math.pi / (_GRID - 1))
    return x, cumulated / cumulated[-1]


def cdf(x: Values, beta: float) -> Values:
    """Return the distribution function of such singular values at ``x`` (in units of sigma * sqrt(M))."""
    grid, cumulated = _distribution(beta)
    return np.interp(x, grid, cumulated, left=0.0, right=1.0)


def quantile(q: float, beta: float) -> float:
    """Return the ``q``-quantile of singular values of pure noise (units of sigma * sqrt(M))."""
    grid, cumulated = _distribution(beta)
    return float(np.interp(q, cumulated, grid))


def median(beta: float) -> float:
    """Return sqrt(mu_beta): the median singular value of pure noise (units of sigma * sqrt(M))."""
    return quantile(0.5, beta)


def _sides(shape: tuple[int, int]) -> tuple[int, int]:
    assert min(shape) >= 1, f"not the shape of a matrix: {shape}"
    return min(shape), max(shape)


def noise_sigma(singular_values: Values, shape: tuple[int, int]) -> float:
    """Estimate the standard deviation of the noise entries from the median singular value.

    Args:
        singular_values: All min(shape) of them, in any order.
        shape: Shape of the matrix.
    """
    small, large = _sides(shape)
    return float(np.median(singular_values)) / (median(small / large) * math.sqrt(large))


def edge(sigma: float, shape: tuple[int, int]) -> float:
    """Return the largest singular value that pure noise reaches: sigma * (sqrt(N) + sqrt(M))."""
    small, large = _sides(shape)
    return sigma * (math.sqrt(small) + math.sqrt(large))


def marchenko_pastur(singular_values: Values, shape: tuple[int, int]) -> Decision:
    """Keep what exceeds the edge of the noise, whose scale the median singular value tells."""
    sigma = noise_sigma(singular_values, shape)
    return _decide(singular_values, sigma, edge(sigma, shape))


def laserrmt(singular_values: Values, shape: tuple[int, int]) -> Decision:
    """Apply the original rule: threshold = IQR / 1.349 * (1 + sqrt(beta))."""
    small, large = _sides(shape)
    upper, lower = np.quantile(singular_values, [0.75, 0.25])
    sigma = float(upper - lower) / _GAUSSIAN_IQR
    return _decide(singular_values, sigma, sigma * math.sqrt((1 + math.sqrt(small / large)) ** 2))


#: The rules by the name that a spec uses.
RULES: dict[Rule, Callable[[Values, tuple[int, int]], Decision]] = {
    "marchenko_pastur": marchenko_pastur,
    "laserrmt": laserrmt,
}


def _decide(singular_values: Values, sigma: float, threshold: float) -> Decision:
    kept = singular_values > threshold
    above, below = float(singular_values[kept].sum()), float(singular_values[~kept].sum())
    total = float(np.square(singular_values).sum())
    return Decision(
        sigma=sigma,
        threshold=threshold,
        rank=int(kept.sum()),
        snr=above / below if below > 0 else None,
        energy=float(np.square(singular_values[kept]).sum()) / total if total else 0.0,
    )
