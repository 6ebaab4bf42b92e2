"""Who gets which worker, with actors that come up when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray

from aidocks.errors import WorkerLost
from cluster import crew as crews
from cluster.crew import Crew, Slot
from cluster.room import Kind
from cluster.signs import Place
from tests.support.fake_actors import Actor

CORE, TWO_CORES = Kind(cpus=1), Kind(cpus=2)
HERE = Place("here", "node", 1, "1", 0)


class Scene:
    """A crew, and the actors that it has made."""

    def __init__(self, patience_s: float = 60.0) -> None:
        self.made: list[Actor] = []
        self.said: list[str] = []
        self.crew = Crew(self._make, lambda _: False, lambda _: "nothing", patience_s)

    def _make(self, _kind: Kind, _name: str) -> Actor:
        self.made.append(Actor())
        return self.made[-1]

    def ask(self, kind: Kind = CORE) -> asyncio.Task[Slot]:
        return asyncio.create_task(self.crew.take(kind, 4, self.said.append))

    async def made_so_many(self, count: int) -> None:
        while len(self.made) < count or not all(actor.asked for actor in self.made):
            await asyncio.sleep(0)

    async def worker(self) -> Slot:
        """Have a worker come up for somebody."""
        asked = self.ask()
        await self.made_so_many(len(self.made) + 1)
        self.made[-1].asked[0].set_result(HERE)
        return await asked


def run(scenario: Callable[[], Awaitable[Any]], monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """Run a scenario; returns the actors that were let go."""
    killed: list[Actor] = []
    monkeypatch.setattr(ray, "kill", lambda handle, no_restart: killed.append(handle))
    monkeypatch.setattr(crews, "LOOK_S", 0.01)
    asyncio.run(scenario())  # type: ignore[arg-type]
    return killed


def test_who_waits_in_vain_for_a_new_worker_gets_the_one_that_becomes_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene()

    async def scenario() -> None:
        # Of two nodes one is gone: the cluster brings no second worker, and says nothing.
        busy = await scene.worker()
        waiting = [scene.ask(), scene.ask()]
        await scene.made_so_many(3)
        scene.crew.give(busy)
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert {task.result() for task in done} == {busy}
        scene.crew.give(busy)
        assert await asyncio.gather(*waiting) == [busy, busy]
        assert scene.crew.idle == []
        monkeypatch.setattr(crews, "UNWANTED_S", 0.0)
        scene.crew.drop_unwanted()
        assert list(scene.crew.slots.values()) == [busy]

    assert run(scenario, monkeypatch) == scene.made[1:]


def test_idle_workers_of_another_kind_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()

    async def scenario() -> None:
        monkeypatch.setattr(crews, "IN_THE_WAY_S", 0.02)
        scene.crew.give(await scene.worker())
        waiting = scene.ask(TWO_CORES)
        while len(scene.crew.slots) == 2 or len(scene.made) < 2:
            await asyncio.sleep(0.01)
        scene.made[1].asked[0].set_result(HERE)
        assert (await waiting).kind == TWO_CORES

    assert run(scenario, monkeypatch) == scene.made[:1]


def test_patience_with_a_cluster_that_brings_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(patience_s=0.05)

    async def scenario() -> None:
        with pytest.raises(WorkerLost, match=r"No worker came up for 0\.05 s: nothing"):
            await scene.ask()
        assert scene.crew.slots == {}

    assert run(scenario, monkeypatch) == scene.made


def test_a_worker_that_comes_up_for_somebody_who_has_left_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()

    async def scenario() -> None:
        waiting = scene.ask()
        await scene.made_so_many(1)
        waiting.cancel()
        await asyncio.wait({waiting})
        scene.made[0].asked[0].set_result(HERE)
        while not scene.crew.idle:
            await asyncio.sleep(0.01)
        assert await scene.ask() is next(iter(scene.crew.slots.values()))

    assert run(scenario, monkeypatch) == []
