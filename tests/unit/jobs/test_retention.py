"""Checkpoints outlive a job that was stopped, for a while, and no other."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aidocks.errors import UnknownJob
from aidocks.executor import InProcessPool
from aidocks.jobs.attempt import remove_checkpoints
from aidocks.jobs.model import Job, Status
from aidocks.jobs.resume import resume_job
from aidocks.jobs.retention import remove_leftovers, remove_old_jobs
from aidocks.jobs.runner import run_job
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import submit_job
from aidocks.settings import Settings

DAY_S = 86_400.0


@pytest.fixture
def ended(settings: Settings, local_store: JobStore, trivial: str, traces: Path) -> Callable[..., Job]:
    """Run a job that has a checkpoint to its end."""

    def run(cancelled: bool = False, **spec: object) -> Job:
        job, _ = submit_job(settings, local_store, trivial, {"traces": str(traces), "units": 2, **spec})
        (settings.checkpoints_dir / job.id / "checkpoint-00000001").mkdir(parents=True)
        if cancelled:
            local_store.request_cancel(job.id)
            return local_store.get(job.id)
        token = local_store.acquire_lease("service", "test")
        claimed = local_store.claim(job.id, token)
        assert claimed is not None
        return asyncio.run(run_job(claimed, local_store, settings, InProcessPool(), token))

    return run


def kept(settings: Settings, name: str) -> bool:
    return (settings.checkpoints_dir / name).exists()


def test_a_job_that_succeeds_needs_none(settings: Settings, ended: Callable[..., Job]) -> None:
    job = ended()
    assert job.status is Status.SUCCEEDED
    assert not kept(settings, job.id)


def test_others_keep_theirs_for_some_days(
    settings: Settings, local_store: JobStore, ended: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, cancelled = ended(fails_at=1), ended(cancelled=True)
    assert (failed.status, cancelled.status) == (Status.FAILED, Status.CANCELLED)
    remove_leftovers(local_store, settings)
    assert kept(settings, failed.id)
    assert kept(settings, cancelled.id)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + settings.checkpoint_retention_days * DAY_S + 60)
    remove_leftovers(local_store, settings)
    assert not kept(settings, failed.id)
    assert not kept(settings, cancelled.id)


def test_those_of_a_job_under_way_stay(
    settings: Settings, local_store: JobStore, trivial: str, traces: Path
) -> None:
    job, _ = submit_job(settings, local_store, trivial, {"traces": str(traces)})
    (settings.checkpoints_dir / job.id).mkdir(parents=True)
    remove_leftovers(local_store, settings.model_copy(update={"checkpoint_retention_days": 0.0}))
    assert kept(settings, job.id)


def test_those_from_which_a_job_under_way_began_stay(
    settings: Settings, local_store: JobStore, ended: Callable[..., Job]
) -> None:
    failed = ended(fails_at=1)
    resumed = local_store.submit("train-llm", {"resume_from_checkpoint": failed.id}, output_name=None)[0]
    at_once = settings.model_copy(update={"checkpoint_retention_days": 0.0})
    remove_leftovers(local_store, at_once)
    assert kept(settings, failed.id)
    local_store.request_cancel(resumed.id)
    remove_leftovers(local_store, at_once)
    assert not kept(settings, failed.id)


def test_what_an_executor_left_of_a_success_and_what_no_job_knows(
    settings: Settings, local_store: JobStore, ended: Callable[..., Job]
) -> None:
    job = ended()
    for name in (job.id, "job-unknown", "job-unknown-and-old", "not-a-job"):
        (settings.checkpoints_dir / name).mkdir(parents=True)
    long_ago = time.time() - (settings.checkpoint_retention_days + 1) * DAY_S
    os.utime(settings.checkpoints_dir / "job-unknown-and-old", (long_ago, long_ago))
    remove_leftovers(local_store, settings)
    left = {path.name for path in settings.checkpoints_dir.iterdir()}
    assert left == {"job-unknown", "not-a-job"}


def test_records_stay_unless_somebody_says_otherwise(
    settings: Settings, local_store: JobStore, ended: Callable[..., Job]
) -> None:
    succeeded, failed = ended(), ended(fails_at=1)
    assert remove_old_jobs(local_store, settings) == []
    one_day = settings.model_copy(update={"job_retention_days": 1.0})
    assert remove_old_jobs(local_store, one_day) == []
    at_once = settings.model_copy(update={"job_retention_days": 0.0})
    # The failed one left checkpoints: as long as they are there it can be resumed.
    assert remove_old_jobs(local_store, at_once) == [succeeded.id]
    remove_checkpoints(settings, failed.id)
    assert remove_old_jobs(local_store, at_once) == [failed.id]
    with pytest.raises(UnknownJob):
        resume_job(settings, local_store, failed.id)


def test_years_of_records_go_bit_by_bit(
    settings: Settings, local_store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(7):
        local_store.request_cancel(local_store.submit("laser", {}, output_name=None)[0].id)
    at_once = settings.model_copy(update={"job_retention_days": 0.0})
    monkeypatch.setattr("aidocks.jobs.store.JobStore.remove_ended.__defaults__", ((), 2))
    monkeypatch.setattr("aidocks.jobs.retention.MOST_BATCHES", 3)
    assert len(remove_old_jobs(local_store, at_once)) == 6
    assert len(remove_old_jobs(local_store, at_once)) == 1
