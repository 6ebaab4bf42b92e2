"""Random histories of two executors and people against the job store; a model says what must hold."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from aidocks.errors import IllegalTransition, LeaseLost, NameTaken
from aidocks.jobs.model import EventType, Status
from aidocks.jobs.store import JobStore

ENDINGS = [Status.SUCCEEDED, Status.FAILED, Status.CANCELLED]


class StoreMachine(RuleBasedStateMachine):
    """Two executors contend for the same jobs; the one with the older token never changes anything."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.store = JobStore(f"sqlite:///{Path(self.directory.name) / 'jobs.db'}")
        self.tokens = {"a": 0, "b": 0}
        self.newest = 0
        self.status: dict[str, Status] = {}
        self.owner: dict[str, int] = {}
        self.names: dict[str, str] = {}
        self.attempts: dict[str, int] = {}
        self.units: dict[str, set[str]] = {}
        self.events: dict[str, int] = {}

    def teardown(self) -> None:
        self.store.close()
        self.directory.cleanup()

    def unfinished(self) -> list[str]:
        return [job for job, status in self.status.items() if not status.terminal]

    @rule(target=jobs, name=st.sampled_from(["x", "y", None]))
    def submit(self, name: str | None) -> object:
        held = name is not None and name in {self.names.get(job) for job in self.unfinished()}
        if held:
            with pytest.raises(NameTaken):
                self.store.submit("laser", {}, output_name=name)
            return multiple()
        job, created = self.store.submit("laser", {}, output_name=name)
        assert created
        if name is not None:
            self.names[job.id] = name
        self.status[job.id], self.owner[job.id], self.attempts[job.id] = Status.QUEUED, 0, 0
        self.units[job.id], self.events[job.id] = set(), 1
        return job.id

    @rule(who=st.sampled_from("ab"))
    def take_over(self, who: str) -> None:
        token = self.store.acquire_lease("service", who)
        assert token > self.newest
        self.newest = self.tokens[who] = token

    @rule(who=st.sampled_from("ab"), job=jobs)
    def claim(self, who: str, job: str) -> None:
        token = self.tokens[who]
        if token == 0 or token != self.newest:
            with pytest.raises(LeaseLost):
                self.store.claim(job, token)
            return
        free = self.status[job] is Status.QUEUED
        abandoned = self.status[job] is Status.RUNNING and self.owner[job] < token
        claimed = self.store.claim(job, token)
        assert (claimed is not None) == (free or abandoned)
        if claimed is not None:
            self.status[job], self.owner[job] = Status.RUNNING, token
            self.attempts[job] += 1

    def may_write(self, who: str, job: str) -> bool:
        token = self.tokens[who]
        return token == self.newest != 0 and self.owner[job] == token and self.status[job] is Status.RUNNING

    @rule(who=st.sampled_from("ab"), job=jobs)
    def say(self, who: str, job: str) -> None:
        if self.may_write(who, job):
            self.store.append(job, EventType.MESSAGE, {}, token=self.tokens[who])
            self.events[job] += 1
        else:
            with pytest.raises(LeaseLost):
                self.store.append(job, EventType.MESSAGE, {}, token=self.tokens[who])

    @rule(who=st.sampled_from("ab"), job=jobs, unit=st.sampled_from("uvw"))
    def finish_unit(self, who: str, job: str, unit: str) -> None:
        def record() -> object:
            return self.store.record_unit(job, unit, "s", "l", {}, 1.0, who, token=self.tokens[who])

        if not self.may_write(who, job):
            with pytest.raises(LeaseLost):
                record()
            return
        event = record()
        assert (event is None) == (unit in self.units[job])
        if event is not None:
            self.units[job].add(unit)
            self.events[job] += 1

    @rule(who=st.sampled_from("ab"), job=jobs, to=st.sampled_from(ENDINGS))
    def end(self, who: str, job: str, to: Status) -> None:
        if self.may_write(who, job):
            assert self.store.transition(job, to, token=self.tokens[who]).status is to
            self.status[job] = to
            self.events[job] += 1
        else:
            with pytest.raises((LeaseLost, IllegalTransition)):
                self.store.transition(job, to, token=self.tokens[who])

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        if self.status[job].terminal:
            with pytest.raises(IllegalTransition):
                self.store.request_cancel(job)
            return
        asked_before = self.store.get(job).cancel_requested
        self.events[job] += 0 if asked_before else 1
        if self.status[job] is Status.QUEUED:
            self.status[job] = Status.CANCELLED
            self.events[job] += 1
        assert self.store.request_cancel(job).status is self.status[job]

    @rule(job=consumes(jobs))
    def forget(self, job: str) -> None:
        """Nobody mentions this job again; it must stay as it is."""

    @rule()
    def reopen(self) -> None:
        url = f"sqlite:///{Path(self.directory.name) / 'jobs.db'}"
        self.store.close()
        self.store = JobStore(url)

    @invariant()
    def agrees_with_the_model(self) -> None:
        listed = {job.id: job for job in self.store.list(limit=1000)}
        assert {job: found.status for job, found in listed.items()} == self.status
        assert {job: found.attempt for job, found in listed.items()} == self.attempts
        for job in self.status:
            sequences = [event.sequence for event in self.store.events(job)]
            assert sequences == list(range(1, self.events[job] + 1))
            assert set(self.store.units(job)) == self.units[job]
            finished = [
                e.data["unit_id"] for e in self.store.events(job) if e.type is EventType.UNIT_FINISHED
            ]
            assert len(finished) == len(set(finished))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
