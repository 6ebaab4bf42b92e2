"""Who is told of a supervisor's work: metrics always, traces where somebody collects them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.metrics import JobMetrics
from cluster.tracing import traces

if TYPE_CHECKING:
    from aidocks.executor import Outcome
    from aidocks.jobs.model import Job
    from aidocks.jobs.observer import Observer
    from aidocks.plan import Unit
    from aidocks.settings import Settings

log = logging.getLogger(__name__)


class Observers:
    """Tells several observers; one that fails hinders neither the others nor the work.

    Args:
        metrics: Is also told of the queue and the workers.
        others: Are told of the work.
    """

    def __init__(self, metrics: JobMetrics, *others: Observer) -> None:
        self._metrics = metrics
        self._all: tuple[Observer, ...] = (metrics, *others)

    def job_began(self, job: Job) -> None:
        self._tell("job_began", job)

    def job_ended(self, job: Job) -> None:
        self._tell("job_ended", job)

    def unit_ended(self, job: Job, stage: str, unit: Unit[Any], outcome: Outcome) -> None:
        self._tell("unit_ended", job, stage, unit, outcome)

    def worker_lost(self, job: Job, unit: Unit[Any], reason: str) -> None:
        self._tell("worker_lost", job, unit, reason)

    def told(self, job: Job, unit: Unit[Any], figures: Mapping[str, Any]) -> None:
        self._tell("told", job, unit, figures)

    def queue(self, waiting: int, oldest_s: float, running: int) -> None:
        """As :meth:`JobMetrics.queue`."""
        self._metrics.queue(waiting, oldest_s, running)

    def workers(self, busy: int, idle: int) -> None:
        """As :meth:`JobMetrics.workers`."""
        self._metrics.workers(busy, idle)

    def _tell(self, what: str, *arguments: Any) -> None:
        for observer in self._all:
            try:
                getattr(observer, what)(*arguments)
            except Exception:
                log.exception("%s could not be observed", what)


def supervisor_observers(settings: Settings) -> Observers:
    """Return those of a supervisor, which runs on a Ray cluster."""
    tracing = traces()
    return Observers(JobMetrics(settings.home), *([tracing] if tracing else []))
