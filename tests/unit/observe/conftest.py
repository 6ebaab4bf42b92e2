"""A job of the trivial operation that runs in this process, watched by an observer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aidocks import operations
from aidocks.executor import InProcessPool
from aidocks.jobs.model import Job
from aidocks.jobs.runner import run_job
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import submit_job
from aidocks.log import LOGGERS
from aidocks.settings import Settings
from tests.support.trivial_operation import REGISTRATION

Watched = Callable[..., Job]


@pytest.fixture
def watched(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Run a trivial job to its end: ``watched(observer, units=3)``."""
    monkeypatch.setattr(operations, "OPERATIONS", (*operations.OPERATIONS, REGISTRATION))
    store = JobStore(settings.store_url)
    traces = tmp_path / "traces"
    traces.mkdir()

    def run(observer: Any, **spec: Any) -> Job:
        job, _ = submit_job(settings, store, REGISTRATION.name, {"traces": str(traces), **spec})
        token = store.acquire_lease("service", "test")
        claimed = store.claim(job.id, token)
        assert claimed is not None
        return asyncio.run(run_job(claimed, store, settings, InProcessPool(), token, observer))

    yield run
    store.close()


@pytest.fixture
def own_loggers() -> Iterator[None]:
    """Put our loggers back as they were."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger in loggers:
        for handler in logger.handlers:
            handler.close()
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture
def api_client(settings: Settings) -> Callable[[str, str], int]:
    """Ask the HTTP application, and return the status: ``api_client("GET", "/jobs")``."""
    import httpx

    from serve.app import create_api

    api = create_api(settings)

    def ask(method: str, path: str) -> int:
        async def send() -> int:
            transport = httpx.ASGITransport(api)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return (await client.request(method, path)).status_code

        return asyncio.run(send())

    return ask
