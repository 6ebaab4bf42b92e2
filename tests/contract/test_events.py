"""GET /jobs/{id}/events: pages, and a stream that can be broken anywhere."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aidocks.jobs.model import EventType, Job, Status
from aidocks.jobs.store import JobStore
from serve import sse

Problem = Callable[..., dict[str, Any]]
STREAM = {"Accept": "text/event-stream"}


def parse(text: str) -> list[dict[str, Any]]:
    """Read a whole stream; every event must have its three lines."""
    events = []
    for block in text.split("\n\n"):
        lines = dict(
            line.split(": ", 1) for line in block.splitlines() if not line.startswith((":", "retry"))
        )
        if lines:
            event = json.loads(lines["data"])
            assert (lines["id"], lines["event"]) == (str(event["sequence"]), event["type"])
            events.append(event)
    return events


def run(store: JobStore, job: Job, messages: int, end: Status | None = Status.SUCCEEDED) -> int:
    token = store.acquire_lease("service")
    store.claim(job.id, token)
    for number in range(messages):
        store.append(job.id, EventType.MESSAGE, {"text": f"line {number}\nid: 99 é"}, token=token)
    if end:
        store.transition(job.id, end, token=token, result={"model": None})
    return token


@pytest.fixture
def ended(store: JobStore, make_job: Callable[..., Job]) -> Job:
    job = make_job()
    run(store, job, 9)
    return job


def test_pages(client: Any, ended: Job) -> None:
    seen: list[int] = []
    after = 0
    while True:
        page = client.get(f"/jobs/{ended.id}/events", params={"after": after, "limit": 4}).json()
        seen += [event["sequence"] for event in page["events"]]
        if not page["has_more"]:
            break
        after = seen[-1]
    assert seen == list(range(1, 12))
    assert client.get(f"/jobs/{ended.id}/events?after=11").json() == {"events": [], "has_more": False}


def test_a_page_unless_a_stream_is_asked_for(client: Any, ended: Job) -> None:
    path = f"/jobs/{ended.id}/events"
    for headers, query, media_type in [
        ({}, "", "application/json"),
        ({"Accept": "application/json"}, "", "application/json"),
        (STREAM, "", "text/event-stream"),
        ({"Accept": "text/event-stream, */*;q=0.1"}, "", "text/event-stream"),
        ({}, "?stream=true", "text/event-stream"),
        (STREAM, "?stream=false", "application/json"),
    ]:
        assert client.get(path + query, headers=headers).headers["content-type"].split(";")[0] == media_type


def test_the_stream_holds_what_the_pages_hold(client: Any, ended: Job) -> None:
    response = client.get(f"/jobs/{ended.id}/events", headers=STREAM)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert parse(response.text) == client.get(f"/jobs/{ended.id}/events").json()["events"]
    assert parse(response.text)[-1]["type"] == "succeeded"


def test_a_reader_who_has_everything_gets_an_empty_stream(client: Any, ended: Job) -> None:
    assert parse(client.get(f"/jobs/{ended.id}/events?after=11", headers=STREAM).text) == []


@hypothesis_settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_stream_broken_anywhere_goes_on_there(client: Any, ended: Job, data: st.DataObject) -> None:
    whole = parse(client.get(f"/jobs/{ended.id}/events", headers=STREAM).text)
    text = client.get(f"/jobs/{ended.id}/events", headers=STREAM).text
    seen: list[dict[str, Any]] = []
    for _ in range(5):
        cut = data.draw(st.integers(0, len(text)))
        # What was cut off within an event never reached the reader.
        seen += parse("".join(text[:cut].rpartition("\n\n")[:2]))
        last = str(seen[-1]["sequence"]) if seen else "0"
        ignored = data.draw(st.integers(0, 20))
        text = client.get(
            f"/jobs/{ended.id}/events?after={ignored}", headers=STREAM | {"Last-Event-ID": last}
        ).text
    seen += parse(text)
    assert seen == whole


def test_events_arrive_while_the_job_runs(client: Any, store: JobStore, make_job: Callable[..., Job]) -> None:
    job = make_job()
    token = run(store, job, 1, end=None)

    def finish() -> None:
        store.append(job.id, EventType.MESSAGE, {"text": "late"}, token=token)
        store.transition(job.id, Status.FAILED, token=token, error={"code": "internal"})

    timer = threading.Timer(0.3, finish)
    timer.start()
    events = parse(client.get(f"/jobs/{job.id}/events", headers=STREAM).text)
    timer.join()
    assert [event["type"] for event in events] == ["queued", "message", "message", "failed"]
    assert events[-1]["data"] == {"code": "internal"}


def test_silence_is_filled_with_heartbeats(store: JobStore, make_job: Callable[..., Job]) -> None:
    job = make_job()

    async def read() -> list[str]:
        stream = sse.event_stream(store, job.id, 0, heartbeat_s=0.01, poll_s=0.001)
        chunks = []
        async for chunk in stream:
            chunks.append(chunk)
            if chunks.count(": still here\n\n") == 3 and not store.get(job.id).status.terminal:
                store.request_cancel(job.id)
        return chunks

    chunks = asyncio.run(read())
    assert chunks.count(": still here\n\n") >= 3
    assert [event["type"] for event in parse("".join(chunks))] == ["queued", "cancel_requested", "cancelled"]


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 30])
def test_ids_that_are_none(client: Any, ended: Job, problem: Problem, last: str) -> None:
    response = client.get(f"/jobs/{ended.id}/events", headers=STREAM | {"Last-Event-ID": last})
    assert problem(response, 422, "invalid_spec")["errors"][0]["field"] == "Last-Event-ID"


def test_streams_leave_room_for_other_requests(
    client: Any, api: FastAPI, ended: Job, problem: Problem
) -> None:
    for _ in range(3):
        client.get(f"/jobs/{ended.id}/events", headers=STREAM)
    assert api.state.context.streams == 0
    api.state.context.streams = sse.MAX_STREAMS
    problem(client.get(f"/jobs/{ended.id}/events", headers=STREAM), 503, "service_unreachable")
    assert client.get(f"/jobs/{ended.id}/events").status_code == 200
