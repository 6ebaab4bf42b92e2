from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.evaluate.measurements import (
    Decision,
    Pairs,
    decide,
    finite_losses,
    judge,
    normal_equivalent,
)
from aidocks.evaluate.perplexity import Comparison

LOOKS = (16, 32, 64, 128)
Draw = Callable[[np.random.Generator], np.ndarray]


def pairs(before: list[float], after: list[float], metric: str = "perplexity") -> Pairs:
    return Pairs(
        metric=metric,
        positions=tuple(range(len(before))),
        before=finite_losses(before),
        after=finite_losses(after),
        tokens=len(before),
        dtype="float32",
    )


def run(differences: np.ndarray, z_threshold: float) -> tuple[Decision, int]:
    """Run one sequential test on the differences of all items; return its end and how many items it took."""
    for look in LOOKS:
        seen = differences[:look]
        delta, error = float(seen.mean()), float(seen.std(ddof=1)) / math.sqrt(look)
        z = None if delta == 0 else delta / error if error else math.copysign(1e9, delta)
        change = Comparison(delta=delta, standard_error=error, z=z)
        decision = judge(change, look, LOOKS[-1], z_threshold)
        if decision != "continue":
            return decision, look
    raise AssertionError("the last look decides")


def simulate(draw: Draw, z_threshold: float, times: int) -> tuple[float, float]:
    """Return how often a change is accepted, and the mean number of items that takes."""
    generator = np.random.default_rng(0)
    ends = [run(draw(generator), z_threshold) for _ in range(times)]
    return float(np.mean([end == "accept" for end, _ in ends])), float(np.mean([n for _, n in ends]))


def drifting(z: float) -> Draw:
    """Draw differences whose mean over all items has this expected z."""
    return lambda generator: generator.standard_normal(128) - z / math.sqrt(128)


def flips(share: float) -> Draw:
    """Draw changes of a right-or-wrong loss that go both ways alike."""
    chances = [share / 2, 1 - share, share / 2]
    return lambda generator: generator.choice([-1.0, 0.0, 1.0], p=chances, size=128)


@pytest.mark.parametrize(
    "draw", [drifting(0), flips(0.1), flips(0.3), lambda generator: generator.standard_t(3, 128)],
    ids=["normal", "few flips", "many flips", "heavy tails"],
)  # fmt: skip
def test_nothing_is_hardly_ever_taken_for_something(draw: Draw) -> None:
    accepted, items = simulate(draw, 3, 8000)
    assert accepted <= 0.0013 + 3 * math.sqrt(0.0013 / 8000)  # the fixed test's rate, and what chance adds
    assert items < 64
    accepted, _ = simulate(draw, 2, 4000)
    assert accepted <= 0.03


def test_a_strong_effect_is_accepted_early_and_a_weak_one_nearly_as_often_as_by_the_whole() -> None:
    accepted, items = simulate(drifting(12), 3, 500)
    assert accepted > 0.99
    assert items < 64
    accepted, _ = simulate(drifting(6), 3, 2000)
    assert accepted > 0.97
    accepted, _ = simulate(drifting(4), 3, 2000)
    assert accepted > 0.8413 - 0.09  # the fixed test, and what futility costs


def test_a_harmful_change_is_given_up_at_once() -> None:
    accepted, items = simulate(drifting(-6), 3, 500)
    assert accepted == 0
    assert items < 18


@given(
    z=st.one_of(st.none(), st.floats(-50, 50).filter(bool)),
    items=st.integers(1, 128),
    threshold=st.floats(0.1, 10),
)
def test_what_is_accepted_is_beyond_the_threshold_and_the_end_decides(
    z: float | None, items: int, threshold: float
) -> None:
    change = Comparison(delta=(z or 0) * 0.1, standard_error=0.1, z=z)
    decision = judge(change, items, 128, threshold)
    if decision == "accept":
        assert change.improved(threshold)
    improved = z is not None and normal_equivalent(z, items) <= -threshold
    if items == 128:
        assert decision == ("accept" if improved else "futile")
    if decision == "futile":
        assert not improved


def test_what_is_not_finite_is_futile_at_once() -> None:
    broken = pairs([1.0] * 20, [0.5] * 19 + [math.nan])
    assert decide(broken, 160, 3) == "futile"
    assert broken.comparison.worsened(3)
    assert broken.value_after == (None, None)
    assert broken.value_before.value == pytest.approx(math.e)
    assert decide(pairs([1.0], [math.inf]), 160, 3) == "futile"


def test_a_few_items_that_change_alike_prove_nothing_before_the_end() -> None:
    alike = pairs([1.0] * 8, [0.0] * 8, "accuracy")
    assert decide(alike, 64, 3) == "continue"
    assert decide(alike, 8, 3) == "accept"
    unchanged = pairs([1.0] * 8, [1.0] * 8, "accuracy")
    assert decide(unchanged, 64, 3) == "continue"
    assert decide(unchanged, 8, 3) == "futile"


