"""The pool of workers on the cluster, as the supervisor uses it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from aidocks.errors import InvalidSpec, WorkerLost
from aidocks.executor import NOBODY, Claim, Outcome
from aidocks.plan import GangUnit, Unit
from cluster import gang as gangs
from cluster import room, signs
from cluster.crew import Crew, Slot, locate, options_of
from cluster.deaths import DEATHS, reason
from cluster.room import Kind
from cluster.signs import GROUP
from cluster.turns import Request, Turns
from cluster.view import look
from cluster.worker import Worker

#: A worker that had nothing to do for so long gives its memory and its GPU back.
IDLE_RELEASE_S = 600.0
#: A worker that gives no sign of life for so long is killed.
SILENCE_S = 30.0
#: How long a worker is waited for that does not come up although no unit of this pool is in its way.
PATIENCE_S = 600.0
#: How old what is known of the nodes may be: while there is work, and else.
REFRESH_S, REST_S = 3.0, 30.0
#: How often the cluster is looked through for what gangs that were killed still hold of it: for a while after a gang
#: has ended, and else.
SWEEP_S, SWEEP_AT_REST_S, SWEEP_FOR_S = 2.0, 60.0, 30.0
#: How long a gang waits for its turns before people hear of it.
GANG_PATIENCE_S = 10.0
#: How long a worker may be idle while a gang waits for room.
ROOM_S = 1.0
#: How long a killed gang's members are waited for.
KILL_WAIT_S = 5.0

_log = logging.getLogger(__name__)


class RayPool:
    """Runs units on ``Worker`` actors, which it starts when they are needed and replaces when they die.

    The actors belong to the process that made the pool, and die with it. All methods are for one event loop.

    Args:
        workers: How many. Default: one for each GPU that the cluster has at the time, or for each of its CPUs.
        idle_release_s: After how many seconds an idle worker is released.
        reserved_gpus: GPUs, or a part of each, that are left to others.
        silence_s: After how many seconds without a sign of life a worker is killed.
        patience_s: How long a worker is waited for that the cluster does not bring.
        growth: How many workers beyond what there is room for waiting units may ask for: what makes an autoscaler
            bring nodes. What no node could hold is then waited for rather than refused.
        tell: Called with a job's id and a line for people.
    """

    def __init__(
        self,
        workers: int | None = None,
        idle_release_s: float = IDLE_RELEASE_S,
        *,
        reserved_gpus: float = 0.0,
        silence_s: float = SILENCE_S,
        patience_s: float = PATIENCE_S,
        growth: int = 0,
        tell: Callable[[str, str], None] = lambda _job, _text: None,
    ) -> None:
        self._workers = workers
        self._idle_release_s = idle_release_s
        self._reserved_gpus = reserved_gpus
        self._silence_s = silence_s
        self._growth = growth
        self._tell = tell
        self._view = look()
        self._default = room.default_kind(self._view.nodes, workers, reserved_gpus)
        self._turns = Turns(1)
        self._count()
        self._crew = Crew(self._make, self._is_lost, self._describe, patience_s)
        # Kinds that a node could hold once: when it cannot any more, that node may come back.
        self._known: set[Kind] = set()
        self._threads: dict[Kind, int] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._refreshed = time.monotonic()
        self._refreshing = False
        self._next_sweep = self._sweep_often_until = 0.0
        gpus = sum(node.get("GPU", 0) for node in self._view.nodes)
        if gpus and reserved_gpus >= gpus:
            _log.warning(
                "AIDOCKS_SERVING_GPUS takes all %g GPUs: jobs wait until nobody asks /embed and /rerank", gpus
            )

    @property
    def parallelism(self) -> int:
        """Workers that there may be at present; it follows the cluster."""
        return self._turns.total

    async def run(
        self,
        unit: Unit[Any],
        workspace: Path,
        started: Callable[[str], None],
        claim: Claim = NOBODY,
    ) -> Outcome:
        """Run one unit on an idle worker, or on a gang. Cancelling kills it: nothing less stops native code.

        Raises:
            InvalidSpec: No node of the cluster could ever hold the worker that is asked for.
            WorkerLost: It died, fell silent, or did not come up for as long as patience lasts.
            Exception: Whatever the unit raised.
        """
        self._refresh_soon()
        if isinstance(unit, GangUnit):
            return await self._run_gang(unit, workspace, started, claim)
        # Whoever knows how much memory it needs has looked at files.
        memory = await asyncio.to_thread(lambda: unit.memory)
        kind = room.kind_of(self._default, claim.resources, memory, () if self._growth else self._view.nodes)
        await self._admit(kind)
        self._threads[kind] = room.threads_of(kind, claim.resources, self._view.cores, self.parallelism)
        async with self._turns_for(claim, kind.worth(self._default)):
            slot = await self._crew.take(kind, self.parallelism, lambda text: self._tell(claim.job, text))
            try:
                _require_memory(unit, memory, slot)
                return await self._run_on(slot, unit, workspace, started)
            finally:
                if slot.name in self._crew.slots:
                    self._crew.give(slot)

    async def _admit(self, kind: Kind) -> None:
        """Refuse what no node could hold; unless one could before, or an autoscaler may bring one."""
        new = kind != self._default and kind not in self._known and not self._growth
        if new and not room.fits(kind, self._view.nodes):
            # A node may have come since anybody looked.
            room.require_room(kind, (await asyncio.to_thread(look)).nodes)
        self._known.add(kind)

    async def _run_gang(
        self, unit: GangUnit[Any], workspace: Path, started: Callable[[str], None], claim: Claim
    ) -> Outcome:
        """Run one unit on processes that are there for it alone.

        They begin anew by themselves when one of them dies; here only when whoever watches them has died.
        """
        gang = unit.gang
        if not self._growth:
            gangs.require_room(gang, (await asyncio.to_thread(look)).nodes)
        directory = unit.directory(workspace)
        directory.mkdir(parents=True, exist_ok=True)
        async with self._turns_for_gang(unit, claim):
            while True:
                slot = self._crew.add("gang", None, lambda name: _gang_actor().remote(name))
                making_room = asyncio.create_task(self._make_room(directory, gang.members))
                try:
                    return await self._run_on(slot, unit, workspace, started)
                except WorkerLost as error:
                    # Not of what the members died of: whoever watches them has counted that, and tried again.
                    if slot.name in self._crew.slots:
                        raise
                    if (failures := gangs.count_failure(gang, directory)) > gang.max_failures:
                        raise gangs.given_up(unit, f"{slot.name} died: {error.message}", failures) from error
                    _log.warning("%s begins anew: %s", unit.label, error)
                finally:
                    making_room.cancel()
                    if slot.name in self._crew.slots:
                        self._crew.drop(slot)
                    self._sweep_often_until = time.monotonic() + SWEEP_FOR_S
                    self._next_sweep = 0.0
                    await _wait_until_empty(directory, gang.members)
                gangs.say(unit, f"{slot.name} died; it begins anew from its last checkpoint")

    async def _make_room(self, directory: Path, members: int) -> None:
        """Let idle workers go for as long as no member of a gang is up: whoever places the members asks nobody.

        There are as many turns as the gang needs, but workers that are idle may keep a core on every node.
        """
        while True:
            if await asyncio.to_thread(gangs.is_empty, directory, members):
                self._crew.drop_idle(lambda slot: time.monotonic() - slot.since >= ROOM_S)
            await asyncio.sleep(ROOM_S)

    @contextlib.asynccontextmanager
    async def _turns_for_gang(self, unit: GangUnit[Any], claim: Claim) -> AsyncIterator[None]:
        """Take as many turns as the gang's share of the cluster is worth; idle workers, which keep CPUs, go."""
        gang = unit.gang
        default = self._default
        worth = gang.members * (gang.gpus / default.gpus if default.gpus else gang.cpus)
        wanted = max(1, math.ceil(worth))
        least = min(wanted, self.parallelism)
        waiting = (
            f"It waits for {least} of {room.count(self.parallelism, 'worker')}: other jobs are using them."
        )
        loop = asyncio.get_running_loop()
        reminder = loop.call_later(GANG_PATIENCE_S, gangs.say, unit, waiting)
        try:
            async with self._turns_for(claim, wanted):
                reminder.cancel()
                self._crew.drop_idle()
                yield
        finally:
            reminder.cancel()

    @contextlib.asynccontextmanager
    async def _turns_for(self, claim: Claim, turns: int) -> AsyncIterator[None]:
        got = asyncio.Event()
        request = Request(claim.owner, claim.job, claim.priority, turns, got.set)
        self._turns.ask(request)
        self._count()
        try:
            await got.wait()
            yield
        finally:
            self._turns.give_back(request)

    async def _run_on(
        self, slot: Slot, unit: Unit[Any], workspace: Path, started: Callable[[str], None]
    ) -> Outcome:
        """Run a unit on an actor, which is dropped if it dies, falls silent or is not waited for."""
        slot.unit = unit.label
        try:
            place = await locate(slot)
            started(slot.name)
            work = slot.handle.run.remote(unit, workspace)
            outcome = await signs.heard_of(slot.handle, place, work, self._silence_s)
        except DEATHS as error:
            self._drop_dead(slot)
            raise WorkerLost(reason(error), value=slot.name) from error
        except TimeoutError:
            self._crew.drop(slot)
            if slot.place is not None:
                await signs.ensure_end(slot.place)
            silence = f"{slot.name} gave no sign of life for {self._silence_s:g} s and was killed."
            raise WorkerLost(silence, value=slot.name) from None
        except asyncio.CancelledError:
            self._crew.drop(slot)
            # The cluster calls it dead before the process is gone, which may still write.
            if slot.place is not None and not await signs.ensure_end(slot.place):
                _log.warning("%s was killed, but may still be there: %s", slot.name, slot.place)
            raise
        assert isinstance(outcome, Outcome)
        return outcome

    def _drop_dead(self, slot: Slot) -> None:
        """Drop a worker that died; what dies of a node's death is dropped before anybody relies on it."""
        self._crew.drop(slot)
        if slot.place is not None:
            node = slot.place.node
            self._crew.drop_idle(lambda idle: idle.place is not None and idle.place.node == node)
        self._refreshed = -math.inf
        self._refresh_soon()

    def release_idle(self) -> None:
        """Let go of what is not needed, and look how the cluster is. To be called every now and then."""
        expired = time.monotonic() - self._idle_release_s
        self._crew.drop_idle(lambda slot: slot.since <= expired)
        self._crew.drop_unwanted()
        self._refresh_soon()
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + (SWEEP_S if now < self._sweep_often_until else SWEEP_AT_REST_S)
            self._begin(_sweep())

    def _refresh_soon(self) -> None:
        age = time.monotonic() - self._refreshed
        at_work = self._turns.held or self._turns.waiting
        if not self._refreshing and age >= (REFRESH_S if at_work else REST_S):
            self._refreshing = True
            self._begin(self._refresh())

    async def _refresh(self) -> None:
        try:
            self._view = await asyncio.to_thread(look)
        except RayError as error:
            _log.warning("the nodes of the cluster are not known at the moment: %s", error)
        finally:
            self._refreshing = False
            self._refreshed = time.monotonic()
        default = room.default_kind(self._view.nodes, self._workers, self._reserved_gpus)
        if default.gpus or not self._default.gpus:  # GPUs that went away may come back
            self._default = default
        self._count()
        present = self._view.ids
        self._crew.drop_idle(lambda slot: slot.place is not None and slot.place.node not in present)

    def _count(self) -> None:
        demand = self._turns.held + self._turns.waiting
        self._turns.total = room.count_workers(
            self._view.nodes, self._workers, self._reserved_gpus, demand=demand, growth=self._growth
        )

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _make(self, kind: Kind, name: str) -> Any:
        actor = ray.remote(**options_of(kind))(Worker)
        return actor.remote(name, "cuda" if kind.gpus else "cpu", self._threads[kind])

    def _is_lost(self, kind: Kind) -> bool:
        return not room.fits(kind, self._view.nodes)

    def _describe(self, kind: Kind) -> str:
        nodes = room.describe_nodes(self._view.nodes)
        return f"it takes {room.describe(kind.resources)}, the cluster has {nodes}"

    def workers(self) -> list[dict[str, Any]]:
        """Return name, process id and present unit of every worker."""
        return [
            {"name": slot.name, "pid": slot.place.pid if slot.place else None, "unit": slot.unit}
            for slot in self._crew.slots.values()
        ]

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        for slot in list(self._crew.slots.values()):
            self._crew.drop(slot)


