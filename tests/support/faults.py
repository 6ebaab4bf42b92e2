"""Faults, drawn by chance from a seed, that fall on a service of several nodes; and how long it takes to recover."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from aidocks.jobs.model import Event, EventType
from aidocks.jobs.store import JobStore
from tests.support.nodes import Node, Nodes
from tests.support.orders import Stream

#: How long a fault's recovery is waited for, at most, before the next one falls.
RECOVERY_WAIT_S = 90.0
#: How long it may take until work is known to be interrupted by a fault; else there was none to interrupt.
NOTICED_S = {"kill worker": 10.0, "halt worker": 30.0, "kill node": 40.0, "kill raylet": 40.0}
#: How long what was halted stays so.
HALT_S = (1.0, 8.0)
FULL_S = (2.0, 6.0)


@dataclass
class Struck:
    """A fault that has fallen.

    Attributes:
        victim: What it hit.
        time: When, in seconds since 1970.
        until: When it was over: something halted went on, a node was back, a disk had room again.
        recovered: Seconds until the work that it had interrupted was under way again, infinite if that was not
            waited to see; None if it had interrupted none.
        alone: No other fault fell before it was over.
    """

    fault: str
    victim: str
    time: float
    until: float
    recovered: float | None = None
    alone: bool = True


@dataclass
class Scene:
    """What faults fall on.

    Attributes:
        ballast: File that fills the data directory's disk; None where that is not one of its own.
        store_fault: Breaks the connections to the job store; None where it is a file.
    """

    nodes: Nodes
    stream: Stream
    random: random.Random
    ballast: Path | None = None
    store_fault: Callable[[], str] | None = None
    lost_nodes: int = 0
    pending: list[Callable[[], None]] = field(default_factory=list)

    @property
    def store(self) -> JobStore:
        return self.stream.store

    def find(self, *titles: str) -> list[tuple[Node, psutil.Process]]:
        """Return the service's processes whose titles begin so, in an order that chance decides."""
        found = []
        for node in self.nodes.nodes:
            for process in self.nodes.processes(node):
                with suppress(psutil.Error):
                    if " ".join(process.cmdline()).startswith(titles):
                        found.append((node, process))
        self.random.shuffle(found)
        return found


#: Lets a fault fall; returns what it hit, or None where there is nothing of the kind just now.
Strike = Callable[[Scene], str | None]


def kill(*titles: str) -> Strike:
    """A process ends by SIGKILL."""

    def strike(scene: Scene) -> str | None:
        for node, process in scene.find(*titles):
            with suppress(psutil.Error):
                name = process.cmdline()[0].strip()
                process.kill()
                return f"{name} ({process.pid}) on node {node.number}"
        return None

    return strike


def halt(*titles: str, for_ever: bool = False) -> Strike:
    """A process stops to do anything, for some seconds or until somebody else ends it."""

    def strike(scene: Scene) -> str | None:
        for node, process in scene.find(*titles):
            with suppress(psutil.Error):
                name = process.cmdline()[0].strip()
                process.suspend()
                if not for_ever:
                    time.sleep(scene.random.uniform(*HALT_S))
                    process.resume()
                return f"{name} ({process.pid}) on node {node.number}"
        return None

    return strike


def kill_node(scene: Scene) -> str | None:
    """All of a node ends; afterwards there is another."""
    others = [node for node in scene.nodes.nodes if not node.is_head]
    if not others:
        return None
    node = scene.random.choice(others)
    scene.nodes.kill(node)
    scene.pending.append(lambda: void(scene.nodes.add()))
    return f"node {node.number} ({node.address})"


def halt_node(scene: Scene) -> str | None:
    """A node stops for some seconds."""
    others = [node for node in scene.nodes.nodes if not node.is_head]
    if not others:
        return None
    node = scene.random.choice(others)
    scene.nodes.stop(node)
    time.sleep(scene.random.uniform(*HALT_S))
    scene.nodes.cont(node)
    return f"node {node.number} ({node.address})"


