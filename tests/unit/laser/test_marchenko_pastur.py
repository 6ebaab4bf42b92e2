from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.laser import marchenko_pastur as mp

sides = st.integers(24, 160)


def singular_values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


@settings(deadline=None)
@given(beta=st.floats(0.01, 1.0))
def test_density_integrates_to_the_distribution(beta: float) -> None:
    x = np.linspace(1 - math.sqrt(beta), 1 + math.sqrt(beta), 20_001)
    total = np.trapezoid(mp.density(x, beta), x)
    # At beta = 1 the density does not vanish at 0, where the grid of this test has its first, empty point.
    assert total == pytest.approx(1.0, abs=2e-3)
    middle = mp.median(beta)
    assert float(mp.cdf(np.array(middle), beta)) == pytest.approx(0.5, abs=1e-6)
    assert mp.quantile(0.25, beta) < middle < mp.quantile(0.75, beta)


@settings(max_examples=40, deadline=None)
@given(small=sides, ratio=st.floats(1, 6), seed=st.integers(0, 2**16), sigma=st.floats(1e-4, 1e3))
def test_pure_noise_of_any_shape_has_almost_no_rank(
    small: int, ratio: float, seed: int, sigma: float
) -> None:
    shape = (small, round(small * ratio))
    values = singular_values(sigma * np.random.default_rng(seed).standard_normal(shape))
    decision = mp.marchenko_pastur(values, shape)
    # The edge is asymptotic: at these sizes the largest value crosses it by chance, by a few at most.
    assert decision.rank <= max(2, 0.03 * small)
    assert decision.sigma == pytest.approx(sigma, rel=0.12)
    assert decision == mp.marchenko_pastur(values, shape[::-1])


@settings(max_examples=40, deadline=None)
@given(small=st.integers(80, 160), ratio=st.floats(1, 4), rank=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_planted_spikes_are_recovered(small: int, ratio: float, rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    large = round(small * ratio)
    left, _ = np.linalg.qr(random.standard_normal((small, rank)))
    right, _ = np.linalg.qr(random.standard_normal((large, rank)))
    signal = 4 * math.sqrt(large) * left @ right.T
    values = singular_values(signal + random.standard_normal((small, large)))
    assert rank <= mp.marchenko_pastur(values, (small, large)).rank <= rank + 2


def test_the_original_rule_step_by_step() -> None:
    values = np.array([10.0, 4.0, 3.0, 2.0, 1.0])
    decision = mp.laserrmt(values, (5, 20))
    sigma = (4.0 - 2.0) / 1.349
    assert decision.sigma == pytest.approx(sigma)
    assert decision.threshold == pytest.approx(sigma * 1.5)  # 2.22
    assert decision.rank == 3
    assert decision.snr == pytest.approx((10 + 4 + 3) / (2 + 1))
    assert decision.energy == pytest.approx(125 / 130)


def test_a_matrix_of_zeros_has_rank_zero() -> None:
    decision = mp.marchenko_pastur(np.zeros(4), (4, 8))
    assert (decision.rank, decision.energy, decision.snr) == (0, 0.0, None)


@settings(max_examples=25, deadline=None)
@given(small=st.integers(60, 140), ratio=st.floats(1, 4), share=st.floats(0, 0.4), seed=st.integers(0, 2**16))
def test_the_fit_sees_through_many_outliers(small: int, ratio: float, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    large, rank = round(small * ratio), int(share * small)
    signal = 30 * random.standard_normal((small, rank)) @ random.standard_normal((rank, large))
    values = singular_values(signal + random.standard_normal((small, large)))
    fit = mp.fit_bulk(values, (small, large))
    assert rank <= fit.outliers <= rank + 3
    assert fit.sigma == pytest.approx(1.0, rel=0.15)
    assert fit.distance < 0.1


def test_the_distance_tells_noise_from_other_bulks() -> None:
    random = np.random.default_rng(0)
    noise = mp.fit_bulk(singular_values(random.standard_normal((300, 500))), (300, 500))
    assert noise.distance < 0.02
    flat = mp.fit_bulk(np.linspace(0.01, 1, 300), (300, 500))
    assert flat.distance > 0.1