def _require_memory(unit: Unit[Any], memory: int | None, slot: Slot) -> None:
    """Refuse a unit that its node cannot hold, which is then the one with the most memory.

    What is known of a unit is an upper bound, in which weights count twice: it is certain where half of it is too much.
    On a GPU they may never be in main memory at once.

    Raises:
        InvalidSpec: Says what is needed and what there is.
    """
    if memory is None or slot.place is None or slot.kind is None or slot.kind.gpus:
        return
    if memory / 2 > slot.place.memory:
        raise InvalidSpec(
            f"{unit.label} needs about {memory / 1e9:.3g} GB of memory; the largest node has "
            f"{slot.place.memory / 1e9:.3g} GB.",
            hint="Add a node with more memory, or use a smaller model.",
        )


async def _sweep() -> None:
    try:
        removed = await asyncio.to_thread(gangs.remove_orphaned_placements)
    except RayError as error:
        _log.warning("placement groups could not be looked through: %s", error)
    else:
        if removed:
            _log.info("removed %d placement groups of gangs that have died", removed)


def _gang_actor() -> Any:
    module, _, name = gangs.ACTOR.partition(":")
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_restarts": 0,
        "max_concurrency": 1,
        "concurrency_groups": {GROUP: 1},
    }
    return ray.remote(**options)(getattr(import_module(module), name))


async def _wait_until_empty(directory: Path, members: int) -> None:
    """Wait until no member of a gang that was killed writes any more."""
    deadline = time.monotonic() + KILL_WAIT_S
    while time.monotonic() < deadline:
        if await asyncio.to_thread(gangs.is_empty, directory, members):
            return
        await asyncio.sleep(0.02)
    _log.warning("members that were killed are still there: %s", directory)
