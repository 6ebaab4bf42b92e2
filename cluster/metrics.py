"""What the service counts and measures, as one list: recorded through Ray, whose agent on each node exports it.

Documentation (`docs/observability.md`) and dashboard (`cluster/monitoring`) are made from the same list. No label names
a job or who submitted it: there is no end of either.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from aidocks.jobs.observer import Unobserved

if TYPE_CHECKING:
    from aidocks.executor import Outcome
    from aidocks.jobs.model import Job
    from aidocks.plan import Unit

#: Bounds of histograms, in seconds.
_JOBS_S = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 86_400)
_UNITS_S = (0.01, 0.05, 0.2, 1, 5, 15, 60, 300, 1800, 7200, 43_200)
_REQUESTS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """One thing that is counted or measured.

    Attributes:
        group: Row of the dashboard.
        name: Without what the export adds: see :attr:`exported`.
        unit: Of its values; empty where they are numbers of things.
        tags: Labels, besides those that Ray adds (node, worker).
        bounds: Of the buckets of a histogram.
    """

    group: str
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    tags: tuple[str, ...]
    help: str
    bounds: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """Return its name in Prometheus; a histogram has ``_bucket``, ``_sum`` and ``_count`` of it."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


METRICS: tuple[Metric, ...] = (
    Metric("Jobs", "aidocks_jobs", "gauge", "", ("status",), "Unfinished jobs, `queued` and `running`."),
    Metric(
        "Jobs",
        "aidocks_queue_age_seconds",
        "gauge",
        "seconds",
        (),
        "How long the oldest queued job has waited.",
    ),
    Metric(
        "Jobs",
        "aidocks_jobs_begun",
        "counter",
        "",
        ("operation",),
        "Jobs that were begun for the first time; less those that ended: how many run.",
    ),
    Metric(
        "Jobs",
        "aidocks_jobs_ended",
        "counter",
        "",
        ("operation", "status", "code"),
        "Jobs that ended; `code` is that of a failed one's error, else `none`.",
    ),
    Metric(
        "Jobs",
        "aidocks_job_seconds",
        "histogram",
        "seconds",
        ("operation", "status"),
        "From the start of a job to its end.",
        _JOBS_S,
    ),
    Metric(
        "Units",
        "aidocks_units_ended",
        "counter",
        "",
        ("operation", "stage"),
        "Units that were run to their end.",
    ),
    Metric(
        "Units",
        "aidocks_unit_seconds",
        "histogram",
        "seconds",
        ("operation", "stage"),
        "How long units ran on their workers.",
        _UNITS_S,
    ),
    Metric(
        "Units", "aidocks_bytes_written", "counter", "bytes", ("operation",), "Files that units have written."
    ),
    Metric(
        "Trainings",
        "aidocks_training_tokens_per_second",
        "gauge",
        "tokens/s",
        ("operation",),
        "All trainings under way together; 0 when there is none.",
    ),
    Metric(
        "Trainings",
        "aidocks_training_loss",
        "gauge",
        "",
        ("operation",),
        "Mean of the trainings under way, each as it last told; nothing when there is none.",
    ),
    Metric("Workers", "aidocks_disk_free_bytes", "gauge", "bytes", (), "Free in the data directory."),
    Metric(
        "Workers",
        "aidocks_recoveries",
        "counter",
        "",
        ("cause",),
        "What was begun again: jobs (`attempt`: their executor died or they are tried again), units (`worker`).",
    ),
    Metric("Workers", "aidocks_workers_lost", "counter", "", (), "Workers that died while they ran a unit."),
    Metric("Workers", "aidocks_workers", "gauge", "", ("state",), "Workers of the pool, `busy` and `idle`."),
    Metric(
        "HTTP",
        "aidocks_http_requests",
        "counter",
        "",
        ("route", "method", "status"),
        "Answers of the HTTP front; `route` is the template, such as `/jobs/{job_id}`.",
    ),
    Metric(
        "HTTP",
        "aidocks_http_request_seconds",
        "histogram",
        "seconds",
        ("route", "method"),
        "From a request to the end of its answer; not of event streams.",
        _REQUESTS_S,
    ),
)


class Instruments(Protocol):
    """Where values go."""

    def record(self, name: str, value: float, **tags: str) -> None:
        """Add to a counter, set a gauge, put into a histogram, whichever the metric of this name is."""


