from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.laser import marchenko_pastur as mp
from aidocks.laser.rules import RULES, decide, omega, shrink_factors

NOISE_RULES = ("marchenko_pastur", "gavish_donoho", "optimal_shrinkage", "screenot")
shapes = st.tuples(st.integers(2, 40), st.integers(2, 40))


def singular_values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


@settings(max_examples=40, deadline=None)
@given(small=st.integers(24, 160), ratio=st.floats(1, 6), seed=st.integers(0, 2**16), flip=st.booleans())
def test_pure_noise_of_any_shape_keeps_almost_nothing(
    small: int, ratio: float, seed: int, flip: bool
) -> None:
    shape = (small, round(small * ratio))
    shape = shape[::-1] if flip else shape
    values = singular_values(np.random.default_rng(seed).standard_normal(shape))
    for rule in NOISE_RULES:
        # The edge is asymptotic: at these sizes the largest value crosses it by chance, by a few at most.
        assert RULES[rule](values, shape).rank <= max(2, 0.03 * small), rule
    assert RULES["gavish_donoho"](values, shape).rank <= 1
    assert RULES["laserrmt"](values, shape).rank >= 0.1 * small


@settings(max_examples=25, deadline=None)
@given(small=st.integers(80, 160), ratio=st.floats(1, 4), rank=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_planted_signals_are_recovered_as_well_as_by_who_knows_the_rank(
    small: int, ratio: float, rank: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    large = round(small * ratio)
    left, _ = np.linalg.qr(random.standard_normal((small, rank)))
    right, _ = np.linalg.qr(random.standard_normal((large, rank)))
    signal = (left * np.linspace(0.5, 6, rank) * math.sqrt(large)) @ right.T
    u, s, vh = np.linalg.svd(signal + random.standard_normal((small, large)), full_matrices=False)

    def error(factors: np.ndarray) -> float:
        return float(np.linalg.norm((u * (s * factors)) @ vh - signal))

    places = np.arange(small)
    oracle = error(places < rank)
    assert error(places < RULES["gavish_donoho"](s, (small, large)).rank) <= 1.03 * oracle
    assert error(shrink_factors(s, (small, large))) <= 1.01 * oracle


@settings(deadline=None)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000), transpose=st.booleans())
def test_decisions_depend_neither_on_scale_nor_on_orientation(
    scale: float, seed: int, transpose: bool
) -> None:
    shape = (20, 30)
    values = singular_values(np.random.default_rng(seed).standard_t(3, shape))
    other_shape = shape[::-1] if transpose else shape
    for rule in RULES:
        one, other = decide(rule, values, shape), decide(rule, values * scale, other_shape)
        assert one.rank == other.rank
        assert one.snr == pytest.approx(other.snr)
        assert one.energy == pytest.approx(other.energy)
        assert one.threshold * scale == pytest.approx(other.threshold)


SPECTRA = {
    "zero": np.zeros(6),
    "rank one": np.array([3.0, 0, 0, 0, 0, 0]),
    "rank one, with rounding": np.array([3.0, 2e-9, 1e-9, 1e-9, 5e-10, 0]),
    "constant": np.full(6, 2.0),
    "tiny": np.full(6, 5e-324),
    "two": np.array([2.0, 1.0]),
    "two equal": np.array([1.0, 1.0]),
    "one": np.array([1.0]),
    "nearly all zero": np.array([4.0, 3.0, 2.0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("large", [1, 4, 5000])
def test_degenerate_spectra_are_decided_too(name: str, large: int) -> None:
    values = SPECTRA[name]
    shape = (len(values), len(values) * large)
    with np.errstate(all="raise", under="ignore"):
        made = [decide(rule, values, shape) for rule in RULES]
        made += [decide(rule, values, shape, 0.5) for rule in ("fraction", "energy")]
        factors = shrink_factors(values, shape)
        fit = mp.fit_bulk(values, shape)
    for decision in made:
        assert 0 <= decision.rank <= len(values)
        numbers = (decision.sigma, decision.threshold, decision.energy)
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
        assert decision.snr is None or math.isfinite(decision.snr)
        assert decision.energy <= 1 + 1e-12
    assert np.isfinite(factors).all()
    assert ((factors >= 0) & (factors <= 1)).all()
    assert math.isfinite(fit.sigma)
    assert 0 <= fit.distance <= 1


def test_what_is_far_below_the_largest_value_is_rounding() -> None:
    for name in ("rank one", "rank one, with rounding"):
        for rule in NOISE_RULES:
            assert decide(rule, SPECTRA[name], (6, 6)).rank == 1, (name, rule)
    assert shrink_factors(SPECTRA["rank one"], (6, 6)).tolist() == [1, 0, 0, 0, 0, 0]


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**16))
def test_shrunk_values_never_grow_and_keep_their_order(shape: tuple[int, int], seed: int) -> None:
    values = singular_values(np.random.default_rng(seed).standard_t(2, shape))
    factors = shrink_factors(values, shape)
    assert (np.diff(factors) <= 1e-9).all()
    assert ((factors >= 0) & (factors <= 1)).all()
    decision = decide("optimal_shrinkage", values, shape)
    assert np.count_nonzero(factors) <= decision.rank
    assert decision.energy <= decide("marchenko_pastur", values, shape).energy


@settings(deadline=None)
@given(
    values=st.lists(st.just(0.0) | st.floats(1e-6, 1e3), min_size=1, max_size=30), keep=st.floats(0.001, 1)
)
def test_shares_are_kept(values: list[float], keep: float) -> None:
    spectrum = np.array(values)
    shape = (len(values), 40)
    fraction = decide("fraction", spectrum, shape, keep)
    assert fraction.rank == max(1, math.floor(keep * len(values) + 1e-9))
    energy = decide("energy", spectrum, shape, keep)
    assert energy.energy >= keep - 1e-9 or not spectrum.any()
    squares = np.sort(np.square(spectrum))[::-1]
    if energy.rank > 1:
        assert squares[: energy.rank - 1].sum() < keep * squares.sum()


def test_shares_are_those_that_people_write() -> None:
    values = np.arange(100, 0, -1.0)
    assert decide("fraction", values, (100, 100), 0.29).rank == 29
    assert decide("fraction", values, (100, 100), 0.01).rank == 1
    assert decide("energy", np.array([2.0, 1.0, 1.0]), (3, 3), 4 / 6).rank == 1
    assert decide("energy", values, (100, 100), 1.0).rank == 100


@settings(deadline=None)
@given(beta=st.floats(1e-5, 1))
def test_omega_lies_where_its_approximation_says(beta: float) -> None:
    # The cubic of arXiv 1305.5870, equation 5, is within 0.02 of it.
    assert omega(beta) == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.025)
