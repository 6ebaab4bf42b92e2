"""The clients against a service whose failures are scripted: retries, resumption, typed results, errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from aidocks.client import events as client_events
from aidocks.client.async_http import AsyncClient
from aidocks.client.http import Client
from aidocks.client.job import AsyncJobHandle, JobHandle
from aidocks.errors import (
    AIDocksError,
    InvalidSpec,
    JobCancelled,
    JobFailed,
    NameTaken,
    ServiceUnreachable,
    UnknownJob,
    UnknownModel,
)
from aidocks.jobs.model import EventType, Status
from aidocks.specs.laser import LaserSpec
from aidocks.specs.laser_result import LaserResult

MEASURED = dict.fromkeys(
    (
        "before",
        "before_standard_error",
        "after",
        "after_standard_error",
        "delta",
        "delta_standard_error",
        "z",
    ),
    1.0,
) | {"tokens": 10, "items": 2, "metric": "perplexity", "data": "prose"}
RESULT = {
    "model": "m", "path": "/models/m", "seconds": 1.5,
    "search": MEASURED | {"part": "search"}, "held_out": MEASURED | {"part": "held_out"},
    "candidates_tried": 1, "matrices_scanned": 2, "parameters": 3, "parameters_before": 3,
}  # fmt: skip


@pytest.fixture
def client(scripted: Any) -> Iterator[Client]:
    with Client(scripted.url, timeout=5.0, retry_s=5.0, reconnect_s=5.0) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_events, "PAUSE_S", 0.0)


def test_every_operation_is_a_method(client: Client, scripted: Any, job: Any, answer: Any) -> None:
    scripted.script = lambda _: answer(job(), 202)
    handle = client.laser(base_model_name="a", laser_model_name="b")
    client.byo_moe({"base_model": "a"}, name="c")
    assert handle.id == "job-1"
    assert handle.status is Status.RUNNING
    assert [(r.method, r.path, r.body) for r in scripted.requests] == [
        ("POST", "/laser", {"base_model_name": "a", "laser_model_name": "b"}),
        ("POST", "/byo-moe", {"base_model": "a", "name": "c"}),
    ]
    assert {"laser", "byo_moe", "jobs", "models"} <= set(dir(client))
    with pytest.raises(AttributeError, match="byo-moe"):
        client.lasre()


def test_a_spec_is_sent_without_its_defaults(client: Client, scripted: Any, job: Any, answer: Any) -> None:
    scripted.script = lambda _: answer(job(), 202)
    client.submit("laser", LaserSpec(base_model_name="a", laser_model_name="b", layers="1-3"))
    assert scripted.requests[0].body == {"base_model_name": "a", "laser_model_name": "b", "layers": [1, 2, 3]}


def test_a_lost_answer_is_asked_for_again_under_the_same_key(
    client: Client, scripted: Any, job: Any, answer: Any
) -> None:
    answers = iter(
        [answer(breaks=True), answer({}, 503), answer({}, 429, {"Retry-After": "0"}), answer(job(), 202)]
    )
    scripted.script = lambda _: next(answers)
    assert client.laser(base_model_name="a").id == "job-1"
    keys = {request.headers["Idempotency-Key"] for request in scripted.requests}
    assert len(scripted.requests) == 4
    assert len(keys) == 1
    scripted.script = lambda _: answer(job(), 202)
    client.laser(base_model_name="a")
    assert scripted.requests[-1].headers["Idempotency-Key"] not in keys


def test_the_callers_key_is_used(client: Client, scripted: Any, job: Any, answer: Any) -> None:
    scripted.script = lambda _: answer(job(), 202)
    client.laser(base_model_name="a", idempotency_key="mine")
    assert scripted.requests[0].headers["Idempotency-Key"] == "mine"


def test_terms_of_a_submission(client: Client, scripted: Any, job: Any, answer: Any) -> None:
    scripted.script = lambda _: answer(job(), 202)
    client.laser(base_model_name="a", priority=3, timeout_s=90.0)
    client.submit("laser", {"base_model_name": "a"}, priority=0)
    client.resume("job-1", timeout_s=60.0)
    client.laser(base_model_name="a")

    async def submit() -> None:
        async with AsyncClient(scripted.url) as other:
            await other.laser(base_model_name="a", priority=-1, timeout_s=5.0)
            await other.resume("job-1", priority=2)

    asyncio.run(submit())
    assert [request.path for request in scripted.requests] == [
        "/laser?priority=3&timeout_s=90.0",
        "/laser?priority=0",
        "/jobs/job-1/resume?timeout_s=60.0",
        "/laser",
        "/laser?priority=-1&timeout_s=5.0",
        "/jobs/job-1/resume?priority=2",
    ]
    assert scripted.requests[0].body == {"base_model_name": "a"}


def test_what_has_an_effect_is_not_repeated_when_its_answer_is_lost(
    client: Client, scripted: Any, answer: Any
) -> None:
    scripted.script = lambda _: answer(breaks=True)
    with pytest.raises(ServiceUnreachable):
        client.delete_model("m")
    assert len(scripted.requests) == 1


def test_no_service(scripted: Any) -> None:
    scripted.close()
    with Client(scripted.url, retry_s=0.2) as client, pytest.raises(ServiceUnreachable) as caught:
        client.health()
    assert scripted.url in str(caught.value)
    assert "aidocks up" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownModel("No model 'x'.", field="base_model_name", value="x", hint="Did you mean 'y'?"), 404),
        (NameTaken("Taken.", field="name", value="x"), 409),
        (InvalidSpec("Two.", errors=[{"field": "a", "message": "m"}, {"field": "b", "message": "n"}]), 422),
        (UnknownJob("No job."), 404),
    ],
)
def test_a_problem_becomes_its_exception(
    client: Client, scripted: Any, answer: Any, error: AIDocksError, status: int
) -> None:
    scripted.script = lambda _: answer(error.problem(), status, {"Content-Type": "application/problem+json"})
    with pytest.raises(type(error)) as caught:
        client.laser(base_model_name="x")
    assert type(caught.value) is type(error)
    assert caught.value.message == error.message
    assert (caught.value.field or None) == (
        error.field or error.problem().get("errors", [{}])[0].get("field")
    )
    assert caught.value.hint == error.hint
    assert getattr(caught.value, "errors", ()) == getattr(error, "errors", ())


def test_something_else_on_the_port_is_named(client: Client, scripted: Any, answer: Any) -> None:
    scripted.script = lambda _: answer(b"<html>hello</html>")
    with pytest.raises(ServiceUnreachable, match="not AIDocks of this version"):
        client.jobs()
    scripted.script = lambda _: answer(b"<html>not found</html>", 404)
    with pytest.raises(AIDocksError, match="answers 404"):
        client.jobs()


class History:
    """A job's history, served from any sequence on, in pieces that break where the test says."""

    def __init__(self, frames: list[bytes], job: dict[str, Any], answer: Any, breaks: dict[int, int]) -> None:
        self.frames, self.job, self.answer, self.breaks = frames, job, answer, breaks
        self.connections = 0

    def __call__(self, request: Any) -> Any:
        if not request.path.endswith("/events"):
            return self.answer(self.job)
        self.connections += 1
        rest = self.frames[int(request.headers["Last-Event-ID"]) :]
        stop = self.breaks.get(self.connections)
        if stop is None:
            return self.answer(stream=[b": hello\n\n", *rest])
        if stop == 0:
            return self.answer({}, 503)
        whole = b"".join(rest)
        cut = min(sum(map(len, rest[:stop])) + 7, len(whole) - 1)
        return self.answer(stream=[whole[:cut]], breaks=True)


