"""The queue: who is started next, who is turned away, and both at the same moment."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.errors import QueueFull, QuotaExceeded
from aidocks.jobs.model import Job, Status
from aidocks.jobs.queue import UNLIMITED, Limits, QueueLength, Started, Waiting, next_job
from aidocks.jobs.store import JobStore
from aidocks.jobs.terms import Terms

OWNERS = st.sampled_from(["local", "key-a", "key-b"])
PRIORITIES = st.integers(-2, 2)
RUNNING = st.lists(st.builds(Started, OWNERS, PRIORITIES), max_size=6)
WAITING = st.lists(st.tuples(OWNERS, PRIORITIES, st.booleans()), max_size=12).map(
    lambda drawn: [
        Waiting(f"job-{n}", n, owner, priority, abandoned)
        for n, (owner, priority, abandoned) in enumerate(drawn)
    ]
)


def submit(store: JobStore, owner: str = "local", limits: Limits = UNLIMITED, **more: object) -> Job:
    terms = Terms(owner=owner, priority=more.pop("priority", 0))  # type: ignore[arg-type]
    return store.submit("laser", {}, output_name=None, terms=terms, limits=limits, **more)[0]  # type: ignore[arg-type]


@given(WAITING, RUNNING, st.integers(1, 6))
def test_the_next_job_is_the_one_that_nobody_has_a_better_claim_than(
    waiting: list[Waiting], running: list[Started], places: int
) -> None:
    chosen = next_job(waiting, running, places)
    highest = max((job.priority for job in running), default=-99)
    if len(running) >= places:
        waiting = [job for job in waiting if job.priority > highest]
    if chosen is None:
        assert not waiting
        return
    assert chosen in waiting
    mine = Counter(job.owner for job in running)
    for other in waiting:
        assert chosen.abandoned or not other.abandoned
        if other.abandoned != chosen.abandoned:
            continue
        assert other.priority <= chosen.priority
        if other.priority == chosen.priority:
            assert mine[chosen.owner] <= mine[other.owner]
            if mine[chosen.owner] == mine[other.owner]:
                assert chosen.number <= other.number


@given(st.lists(st.tuples(OWNERS, PRIORITIES), max_size=60), st.integers(1, 4))
def test_never_more_than_one_beside_the_places_for_each_priority(
    drawn: list[tuple[str, int]], places: int
) -> None:
    waiting = [Waiting(f"job-{n}", n, owner, priority) for n, (owner, priority) in enumerate(drawn)]
    running: list[Started] = []
    while chosen := next_job(waiting, running, places):
        waiting.remove(chosen)
        running.append(Started(chosen.owner, chosen.priority))
    assert len(running) <= places + 5
    highest = max((job.priority for job in running), default=0)
    assert all(job.priority <= highest for job in waiting)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 3), st.integers(2, 4))
def test_nobody_starves_behind_others_of_the_same_priority(
    data: st.DataObject, places: int, owners: int
) -> None:
    """Others submit more than can run, at every moment and for ever; jobs end when they like, but they end."""
    backlog = [Waiting("mine", 1, "me", 0)]
    running: list[tuple[Waiting, int]] = [(Waiting("long", 0, "me", 0), data.draw(st.integers(1, 5)))]
    number = 2
    for _ in range(60):
        for owner in range(owners):
            backlog.append(Waiting(f"job-{number}", number, f"other-{owner}", 0))
            number += 1
        while chosen := next_job(backlog, [Started(job.owner, 0) for job, _ in running], places):
            backlog.remove(chosen)
            running.append((chosen, data.draw(st.integers(1, 5))))
            if chosen.id == "mine":
                return
        running = [(job, left - 1) for job, left in running if left > 1]
    raise AssertionError("it was never started")


def test_only_what_is_due_may_be_started(store: JobStore) -> None:
    first, second = submit(store, "key-a", priority=3), submit(store)
    submit(store, place="local")
    token = store.acquire_lease("service")
    assert store.waiting("service", token) == [
        Waiting(first.id, 1, "key-a", 3),
        Waiting(second.id, 2, "local", 0),
    ]
    store.claim(first.id, token)
    store.put_back(first.id, {}, 3600.0, token=token)
    assert [job.id for job in store.waiting("service", token)] == [second.id]
    store.claim(second.id, token)
    store.put_back(second.id, {}, -1.0, token=token)
    assert [job.id for job in store.waiting("service", token)] == [second.id]


def test_the_length_of_the_queue(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.queue_length() == QueueLength(0, 0.0)
    submit(store)
    submit(store)
    submit(store, place="local")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100)
    length = store.queue_length()
    assert length.waiting == 2
    assert 99 < length.oldest_s < 160


def test_a_full_queue_turns_everybody_away(store: JobStore) -> None:
    limits = Limits(queued=2)
    first = submit(store, "key-a", limits)
    submit(store, "key-b", limits, idempotency_key="k")
    for owner in ("key-a", "key-c", "local"):
        with pytest.raises(QueueFull, match="2 jobs wait"):
            submit(store, owner, limits)
    again, created = store.submit(
        "laser", {}, output_name=None, terms=Terms(owner="key-b"), limits=limits, idempotency_key="k"
    )
    assert not created, "what was accepted once is not refused when it is asked for again"
    assert again.owner == "key-b"
    submit(store, place="local")
    token = store.acquire_lease("service")
    store.claim(first.id, token)
    submit(store, "local", limits)


def test_a_key_may_have_so_many_unfinished_jobs(store: JobStore) -> None:
    limits = Limits(unfinished=2)
    token = store.acquire_lease("service")
    running = submit(store, "key-a", limits)
    store.claim(running.id, token)
    submit(store, "key-a", limits)
    with pytest.raises(QuotaExceeded, match="key-a has 2"):
        submit(store, "key-a", limits)
    submit(store, "key-b", limits)
    for _ in range(3):
        submit(store, "local", limits)
    store.request_cancel(running.id)
    store.transition(running.id, Status.CANCELLED, token=token)
    submit(store, "key-a", limits)


@pytest.mark.parametrize("limits", [Limits(queued=5), Limits(unfinished=5)])
def test_many_at_once_get_exactly_the_places_that_there_are(store_url: str, limits: Limits) -> None:
    stores = [JobStore(store_url) for _ in range(4)]
    barrier, refused = threading.Barrier(4), []

    def send(store: JobStore) -> None:
        barrier.wait()
        for _ in range(4):
            try:
                submit(store, "key-a", limits)
            except (QueueFull, QuotaExceeded) as error:
                refused.append(error)

    threads = [threading.Thread(target=send, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(stores[0].list()), len(refused)) == (5, 11)
    for store in stores:
        store.close()
