"""ScreeNOT: the optimal hard threshold in noise of unknown correlation.

D. L. Donoho, M. Gavish and E. Romanov, arXiv 2009.12297. In Y = X + Z with X of low rank, the noise Z may be
correlated across rows, columns or both. Let H be the distribution of its singular values, gamma = N / M, and

    phi(y) = mean over z of H of y / (y^2 - z^2),      D(y) = phi(y) (gamma phi(y) + (1 - gamma) / y).

The threshold of the least asymptotic error is where the logarithmic slope y D'(y) / D(y), which grows from minus
infinity at the edge of the noise to -2, is -4 (section 3; for independent noise this is 4 / sqrt(3) at gamma = 1). H is
estimated from Y itself: its leading values, which may be signal, are replaced by what the edge of a distribution
whose density vanishes there like a square root would show (section 4, "imputation").
"""

from __future__ import annotations

import numpy as np

from aidocks.laser.marchenko_pastur import Values, fit_bulk

#: Shares of the values that are replaced because they may be signal: at least, and at most.
_SIGNAL_SHARES = 0.1, 0.25
_SLOPE = -4.0
_BISECTIONS = 60
#: How close to the largest value of the noise the search begins, in relative terms.
_NEAR = 1e-9


def threshold(values_N: Values, shape: tuple[int, int], most_signal: int | None = None) -> float | None:
    """Return the optimal threshold for the singular values of a matrix, None where there are too few to tell.

    Args:
        values_N: All N = min(shape) singular values, in any order.
        shape: Shape of the matrix.
        most_signal: Upper bound of the rank of the signal. Default: the outliers of the fitted Marchenko-Pastur law,
            but a tenth of N at least and a quarter at most.
    """
    descending = np.sort(values_N)[::-1]
    count = len(descending)
    if most_signal is None:
        least, most = (max(1, int(share * count)) for share in _SIGNAL_SHARES)
        most_signal = min(max(fit_bulk(descending, shape).outliers, least), most)
    bound = min(most_signal, (count - 1) // 2)
    if bound < 1:
        return None
    noise_N = impute(descending, bound)
    top = float(noise_N[0])
    if top <= 0:
        return 0.0
    # In units of the largest value, so that squares neither overflow nor vanish.
    return top * _steepest(noise_N / top, min(shape) / max(shape))


def impute(descending_N: Values, bound: int) -> Values:
    """Return the values with the first ``bound`` of them replaced by those that the edge of noise would show.

    Near such an edge the i-th value lies below it by a multiple of i^(2/3); the values at ``bound`` and at twice
    that tell which multiple.
    """
    last, further = descending_N[bound], descending_N[2 * bound]
    share = (np.arange(bound) / bound) ** (2 / 3)
    imputed = descending_N.copy()
    imputed[:bound] = last + (1 - share) / (2 ** (2 / 3) - 1) * (last - further)
    return imputed


def slope(y: float, noise_N: Values, gamma: float) -> float:
    """Return y D'(y) / D(y) for noise with these singular values, all below ``y``."""
    gaps = y * y - np.square(noise_N)
    phi = float(np.mean(y / gaps))
    phi_slope = -float(np.mean((y * y + np.square(noise_N)) / np.square(gaps)))
    other = gamma * phi + (1 - gamma) / y
    other_slope = gamma * phi_slope - (1 - gamma) / (y * y)
    return y * (phi_slope / phi + other_slope / other)


def _steepest(noise_N: Values, gamma: float) -> float:
    """Return where the slope is -4, by bisection; the largest value of the noise is 1."""
    low, high = 1 + _NEAR, 2.0
    if slope(low, noise_N, gamma) >= _SLOPE:
        return low
    while slope(high, noise_N, gamma) < _SLOPE:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle, noise_N, gamma) < _SLOPE else (low, middle)
    return high
