"""What workers take of nodes: kinds of workers, how many there may be, and whether any node could hold one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aidocks.errors import InvalidSpec
from aidocks.specs.resources import Resources

#: All resources of a node, by Ray's names (memory in bytes).
Node = Mapping[str, float]

#: Ray counts in ten-thousandths of a GPU.
_GRAIN = 10_000
#: What a unit is known to need is rounded up to so much, so that units of about the same size share workers.
_MEMORY_STEP = 10**9


@dataclass(frozen=True)
class Kind:
    """What a worker takes of its node.

    Attributes:
        cpus: Cores of Ray's count.
        gpus: GPUs, or a part of one.
        memory: Bytes that are reserved; 0: none.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    memory: int = 0

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's names."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory)}
        return {name: amount for name, amount in wanted.items() if amount}

    def serves(self, other: Kind) -> bool:
        """Say whether a worker of this kind may run what asks for the other one."""
        return (self.cpus, self.gpus) == (other.cpus, other.gpus) and self.memory >= other.memory

    def worth(self, default: Kind) -> int:
        """Return for how many workers of the default kind it counts."""
        shares = [1.0]
        if default.gpus:
            shares.append(self.gpus / default.gpus)
        if default.cpus:
            shares.append(self.cpus / default.cpus)
        return math.ceil(max(shares) - 1e-9)


def default_kind(nodes: Sequence[Node], workers: int | None, reserved_gpus: float = 0.0) -> Kind:
    """Return what a worker takes when nobody asks for anything else: a GPU or its share, without GPUs a core.

    Args:
        nodes: Of the cluster.
        workers: How many there shall be; None: one for each GPU, or core.
        reserved_gpus: GPUs that are left to others: whole ones, or a part of every one.
    """
    gpus = _gpus(nodes)
    if not gpus:
        return Kind(cpus=1.0)
    part = 1.0 - reserved_gpus if reserved_gpus < 1 else 1.0
    # A part of a GPU must lie on one: three workers on two GPUs take halves, not thirds of both.
    on_each = math.ceil(workers / _left(gpus, reserved_gpus)) if workers else 1
    return Kind(gpus=max(1, math.floor(_GRAIN * part / on_each)) / _GRAIN)


def count_workers(
    nodes: Sequence[Node],
    workers: int | None,
    reserved_gpus: float = 0.0,
    *,
    demand: int = 0,
    growth: int = 0,
) -> int:
    """Return how many workers there may be at the same time.

    A node without CPUs and GPUs, such as a head that only administrates, counts for nothing.

    Args:
        nodes: That are alive.
        workers: What was asked for; then it is that many, whatever there is: the cluster may bring more nodes.
        reserved_gpus: As in :func:`default_kind`.
        demand: Workers that are in use or waited for.
        growth: How many of those may be beyond what there is room for, which makes an autoscaler bring nodes.
    """
    if workers:
        return workers
    gpus = _gpus(nodes)
    there = _left(gpus, reserved_gpus) if gpus else math.floor(sum(node.get("CPU", 0) for node in nodes))
    return max(1, there, min(demand, there + growth))


def _gpus(nodes: Sequence[Node]) -> int:
    return int(sum(node.get("GPU", 0) for node in nodes))


def _left(gpus: int, reserved: float) -> int:
    return max(1, gpus - (math.ceil(reserved) if reserved >= 1 else 0))


def kind_of(default: Kind, asked: Resources | None, memory: int | None, nodes: Sequence[Node]) -> Kind:
    """Return the kind of worker that a unit asks for.

    What a request says is taken at its word. What is known of a unit (``memory``) is an upper bound, and so is
    reserved as far as the largest node goes: a node counts as memory what was free when it was started.

    Args:
        default: Of the pool.
        asked: By the request.
        memory: Bytes that the unit is known to need.
        nodes: That are alive.
    """
    cpus, gpus, requested = default.cpus, default.gpus, 0
    if asked is not None:
        gpus = gpus if asked.gpus is None else asked.gpus
        requested = int((asked.memory_gb or 0) * 1e9)
        if asked.cpus is not None:
            cpus = asked.cpus
        elif not gpus:
            cpus = max(1.0, cpus)
    kind = Kind(cpus, gpus, requested)
    if memory is None or memory <= requested:
        return kind
    room = [int(node.get("memory", 0)) for node in nodes if places(Kind(cpus, gpus).resources, [node])[0]]
    rounded = math.ceil(memory / _MEMORY_STEP) * _MEMORY_STEP
    return Kind(cpus, gpus, max(requested, min(rounded, max(room, default=rounded))))


def threads_of(kind: Kind, asked: Resources | None, cores: float, workers: int) -> int:
    """Return how many threads a worker computes with: its cores, or its share of the cluster's.

    Args:
        kind: Of the worker.
        asked: By the request.
        cores: Real ones of all nodes.
        workers: That share them.
    """
    if asked is not None and asked.cpus is not None:
        return max(1, math.floor(kind.cpus))
    return max(1, int(cores) // max(1, workers))


def places(wanted: Mapping[str, float], nodes: Sequence[Node]) -> list[int]:
    """Return how often each node could hold ``wanted``, if nothing else ran there."""
    return [
        min((math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in wanted.items()), default=0)
        for node in nodes
    ]


def fits(kind: Kind, nodes: Sequence[Node]) -> bool:
    """Say whether a node could hold a worker of a kind, if nothing else ran there."""
    return any(places(kind.resources, nodes))


def require_room(kind: Kind, nodes: Sequence[Node]) -> None:
    """Refuse a worker that no node could ever hold.

    Raises:
        InvalidSpec: Naming the resource that is asked for in vain.
    """
    if fits(kind, nodes):
        return
    fields = {"CPU": "cpus", "GPU": "gpus", "memory": "memory_gb"}
    alone = [name for name, amount in kind.resources.items() if not any(places({name: amount}, nodes))]
    name = alone[0] if alone else "CPU"
    amount = kind.resources.get(name, 0)
    raise InvalidSpec(
        f"No node of the cluster can hold a worker of {describe(kind.resources)}. It has {describe_nodes(nodes)}.",
        field=f"resources.{fields[name]}",
        value=amount / 1e9 if name == "memory" else amount,
        hint="Ask for less for each worker (resources), or add a larger node.",
    )


def describe(wanted: Mapping[str, float]) -> str:
    """Say what somebody takes, such as ``1 CPU, 6 GB of memory``."""
    return ", ".join(_amount(name, amount) for name, amount in wanted.items() if amount) or "nothing"


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Say what nodes have, such as ``2 nodes: 4 CPU, 16 GB of memory; 8 CPU, 32 GB of memory``."""
    known = ("CPU", "GPU", "memory")
    each = [describe({name: node.get(name, 0) for name in known}) for node in nodes]
    return f"{count(len(nodes), 'node')}{': ' if each else ''}{'; '.join(dict.fromkeys(each))}"


def count(number: int, what: str) -> str:
    """Say how many of something there are, such as ``1 node`` and ``2 nodes``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _amount(name: str, amount: float) -> str:
    return f"{amount / 1e9:.3g} GB of memory" if name == "memory" else f"{amount:g} {name}"
