"""The Marchenko-Pastur law of singular values, its fit to a spectrum, and the two rules that are a plain edge.

A matrix has sides N <= M, beta = N/M, and independent noise entries of standard deviation sigma. Divided by
sigma * sqrt(M), the singular values of pure noise fill [1 - sqrt(beta), 1 + sqrt(beta)] (V. A. Marchenko and
L. A. Pastur, Mat. Sb. 72, 1967; the median as scale estimate: M. Gavish and D. L. Donoho, arXiv 1305.5870,
section III-E).

``laserrmt`` is the rule of the laserRMT project (cognitivecomputations), kept for compatibility: it takes the
interquartile range of the singular values, as if they were Gaussian, for sigma * sqrt(M), which depends on
the shape and calls 24 % to 100 % of pure noise signal.

Shapes: values_N all singular values of a matrix, float64, in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

#: Interquartile range of the standard normal distribution, as the original rounds it.
_GAUSSIAN_IQR = 1.349
_GRID = 4097
#: Below this share of the largest one, singular values from a Gram matrix in fp64 are rounding.
ROUNDING = 1e-7
#: A fit that would explain more than this share of the values as signal is not one of a bulk.
_MOST_SIGNAL = 0.75


@dataclass(frozen=True)
class Decision:
    """What a rule makes of one spectrum.

    Attributes:
        sigma: Estimated standard deviation of the noise entries; for ``laserrmt`` the normalised interquartile
            range of the singular values, as the original has it.
        threshold: Singular values above it are kept.
        rank: How many those are.
        snr: Sum of the kept singular values over the sum of the others; None when the others sum to nothing.
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


def noise_sigma(values_N: Values, shape: tuple[int, int]) -> float:
    """Estimate the standard deviation of the noise entries from the median singular value.

    Args:
        values_N: All N = min(shape) singular values, in any order.
        shape: Shape of the matrix.
    """
    small, large = _sides(shape)
    return float(np.median(values_N)) / (median(small / large) * math.sqrt(large))


def edge(sigma: float, shape: tuple[int, int]) -> float:
    """Return the largest singular value that pure noise reaches: sigma * (sqrt(N) + sqrt(M))."""
    small, large = _sides(shape)
    return sigma * (math.sqrt(small) + math.sqrt(large))


@dataclass(frozen=True)
class BulkFit:
    """The law fitted to the bulk of a spectrum.

    Attributes:
        sigma: Standard deviation of the noise entries.
        edge: The largest singular value that this noise reaches.
        outliers: Singular values that the fit has left out, for being above it.
        distance: Kolmogorov-Smirnov distance of the other values from the law: 0 to 1, and of the order of
            1/N (not 1/sqrt(N): eigenvalues repel each other) where the bulk is noise.
    """

    sigma: float
    edge: float
    outliers: int
    distance: float


def fit_bulk(values_N: Values, shape: tuple[int, int]) -> BulkFit:
    """Fit the law to what is left of a spectrum when its outliers are taken away.

    The median of all values is too large where there are many outliers. So values above the edge are taken away and
    sigma follows from the median of the others, which are distributed as those of noise of
    shape (N - k) x (M - k), until no further value is above the edge.
    """
    small, large = _sides(shape)
    descending = np.sort(values_N)[::-1]
    outliers = 0
    while True:
        left = (small - outliers, large - outliers)
        sigma = noise_sigma(descending[outliers:], left)
        above = int(np.count_nonzero(descending > edge(sigma, left)))
        if above <= outliers or above > _MOST_SIGNAL * small:
            break
        outliers = above
    return BulkFit(sigma, edge(sigma, left), outliers, _distance(descending[outliers:], sigma, left))


def _distance(descending_K: Values, sigma: float, shape: tuple[int, int]) -> float:
    small, large = shape
    if sigma <= 0:
        return 1.0
    law = cdf(descending_K[::-1] / (sigma * math.sqrt(large)), small / large)
    steps = np.arange(len(law) + 1) / len(law)
    return float(max(np.max(law - steps[:-1]), np.max(steps[1:] - law)))


def marchenko_pastur(values_N: Values, shape: tuple[int, int]) -> Decision:
    """Keep what exceeds the edge of the noise, whose scale the median singular value tells."""
    sigma = noise_sigma(values_N, shape)
    return decide_above(values_N, sigma, above_rounding(edge(sigma, shape), values_N))


def laserrmt(values_N: Values, shape: tuple[int, int]) -> Decision:
    """Apply the original rule: threshold = IQR / 1.349 * (1 + sqrt(beta)), without any guard of ours."""
    small, large = _sides(shape)
    upper, lower = np.quantile(values_N, [0.75, 0.25])
    sigma = float(upper - lower) / _GAUSSIAN_IQR
    return decide_above(values_N, sigma, sigma * math.sqrt((1 + math.sqrt(small / large)) ** 2))


def above_rounding(threshold: float, values_N: Values) -> float:
    """Return ``threshold``, raised to where singular values can be told from rounding."""
    return max(threshold, ROUNDING * float(np.max(values_N)))


def decide_above(values_N: Values, sigma: float, threshold: float) -> Decision:
    """Return the decision that keeps what exceeds ``threshold``."""
    kept = values_N > threshold
    above, below = float(values_N[kept].sum()), float(values_N[~kept].sum())
    total = float(np.square(values_N).sum())
    return Decision(
        sigma=sigma,
        threshold=threshold,
        rank=int(kept.sum()),
        snr=above / below if below > 0 and math.isfinite(above / below) else None,
        energy=float(np.square(values_N[kept]).sum()) / total if total else 0.0,
    )
