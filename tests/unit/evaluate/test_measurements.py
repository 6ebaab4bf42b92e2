from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.evaluate.measurements import Decision, Pairs, decide, finite_losses, judge
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
    accepted, items = simulate(drifting(10), 3, 500)
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
    if items == 128:
        assert decision == ("accept" if change.improved(threshold) else "futile")
    if decision == "futile":
        assert not change.improved(threshold)


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
