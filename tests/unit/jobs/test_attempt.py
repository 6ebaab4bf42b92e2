"""One attempt at a job after another, in process: journal, recovery, retries, cancellation, failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aidocks.errors import LeaseLost, WorkerLost
from aidocks.executor import InProcessPool
from aidocks.jobs.model import EventType, Job, Status
from aidocks.jobs.runner import run_job
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import submit_job
from aidocks.plan import Unit
from aidocks.settings import Settings
from tests.support.fake_pool import FakePool
from tests.support.trivial_operation import count_traces


class Killed(BaseException):
    """Stands for kill -9 of the supervisor."""


@pytest.fixture
def begin(
    settings: Settings, local_store: JobStore, trivial: str, traces: Path
) -> Callable[..., tuple[Job, int]]:
    def submit_and_claim(**spec: object) -> tuple[Job, int]:
        job, _ = submit_job(settings, local_store, trivial, {"traces": str(traces), **spec})
        return claim(local_store, job)

    return submit_and_claim


def claim(store: JobStore, job: Job) -> tuple[Job, int]:
    token = store.acquire_lease("service", "test")
    claimed = store.claim(job.id, token)
    assert claimed is not None
    return claimed, token


def types(store: JobStore, job: Job) -> list[EventType]:
    return [event.type for event in store.events(job.id)]


def finished_units(store: JobStore, job: Job) -> list[str]:
    events = store.events(job.id)
    return [event.data["unit_id"] for event in events if event.type is EventType.UNIT_FINISHED]


def test_success(
    settings: Settings, local_store: JobStore, begin: Callable[..., tuple[Job, int]], traces: Path
) -> None:
    job, token = begin(units=4, repeats=2)
    ended = asyncio.run(run_job(job, local_store, settings, InProcessPool(), token))
    assert ended.status is Status.SUCCEEDED
    assert ended.result is not None
    assert ended.result["total"] == 2 * (0 + 1 + 4 + 9)
    assert ended.result["seconds"] > 0
    assert set(count_traces(traces).values()) == {1}, "equal units of a stage run once"
    assert not (settings.workspaces_dir / job.id).exists()
    events = local_store.events(job.id)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [e.type for e in events][:4] == ["queued", "started", "message", "stage_started"]
    assert events[1].data == {"attempt": 1, "parallelism": 1}
    assert events[3].data == {"stage": "squares", "stage_number": 1, "total": 4, "already_done": 0}
    assert events[-1].type is EventType.SUCCEEDED
    assert ended.progress is not None
    assert (ended.progress.stage, ended.progress.done, ended.progress.fraction) == ("sum", 1, 1.0)
    for unit_id in finished_units(local_store, job):
        story = [event.type for event in events if event.data.get("unit_id") == unit_id]
        assert story == [EventType.UNIT_STARTED, EventType.UNIT_FINISHED]


def test_a_killed_executor_is_continued_from_the_journal(
    settings: Settings, local_store: JobStore, begin: Callable[..., tuple[Job, int]], traces: Path
) -> None:
    job, token = begin(units=6)

    def die(unit: Unit[Any]) -> None:
        if len(local_store.units(job.id)) >= 3:
            raise Killed

    with pytest.raises(Killed):
        asyncio.run(run_job(job, local_store, settings, FakePool(die, parallelism=1), token))
    done = {unit.label for unit in local_store.units(job.id).values()}
    assert len(done) >= 3
    assert local_store.get(job.id).status is Status.RUNNING
    assert (settings.workspaces_dir / job.id).exists()
    again, token = claim(local_store, job)
    ended = asyncio.run(run_job(again, local_store, settings, FakePool(), token))
    assert (ended.status, ended.attempt) == (Status.SUCCEEDED, 2)
    assert ended.result is not None
    assert ended.result["total"] == 55
    recovered = next(event for event in local_store.events(job.id) if event.type is EventType.RECOVERED)
    assert recovered.data == {"attempt": 2, "units_done": len(done)}
    stages = [event.data for event in local_store.events(job.id) if event.type is EventType.STAGE_STARTED]
    assert [stage["already_done"] for stage in stages] == [0, len(done), 0]
    finished = finished_units(local_store, job)
    assert len(finished) == len(set(finished)) == 7
    assert all(count_traces(traces)[int(label.rpartition(" ")[2])] == 1 for label in done)


def test_a_journalled_unit_whose_file_has_changed_runs_again(
    settings: Settings, local_store: JobStore, begin: Callable[..., tuple[Job, int]], traces: Path
) -> None:
    job, token = begin(units=4)

    def die(unit: Unit[Any]) -> None:
        if unit.label == "sum":
            raise Killed

    with pytest.raises(Killed):
        asyncio.run(run_job(job, local_store, settings, FakePool(die), token))
    workspace = settings.workspaces_dir / job.id
    (workspace / "1.txt").unlink()
    (workspace / "2.txt").write_text("5")
    again, token = claim(local_store, job)
    ended = asyncio.run(run_job(again, local_store, settings, FakePool(), token))
    assert ended.result is not None
    assert ended.result["total"] == 14
    assert count_traces(traces) == {0: 1, 1: 2, 2: 2, 3: 1}
    finished = finished_units(local_store, job)
    assert len(finished) == len(set(finished))


def test_a_lost_worker_costs_one_unit(
    settings: Settings, local_store: JobStore, begin: Callable[..., tuple[Job, int]]
) -> None:
    job, token = begin(units=3)
    losses = iter([True, True, True])

    def lose(unit: Unit[Any]) -> None:
        if unit.label == "square of 1" and next(losses, False):
            raise WorkerLost("killed", value="worker-7")

    ended = asyncio.run(run_job(job, local_store, settings, FakePool(lose), token))
    assert ended.status is Status.SUCCEEDED
    lost = [event.data for event in local_store.events(job.id) if event.type is EventType.WORKER_LOST]
    assert len(lost) == 3
    assert lost[0] | {"unit_id": ""} == {
        "worker": "worker-7",
        "unit_id": "",
        "label": "square of 1",
        "reason": "killed",
    }


def test_a_unit_that_kills_every_worker_fails_the_job_when_it_does_so_again(
    settings: Settings, local_store: JobStore, begin: Callable[..., tuple[Job, int]]
) -> None:
    job, token = begin(units=3)

    def lose(unit: Unit[Any]) -> None:
        if unit.label == "square of 1":
            raise WorkerLost("out of memory", value="worker-7")

    again = asyncio.run(run_job(job, local_store, settings, FakePool(lose), token))
    assert (again.status, again.failures) == (Status.QUEUED, 1)
    job, token = claim(local_store, job)
    ended = asyncio.run(run_job(job, local_store, settings, FakePool(lose), token))
    assert ended.status is Status.FAILED
    assert ended.error is not None
    assert ended.error["code"] == "worker_lost"
    assert "square of 1: 4 workers died" in ended.error["detail"]
    assert types(local_store, job).count(EventType.WORKER_LOST) == 8


def test_the_first_failing_unit_fails_the_job_and_stops_the_others(
    settings: Settings, local_store: JobStore, begin: Callable[..., tuple[Job, int]], traces: Path
) -> None:
    job, token = begin(units=40, fails_at=1)
    ended = asyncio.run(run_job(job, local_store, settings, FakePool(), token))
    assert ended.status is Status.FAILED
    assert ended.error is not None
    assert (ended.error["code"], ended.error["errors"][0]["field"]) == ("invalid_spec", "units")
    assert ended.error["instance"] == f"/jobs/{job.id}"
    assert sum(count_traces(traces).values()) < 40
    assert not (settings.workspaces_dir / job.id).exists()
    assert types(local_store, job)[-1] is EventType.FAILED


def test_an_unexpected_error_is_internal_and_keeps_its_traceback_to_the_log(
    settings: Settings,
    local_store: JobStore,
    begin: Callable[..., tuple[Job, int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    job, token = begin(units=1)

    def break_down(unit: Unit[Any]) -> None:
        raise ZeroDivisionError("somewhere")

    ended = asyncio.run(run_job(job, local_store, settings, FakePool(break_down), token))
    assert ended.error is not None
    assert (ended.error["code"], ended.error["detail"]) == ("internal", "ZeroDivisionError: somewhere")
    assert "break_down" in caplog.text


def test_a_failing_preflight_fails_the_job(
    settings: Settings, local_store: JobStore, trivial: str, traces: Path
) -> None:
    # Accepted by an earlier state of the world, so to say.
    spec = {"traces": str(traces), "refused": True}
    job, token = claim(local_store, local_store.submit(trivial, spec, output_name=None)[0])
    ended = asyncio.run(run_job(job, local_store, settings, FakePool(), token))
    assert ended.status is Status.FAILED
    assert count_traces(traces) == {}


@pytest.mark.timeout(30)
def test_cancelling_a_running_job(
    settings: Settings, local_store: JobStore, begin: Callable[..., tuple[Job, int]]
) -> None:
    job, token = begin(units=3, seconds=1e6)

    async def run_and_cancel() -> Job:
        pool = FakePool()
        running = asyncio.create_task(run_job(job, local_store, settings, pool, token))
        while not pool.active:
            await asyncio.sleep(0.01)
        local_store.request_cancel(job.id)
        ended = await running
        assert pool.active == 0
        return ended

    ended = asyncio.run(run_and_cancel())
    assert ended.status is Status.CANCELLED
    assert types(local_store, job).count(EventType.CANCEL_REQUESTED) == 1
    assert types(local_store, job)[-1] is EventType.CANCELLED
    assert not (settings.workspaces_dir / job.id).exists()


def test_a_superseded_executor_touches_nothing_more(
    settings: Settings, local_store: JobStore, begin: Callable[..., tuple[Job, int]]
) -> None:
    job, token = begin(units=6)

    def take_over(unit: Unit[Any]) -> None:
        if len(local_store.units(job.id)) >= 2 and local_store.get(job.id).attempt == 1:
            claim(local_store, job)

    with pytest.raises(LeaseLost):
        asyncio.run(run_job(job, local_store, settings, FakePool(take_over), token))
    assert local_store.get(job.id).status is Status.RUNNING
    assert (settings.workspaces_dir / job.id).exists()
    before = local_store.last_sequence(job.id)
    with pytest.raises(LeaseLost):
        asyncio.run(run_job(job, local_store, settings, FakePool(), token))
    assert local_store.last_sequence(job.id) == before


def test_units_run_side_by_side_and_progress_is_not_chatty(
    settings: Settings, local_store: JobStore, begin: Callable[..., tuple[Job, int]]
) -> None:
    job, token = begin(units=60)
    pool = FakePool(parallelism=4)
    asyncio.run(run_job(job, local_store, settings, pool, token))
    assert 4 <= pool.most_active <= 8
    ended = local_store.get(job.id)
    assert ended.started_at is not None
    assert ended.finished_at is not None
    events = [event for event in local_store.events(job.id) if event.type is EventType.PROGRESS]
    assert len(events) <= 4 * (ended.finished_at - ended.started_at).total_seconds() + 2
    assert [event.data["fraction"] for event in events][-1] == 1.0


def test_a_pool_that_grows_is_used_as_it_grows(
    settings: Settings, local_store: JobStore, begin: Callable[..., tuple[Job, int]]
) -> None:
    job, token = begin(units=40)

    def grow(_: Any) -> None:
        pool.parallelism = 6

    pool = FakePool(before=grow, parallelism=1)
    assert asyncio.run(run_job(job, local_store, settings, pool, token)).status is Status.SUCCEEDED
    assert 6 <= pool.most_active <= 12
