"""Errors that may pass: the job waits and is tried again, from its journal, a few times. And time that is up."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from aidocks.errors import (
    AIDocksError,
    HubRefused,
    HubUnavailable,
    InsufficientDisk,
    InvalidSpec,
    ServiceUnreachable,
    WorkerLost,
)
from aidocks.jobs.model import Event, EventType, Job, Status
from aidocks.jobs.retries import MOST_FAILURES, Hopeless, wait_before_retry
from aidocks.jobs.runner import run_job, run_locally
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import submit_job
from aidocks.jobs.terms import USUAL, Terms
from aidocks.plan import Unit
from aidocks.settings import Settings
from tests.support.fake_pool import FakePool
from tests.support.trivial_operation import TrivialSpec, count_traces

FULL = InsufficientDisk("The disk is full.", hint="Free some space.")


class Trial:
    """A job of the trivial operation that is run attempt by attempt."""

    def __init__(self, settings: Settings, store: JobStore, traces: Path, terms: Terms, **spec: Any) -> None:
        self.settings, self.store = settings, store
        body = {"traces": str(traces), "units": 4, **spec}
        self.job, _ = submit_job(settings, store, "trivial", body, terms=terms)

    def run(self, before: Callable[[Unit[Any]], None] = lambda _: None) -> Job:
        token = self.store.acquire_lease("service", "test")
        claimed = self.store.claim(self.job.id, token)
        assert claimed is not None
        pool = FakePool(before, parallelism=1)
        self.job = asyncio.run(run_job(claimed, self.store, self.settings, pool, token))
        return self.job

    def events(self, kind: EventType) -> list[Event]:
        return [event for event in self.store.events(self.job.id) if event.type is kind]


@pytest.fixture
def trial(settings: Settings, local_store: JobStore, trivial: str, traces: Path) -> Callable[..., Trial]:
    def make(terms: Terms = USUAL, **spec: Any) -> Trial:
        return Trial(settings, local_store, traces, terms, **spec)

    return make


def failing(error: Exception, label: str = "square of 2") -> Callable[[Unit[Any]], None]:
    def fail(unit: Unit[Any]) -> None:
        if unit.label == label:
            raise error

    return fail


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (FULL, 4),
        (HubUnavailable("no network"), 4),
        (ServiceUnreachable("away"), 4),
        (WorkerLost("killed"), 2),
        (HubRefused("gated"), 1),
        (InvalidSpec("wrong"), 1),
        (AIDocksError("a fault"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_pass_is_tried_again_a_few_times(error: AIDocksError, tries: int) -> None:
    waits = []
    while (wait_s := wait_before_retry(error, len(waits))) is not None:
        waits.append(wait_s)
    assert len(waits) == tries - 1
    for n, wait_s in enumerate(waits):
        assert 0.8 <= wait_s / (30 * 4**n) <= 1.2
    assert waits == sorted(waits)


@pytest.mark.parametrize("error", [FULL, OSError(errno.ENOSPC, "No space left on device", "a file")])
def test_a_job_that_meets_a_full_disk_waits_and_goes_on_where_it_was(
    trial: Callable[..., Trial], settings: Settings, traces: Path, error: Exception
) -> None:
    one = trial()
    job = one.run(failing(error))
    assert (job.status, job.failures, job.error, job.finished_at) == (Status.QUEUED, 1, None, None)
    assert job.retry_at is not None
    assert 20 < job.retry_at.timestamp() - time.time() < 40
    (told,) = one.events(EventType.RETRYING)
    assert told.data["attempt"] == 1
    assert 20 < told.data["wait_s"] < 40
    assert told.data["reason"]["code"] == "insufficient_disk"
    assert told.data["reason"]["hint"].startswith("Free some space")
    assert (settings.workspaces_dir / job.id / "0.txt").exists()
    done = {unit.label for unit in one.store.units(job.id).values()}

    job = one.run()
    assert (job.status, job.attempt, job.failures, job.retry_at) == (Status.SUCCEEDED, 2, 1, None)
    assert all(count_traces(traces)[int(label.rpartition(" ")[2])] == 1 for label in done)
    finished = [event.data["unit_id"] for event in one.events(EventType.UNIT_FINISHED)]
    assert len(finished) == len(set(finished)) == 5


def test_a_job_that_never_gets_further_fails_with_the_cause(
    trial: Callable[..., Trial], settings: Settings
) -> None:
    one = trial()
    for failures in range(1, MOST_FAILURES + 1):
        assert one.run(failing(FULL)).failures == failures
    job = one.run(failing(FULL))
    assert (job.status, job.attempt) == (Status.FAILED, 4)
    assert job.error is not None
    assert job.error["code"] == "insufficient_disk"
    assert len(one.events(EventType.RETRYING)) == MOST_FAILURES
    assert not (settings.workspaces_dir / job.id).exists()


@pytest.mark.parametrize("error", [HubRefused("gated"), InvalidSpec("wrong"), ZeroDivisionError("a bug")])
def test_what_cannot_pass_is_not_tried_again(trial: Callable[..., Trial], error: Exception) -> None:
    one = trial()
    assert one.run(failing(error)).status is Status.FAILED
    assert not one.events(EventType.RETRYING)


def test_a_job_that_was_cancelled_meanwhile_does_not_wait(
    trial: Callable[..., Trial], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidocks.jobs.attempt.CANCEL_POLL_S", 1e6)
    one = trial()

    def cancel_and_fail(unit: Unit[Any]) -> None:
        if unit.label == "square of 2":
            one.store.request_cancel(one.job.id)
            raise FULL

    assert one.run(cancel_and_fail).status is Status.CANCELLED
    assert not (settings.workspaces_dir / one.job.id).exists()


def test_one_that_waits_is_cancelled_at_once(trial: Callable[..., Trial]) -> None:
    one = trial()
    one.run(failing(FULL))
    assert one.store.request_cancel(one.job.id).status is Status.CANCELLED


def test_here_and_now_nothing_is_tried_again(
    settings: Settings, trivial: str, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tests.support.trivial_operation.SquareUnit.run", lambda *_: (_ for _ in ()).throw(FULL)
    )
    job = run_locally(trivial, TrivialSpec(traces=traces), settings)
    assert (job.status, job.failures) == (Status.FAILED, 0)


def test_a_store_that_fails_fails_no_job(trial: Callable[..., Trial]) -> None:
    one = trial()
    with pytest.raises(OperationalError):
        one.run(failing(OperationalError("", None, Exception("database or disk is full"))))
    assert one.store.get(one.job.id).status is Status.RUNNING
    assert one.run().status is Status.SUCCEEDED


@pytest.mark.timeout(30)
def test_time_that_is_up_ends_the_job(trial: Callable[..., Trial], settings: Settings) -> None:
    one = trial(Terms(timeout_s=0.3), seconds=1e6)
    job = one.run()
    assert job.status is Status.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["errors"][0]["field"]) == ("timed_out", "timeout_s")
    assert "0.3 seconds" in job.error["detail"]
    assert not (settings.workspaces_dir / job.id).exists()


def test_time_counts_over_all_attempts(trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial(Terms(timeout_s=600.0))
    assert one.run(failing(FULL)).status is Status.QUEUED
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601)
    job = one.run()
    assert (job.status, job.error and job.error["code"]) == (Status.FAILED, "timed_out")


def test_no_try_for_which_there_is_no_time(trial: Callable[..., Trial]) -> None:
    one = trial(Terms(timeout_s=10.0))
    job = one.run(failing(FULL))
    assert (job.status, job.error and job.error["code"]) == (Status.FAILED, "insufficient_disk")


@pytest.mark.timeout(30)
def test_time_is_up_here_and_now_too(
    settings: Settings, trivial: str, traces: Path, local_store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidocks.executor.InProcessPool.cancel_grace_s", 0.1)
    job = run_locally(trivial, TrivialSpec(traces=traces, seconds=1.0), settings, timeout_s=0.2)
    assert (job.status, job.error and job.error["code"]) == (Status.FAILED, "timed_out")
    assert local_store.get(job.id).timeout_s == 0.2


def test_the_terms_reach_the_pool(
    trial: Callable[..., Trial], settings: Settings, local_store: JobStore
) -> None:
    one = trial(Terms(owner="key-a", priority=7))
    token = local_store.acquire_lease("service", "test")
    claimed = local_store.claim(one.job.id, token)
    assert claimed is not None
    pool = FakePool()
    asyncio.run(run_job(claimed, local_store, settings, pool, token))
    assert {(claim.job, claim.owner, claim.priority) for claim in pool.claims} == {(one.job.id, "key-a", 7)}


def test_what_was_begun_anew_as_often_as_it_may_be_is_not_tried_again(trial: Callable[..., Trial]) -> None:
    job = trial().run(failing(Hopeless(WorkerLost("its processes died too often"))))
    assert (job.status, job.error and job.error["code"]) == (Status.FAILED, "worker_lost")
