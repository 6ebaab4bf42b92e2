"""Random histories of two executors and people against the job store; a model says what must hold.

Every write may also be interrupted, by the death of its process, before any of its statements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, event

from aidocks.errors import IdempotencyMismatch, IllegalTransition, LeaseLost, NameTaken, QueueFull
from aidocks.jobs.database import events, jobs, leases, units
from aidocks.jobs.model import EventType, Job, Status
from aidocks.jobs.queue import Limits
from aidocks.jobs.store import JobStore
from aidocks.jobs.terms import Terms

AnswerT = TypeVar("AnswerT")
ENDINGS = [Status.SUCCEEDED, Status.FAILED, Status.CANCELLED]
#: After how many statements of a write its process dies; None: it lives.
DEATHS = st.sampled_from([None, None, None, 0, 1, 2, 3, 4])
#: Jobs that may wait.
PLACES = 4


class Died(BaseException):
    """Stands for ``kill -9`` in the middle of a transaction."""


class StoreMachine(RuleBasedStateMachine):
    """Two executors contend for the same jobs; the one with the older token never changes anything."""

    jobs = Bundle("jobs")

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.left: int | None = None
        self.open()
        with self.store._database.durable() as connection:
            for table in (events, units, jobs, leases):
                connection.execute(delete(table))
        self.tokens = {"a": 0, "b": 0}
        self.newest = 0
        self.status: dict[str, Status] = {}
        self.executor: dict[str, int] = {}
        self.names: dict[str, str] = {}
        self.keys: dict[tuple[str, str], tuple[str, int]] = {}
        self.attempts: dict[str, int] = {}
        self.failures: dict[str, int] = {}
        self.due: dict[str, bool] = {}
        self.asked_to_stop: set[str] = set()
        self.units: dict[str, set[str]] = {}
        self.events: dict[str, int] = {}
        self.ended: dict[str, Job] = {}

    def open(self) -> None:
        self.store = JobStore(self.url)
        database = self.store._database
        for engine in {database._durable, database._relaxed}:
            event.listen(engine, "before_cursor_execute", self.may_die)

    def may_die(self, *_: Any) -> None:
        if self.left is None:
            return
        if self.left == 0:
            raise Died
        self.left -= 1

    def live(self, death: int | None, write: Callable[[], AnswerT]) -> AnswerT | None:
        """Do a write; None when its process died on the way, and so nothing was written."""
        self.left = death
        try:
            return write()
        except Died:
            return None
        finally:
            self.left = None

    def teardown(self) -> None:
        self.drain()
        self.store.close()

    def drain(self) -> None:
        """Every job that was accepted and has not ended can be taken over and ended."""
        token = self.store.acquire_lease("service", "the last")
        for job in self.unfinished():
            assert self.store.claim(job, token) is not None
            assert self.store.transition(job, Status.SUCCEEDED, token=token).status is Status.SUCCEEDED
        assert self.store.unfinished("service") == []

    def unfinished(self) -> list[str]:
        return [job for job, status in self.status.items() if not status.terminal]

    @rule(
        target=jobs,
        name=st.sampled_from(["x", "y", None]),
        owner=st.sampled_from(["key-a", "key-b"]),
        key=st.sampled_from(["k", None, None]),
        body=st.integers(1, 2),
        death=DEATHS,
    )
    def submit(self, name: str | None, owner: str, key: str | None, body: int, death: int | None) -> object:
        def write() -> tuple[Job, bool]:
            return self.store.submit(
                "laser",
                {"n": body},
                output_name=name,
                idempotency_key=key,
                terms=Terms(owner=owner),
                limits=Limits(queued=PLACES),
            )

        known = self.keys.get((owner, key or ""))
        if known is not None:
            if known[1] != body:
                with pytest.raises(IdempotencyMismatch):
                    write()
            else:
                found, created = write()
                assert (found.id, created) == (known[0], False)
            return multiple()
        if list(self.status.values()).count(Status.QUEUED) >= PLACES:
            with pytest.raises(QueueFull):
                write()
            return multiple()
        if name is not None and name in {self.names.get(job) for job in self.unfinished()}:
            with pytest.raises(NameTaken):
                write()
            return multiple()
        answer = self.live(death, write)
        if answer is None:
            return multiple()
        job, created = answer
        assert created
        if name is not None:
            self.names[job.id] = name
        if key is not None:
            self.keys[owner, key] = (job.id, body)
        self.status[job.id], self.executor[job.id], self.due[job.id] = Status.QUEUED, 0, True
        self.attempts[job.id] = self.failures[job.id] = 0
        self.units[job.id], self.events[job.id] = set(), 1
        return job.id

    @rule(who=st.sampled_from("ab"), death=DEATHS)
    def take_over(self, who: str, death: int | None) -> None:
        token = self.live(death, lambda: self.store.acquire_lease("service", who))
        if token is not None:
            assert token > self.newest
            self.newest = self.tokens[who] = token

    @rule(who=st.sampled_from("ab"), job=jobs, death=DEATHS)
    def claim(self, who: str, job: str, death: int | None) -> None:
        token = self.tokens[who]
        if token == 0 or token != self.newest:
            with pytest.raises(LeaseLost):
                self.store.claim(job, token)
            return
        free = self.status[job] is Status.QUEUED
        abandoned = self.status[job] is Status.RUNNING and self.executor[job] < token
        claimed = self.live(death, lambda: self.store.claim(job, token))
        assert free or abandoned or claimed is None
        assert claimed is not None or not (free or abandoned) or death is not None
        if claimed is not None:
            self.status[job], self.executor[job], self.due[job] = Status.RUNNING, token, True
            self.attempts[job] += 1

    def may_write(self, who: str, job: str) -> bool:
        token = self.tokens[who]
        mine = token == self.newest != 0 and self.executor[job] == token
        return mine and self.status[job] is Status.RUNNING

    @rule(who=st.sampled_from("ab"), job=jobs, death=DEATHS)
    def say(self, who: str, job: str, death: int | None) -> None:
        def write() -> object:
            return self.store.append(job, EventType.MESSAGE, {}, token=self.tokens[who])

        if not self.may_write(who, job):
            with pytest.raises(LeaseLost):
                write()
        elif self.live(death, write) is not None:
            self.events[job] += 1

    @rule(who=st.sampled_from("ab"), job=jobs, unit=st.sampled_from("uvw"), death=DEATHS)
    def finish_unit(self, who: str, job: str, unit: str, death: int | None) -> None:
        def write() -> object:
            return self.store.record_unit(job, unit, "s", "l", {}, 1.0, who, token=self.tokens[who])

        if not self.may_write(who, job):
            with pytest.raises(LeaseLost):
                write()
        elif unit in self.units[job]:
            assert self.live(death, write) is None
        elif self.live(death, write) is not None:
            self.units[job].add(unit)
            self.events[job] += 1

    @rule(who=st.sampled_from("ab"), job=jobs, to=st.sampled_from(ENDINGS), death=DEATHS)
    def end(self, who: str, job: str, to: Status, death: int | None) -> None:
        def write() -> Job:
            return self.store.transition(job, to, token=self.tokens[who])

        if not self.may_write(who, job):
            with pytest.raises((LeaseLost, IllegalTransition)):
                write()
            return
        ended = self.live(death, write)
        if ended is not None:
            assert ended.status is to
            self.finish(ended)

    @rule(who=st.sampled_from("ab"), job=jobs, wait_s=st.sampled_from([-1.0, 3600.0]), death=DEATHS)
    def put_back(self, who: str, job: str, wait_s: float, death: int | None) -> None:
        def write() -> Job:
            return self.store.put_back(job, {"code": "worker_lost"}, wait_s, token=self.tokens[who])

        if not self.may_write(who, job):
            with pytest.raises((LeaseLost, IllegalTransition)):
                write()
            return
        waiting = self.live(death, write)
        if waiting is None:
            return
        if job in self.asked_to_stop:
            assert waiting.status is Status.CANCELLED
            self.finish(waiting)
            return
        assert waiting.status is Status.QUEUED
        self.status[job], self.executor[job], self.due[job] = Status.QUEUED, 0, wait_s < 0
        self.failures[job] += 1
        self.events[job] += 1

    @rule(job=jobs, death=DEATHS)
    def cancel(self, job: str, death: int | None) -> None:
        if self.status[job].terminal:
            with pytest.raises(IllegalTransition):
                self.store.request_cancel(job)
            return
        asked = self.live(death, lambda: self.store.request_cancel(job))
        if asked is None:
            return
        self.events[job] += 0 if job in self.asked_to_stop else 1
        self.asked_to_stop.add(job)
        if self.status[job] is Status.QUEUED:
            self.finish(asked)
        assert asked.status is self.status[job]

    def finish(self, job: Job) -> None:
        self.status[job.id] = job.status
        self.events[job.id] += 1
        self.ended[job.id] = job

    @rule(job=consumes(jobs))
    def forget(self, job: str) -> None:
        """Nobody mentions this job again; it must stay as it is."""

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @rule()
    def look_for_work(self) -> None:
        startable = {waiting.id: waiting.abandoned for waiting in self.store.waiting("service", self.newest)}
        for job, status in self.status.items():
            abandoned = status is Status.RUNNING and self.executor[job] < self.newest
            expected = abandoned or (status is Status.QUEUED and self.due[job])
            assert (job in startable) == expected
            assert not expected or startable[job] == abandoned

    @invariant()
    def agrees_with_the_model(self) -> None:
        listed = {job.id: job for job in self.store.list(limit=1000)}
        assert {job: found.status for job, found in listed.items()} == self.status
        assert {job: found.attempt for job, found in listed.items()} == self.attempts
        assert {job: found.failures for job, found in listed.items()} == self.failures
        assert {job: listed[job] for job in self.ended} == self.ended
        assert self.store.queue_length().waiting == list(self.status.values()).count(Status.QUEUED)
        for job in self.status:
            told = self.store.events(job)
            assert [event.sequence for event in told] == list(range(1, self.events[job] + 1))
            assert set(self.store.units(job)) == self.units[job]
            finished = [one.data["unit_id"] for one in told if one.type is EventType.UNIT_FINISHED]
            assert len(finished) == len(set(finished))


def test_histories(store_url: str) -> None:
    run_state_machine_as_test(
        lambda: StoreMachine(store_url),
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
