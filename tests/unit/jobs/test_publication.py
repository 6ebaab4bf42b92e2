"""A job that dies between the publication of its model and its own last row recognises its model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from aidocks.executor import InProcessPool
from aidocks.jobs.model import EventType, Job, Status
from aidocks.jobs.runner import run_job
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import submit_job
from aidocks.models.registry import Registry
from aidocks.settings import Settings


class Killed(BaseException):
    """Stands for kill -9 of the executor."""


def claim(store: JobStore, job: Job) -> tuple[Job, int]:
    token = store.acquire_lease("service", "test")
    claimed = store.claim(job.id, token)
    assert claimed is not None
    return claimed, token


@pytest.mark.slow
def test_no_unit_runs_again_after_the_publication(
    settings: Settings,
    local_store: JobStore,
    tiny_llama: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry(settings.models_dir)
    registry.import_checkpoint("base", tiny_llama(tmp_path / "model", num_hidden_layers=2))
    spec = {
        "base_model_name": "base",
        "laser_model_name": "mine",
        "candidates": 2,
        "chunks": 8,
        "seqlen": 16,
    }
    job, token = claim(local_store, submit_job(settings, local_store, "laser", spec)[0])

    def die(*_: object, **__: object) -> Job:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(local_store, "transition", die)
        with pytest.raises(Killed):
            asyncio.run(run_job(job, local_store, settings, InProcessPool(), token))
    assert registry.manifest("mine").job_id == job.id
    assert local_store.get(job.id).status is Status.RUNNING

    again, token = claim(local_store, job)
    ended = asyncio.run(run_job(again, local_store, settings, InProcessPool(), token))
    assert ended.status is Status.SUCCEEDED, ended.error
    assert ended.result is not None
    assert ended.result["model"] == "mine"
    assert registry.names() == ["base", "mine"]
    events = local_store.events(job.id)
    recovered = next(event.sequence for event in events if event.type is EventType.RECOVERED)
    started = [event for event in events if event.type is EventType.UNIT_STARTED]
    assert [event.data["label"] for event in started if event.sequence > recovered] == []
    assert not (settings.workspaces_dir / job.id).exists()
