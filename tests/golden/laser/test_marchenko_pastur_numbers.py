"""The law against published numbers and against the measurements that motivated the corrected rule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aidocks.laser import marchenko_pastur as mp
from aidocks.laser.rules import decide, known_sigma_threshold, omega, shrink_factors


@pytest.mark.parametrize(("beta", "expected"), [(1.0, 0.8079), (0.375, 0.9346), (0.25, 0.9571)])
def test_median_of_the_law(beta: float, expected: float) -> None:
    assert mp.median(beta) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("beta", "expected"), [(1.0, 2.858), (0.375, 2.007), (1 / 3, 1.951), (0.286, 1.887), (0.25, 1.837)]
)
def test_omega_of_gavish_and_donoho(beta: float, expected: float) -> None:
    """arXiv 1305.5870, table IV."""
    assert omega(beta) == pytest.approx(expected, abs=1e-3)


def test_the_threshold_for_known_noise() -> None:
    assert known_sigma_threshold(1.0) == pytest.approx(4 / math.sqrt(3))


@pytest.mark.parametrize(
    ("beta", "iqr", "threshold_over_edge", "noise_kept"),
    [
        (1.0, 0.874, 0.648, 0.237),
        (0.375, 0.505, 0.374, 0.839),
        (1 / 3, 0.475, 0.352, 0.912),
        (0.286, 0.438, 0.325, 0.987),
        (0.25, 0.409, 0.303, 1.0),
        (0.125, 0.287, 0.213, 1.0),
    ],
)
def test_what_the_original_rule_makes_of_pure_noise(
    beta: float, iqr: float, threshold_over_edge: float, noise_kept: float
) -> None:
    spread = mp.quantile(0.75, beta) - mp.quantile(0.25, beta)
    assert spread == pytest.approx(iqr, abs=6e-4)
    assert spread / 1.349 == pytest.approx(threshold_over_edge, abs=6e-4)
    threshold = spread / 1.349 * (1 + math.sqrt(beta))
    assert 1 - float(mp.cdf(np.array(threshold), beta)) == pytest.approx(noise_kept, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "kept", "snr"),
    [((576, 576), 135, 0.78), ((576, 1536), 484, 10.7), ((192, 576), 175, 20.5)],
)
def test_gaussian_noise_of_the_shapes_of_a_small_language_model(
    shape: tuple[int, int], kept: int, snr: float
) -> None:
    noise = np.random.default_rng(0).standard_normal(shape)
    values = np.linalg.svd(noise, compute_uv=False)
    original = mp.laserrmt(values, shape)
    assert original.rank == pytest.approx(kept, abs=0.015 * shape[0])
    assert original.snr == pytest.approx(snr, rel=0.08)
    corrected = mp.marchenko_pastur(values, shape)
    assert corrected.rank == 0
    assert corrected.snr == 0
    assert corrected.sigma == pytest.approx(1.0, rel=0.01)


# Twenty spikes (ten in the smallest shape) of 1 to 6 times sigma * sqrt(M) in unit noise. Columns: rank and relative
# squared error of the original rule, then errors of the edge, of the hard threshold, of the shrinker, of the true rank.
@pytest.mark.parametrize(
    ("shape", "planted", "original", "edge", "hard", "shrunk", "oracle"),
    [
        ((576, 576), 20, (136, 1.119), 0.148, 0.146, 0.121, 0.155),
        ((576, 1536), 20, (480, 1.819), 0.101, 0.099, 0.084, 0.101),
        ((192, 576), 10, (174, 1.225), 0.097, 0.093, 0.079, 0.097),
    ],
)
def test_recovery_of_planted_signals(
    shape: tuple[int, int],
    planted: int,
    original: tuple[int, float],
    edge: float,
    hard: float,
    shrunk: float,
    oracle: float,
) -> None:
    random = np.random.default_rng(1)
    left, _ = np.linalg.qr(random.standard_normal((shape[0], planted)))
    right, _ = np.linalg.qr(random.standard_normal((shape[1], planted)))
    signal = (left * (np.linspace(1.0, 6.0, planted) * math.sqrt(max(shape)))) @ right.T
    u, s, vh = np.linalg.svd(signal + random.standard_normal(shape), full_matrices=False)

    def error(factors: np.ndarray) -> float:
        return float(np.square((u * (s * factors)) @ vh - signal).sum() / np.square(signal).sum())

    def cut(rank: int) -> float:
        return error(np.arange(len(s)) < rank)

    # The table was measured with other spikes of the same kind.
    of_table = {"rel": 0.12}
    original_rank, original_error = original
    assert decide("laserrmt", s, shape).rank == pytest.approx(original_rank, rel=0.03)
    assert cut(decide("laserrmt", s, shape).rank) == pytest.approx(original_error, **of_table)
    assert abs(decide("marchenko_pastur", s, shape).rank - planted) <= 2
    assert cut(decide("marchenko_pastur", s, shape).rank) == pytest.approx(edge, **of_table)
    assert cut(decide("gavish_donoho", s, shape).rank) == pytest.approx(hard, **of_table)
    assert error(shrink_factors(s, shape)) == pytest.approx(shrunk, **of_table)
    assert cut(planted) == pytest.approx(oracle, **of_table)

    assert cut(decide("gavish_donoho", s, shape).rank) <= cut(planted)
    assert cut(decide("screenot", s, shape).rank) <= cut(planted)
    assert error(shrink_factors(s, shape)) <= 0.9 * cut(planted)