@pytest.fixture
def frames(event_frame: Any) -> list[bytes]:
    return [
        event_frame(1, "queued"),
        event_frame(2, "started", attempt=1, parallelism=1),
        event_frame(3, "message", text="hello"),
        event_frame(4, "progress", stage="scan", stage_number=1, done=1, total=2, fraction=0.5),
        event_frame(5, "succeeded", **RESULT),
    ]


def test_events_come_once_and_in_order_over_broken_connections(
    client: Client, scripted: Any, job: Any, answer: Any, frames: list[bytes]
) -> None:
    scripted.script = History(frames, job("succeeded", result=RESULT), answer, breaks={1: 2, 2: 0, 3: 1})
    handle = client.job("job-1")
    assert [event.sequence for event in handle.events()] == [1, 2, 3, 4, 5]
    assert scripted.script.connections == 4
    assert [event.sequence for event in handle.events(after=3)] == [4, 5]


def test_events_of_a_newer_service_are_passed_over(
    client: Client, scripted: Any, job: Any, answer: Any, event_frame: Any
) -> None:
    frames = [event_frame(1, "queued"), event_frame(2, "beamed_up"), event_frame(3, "cancelled")]
    scripted.script = History(frames, job("cancelled"), answer, {})
    assert [event.type for event in client.job("job-1").events()] == [EventType.QUEUED, EventType.CANCELLED]