def _other_raylets(scene: Scene) -> list[tuple[Node, psutil.Process]]:
    found = []
    for node in scene.nodes.nodes:
        for process in [] if node.is_head else scene.nodes.processes(node):
            with suppress(psutil.Error):
                if process.name() == "raylet":
                    found.append((node, process))
    scene.random.shuffle(found)
    return found


def kill_raylet(scene: Scene) -> str | None:
    """What makes a machine a node ends; the rest of it follows by itself, and afterwards there is another."""
    found = _other_raylets(scene)
    if not found:
        return None
    node, process = found[0]
    process.kill()
    scene.pending += [lambda: scene.nodes.kill(node), lambda: void(scene.nodes.add())]
    return f"raylet ({process.pid}) of node {node.number}"


def halt_raylet(scene: Scene) -> str | None:
    """What makes a machine a node stops for some seconds."""
    for node, process in _other_raylets(scene):
        process.suspend()
        time.sleep(scene.random.uniform(*HALT_S))
        process.resume()
        return f"raylet ({process.pid}) of node {node.number}"
    return None


def kill_client(scene: Scene) -> str | None:
    """Whoever has just submitted a job dies, and asks again under the same key."""
    order = scene.stream.order(scene.random.choice(("slerp", "trivial")))
    process = scene.stream.submit_by_command(order)
    scene.stream.clients.append(process)
    time.sleep(scene.random.uniform(1.0, 4.0))
    os.kill(process.pid, signal.SIGKILL)
    scene.stream.submit(order)
    return order.key


def fill_disk(scene: Scene) -> str | None:
    """The disk of the data directory is full for some seconds."""
    if scene.ballast is None:
        return None
    with suppress(OSError), scene.ballast.open("wb", buffering=0) as file:
        for block in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * block)
    time.sleep(scene.random.uniform(*FULL_S))
    scene.ballast.unlink()
    return str(scene.ballast)


def break_store(scene: Scene) -> str | None:
    """Connections to the job store break."""
    return scene.store_fault() if scene.store_fault else None


def kill_haproxy(scene: Scene) -> str | None:
    """The program that takes the connections ends; it calls itself by its path."""
    for node in scene.nodes.nodes:
        for process in scene.nodes.processes(node):
            with suppress(psutil.Error):
                if process.name() == "haproxy":
                    process.kill()
                    return f"haproxy ({process.pid}) on node {node.number}"
    return None


GANG = ("ray::RayTrainWorker", "ray::TrainController", "ray::RayGang")
FAULTS: dict[str, Strike] = {
    "kill worker": kill("ray::Worker"),
    "kill supervisor": kill("ray::SupervisorActor"),
    "kill replica": kill("ray::ServeReplica:api:http"),
    "kill controller": kill("ray::ServeController"),
    "kill proxy actor": kill("ray::HAProxyManager", "ray::ProxyActor"),
    "kill haproxy": kill_haproxy,
    "kill gang": kill(*GANG),
    "kill node": kill_node,
    "kill raylet": kill_raylet,
    "kill client": kill_client,
    "halt worker": halt("ray::Worker", for_ever=True),
    "halt worker for a while": halt("ray::Worker"),
    "halt supervisor for a while": halt("ray::SupervisorActor"),
    "halt supervisor": halt("ray::SupervisorActor", for_ever=True),
    "halt replica for a while": halt("ray::ServeReplica:api:http"),
    "halt node for a while": halt_node,
    "halt raylet for a while": halt_raylet,
    "full disk": fill_disk,
    "broken store": break_store,
}


def void(_: object) -> None:
    """Take no notice of a value."""


