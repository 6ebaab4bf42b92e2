"""The law against published numbers and against the measurements that motivated the corrected rule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aidocks.laser import marchenko_pastur as mp


@pytest.mark.parametrize(("beta", "expected"), [(1.0, 0.8079), (0.375, 0.9346), (0.25, 0.9571)])
def test_median_of_the_law(beta: float, expected: float) -> None:
    assert mp.median(beta) == pytest.approx(expected, abs=6e-5)


# Gavish and Donoho (arXiv 1305.5870), table IV: omega(beta) = lambda(beta) / sqrt(mu_beta), here checked
# through mu.
@pytest.mark.parametrize(
    ("beta", "omega"), [(1.0, 2.858), (0.375, 2.007), (1 / 3, 1.951), (0.286, 1.887), (0.25, 1.837)]
)
def test_median_through_the_gavish_donoho_coefficient(beta: float, omega: float) -> None:
    root = math.sqrt(beta**2 + 14 * beta + 1)
    known_sigma = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
    assert known_sigma / mp.median(beta) == pytest.approx(omega, abs=1e-3)


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


@pytest.mark.parametrize(
    ("shape", "planted", "original_rank"),
    [((576, 576), 20, 136), ((576, 1536), 20, 480), ((192, 576), 10, 174)],
)
def test_planted_signals_are_found_by_the_edge_and_drowned_by_the_original_rule(
    shape: tuple[int, int], planted: int, original_rank: int
) -> None:
    random = np.random.default_rng(1)
    small, large = shape
    left, _ = np.linalg.qr(random.standard_normal((small, planted)))
    right, _ = np.linalg.qr(random.standard_normal((large, planted)))
    spikes = np.linspace(1.5, 6.0, planted) * math.sqrt(large)
    values = np.linalg.svd((left * spikes) @ right.T + random.standard_normal(shape), compute_uv=False)
    assert abs(mp.marchenko_pastur(values, shape).rank - planted) <= 1
    assert mp.laserrmt(values, shape).rank == pytest.approx(original_rank, rel=0.05)
