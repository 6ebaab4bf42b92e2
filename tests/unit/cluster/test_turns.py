"""Who gets the next free worker: priorities, owners, jobs, and gangs that need many at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.turns import Request, Turns


@dataclass
class Line:
    """Turns, and who got some, in order."""

    turns: Turns
    served: list[str] = field(default_factory=list)

    def ask(self, name: str, owner: str = "a", priority: int = 0, turns: int = 1, job: str = "") -> Request:
        request = Request(owner, job or owner, priority, turns, lambda: self.served.append(name))
        self.turns.ask(request)
        return request


def test_first_comes_the_priority_then_who_holds_least_then_who_came_first() -> None:
    line = Line(Turns(3))
    held = [line.ask(f"held-{n}", owner="rich") for n in range(2)]
    held.append(line.ask("held-2", owner="poor"))
    line.ask("rich", owner="rich")
    line.ask("poor-second-job", owner="poor", job="other")
    line.ask("poor-same-job", owner="poor", job="poor")
    line.ask("new", owner="new")
    line.ask("urgent", owner="rich", priority=5)
    for request in held:
        line.turns.give_back(request)
    assert line.served[3:] == ["urgent", "new", "poor-second-job"]


def test_owners_share_workers_however_many_units_each_of_them_has() -> None:
    line = Line(Turns(4))
    running = [line.ask("first", owner="first") for _ in range(4)]
    waiting = [line.ask("first", owner="first") for _ in range(40)]
    waiting += [line.ask("second", owner="second") for _ in range(40)]
    for request in running:
        line.turns.give_back(request)
    assert sorted(line.served[4:]) == ["first", "first", "second", "second"]
    assert waiting[0].held == 1


def test_a_gang_gets_all_turns_at_once_and_nobody_passes_it() -> None:
    line = Line(Turns(3))
    running = [line.ask(f"unit-{n}", owner="a") for n in range(3)]
    gang = line.ask("gang", owner="b", turns=3)
    for number in range(30):
        line.ask(f"later-{number}", owner="c")
    for request in running[:2]:
        line.turns.give_back(request)
        assert gang.held == 0
    assert line.turns.held == 1, "turns stay free for it"
    line.ask("urgent", owner="c", priority=1)
    assert line.served[-1] == "urgent"
    line.turns.give_back(running[2])
    assert gang.held == 0


def test_who_leaves_the_line_frees_what_it_kept_free() -> None:
    line = Line(Turns(2))
    line.ask("unit")
    gang = line.ask("gang", owner="b", turns=2)
    line.ask("small", owner="c")
    assert line.served == ["unit"]
    line.turns.give_back(gang)
    assert line.served == ["unit", "small"]


def test_a_pool_may_grow_and_shrink() -> None:
    line = Line(Turns(1))
    requests = [line.ask(f"unit-{n}") for n in range(4)]
    line.turns.total = 3
    assert len(line.served) == 3
    line.turns.total = 1
    line.turns.give_back(requests[0])
    line.turns.give_back(requests[1])
    assert len(line.served) == 3, "one is still in use, and there is only one"
    line.turns.give_back(requests[2])
    assert len(line.served) == 4
    # What wants more than there is gets what there is.
    line.turns.give_back(requests[3])
    assert line.ask("gang", turns=8).held == 1


WISHES = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(-1, 1), st.integers(1, 5)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(wishes=WISHES, total=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_everybody_is_served_whatever_they_want_and_never_more_than_there_is(
    wishes: list[tuple[str, str, int, int]], total: int, order: object
) -> None:
    turns = Turns(total)
    running: list[Request] = []
    served = 0
    requests: list[Request] = []

    def note(number: int) -> Callable[[], None]:
        return lambda: running.append(requests[number])

    for number, (owner, job, priority, wanted) in enumerate(wishes):
        requests.append(Request(owner, owner + job, priority, wanted, note(number)))
        turns.ask(requests[number])
        assert turns.held <= total
    while running:
        request = running.pop(order.randrange(len(running)))  # type: ignore[attr-defined]
        assert request.held == min(request.turns, total)
        turns.give_back(request)
        served += 1
        assert 0 <= turns.held <= total
    assert (served, turns.held, turns.waiting) == (len(wishes), 0, 0)


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(2, 6),
    share=st.integers(1, 6),
    order=st.randoms(use_true_random=False),
    same_owner=st.booleans(),
)
def test_a_stream_of_units_does_not_starve_gangs(
    total: int, share: int, order: object, same_owner: bool
) -> None:
    turns = Turns(total)
    running: list[Request] = []

    def ask(owner: str, job: str, wanted: int) -> Request:
        request = Request(owner, job, 0, wanted, lambda: running.append(request))
        turns.ask(request)
        return request

    for _ in range(3 * total):
        ask("stream", "stream", 1)
    gangs = [ask("stream" if same_owner else "gangs", f"gang-{n}", min(share, total)) for n in range(3)]
    for _ in range(40 * total):
        if not running:
            break
        ended = running.pop(order.randrange(len(running)))  # type: ignore[attr-defined]
        turns.give_back(ended)
        if ended.job == "stream":
            ask("stream", "stream", 1)  # there is always a next one
    assert all(gang.held == 0 and gang not in running for gang in gangs), "all have run and ended"
    assert not [gang for gang in gangs if gang in turns._waiting]
