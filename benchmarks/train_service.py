"""Trainings on a service of their own: a private Ray on loopback, whose gangs Ray Train starts."""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aidocks.jobs.model import Event, EventType
from aidocks.settings import Settings
from aidocks.specs.train_llm_result import LLMTrainResult
from aidocks.specs.train_retrieval_result import RetrieverTrainResult
from benchmarks.peers import NotAtHand, scratch_dir

_LOOK_S = 0.2
#: What each training leaves out: nothing is measured, nothing is merged.
_ALONE: dict[str, dict[str, Any]] = {
    "train-llm": {"evaluate": False, "samples": 0, "merge_adapter": False},
    "train-emb": {"evaluate": False, "merge_adapter": False},
    "train-rerank": {"evaluate": False, "merge_adapter": False},
}
Result = LLMTrainResult | RetrieverTrainResult


@dataclass(frozen=True)
class Course:
    """A training that has ended on a service.

    Attributes:
        result: Of the job.
        points: Figures of every step, in their order.
        loop_seconds: From the beginning of the loop to the end of its last step.
        start_seconds: From the start of the unit that trains to the beginning of its loop.
    """

    result: Result
    points: tuple[dict[str, Any], ...]
    loop_seconds: float
    start_seconds: float

    @property
    def losses(self) -> list[float]:
        """Loss of every step."""
        return [point["loss"] for point in self.points]


@contextmanager
def service(workers: int) -> Iterator[Settings]:
    """Start a service with a data directory that vanishes afterwards."""
    from cluster.bringup import start_service, stop_service

    home = Path(tempfile.mkdtemp(prefix="service-", dir=scratch_dir()))
    settings = Settings(home=home, port=_free_port(), workers=workers, allowed_roots=(Path("/"),))
    try:
        start_service(settings)
        yield settings
    finally:
        stop_service(settings)
        shutil.rmtree(home, ignore_errors=True)


def _free_port() -> int:
    """Return a port that nothing has; not one of those that the system gives to Ray's processes all the time."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise NotAtHand("no port is free")


def train_there(settings: Settings, fields: dict[str, Any], operation: str = "train-llm") -> Course:
    """Run one training on a service to its end. Nothing but the training itself is done: no measuring, no merging.

    Args:
        settings: Of the service.
        fields: Of the request.
        operation: ``train-llm``, ``train-emb`` or ``train-rerank``.

    Raises:
        RuntimeError: The job failed; with what it says.
    """
    from aidocks.jobs.store import JobStore
    from aidocks.jobs.submit import submit_job
    from aidocks.operations import find_operation

    spec = find_operation(operation).spec_type().model_validate({**_ALONE[operation], **fields})
    with closing(JobStore(settings.store_url)) as store:
        job, _ = submit_job(settings, store, operation, spec)
        while not (job := store.get(job.id)).status.terminal:
            time.sleep(_LOOK_S)
        if job.result is None:
            raise RuntimeError(f"{job.status}: {job.error}")
        events = list(store.events(job.id, limit=100_000))
    result_type = LLMTrainResult if operation == "train-llm" else RetrieverTrainResult
    return _course(result_type.model_validate(job.result), events)


def _course(result: Result, events: list[Event]) -> Course:
    told = [event for event in events if event.type is EventType.METRICS and "loss" in event.data]
    points = tuple(event.data for event in told)
    unit = points[0]["unit_id"]
    started = next(
        event
        for event in events
        if event.type is EventType.UNIT_STARTED and event.data.get("unit_id") == unit
    )
    # A point is told when its step has ended, and knows how long the loop has lasted.
    until_first_step = (told[0].time - started.time).total_seconds()
    return Course(result, points, points[-1]["seconds"], until_first_step - points[0]["seconds"])
