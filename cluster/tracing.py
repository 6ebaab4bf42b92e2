"""Jobs as traces of OpenTelemetry, where somebody collects them: a span for each job, and one for each of its units.

Ids of trace and span of a job follow from its id, and both kinds of spans are told when they end. So nothing has to be
remembered, and a job that several supervisors have worked on is one trace.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from aidocks._version import __version__
from aidocks.jobs.model import Status
from aidocks.jobs.observer import Unobserved

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

    from aidocks.executor import Outcome
    from aidocks.jobs.model import Job
    from aidocks.plan import Unit

#: Where spans are sent, by the names that OpenTelemetry gives.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

log = logging.getLogger(__name__)


class JobTraces(Unobserved):
    """Makes spans of the work of one supervisor (an :class:`~aidocks.jobs.observer.Observer`).

    Args:
        exporter: Where they go. Called from a thread of its own.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        class JobIds(RandomIdGenerator):
            """Gives the span without a parent, that of a job, the ids of the job."""

            job = ""

            def generate_trace_id(self) -> int:
                return trace_id(self.job)

            def generate_span_id(self) -> int:
                return span_id(self.job) if self.job else super().generate_span_id()

        self._ids = JobIds()
        name = os.environ.get("OTEL_SERVICE_NAME", "aidocks")
        resource = Resource.create({"service.name": name, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=True)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("aidocks", __version__)

    def job_ended(self, job: Job) -> None:
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace import Status as SpanStatus

        if not job.status.terminal:
            return  # it waits for another try
        begun = job.started_at or job.created_at
        attributes = {
            "aidocks.job": job.id,
            "aidocks.operation": job.operation,
            "aidocks.status": job.status.value,
            "aidocks.attempts": job.attempt,
            "aidocks.waited_s": (begun - job.created_at).total_seconds(),
        }
        self._ids.job = job.id
        span = self._tracer.start_span(
            job.operation, None, SpanKind.CONSUMER, attributes, start_time=_nanoseconds(begun.timestamp())
        )
        self._ids.job = ""
        if job.status is Status.FAILED:
            code = str((job.error or {}).get("code", ""))
            span.set_attribute("error.type", code)
            span.set_status(SpanStatus(StatusCode.ERROR, code))
        span.end(_nanoseconds(job.finished_at.timestamp() if job.finished_at else time.time()))

    def unit_ended(self, job: Job, stage: str, unit: Unit[Any], outcome: Outcome) -> None:
        ended = time.time()
        attributes = {
            "aidocks.job": job.id,
            "aidocks.stage": stage,
            "aidocks.unit": unit.label,
            "aidocks.worker": outcome.worker,
        }
        span = self._tracer.start_span(
            stage,
            _within(job),
            attributes=attributes,
            start_time=_nanoseconds(ended - outcome.seconds),
        )
        span.end(_nanoseconds(ended))

    def worker_lost(self, job: Job, unit: Unit[Any], reason: str) -> None:
        span = self._tracer.start_span(
            "worker lost", _within(job), attributes={"aidocks.job": job.id, "aidocks.unit": unit.label}
        )
        span.end()

    def flush(self) -> None:
        """Send what was not sent yet."""
        self._provider.force_flush()


def traces() -> JobTraces | None:
    """Return what makes traces, where the environment names a collector; else None, and nothing is imported."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        log.warning("no traces: OpenTelemetry's exporter is not installed; pip install 'aidocks[otel]'")
        return None
    return JobTraces(OTLPSpanExporter())


def trace_id(job_id: str) -> int:
    """Return the id of a job's trace: 128 bits of a hash of the job's id, as it is written in hexadecimal."""
    return int(hashlib.sha256(job_id.encode()).hexdigest()[:32], 16)


def span_id(job_id: str) -> int:
    """Return the id of a job's own span."""
    return int(hashlib.sha256(job_id.encode()).hexdigest()[32:48], 16)


def _within(job: Job) -> Context:
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    flags = TraceFlags(TraceFlags.SAMPLED)
    return set_span_in_context(
        NonRecordingSpan(SpanContext(trace_id(job.id), span_id(job.id), is_remote=True, trace_flags=flags))
    )


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
