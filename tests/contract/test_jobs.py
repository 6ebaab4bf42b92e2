"""GET /jobs, GET /jobs/{id}, POST /jobs/{id}/cancel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aidocks.jobs.model import Job, Status
from aidocks.jobs.store import JobStore

Problem = Callable[..., dict[str, Any]]


def test_pages_hold_every_job_once_newest_first(client: Any, make_job: Callable[..., Job]) -> None:
    made = [make_job().id for _ in range(7)]
    seen: list[str] = []
    before = None
    while True:
        page = client.get("/jobs", params={"limit": 3} | ({"before": before} if before else {})).json()
        seen += [job["id"] for job in page["jobs"]]
        if not page["has_more"]:
            break
        before = page["jobs"][-1]["id"]
    assert seen == made[::-1]


def test_filters(client: Any, store: JobStore, make_job: Callable[..., Job]) -> None:
    laser, moe = make_job("laser").id, make_job("byo-moe").id
    store.request_cancel(laser)

    def ids(**params: str) -> list[str]:
        return [job["id"] for job in client.get("/jobs", params=params).json()["jobs"]]

    assert ids(status="cancelled") == [laser]
    assert ids(status="queued") == [moe]
    assert ids(operation="byo-moe") == ids(operation="byo_moe") == [moe]
    assert ids(operation="laser", status="queued") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("status=done", "status"),
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=x", "limit"),
        ("operation=lasre", "operation"),
        ("before=%00", "before"),
    ],
)
def test_wrong_queries(client: Any, problem: Problem, query: str, field: str) -> None:
    found = problem(client.get(f"/jobs?{query}"), 422, "invalid_spec")
    assert [fault["field"] for fault in found["errors"]] == [field]


def test_unknown_jobs(client: Any, problem: Problem) -> None:
    for method, path in [
        ("GET", ""),
        ("POST", "/cancel"),
        ("GET", "/events"),
        ("GET", "/events?stream=true"),
    ]:
        problem(client.request(method, f"/jobs/job-1{path}"), 404, "unknown_job")
    problem(client.get("/jobs?before=job-1"), 404, "unknown_job")


def test_cancelling(client: Any, store: JobStore, make_job: Callable[..., Job], problem: Problem) -> None:
    waiting = make_job().id
    ended = client.post(f"/jobs/{waiting}/cancel")
    assert (ended.status_code, ended.json()["status"]) == (200, "cancelled")
    problem(client.post(f"/jobs/{waiting}/cancel"), 409, "illegal_transition")

    running = make_job().id
    token = store.acquire_lease("service")
    store.claim(running, token)
    asked = client.post(f"/jobs/{running}/cancel")
    assert (asked.status_code, asked.json()["status"]) == (202, "running")
    assert asked.json()["cancel_requested"]
    store.transition(running, Status.CANCELLED, token=token)
    assert client.get(f"/jobs/{running}").json()["status"] == "cancelled"
