"""The pool of workers on the cluster, as the supervisor uses it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from aidocks.errors import WorkerLost
from aidocks.executor import NOBODY, Claim, Outcome
from aidocks.plan import GangUnit, Unit
from cluster import gang as gangs
from cluster.worker import Worker

#: A worker that had nothing to do for so long gives its memory and its GPU back.
IDLE_RELEASE_S = 600.0
#: How often the cluster is looked through for what gangs that were killed still hold of it.
PLACEMENT_SWEEP_S = 2.0
#: How long a gang waits for its turns before people hear of it.
PATIENCE_S = 10.0
#: How long a killed worker is waited for.
KILL_WAIT_S = 5.0

_DEATHS = (ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)

_log = logging.getLogger(__name__)


@dataclass
class _Slot:
    name: str
    handle: Any
    host: str = ""
    pid: int | None = None
    unit: str | None = None
    idle_since: float = 0.0


class RayPool:
    """Runs units on ``Worker`` actors, which it starts when they are needed and replaces when they die.

    The actors belong to the process that made the pool, and die with it. All methods are for one event loop.

    Args:
        workers: How many. Default: one for each GPU of the cluster, or for each of its CPUs.
        idle_release_s: After how many seconds an idle worker is released.
        reserved_gpus: GPUs, or parts of one, that are left to others: workers share what remains.
    """

    def __init__(
        self,
        workers: int | None = None,
        idle_release_s: float = IDLE_RELEASE_S,
        *,
        reserved_gpus: float = 0.0,
    ) -> None:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = int(resources.get("GPU", 0))
        self.parallelism = workers or gpus or max(1, int(resources.get("CPU", 1)))
        self._device = "cuda" if gpus else "cpu"
        if gpus and reserved_gpus >= gpus:
            _log.warning(
                "AIDOCKS_SERVING_GPUS takes all %d GPUs: jobs wait until nobody asks /embed and /rerank", gpus
            )
        # Ray counts in ten-thousandths of a GPU.
        free = math.floor(1e4 * max(0.0, gpus - reserved_gpus) / self.parallelism) / 1e4
        self._gpu_share = min(1.0, max(1e-4, free)) if gpus else 0.0
        share = {"num_cpus": 0, "num_gpus": self._gpu_share} if gpus else {"num_cpus": 1}
        nodes = len([node for node in ray.nodes() if node["Alive"]])  # type: ignore[no-untyped-call]
        self._threads = max(1, (os.cpu_count() or 1) * nodes // self.parallelism)
        self._actor = ray.remote(Worker).options(**share, max_restarts=0, max_concurrency=1)
        self._turns = asyncio.Semaphore(self.parallelism)
        # Two gangs of which each has some of the turns that it needs would wait for each other.
        self._gathering = asyncio.Lock()
        self._slots: dict[str, _Slot] = {}
        self._idle: list[_Slot] = []
        self._idle_release_s = idle_release_s
        self._swept = 0.0

    async def run(
        self,
        unit: Unit[Any],
        workspace: Path,
        started: Callable[[str], None],
        claim: Claim = NOBODY,
    ) -> Outcome:
        """Run one unit on an idle worker, or on a gang. Cancelling kills it: nothing less stops native code."""
        if isinstance(unit, GangUnit):
            return await self._run_gang(unit, workspace, started)
        async with self._turns:
            slot = self._take()
            try:
                return await self._run_on(slot, unit, workspace, started)
            finally:
                if slot.name in self._slots:
                    self._give_back(slot)

    async def _run_gang(
        self, unit: GangUnit[Any], workspace: Path, started: Callable[[str], None]
    ) -> Outcome:
        """Run one unit on processes that are there for it alone.

        They begin anew by themselves when one of them dies; here only when whoever watches them has died.
        """
        gang = unit.gang
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        gangs.require_room(gang, [node["Resources"] for node in nodes if node["Alive"]])
        directory = unit.directory(workspace)
        directory.mkdir(parents=True, exist_ok=True)
        async with self._turns_for(unit):
            while True:
                slot = self._make_slot("gang", _gang_actor())
                try:
                    return await self._run_on(slot, unit, workspace, started)
                except WorkerLost as error:
                    # Not of what the members died of: whoever watches them has counted that, and tried again.
                    if slot.name in self._slots or gangs.count_failure(directory) > gang.max_failures:
                        raise
                    _log.warning("%s begins anew: %s", unit.label, error)
                finally:
                    if slot.name in self._slots:
                        self._drop(slot)
                    await _wait_until_empty(directory, gang.members)
                gangs.say(unit, f"{slot.name} died; it begins anew from its last checkpoint")

    @contextlib.asynccontextmanager
    async def _turns_for(self, unit: GangUnit[Any]) -> AsyncIterator[None]:
        """Take as many turns as the gang's share of the cluster is worth; idle workers, which keep CPUs, go."""
        gang = unit.gang
        worth = gang.members * (gang.gpus / self._gpu_share if self._gpu_share else gang.cpus)
        wanted = max(1, min(self.parallelism, math.ceil(worth)))
        held = 0
        waiting = f"It waits for {wanted} of {self.parallelism} workers: other jobs are using them."
        reminder = asyncio.get_running_loop().call_later(PATIENCE_S, gangs.say, unit, waiting)
        try:
            async with self._gathering:
                while held < wanted:
                    await self._turns.acquire()
                    held += 1
            reminder.cancel()
            for slot in list(self._idle):
                self._drop(slot)
            yield
        finally:
            reminder.cancel()
            for _ in range(held):
                self._turns.release()

    async def _run_on(
        self, slot: _Slot, unit: Unit[Any], workspace: Path, started: Callable[[str], None]
    ) -> Outcome:
        """Run a unit on an actor, which is dropped if it dies or is not waited for."""
        slot.unit = unit.label
        try:
            if slot.pid is None:
                slot.host, slot.pid = await _result(slot.handle.place.remote())
            started(slot.name)
            outcome = await _result(slot.handle.run.remote(unit, workspace))
        except _DEATHS as error:
            self._drop(slot)
            raise WorkerLost(_reason(error), value=slot.name) from error
        except asyncio.CancelledError:
            self._drop(slot)
            await _wait_for_death(slot)
            raise
        assert isinstance(outcome, Outcome)
        return outcome

    def release_idle(self) -> None:
        """Let go of the workers that have been idle for long, and of what dead gangs hold."""
        expired = [slot for slot in self._idle if time.monotonic() - slot.idle_since >= self._idle_release_s]
        for slot in expired:
            self._drop(slot)
        if time.monotonic() - self._swept >= PLACEMENT_SWEEP_S:
            self._swept = time.monotonic()
            gangs.remove_orphaned_placements()

    def workers(self) -> list[dict[str, Any]]:
        """Return name, process id and present unit of every worker."""
        return [{"name": slot.name, "pid": slot.pid, "unit": slot.unit} for slot in self._slots.values()]

    async def close(self) -> None:
        for slot in list(self._slots.values()):
            self._drop(slot)

    def _take(self) -> _Slot:
        # The one used last: its caches are warm, and the others get a chance to be released.
        if self._idle:
            return self._idle.pop()
        return self._make_slot("worker", self._actor, self._device, self._threads)

    def _make_slot(self, kind: str, actor: Any, *arguments: Any) -> _Slot:
        number = next(n for n in range(1, len(self._slots) + 2) if f"{kind}-{n}" not in self._slots)
        name = f"{kind}-{number}"
        self._slots[name] = slot = _Slot(name, actor.remote(name, *arguments))
        return slot

    def _give_back(self, slot: _Slot) -> None:
        slot.unit = None
        slot.idle_since = time.monotonic()
        self._idle.append(slot)

    def _drop(self, slot: _Slot) -> None:
        self._slots.pop(slot.name, None)
        if slot in self._idle:
            self._idle.remove(slot)
        # Also one that is said to be dead: "unavailable" may come back, while its unit runs again elsewhere.
        ray.kill(slot.handle, no_restart=True)


