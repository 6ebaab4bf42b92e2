"""Jobs as traces: ids that follow from the job's, a span for each unit, and nothing where nobody collects them."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from aidocks.jobs.model import Status
from cluster import tracing

pytest.importorskip("opentelemetry.sdk")


@pytest.fixture
def spans() -> Any:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


def test_a_job_is_one_trace_with_a_span_for_each_unit(watched: Any, spans: Any) -> None:
    observer = tracing.JobTraces(spans)
    job = watched(observer, units=3)
    observer.flush()
    found = spans.get_finished_spans()
    assert {span.context.trace_id for span in found} == {tracing.trace_id(job.id)}
    (whole,) = [span for span in found if span.parent is None]
    assert whole.name == "trivial"
    assert whole.context.span_id == tracing.span_id(job.id)
    assert whole.attributes["aidocks.status"] == "succeeded"
    parts = [span for span in found if span.parent is not None]
    assert sorted(span.name for span in parts) == ["squares"] * 3 + ["sum"]
    assert {span.parent.span_id for span in parts} == {whole.context.span_id}
    assert len({span.context.span_id for span in found}) == len(found)
    assert all(span.start_time <= span.end_time for span in found)


def test_a_failed_job_says_of_what_but_not_with_what(watched: Any, spans: Any) -> None:
    observer = tracing.JobTraces(spans)
    watched(observer, units=2, fails_at=0)
    observer.flush()
    (whole,) = [span for span in spans.get_finished_spans() if span.parent is None]
    assert not whole.status.is_ok
    assert whole.attributes["error.type"] == "invalid_spec"
    assert "traces" not in str(dict(whole.attributes)), "the request stays here"


def test_what_waits_for_another_try_and_what_is_lost(watched: Any, spans: Any) -> None:
    observer = tracing.JobTraces(spans)
    job = watched(None, units=1)
    unit: Any = type("Unit", (), {"label": "layer 1"})
    observer.worker_lost(job, unit, "killed")
    observer.job_ended(job.model_copy(update={"status": Status.QUEUED}))
    observer.flush()
    assert [span.name for span in spans.get_finished_spans()] == ["worker lost"]


def test_without_a_collector_there_are_no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert tracing.traces() is None
    monkeypatch.setenv(tracing.ENDPOINTS[0], "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert tracing.traces() is None, "the service runs without the exporter"


def test_spans_reach_a_collector(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    bodies: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        observer = tracing.traces()
        assert observer is not None
        job = watched(observer, units=1)
        observer.flush()
        server.shutdown()
        thread.join()
    assert {path for path, _ in bodies} == {"/v1/traces"}
    assert any(job.id.encode() in body for _, body in bodies)
