from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.laser import marchenko_pastur as mp
from aidocks.laser import screenot
from aidocks.laser.rules import RULES, known_sigma_threshold


def singular_values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


@settings(max_examples=15, deadline=None)
@given(small=st.integers(150, 300), ratio=st.floats(1, 4), seed=st.integers(0, 2**16))
def test_in_independent_noise_it_is_the_threshold_of_gavish_and_donoho(
    small: int, ratio: float, seed: int
) -> None:
    shape = (small, round(small * ratio))
    values = singular_values(np.random.default_rng(seed).standard_normal(shape))
    expected = known_sigma_threshold(small / shape[1]) * math.sqrt(shape[1])
    assert screenot.threshold(values, shape) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.1])
def test_the_slope_at_the_known_threshold(gamma: float) -> None:
    quantiles = np.array([mp.quantile((i + 0.5) / 20_000, gamma) for i in range(20_000)])
    assert screenot.slope(known_sigma_threshold(gamma), quantiles, gamma) == pytest.approx(-4, abs=2e-3)
    assert screenot.slope(1e6, quantiles, gamma) == pytest.approx(-2, abs=1e-3)


def correlated_noise(shape: tuple[int, int], seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows = np.sqrt(np.concatenate([np.full(shape[0] // 2, 1.0), np.full(shape[0] - shape[0] // 2, 10.0)]))
    return rows[:, None] * random.standard_normal(shape)


@pytest.mark.parametrize("shape", [(200, 200), (150, 500), (500, 150)])
def test_correlated_noise_is_noise(shape: tuple[int, int]) -> None:
    values = singular_values(correlated_noise(shape, 3))
    assert RULES["screenot"](values, shape).rank == 0
    assert RULES["marchenko_pastur"](values, shape).rank > 10


def test_signals_in_correlated_noise_are_found() -> None:
    shape, rank = (200, 400), 6
    random = np.random.default_rng(5)
    left, _ = np.linalg.qr(random.standard_normal((shape[0], rank)))
    right, _ = np.linalg.qr(random.standard_normal((shape[1], rank)))
    signal = (left * np.linspace(150, 400, rank)) @ right.T
    values = singular_values(signal + correlated_noise(shape, 5))
    assert RULES["screenot"](values, shape).rank == rank


def test_imputed_values_continue_the_edge() -> None:
    # Values that lie below an edge at 10 by the 2/3 power of their number are what is imputed.
    edge = 10 - 0.1 * np.arange(100) ** (2 / 3)
    with_signal = edge.copy()
    with_signal[:7] = np.linspace(90, 50, 7)
    np.testing.assert_allclose(screenot.impute(with_signal, 7), edge, rtol=1e-9)


def test_too_few_values_tell_nothing() -> None:
    assert screenot.threshold(np.array([2.0, 1.0]), (2, 9)) is None
    assert screenot.threshold(np.array([2.0, 1.0, 0.5]), (3, 9)) is not None