class Weather:
    """Lets faults fall on a scene, one after another or, now and then, two at once."""

    def __init__(self, scene: Scene, names: tuple[str, ...], tell: Callable[[str], None] = void) -> None:
        self._scene = scene
        self._names = names
        self._tell = tell
        self.struck: list[Struck] = []

    def strike(self, name: str, *, wait: bool = True) -> Struck | None:
        """Let one fall; with ``wait``, until what it interrupted is under way again."""
        scene = self._scene
        begin = time.time()
        running = self._running()
        victim = FAULTS[name](scene)
        if victim is None:
            return None
        struck = Struck(name, victim, begin, time.time(), alone=wait)
        if wait:
            struck.recovered = self._recovery(name, begin, running)
        while scene.pending:
            scene.pending.pop(0)()
        struck.until = time.time()
        self.struck.append(struck)
        took = "" if struck.recovered is None else f", work again after {struck.recovered:.1f} s"
        self._tell(f"{name}: {victim}{took}")
        return struck

    def storm(self, count: int, together: float = 0.25, gap_s: tuple[float, float] = (0.2, 2.0)) -> None:
        """Let so many fall; each kind once, in some order, before any falls again where that is possible."""
        chance = self._scene.random
        deck: list[str] = []
        while len(self.struck) < count:
            if not deck:
                deck = list(self._names)
                chance.shuffle(deck)
            self.strike(deck.pop(), wait=chance.random() >= together)
            time.sleep(chance.uniform(*gap_s))

    def _running(self) -> dict[str, int]:
        """Return the jobs under way, each with the number of its last event."""
        store = self._scene.store
        with suppress(Exception):
            return {job.id: store.last_sequence(job.id) for job in store.unfinished("service")}
        return {}

    def _recovery(self, name: str, begin: float, running: dict[str, int]) -> float | None:
        """Wait until work is done again that a fault has interrupted; return the seconds since it fell."""
        measure = RECOVERIES.get(name)
        if measure is None:
            return None
        deadline = time.monotonic() + RECOVERY_WAIT_S
        while time.monotonic() < deadline:
            with suppress(Exception):  # the store may be what was hit
                events = {
                    job_id: self._scene.store.events(job_id, after=after, limit=10_000)
                    for job_id, after in running.items()
                }
                ended = all(self._scene.store.get(job_id).status.terminal for job_id in running)
                found = measure(events, begin)
                if found is not None:
                    return round(found - begin, 2)
                noticed = any(event.type in _SIGNS for told in events.values() for event in told)
                if ended or (not noticed and time.time() - begin > NOTICED_S.get(name, math.inf)):
                    return None
            time.sleep(0.1)
        return math.inf


#: Events that tell of interrupted work.
_SIGNS = (EventType.WORKER_LOST, EventType.RECOVERED)
Measure = Callable[[dict[str, list[Event]], float], float | None]


def lost_units_again(events: dict[str, list[Event]], begin: float) -> float | None:
    """Return when the last of the units was begun again whose worker was lost; None until then."""
    latest = None
    for told in events.values():
        lost = {
            event.data["unit_id"]: event.sequence for event in told if event.type is EventType.WORKER_LOST
        }
        for unit_id, sequence in lost.items():
            again = [
                event.time.timestamp()
                for event in told
                if event.type is EventType.UNIT_STARTED
                and event.data["unit_id"] == unit_id
                and event.sequence > sequence
            ]
            if not again:
                return None
            latest = max(latest or 0.0, again[0])
    return latest


def next_attempt_at_work(events: dict[str, list[Event]], begin: float) -> float | None:
    """Return when the first unit was begun, or finished, by an executor that has taken a job over."""
    found = []
    for told in events.values():
        recovered = [event.sequence for event in told if event.type is EventType.RECOVERED]
        if recovered:
            found += [
                event.time.timestamp()
                for event in told
                if event.sequence > recovered[0]
                and event.type in (EventType.UNIT_STARTED, EventType.UNIT_FINISHED, EventType.SUCCEEDED)
            ]
    return min(found, default=None)


RECOVERIES: dict[str, Measure] = {
    "kill worker": lost_units_again,
    "halt worker": lost_units_again,
    "kill node": lost_units_again,
    "kill raylet": lost_units_again,
    "kill supervisor": next_attempt_at_work,
    "halt supervisor": next_attempt_at_work,
}