def _gang_actor() -> Any:
    module, _, name = gangs.ACTOR.partition(":")
    return ray.remote(getattr(import_module(module), name)).options(num_cpus=0, max_restarts=0)


async def _wait_until_empty(directory: Path, members: int) -> None:
    """Wait until no member of a gang that was killed writes any more."""
    deadline = time.monotonic() + KILL_WAIT_S
    while time.monotonic() < deadline:
        if await asyncio.to_thread(gangs.is_empty, directory, members):
            return
        await asyncio.sleep(0.02)
    _log.warning("members that were killed are still there: %s", directory)


async def _result(ref: Any) -> Any:
    """Await an object on the running loop, and raise what the worker raised as itself."""
    try:
        return await asyncio.wrap_future(ref.future())
    except RayTaskError as error:
        _log.info("a unit raised:\n%s", error)
        if isinstance(error.cause, RayError) or not isinstance(error.cause, Exception):
            raise
        raise error.cause from None


async def _wait_for_death(slot: _Slot) -> None:
    """Wait until a killed worker writes no more, so that its files can be removed after it."""
    deadline = time.monotonic() + KILL_WAIT_S
    with contextlib.suppress(*_DEATHS, TimeoutError):
        await asyncio.wait_for(_result(slot.handle.place.remote()), KILL_WAIT_S)
    # The cluster calls it dead a moment before the process is gone; only processes of this host can be seen.
    while slot.host == socket.gethostname() and slot.pid and time.monotonic() < deadline:
        try:
            os.kill(slot.pid, 0)
        except ProcessLookupError:
            return
        await asyncio.sleep(0.01)


def _reason(error: RayError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:500] or type(error).__name__
