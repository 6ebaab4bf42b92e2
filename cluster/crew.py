"""The worker actors of a pool: started when they are needed, lent to units, let go when they are in the way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from aidocks.errors import WorkerLost
from cluster import signs
from cluster.deaths import reason
from cluster.room import Kind
from cluster.signs import GROUP, Place, result

#: How often somebody who waits for a worker looks around.
LOOK_S = 1.0
#: How long a worker may take to come up before idle ones of another kind are let go for it.
IN_THE_WAY_S = 2.0
#: How long a worker may take to come up before people hear of it.
SAY_AFTER_S = 10.0
#: A worker that came up for nobody is not waited for any longer than this.
UNWANTED_S = 30.0

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Slot:
    """One actor. Without a place it is not up yet.

    Attributes:
        name: Readable name, such as ``worker-1``.
        kind: What it takes of its node; None for one that runs a gang.
        handle: Of the actor.
        place: Where its process is.
        unit: What it runs, for people.
        since: Begin of its present state, on the monotonic clock.
    """

    name: str
    kind: Kind | None
    handle: Any
    place: Place | None = None
    unit: str | None = None
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Wait:
    kind: Kind
    slot: asyncio.Future[Slot]


class Crew:
    """All actors of a pool. All methods are for one event loop.

    Args:
        make: Makes an actor of a kind that goes by a name; returns its handle.
        is_lost: Says whether no node that is there could hold a worker of a kind.
        describe: Says what the cluster has, for people.
        patience_s: How long a worker is waited for that nothing but the cluster keeps from coming up.
    """

    def __init__(
        self,
        make: Callable[[Kind, str], Any],
        is_lost: Callable[[Kind], bool],
        describe: Callable[[Kind], str],
        patience_s: float,
    ) -> None:
        self._make = make
        self._is_lost = is_lost
        self._describe = describe
        self._patience_s = patience_s
        self._waits: list[_Wait] = []
        self._coming: set[asyncio.Task[None]] = set()
        self.slots: dict[str, Slot] = {}
        self.idle: list[Slot] = []

    async def take(self, kind: Kind, most: int, say: Callable[[str], None]) -> Slot:
        """Return a worker that serves a kind: an idle one, else the first that comes up or becomes idle.

        Args:
            kind: What is asked for.
            most: Workers that there may be: beyond that, idle ones of another kind go.
            say: Tells people once, where it takes long.

        Raises:
            WorkerLost: None came up for as long as patience lasts, or it died while it did.
        """
        for slot in reversed(self.idle):  # the one used last: its caches are warm, and others may be released
            if slot.kind is not None and slot.kind.serves(kind):
                self.idle.remove(slot)
                return slot
        wait = _Wait(kind, asyncio.get_running_loop().create_future())
        self._waits.append(wait)
        try:
            self._start_for(wait, most)
            return await self._patiently(wait, say)
        except asyncio.CancelledError:
            if wait.slot.done() and not wait.slot.cancelled() and wait.slot.exception() is None:
                self.give(wait.slot.result())
            raise
        finally:
            self._waits.remove(wait)

    def give(self, slot: Slot) -> None:
        """Take a worker back: for somebody who waits for one that takes as much, or to idle."""
        slot.unit, slot.since = None, time.monotonic()
        for wait in self._waits:
            if slot.kind is not None and slot.kind.serves(wait.kind) and not wait.slot.done():
                wait.slot.set_result(slot)
                return
        self.idle.append(slot)

    def add(self, stem: str, kind: Kind | None, make: Callable[[str], Any]) -> Slot:
        """Make an actor under the first free name."""
        number = next(n for n in range(1, len(self.slots) + 2) if f"{stem}-{n}" not in self.slots)
        name = f"{stem}-{number}"
        self.slots[name] = slot = Slot(name, kind, make(name))
        return slot

    def drop(self, slot: Slot) -> None:
        """Let an actor go, dead or alive."""
        self.slots.pop(slot.name, None)
        if slot in self.idle:
            self.idle.remove(slot)
        # Also one that is said to be dead: "unavailable" may come back, while its unit runs again elsewhere.
        ray.kill(slot.handle, no_restart=True)

    def drop_idle(self, where: Callable[[Slot], bool] = lambda _: True) -> None:
        """Let idle workers go."""
        for slot in [slot for slot in self.idle if where(slot)]:
            self.drop(slot)

    def drop_unwanted(self) -> None:
        """Let workers go that do not come up and that nobody waits for any more."""
        late = time.monotonic() - UNWANTED_S
        for slot in [slot for slot in self._starting() if slot.since < late]:
            if not any(slot.kind and slot.kind.serves(wait.kind) for wait in self._waits):
                self.drop(slot)

    @property
    def busy(self) -> bool:
        """Whether any unit runs."""
        return any(slot.unit is not None for slot in self.slots.values())

    def _starting(self) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.place is None and slot.kind is not None]

    def _start_for(self, wait: _Wait, most: int) -> None:
        open_waits = [other for other in self._waits if other.kind == wait.kind and not other.slot.done()]
        coming = [slot for slot in self._starting() if slot.kind and slot.kind.serves(wait.kind)]
        if len(coming) >= len(open_waits):
            return
        while len(self.slots) >= most and self.idle:
            self.drop(self.idle[0])
        slot = self.add("worker", wait.kind, lambda name: self._make(wait.kind, name))
        task = asyncio.create_task(self._come_up(slot))
        self._coming.add(task)
        task.add_done_callback(self._coming.discard)

    async def _come_up(self, slot: Slot) -> None:
        try:
            await locate(slot)
        except Exception as error:  # noqa: BLE001 - whatever it was, whoever waits is told
            if slot.name not in self.slots:
                return  # it was let go
            self.drop(slot)
            text = reason(error) if isinstance(error, RayError) else str(error)
            lost = WorkerLost(f"A worker died before it was up: {text}", value=slot.name)
            for wait in self._waits:
                if wait.kind == slot.kind and not wait.slot.done():
                    wait.slot.set_exception(lost)
                    return
        else:
            if slot.name in self.slots:
                self.give(slot)

    async def _patiently(self, wait: _Wait, say: Callable[[str], None]) -> Slot:
        begin = hopeless_since = time.monotonic()
        said = False
        while True:
            done, _ = await asyncio.wait({wait.slot}, timeout=LOOK_S)
            if done:
                return wait.slot.result()
            now = time.monotonic()
            if now - begin >= IN_THE_WAY_S:
                self.drop_idle(lambda slot: slot.kind is not None and not slot.kind.serves(wait.kind))
            if not said and now - begin >= SAY_AFTER_S:
                said = True
                say(f"It waits for a worker: {self._describe(wait.kind)}.")
            # While others of ours run, what they hold comes free; unless what is asked for is nowhere at all.
            if self.busy and not self._is_lost(wait.kind):
                hopeless_since = now
            if now - hopeless_since >= self._patience_s:
                self._give_up(wait)
                raise WorkerLost(
                    f"No worker came up for {self._patience_s:g} s: {self._describe(wait.kind)}.",
                    hint="Add nodes, or ask for less for each worker (resources).",
                )

    def _give_up(self, wait: _Wait) -> None:
        for slot in self._starting():
            if slot.kind == wait.kind:
                self.drop(slot)
                return


def options_of(kind: Kind) -> dict[str, Any]:
    """Return what an actor of a kind asks of Ray: spread over the nodes, so that units use all of them."""
    return {
        "num_cpus": kind.cpus,
        "num_gpus": kind.gpus,
        "memory": kind.memory or None,
        "scheduling_strategy": "SPREAD",
        "max_restarts": 0,
        "max_concurrency": 1,
        "concurrency_groups": {GROUP: 1},
    }


async def locate(slot: Slot) -> Place:
    """Return where an actor's process is, as soon as it is up."""
    if slot.place is None:
        slot.place = await result(slot.handle.__ray_call__.remote(signs.whereabouts))
    return slot.place
