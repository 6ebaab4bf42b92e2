"""The HTTP application on a real store and registry, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from aidocks.jobs.model import Job
from aidocks.jobs.store import JobStore
from aidocks.settings import Settings
from serve.app import create_api
from serve.supervision import SupervisorState

URL = "http://localhost:8723"


class WokenSupervisor:
    """Counts how often it was woken."""

    def __init__(self) -> None:
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1

    async def state(self) -> SupervisorState:
        return "running"

    def answer(self) -> dict[str, Any]:
        return {"parallelism": 2, "workers": [{"name": "worker-1", "pid": 1, "unit": "layer 0"}]}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def supervisor() -> WokenSupervisor:
    return WokenSupervisor()


@pytest.fixture
def api(settings: Settings, supervisor: WokenSupervisor) -> FastAPI:
    return create_api(settings, supervisor)


class ApiClient:
    """Asks an ASGI application, each time in an event loop of its own."""

    def __init__(self, api: FastAPI) -> None:
        self._api = api

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._api)
            async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)


@pytest.fixture
def client(api: FastAPI) -> ApiClient:
    return ApiClient(api)


class _Quiet(uvicorn.Server):
    def install_signal_handlers(self) -> None:
        """Signals belong to pytest."""


@pytest.fixture
def url(api: FastAPI) -> Iterator[str]:
    """Where the application is served."""
    server = _Quiet(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error", ws="none"))
    started = threading.Event()
    startup = server.startup

    async def tell(*arguments: Any, **options: Any) -> None:
        await startup(*arguments, **options)
        started.set()

    server.startup = tell  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    assert started.wait(30)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def store(api: FastAPI) -> JobStore:
    store: JobStore = api.state.context.store
    return store


@pytest.fixture
def model(api: FastAPI, tiny_base: Path) -> str:
    """Name of a small model in the registry."""
    api.state.context.registry.import_checkpoint("tiny-base", tiny_base)
    return "tiny-base"


@pytest.fixture
def make_job(store: JobStore) -> Callable[..., Job]:
    def make(operation: str = "laser", **options: Any) -> Job:
        return store.submit(operation, {"n": 1}, output_name=options.pop("output_name", None), **options)[0]

    return make


@pytest.fixture
def laser_body(model: str) -> dict[str, Any]:
    return {"base_model_name": model, "laser_model_name": "made"}


def check_problem(response: Any, status: int, code: str) -> dict[str, Any]:
    """Assert that an answer is the one error shape, and return it."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    problem: dict[str, Any] = response.json()
    assert (response.status_code, problem["status"], problem["code"]) == (status, status, code), problem
    assert problem["type"] == f"urn:aidocks:error:{code}"
    assert problem["title"]
    assert problem["detail"]
    assert response.headers["x-request-id"]
    for fault in problem.get("errors", []):
        assert set(fault) == {"field", "value", "message", "hint"}
    return problem


@pytest.fixture
def problem() -> Callable[..., dict[str, Any]]:
    return check_problem
