"""The distribution that candidates are drawn from."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.merge.evolve.population import WORST, Population, default_size


def minimise(best: tuple[float, ...], seed: int, generations: int) -> Population:
    found = Population([0.5] * len(best), size=default_size(len(best)), step=0.3, seed=seed)
    for _ in range(generations):
        drawn = found.draw()
        found.learn([sum((a - b) ** 2 for a, b in zip(one, best, strict=True)) for one in drawn])
    return found


@settings(max_examples=25, deadline=None)
@given(
    best=st.lists(st.floats(0, 1), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 1000),
)
def test_it_moves_to_the_minimum_wherever_that_lies(best: tuple[float, ...], seed: int) -> None:
    found = minimise(best, seed, 60)
    assert found.mean == pytest.approx(best, abs=0.1)
    assert found.spread < 0.3


@given(seed=st.integers(0, 1000), dimensions=st.integers(1, 6))
def test_candidates_lie_inside_of_the_ranges(seed: int, dimensions: int) -> None:
    found = Population([1.0] * dimensions, size=default_size(dimensions), step=1.0, seed=seed)
    drawn = found.draw()
    assert len(drawn) == default_size(dimensions)
    assert all(0 <= share <= 1 for one in drawn for share in one)


def test_equal_seeds_and_costs_give_equal_candidates() -> None:
    one, other = minimise((0.2, 0.9), 7, 5), minimise((0.2, 0.9), 7, 5)
    assert one.draw() == other.draw()
    assert minimise((0.2, 0.9), 8, 5).draw() != one.draw()


def test_a_generation_without_a_cost_is_survived() -> None:
    found = Population([0.5, 0.5], size=6, step=0.3, seed=0)
    for _ in range(3):
        found.draw()
        found.learn([WORST] * 6)
    assert len(found.draw()) == 6


def test_the_default_size_is_the_tutorials() -> None:
    assert [default_size(n) for n in (1, 2, 10, 100)] == [4, 6, 10, 17]
