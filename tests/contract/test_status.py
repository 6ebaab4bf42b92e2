"""``GET /status``: what the service does, as far as its parts answer."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from aidocks.client.async_http import AsyncClient
from aidocks.client.http import Client
from aidocks.jobs.model import Status
from aidocks.jobs.store import JobStore
from aidocks.overview import Overview
from serve import overview
from serve.app import create_api


def test_jobs_workers_and_disk(client: Any, api: Any) -> None:
    store: JobStore = api.state.context.store
    token = store.acquire_lease("service", "test")
    jobs = [store.submit("laser", {"n": n}, output_name=None)[0] for n in range(5)]
    for job in jobs[:3]:
        assert store.claim(job.id, token)
    store.transition(jobs[0].id, Status.FAILED, token=token, error={"code": "internal"})
    store.transition(jobs[1].id, Status.SUCCEEDED, token=token, result={})
    store.submit("laser", {"local": True}, output_name=None, place="local")
    response = client.get("/status")
    assert response.status_code == 200
    told = Overview.model_validate(response.json())
    assert told.jobs is not None
    counts = told.jobs.model_dump(exclude={"oldest_queued_s"})
    assert counts == {
        "running": 1,
        "queued": 2,
        "succeeded_today": 1,
        "failed_today": 1,
        "cancelled_today": 0,
    }
    assert told.jobs.oldest_queued_s >= 0
    assert told.workers is not None
    assert told.workers.model_dump() == {"busy": 1, "idle": 0, "most": 2}
    assert told.disk is not None
    assert 0 < told.disk.free_bytes <= told.disk.total_bytes
    assert (told.status, told.nodes) == ("ok", None)


def test_what_does_not_answer_is_null(
    client: Any, api: Any, supervisor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def broken(*_: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(overview, "PATIENCE_S", 0.05)
    monkeypatch.setattr(api.state.context.store, "counts", lambda *_: released.wait(20))
    monkeypatch.setattr(overview.shutil, "disk_usage", broken)
    monkeypatch.setattr(supervisor, "answer", dict)
    threading.Timer(0.5, released.set).start()
    told = client.get("/status").json()
    assert (told["jobs"], told["disk"], told["workers"]) == (None, None, None)
    assert told["status"] == "ok"


def test_both_clients_ask(settings: Any, supervisor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    api = create_api(settings, supervisor)

    async def ask() -> Overview:
        async with AsyncClient("http://localhost:8723") as client:
            client._http = httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url=client.url)
            return await client.status()

    assert asyncio.run(ask()).supervisor == "unknown"
    assert callable(Client.status)
