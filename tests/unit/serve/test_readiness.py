"""GET /health: found out in the background, answered from memory."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from fastapi import FastAPI

from aidocks.settings import Settings
from serve.app import create_api
from serve.readiness import Readiness
from serve.supervision import NoSupervisor, SupervisorState


class FakeStore:
    def __init__(self) -> None:
        self.asked = 0
        self.error: Exception | None = None
        self.hold: threading.Event | None = None

    def list(self, limit: int) -> list[Any]:
        self.asked += 1
        if self.hold:
            self.hold.wait(10)
        if self.error:
            raise self.error
        return []


class FakeSupervisor(NoSupervisor):
    def __init__(self) -> None:
        self.answers: SupervisorState | Exception = "running"

    async def state(self) -> SupervisorState:
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


def told(readiness: Readiness) -> tuple[int, dict[str, Any]]:
    answer = readiness.answer()
    return answer.status_code, json.loads(bytes(answer.body))


def test_answering_asks_nobody() -> None:
    store = FakeStore()
    readiness = Readiness(store, FakeSupervisor())  # type: ignore[arg-type]
    status, health = told(readiness)
    assert (status, health["status"], health["supervisor"]) == (200, "ok", "unknown")
    assert store.asked == 0


def test_looking_finds_out() -> None:
    store, supervisor = FakeStore(), FakeSupervisor()
    readiness = Readiness(store, supervisor)  # type: ignore[arg-type]
    asyncio.run(readiness.look())
    assert told(readiness)[1]["supervisor"] == "running"
    supervisor.answers = RuntimeError("gone")
    store.error = OSError("disk")
    asyncio.run(readiness.look())
    status, health = told(readiness)
    assert (status, health["status"], health["supervisor"]) == (503, "unavailable", "unknown")
    store.error, supervisor.answers = None, "restarting"
    asyncio.run(readiness.look())
    status, health = told(readiness)
    assert (status, health["status"], health["supervisor"]) == (200, "ok", "restarting")


def test_a_look_that_hangs_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.readiness.STORE_TIMEOUT_S", 0.01)
    store = FakeStore()
    store.hold = threading.Event()
    readiness = Readiness(store, FakeSupervisor())  # type: ignore[arg-type]

    async def look_thrice() -> None:
        for _ in range(3):
            await readiness.look()
        assert (store.asked, told(readiness)[0]) == (1, 503)
        assert store.hold is not None
        store.hold.set()
        while told(readiness)[0] == 503:
            await readiness.look()

    asyncio.run(look_thrice())
    assert store.asked == 1


def test_the_application_looks_while_it_lives(settings: Settings) -> None:
    supervisor = FakeSupervisor()
    api: FastAPI = create_api(settings, supervisor)

    async def live() -> str:
        async with api.router.lifespan_context(api):
            while api.state.context.readiness.health.supervisor == "unknown":
                await asyncio.sleep(0.001)
            return str(api.state.context.readiness.health.supervisor)

    assert asyncio.run(asyncio.wait_for(live(), 10)) == "running"