def test_a_reader_who_has_seen_all_is_not_left_waiting(
    client: Client, scripted: Any, job: Any, answer: Any, frames: list[bytes]
) -> None:
    scripted.script = History(frames, job("succeeded", result=RESULT), answer, {})
    assert list(client.job("job-1").events(after=5)) == []


def test_a_service_that_stays_away_is_given_up(
    scripted: Any, job: Any, answer: Any, frames: list[bytes]
) -> None:
    scripted.script = History(frames, job(), answer, breaks=dict.fromkeys(range(1, 99), 0))
    with Client(scripted.url, reconnect_s=0.3) as client, pytest.raises(ServiceUnreachable):
        list(client.job("job-1").events())


def test_events_of_no_job(client: Client, scripted: Any, answer: Any, job: Any) -> None:
    handle_answers = iter([answer(job()), answer(UnknownJob("No such job.").problem(), 404)])
    scripted.script = lambda _: next(handle_answers)
    handle = client.job("job-1")
    with pytest.raises(UnknownJob):
        next(handle.events())


def test_wait_returns_the_typed_result_and_tells_of_each_event(
    client: Client, scripted: Any, job: Any, answer: Any, frames: list[bytes]
) -> None:
    result = RESULT | {"a_field_of_the_next_version": 1}
    scripted.script = History(frames, job("succeeded", result=result), answer, {})
    seen: list[int] = []
    waited = client.job("job-1").wait(progress=lambda event: seen.append(event.sequence))
    assert isinstance(waited, LaserResult)
    assert waited.held_out.before == 1.0
    assert seen == [1, 2, 3, 4, 5]


def test_wait_raises_what_became_of_the_job(
    client: Client, scripted: Any, job: Any, answer: Any, event_frame: Any
) -> None:
    problem = UnknownModel("No model 'x'.", field="base_model_name", value="x").problem()
    frames = [event_frame(1, "failed", **problem)]
    scripted.script = History(frames, job("failed", error=problem), answer, {})
    with pytest.raises(JobFailed, match="No model 'x'") as caught:
        client.job("job-1").wait()
    assert isinstance(caught.value.__cause__, UnknownModel)
    assert caught.value.field == "base_model_name"
    scripted.script = History([event_frame(1, "cancelled")], job("cancelled"), answer, {})
    with pytest.raises(JobCancelled):
        client.job("job-1").wait()


def test_wait_ends_when_its_time_is_over(client: Client, scripted: Any, job: Any, answer: Any) -> None:
    over = threading.Event()

    def silence() -> Iterator[bytes]:
        yield b": hello\n\n"
        over.wait(10)

    scripted.script = lambda request: answer(stream=silence()) if "events" in request.path else answer(job())
    try:
        with pytest.raises(TimeoutError, match="goes on"):
            client.job("job-1").wait(timeout=0.2)
    finally:
        over.set()


