"""Token buckets."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from serve.rates import Rates


def test_so_many_at_once_and_so_many_a_minute(clock: Any) -> None:
    rates = Rates(clock=clock)
    assert [rates.take("a", 3) for _ in range(3)] == [0, 0, 0]
    assert 19.9 < rates.take("a", 3) <= 20
    assert rates.take("b", 3) == 0
    clock.now += 20
    assert rates.take("a", 3) == 0
    assert rates.take("a", 3) > 19
    clock.now += 3600
    assert [rates.take("a", 3) > 0 for _ in range(4)] == [False, False, False, True]


@given(st.integers(1, 100), st.lists(st.floats(0, 30), max_size=300))
def test_never_more_than_two_minutes_worth_in_one(per_minute: int, pauses: list[float]) -> None:
    now = [0.0]
    rates = Rates(clock=lambda: now[0])
    taken = []
    for pause in pauses:
        now[0] += pause
        wait = rates.take("key", per_minute)
        assert 0 <= wait <= 60 / per_minute + 1e-6
        if not wait:
            taken.append(now[0])
        else:  # and what was said holds
            now[0] += wait + 1e-6
            assert rates.take("key", per_minute) == 0
            taken.append(now[0])
    for start in taken:
        assert sum(start <= moment < start + 60 for moment in taken) <= 2 * per_minute


def test_a_flood_of_names_takes_no_memory(clock: Any) -> None:
    rates = Rates(most=10, clock=clock)
    for number in range(1000):
        rates.take(str(number), 1)
        rates.take("kept", 10**6)
    assert len(rates._full_at) == 10
    assert rates.wait_s("kept", 10**6) == 0
    assert rates.wait_s("999", 1) > 0
    assert rates.wait_s("1", 1) == 0
