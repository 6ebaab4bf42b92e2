"""``kill -9`` of a member, and of the supervisor, while a model is trained by two: it ends as if nothing had been."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from aidocks.jobs.model import EventType
from aidocks.jobs.store import JobStore
from aidocks.models.registry import Registry
from tests.conftest import Service
from tests.support.gang_jobs import processes_of, until
from tests.support.tiny_retrievers import make_embedder, questions

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(400)]

DEADLINE_S = 180.0
STEPS = 40
SAVE_STEPS = 10
ROWS = [
    {"prompt": f"Once upon a time there were {n} cats.", "completion": f" One of the {n} ran away, and then"}
    for n in range(200)
]


#: What is asked for, of each kind of training.
BODIES: dict[str, dict[str, Any]] = {
    "llm": {
        "base_model": "kills-base",
        "method": "sft",
        "dataset": ROWS,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "per_device_train_batch_size": 2,
        "merge_adapter": False,
        "samples": 0,
    },
    # Its steps are short: the process that kills needs some time, too.
    "emb": {
        "base_model": "kills-embedder",
        "dataset": questions(120),
        "eval_split": 0,
        "max_steps": 150,
        "save_steps": 15,
        "per_device_train_batch_size": 16,
    },
}


class Course:
    """One training on the service."""

    def __init__(self, service: Service, store: JobStore, name: str, kind: str = "llm") -> None:
        self.service = service
        self.store = store
        body = {"name": name, "workers": 2, "max_length": 64, "evaluate": False, **BODIES[kind]}
        response = httpx.post(f"{service.url}/train/{kind}", json=body, timeout=60)
        assert response.status_code == 202, response.text
        self.id = response.json()["id"]

    def events(self, type: EventType) -> list[dict[str, Any]]:
        return [event.data for event in self.store.events(self.id, limit=100_000) if event.type is type]

    def losses(self) -> dict[int, float]:
        """Return the loss of each step, as it was told last."""
        points = self.events(EventType.METRICS)
        return {point["step"]: point["loss"] for point in points if point.get("loss") is not None}

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait on the disk: events come later, when there may be nothing left to kill."""
        checkpoint = self.service.settings.checkpoints_dir / self.id / f"checkpoint-{step:08d}"

        def written() -> bool:
            job = self.store.get(self.id)
            assert not job.status.terminal, job.error
            return checkpoint.exists()

        until(written, checkpoint.name, DEADLINE_S)

    def wait_for_next_attempt(self) -> None:
        until(
            lambda: any(
                "goes on from checkpoint-" in said["text"] for said in self.events(EventType.MESSAGE)
            ),
            "the next attempt",
            DEADLINE_S,
        )

    def kill(self, title: str) -> None:
        process, *_ = processes_of(self.service.settings, (title,))
        process.send_signal(signal.SIGKILL)

    def result(self) -> dict[str, Any]:
        until(lambda: self.store.get(self.id).status.terminal, "the job's end", DEADLINE_S)
        job = self.store.get(self.id)
        assert job.result is not None, job.error
        return job.result


@pytest.fixture
def train(service: Service, stories260k: Path, tmp_path: Path) -> Iterator[Callable[..., Course]]:
    registry = Registry(service.settings.models_dir)
    registry.import_checkpoint("kills-base", stories260k)
    registry.import_checkpoint("kills-embedder", make_embedder(tmp_path / "embedder"))
    store = JobStore(service.settings.store_url)
    courses: list[Course] = []

    def begin(name: str, kind: str = "llm") -> Course:
        courses.append(Course(service, store, name, kind))
        return courses[-1]

    yield begin
    for course in courses:
        if not store.get(course.id).status.terminal:
            store.request_cancel(course.id)
            until(lambda course=course: store.get(course.id).status.terminal, "its end")  # type: ignore[misc]
    store.close()
    names = ("kills-undisturbed", "kills-disturbed", "kills-finder", "kills-base", "kills-embedder")
    for name in names:
        if registry.exists(name):
            registry.delete(name)


def test_a_training_ends_as_if_nobody_had_been_killed(train: Callable[..., Course]) -> None:
    undisturbed = train("kills-undisturbed")
    expected = undisturbed.result()

    course = train("kills-disturbed")
    course.wait_for_checkpoint(SAVE_STEPS)
    course.kill("ray::RayTrainWorker")
    course.wait_for_next_attempt()
    course.wait_for_checkpoint(2 * SAVE_STEPS)
    course.kill("ray::SupervisorActor")
    result = course.result()

    assert len(course.events(EventType.RECOVERED)) == 1
    assert result["steps"] == expected["steps"] == STEPS
    steps = [point["step"] for point in course.events(EventType.METRICS) if point.get("loss") is not None]
    back = [before - after for before, after in pairwise(steps) if after <= before]
    assert len(back) <= 2
    assert all(repeated <= SAVE_STEPS for repeated in back), "at most what came after the last checkpoint"
    assert course.losses()[STEPS] == pytest.approx(undisturbed.losses()[STEPS], rel=1e-6)
    checkpoints = course.service.settings.checkpoints_dir / course.id
    until(lambda: not checkpoints.exists(), "the checkpoints to be removed")


def test_what_finds_texts_is_trained_to_its_end_by_another_worker(train: Callable[..., Course]) -> None:
    """Steps that are done again have the losses that they had, and one model is published, with all its steps."""
    course = train("kills-finder", "emb")
    body = BODIES["emb"]
    course.wait_for_checkpoint(body["save_steps"])
    course.kill("ray::RayTrainWorker")
    course.wait_for_next_attempt()
    result = course.result()

    assert (result["steps"], result["attempts"]) == (body["max_steps"], 2)
    assert result["reload_error"] < 1e-5
    losses: dict[int, list[float]] = {}
    for point in course.events(EventType.METRICS):
        if point.get("loss") is not None:
            losses.setdefault(point["step"], []).append(point["loss"])
    again = {step: found for step, found in losses.items() if len(found) > 1}
    assert len(again) <= body["save_steps"], "at most what came after the last checkpoint"
    for found in again.values():
        assert found == pytest.approx(found[:1] * len(found), rel=1e-3)
    history = json.loads((Path(result["path"]) / "report" / "history.json").read_text())
    steps = [point["step"] for point in history["points"] if point.get("loss") is not None]
    assert steps == list(range(1, body["max_steps"] + 1))