def test_history_pages_to_the_end(client: Client, scripted: Any, job: Any, answer: Any) -> None:
    def script(request: Any) -> Any:
        if "events" not in request.path:
            return answer(job())
        after = int(request.path.partition("after=")[2])
        page = [
            {"job_id": "job-1", "sequence": n, "time": "2026-01-01T00:00:00Z", "type": "message", "data": {}}
            for n in range(after + 1, min(after + 3, 6))
        ]
        return answer({"events": page, "has_more": after < 4})

    scripted.script = script
    assert [event.sequence for event in client.job("job-1").history()] == [1, 2, 3, 4, 5]


def test_names_cannot_leave_their_place_in_the_url(client: Client, scripted: Any, answer: Any) -> None:
    scripted.script = lambda _: answer({}, 204)
    client.delete_model("../jobs?x=1#y")
    assert scripted.requests[0].path == "/models/..%2Fjobs%3Fx%3D1%23y"


def test_the_async_client_does_the_same(scripted: Any, job: Any, answer: Any, frames: list[bytes]) -> None:
    history = History(frames, job("succeeded", result=RESULT), answer, breaks={1: 2, 2: 0})

    def script(request: Any) -> Any:
        return answer(job(), 202) if request.method == "POST" else history(request)

    async def course() -> None:
        async with AsyncClient(scripted.url, reconnect_s=5.0) as client:
            handle = await client.laser(base_model_name="a")
            assert [event.sequence async for event in handle.events()] == [1, 2, 3, 4, 5]
            result = await handle.wait()
            assert isinstance(result, LaserResult)
            assert (await handle.refresh()).status is Status.SUCCEEDED

    scripted.script = script
    asyncio.run(course())
    assert scripted.requests[0].headers["Idempotency-Key"]


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")} - {"close", "aclose"}

    assert public(Client) == public(AsyncClient)
    assert public(JobHandle) == public(AsyncJobHandle)


@pytest.mark.parametrize("breaks", [False, True])
def test_download_is_whole_or_absent(
    client: Client, scripted: Any, answer: Any, tmp_path: Any, breaks: bool
) -> None:
    import hashlib

    weights = bytes(range(256)) * 40
    digest = hashlib.sha256(weights).hexdigest()
    files = [
        {"path": "report/a.json", "bytes": 2},
        {"path": "model.safetensors", "bytes": len(weights), "sha256": digest},
    ]
    attempts: list[str | None] = []

    def script(request: Any) -> Any:
        if request.path.endswith("/files"):
            return answer({"files": files})
        if request.path.endswith("a.json"):
            return answer(b"{}")
        asked = request.headers.get("Range")
        attempts.append(asked)
        assert not (tmp_path / "m").exists()
        if breaks and len(attempts) == 1:
            return answer(stream=[weights[:1000]], breaks=True)
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        return answer(weights[begin:], 206 if asked else 200)

    scripted.script = script
    path = client.download("m", tmp_path)
    assert path == tmp_path / "m"
    assert (path / "model.safetensors").read_bytes() == weights
    assert (path / "report" / "a.json").read_text() == "{}"
    assert attempts == ([None, "bytes=1000-"] if breaks else [None])
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    with pytest.raises(AIDocksError, match="exists"):
        client.download("m", tmp_path)


def test_a_download_that_differs_from_the_manifest_is_not_published(
    client: Client, scripted: Any, answer: Any, tmp_path: Any
) -> None:
    listing = {"files": [{"path": "config.json", "bytes": 2, "sha256": "0" * 64}]}
    scripted.script = lambda request: answer(listing if request.path.endswith("/files") else b"{}")
    with pytest.raises(AIDocksError, match="manifest"):
        client.download("m", tmp_path)
    assert not (tmp_path / "m").exists()


def test_a_download_cannot_write_elsewhere(client: Client, scripted: Any, answer: Any, tmp_path: Any) -> None:
    scripted.script = lambda _: answer({"files": [{"path": "../evil", "bytes": 2}]})
    with pytest.raises(AIDocksError, match="outside"):
        client.download("m", tmp_path)