def test_values_are_in_the_metrics_own_unit() -> None:
    losses = [0.0, 1.0, 1.0, 0.0]
    error = pytest.approx(math.sqrt(1 / 3) / 2)
    assert pairs(losses, losses, "accuracy").value_before == (0.5, error)
    assert pairs(losses, losses, "log_likelihood").value_before == (-0.5, error)
    assert pairs(losses, losses, "preference").value_after == (-0.5, error)
    value, error = pairs(losses, losses).value_after
    assert value == pytest.approx(math.exp(0.5))
    assert error == pytest.approx(math.exp(0.5) * math.sqrt(1 / 3) / 2)
    assert pairs([900.0], [900.0]).value_before == (None, None)


def test_errors_are_those_of_the_differences() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(5, 3, 200)
    after = before - 0.1 + generator.normal(0, 0.1, 200)
    change = pairs(before.tolist(), after.tolist()).comparison
    assert change.delta == pytest.approx(float((after - before).mean()))
    assert change.standard_error == pytest.approx(float((after - before).std(ddof=1)) / math.sqrt(200))
    assert change.z is not None
    assert change.z < -10
    assert Pairs.model_validate_json(pairs([1.0], [math.nan]).model_dump_json()).after == (None,)


@pytest.mark.parametrize(
    ("t", "freedom", "tail"),
    [
        # Critical values of printed tables, to four digits.
        (6.314, 1, 0.05), (31.82, 1, 0.01), (318.3, 1, 0.001), (2.132, 4, 0.05), (8.610, 4, 0.0005),
        (1.895, 7, 0.05), (2.998, 7, 0.01), (4.785, 7, 0.001), (1.316, 25, 0.1), (2.787, 25, 0.005),
        (3.160, 120, 0.001), (1.658, 120, 0.05), (0.683, 28, 0.25),
    ],
)  # fmt: skip
def test_few_items_are_judged_by_students_distribution(t: float, freedom: int, tail: float) -> None:
    expected = -NormalDist().inv_cdf(tail)
    assert normal_equivalent(t, freedom + 1) == pytest.approx(expected, abs=6e-4)
    assert normal_equivalent(-t, freedom + 1) == -normal_equivalent(t, freedom + 1)


@given(t=st.floats(0, 1e9), items=st.integers(2, 2000))
def test_fewer_items_prove_less_and_larger_differences_more(t: float, items: int) -> None:
    z = normal_equivalent(t, items)
    assert -1e-12 <= z <= t * (1 + 1e-9) + 1e-12
    assert z <= normal_equivalent(t, 2 * items) * (1 + 1e-5) + 1e-12
    assert z <= normal_equivalent(1.1 * t, items) * (1 + 1e-5) + 1e-12


def test_exact_values_in_between_and_far_out() -> None:
    for t in (0.1, 1.0, 5.0, 1e4):  # two degrees of freedom have a closed form: (1 - t / √(2 + t²)) / 2
        root = math.sqrt(2 + t * t)
        assert NormalDist().cdf(-normal_equivalent(t, 3)) == pytest.approx(1 / (root * (root + t)))
    assert normal_equivalent(2.0, 10**6) == pytest.approx(2.0, abs=1e-5)
    assert normal_equivalent(1e9, 1) == 0  # one item alone has no error
    assert normal_equivalent(40.0, 10**6) == pytest.approx(40, abs=0.02)  # a tail below what a float holds
    below, above = normal_equivalent(37.1, 10**6), normal_equivalent(37.6, 10**6)
    assert 0.4 < above - below < 0.6


@pytest.mark.parametrize("z_threshold", [1.5, 2.0, 3.0])
def test_the_level_holds_for_eight_items(z_threshold: float) -> None:
    times = 30_000
    drawn = np.random.default_rng(1).standard_normal((times, 8))
    t = drawn.mean(1) / (drawn.std(1, ddof=1) / math.sqrt(8))
    level = NormalDist().cdf(-z_threshold)
    accepted = sum(
        judge(Comparison(delta=z, standard_error=1.0, z=z), 8, 8, z_threshold) == "accept" for z in t.tolist()
    )
    assert accepted / times == pytest.approx(level, abs=4 * math.sqrt(level / times))
    assert (t <= -z_threshold).mean() > 1.2 * level  # what a plain z would accept


def test_pairs_judge_themselves_by_their_number() -> None:
    generator = np.random.default_rng(3)
    noise = generator.normal(0, 1, 8)
    drop = noise - noise.mean() - 3.2 * noise.std(ddof=1) / math.sqrt(8)
    better, worse = pairs([5.0] * 8, (5 + drop).tolist()), pairs((5 + drop).tolist(), [5.0] * 8)
    assert better.comparison.z == pytest.approx(-3.2)
    assert better.comparison.improved(3)
    assert better.improved(2.4)
    assert not better.improved(3)
    assert worse.worsened(2.4)
    assert not worse.worsened(3)
    assert not worse.improved(0.1)
    unchanged = pairs([1.0] * 8, [1.0] * 8)
    assert not unchanged.improved(0.1)
    assert not unchanged.worsened(0.1)
    assert pairs([1.0] * 8, [math.nan] * 8).worsened(3)
    assert not pairs([1.0] * 8, [math.nan] * 8).improved(0.1)
