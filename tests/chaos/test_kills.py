"""``kill -9`` of a worker, of the supervisor and of a Serve replica while a /laser job runs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from aidocks.jobs.model import Event, EventType, Job, Status
from aidocks.jobs.store import JobStore
from aidocks.models.registry import Registry
from cluster.bringup import service_status
from tests.conftest import Service

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(280)]

DEADLINE_S = 120.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Return the first true value of ``condition``."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


class Story:
    """One job on a service, as its events tell it, and the service's processes."""

    def __init__(self, service: Service, job_id: str) -> None:
        self.service = service
        self.job_id = job_id
        self.store = JobStore(service.settings.store_url)

    def events(self, type: EventType | None = None) -> list[Event]:
        events = self.store.events(self.job_id, limit=100_000)
        return [event for event in events if type in (None, event.type)]

    def job(self) -> Job:
        return self.store.get(self.job_id)

    def wait_for_units(self, more: int) -> None:
        present = len(self.events(EventType.UNIT_FINISHED))

        def enough() -> bool:
            assert not self.job().status.terminal, self.job()
            return len(self.events(EventType.UNIT_FINISHED)) >= present + more

        until(enough, f"{more} more units")

    def kill(self, title: str) -> int:
        """Kill the first process of the service whose title begins so; returns its id."""
        head = service_status(self.service.settings).pid
        assert head is not None

        def find() -> psutil.Process | None:
            for process in psutil.Process(head).children(recursive=True):
                try:
                    if " ".join(process.cmdline()).startswith(title):
                        return process
                except psutil.Error:
                    continue
            return None

        process: psutil.Process = until(find, f"a process called {title}")
        process.send_signal(signal.SIGKILL)
        return process.pid


def answers(service: Service) -> bool:
    try:
        return httpx.get(f"{service.url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def story(service: Service, tiny_llama: Callable[..., Path], tmp_path: Path) -> Iterator[Story]:
    """A /laser job of many units that has just been submitted over HTTP."""
    model = tiny_llama(
        tmp_path / "model", seed=1, hidden_size=512, intermediate_size=1408, num_hidden_layers=6
    )
    registry = Registry(service.settings.models_dir)
    registry.import_checkpoint("chaos-base", model)
    body = {
        "base_model_name": "chaos-base",
        "laser_model_name": "chaos-laser",
        "candidates": 20,
        "chunks": 16,
        "seqlen": 64,
    }
    response = httpx.post(f"{service.url}/laser", json=body, timeout=30)
    assert response.status_code == 202, response.text
    story = Story(service, response.json()["id"])
    yield story
    if not story.job().status.terminal:
        story.store.request_cancel(story.job_id)
        until(lambda: story.job().status.terminal, "the job's end")
    story.store.close()
    for name in ("chaos-laser", "chaos-base"):
        if registry.exists(name):
            registry.delete(name)


def test_a_laser_job_survives_the_death_of_everything_around_it(story: Story, service: Service) -> None:
    story.wait_for_units(3)
    story.kill("ray::Worker.run")
    until(lambda: story.events(EventType.WORKER_LOST), "the worker's loss to be noticed")
    story.wait_for_units(2)
    story.kill("ray::SupervisorActor")
    until(lambda: story.events(EventType.RECOVERED), "the job's recovery")
    story.wait_for_units(2)
    story.kill("ray::ServeReplica")
    until(lambda: story.job().status.terminal, "the job's end")
    until(lambda: answers(service), "an answer")

    job = story.job()
    assert job.status is Status.SUCCEEDED, job.error
    assert job.attempt == 2
    events = story.events()
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    finished = [event.data["unit_id"] for event in events if event.type is EventType.UNIT_FINISHED]
    assert len(finished) == len(set(finished)), "no unit was done twice"
    assert set(finished) == set(story.store.units(story.job_id))
    (recovered,) = story.events(EventType.RECOVERED)
    done_before = [
        event for event in story.events(EventType.UNIT_FINISHED) if event.sequence < recovered.sequence
    ]
    assert recovered.data["units_done"] == len(done_before) >= 5
    answered = httpx.get(f"{service.url}/jobs/{job.id}", timeout=10).json()
    assert (answered["status"], answered["id"]) == ("succeeded", job.id)
    assert httpx.get(f"{service.url}/models/chaos-laser", timeout=10).status_code == 200
    assert not (service.settings.workspaces_dir / job.id).exists()