class RayInstruments:
    """Gives values to Ray, which exports them within ten seconds. Only for processes of a Ray cluster."""

    def __init__(self) -> None:
        from ray.util import metrics

        self._record: dict[str, Any] = {}
        for metric in METRICS:
            given = (metric.name, metric.help)
            match metric.kind:
                case "counter":
                    self._record[metric.name] = metrics.Counter(*given, tag_keys=metric.tags).inc
                case "gauge":
                    self._record[metric.name] = metrics.Gauge(*given, tag_keys=metric.tags).set
                case "histogram":
                    bounds = list(metric.bounds)
                    self._record[metric.name] = metrics.Histogram(*given, bounds, metric.tags).observe

    def record(self, name: str, value: float, **tags: str) -> None:
        try:
            self._record[name](value, tags)
        except Exception:  # an observer must not raise, whatever becomes of a figure
            log.exception("%s could not be recorded", name)


@cache
def ray_instruments() -> Instruments:
    """Return those of this process: a metric is registered once."""
    return RayInstruments()


class JobMetrics(Unobserved):
    """Counts the work of one supervisor (an :class:`~aidocks.jobs.observer.Observer`).

    Args:
        home: The data directory, whose disk is looked at.
        instruments: Where the values go. Default: to Ray.
    """

    def __init__(self, home: Path, instruments: Instruments | None = None) -> None:
        self._home = home
        self._to = instruments or ray_instruments()
        #: Of every training under way, by operation and job, what it told last.
        self._trainings: dict[str, dict[str, dict[str, float]]] = {}

    def job_began(self, job: Job) -> None:
        if job.attempt > 1:
            self._to.record("aidocks_recoveries", 1, cause="attempt")
        else:
            self._to.record("aidocks_jobs_begun", 1, operation=job.operation)

    def job_ended(self, job: Job) -> None:
        operation, status = job.operation, job.status.value
        if self._trainings.get(operation, {}).pop(job.id, None) is not None:
            self._show_trainings(operation)
        if not job.status.terminal:
            return  # it waits for another try
        code = str((job.error or {}).get("code", "none"))
        self._to.record("aidocks_jobs_ended", 1, operation=operation, status=status, code=code)
        if job.started_at is not None:
            ended = job.finished_at.timestamp() if job.finished_at else time.time()
            seconds = max(0.0, ended - job.started_at.timestamp())
            self._to.record("aidocks_job_seconds", seconds, operation=operation, status=status)

    def unit_ended(self, job: Job, stage: str, unit: Unit[Any], outcome: Outcome) -> None:
        tags = {"operation": job.operation, "stage": stage_label(stage)}
        self._to.record("aidocks_units_ended", 1, **tags)
        self._to.record("aidocks_unit_seconds", outcome.seconds, **tags)
        written = sum(output.bytes for output in unit.outputs(outcome.result))
        if written:
            self._to.record("aidocks_bytes_written", written, operation=job.operation)

    def worker_lost(self, job: Job, unit: Unit[Any], reason: str) -> None:
        self._to.record("aidocks_workers_lost", 1)
        self._to.record("aidocks_recoveries", 1, cause="worker")

    def told(self, job: Job, unit: Unit[Any], figures: Mapping[str, Any]) -> None:
        found = {name: figures.get(name) for name in ("tokens_per_s", "loss")}
        numbers = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
        if numbers:
            last = self._trainings.setdefault(job.operation, {}).setdefault(job.id, {})
            last |= numbers
            self._show_trainings(job.operation)

    def queue(self, waiting: int, oldest_s: float, running: int) -> None:
        """Tell how many jobs there are now; to be repeated, as Ray forgets a gauge 20 s after it was set.

        Args:
            waiting: Queued jobs.
            oldest_s: Seconds for which the oldest of them has waited; 0 without any.
            running: Jobs under way.
        """
        self._to.record("aidocks_jobs", waiting, status="queued")
        self._to.record("aidocks_jobs", running, status="running")
        self._to.record("aidocks_queue_age_seconds", oldest_s)
        with suppress(OSError):
            self._to.record("aidocks_disk_free_bytes", shutil.disk_usage(self._home).free)
        for operation in self._trainings:
            self._show_trainings(operation)

    def workers(self, busy: int, idle: int) -> None:
        """Tell how many workers there are now; to be repeated as :meth:`queue`."""
        self._to.record("aidocks_workers", busy, state="busy")
        self._to.record("aidocks_workers", idle, state="idle")

    def _show_trainings(self, operation: str) -> None:
        told = self._trainings[operation].values()
        speed = sum(one.get("tokens_per_s", 0.0) for one in told)
        self._to.record("aidocks_training_tokens_per_second", speed, operation=operation)
        losses = [one["loss"] for one in told if "loss" in one]
        if losses:
            self._to.record("aidocks_training_loss", sum(losses) / len(losses), operation=operation)


def stage_label(stage: str) -> str:
    """Return a stage's name without the numbers in it, of which there is no end."""
    return re.sub(r"\d+", "N", stage)
