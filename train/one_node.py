"""Where a gang runs when nodes share no file system: all of it on one node, which has to be large enough."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aidocks.errors import InvalidSpec, WorkerLost
from aidocks.plan import Gang, GangUnit
from cluster.gang import describe_member, largest_size, say, too_large
from cluster.room import count

#: How often it is looked for a node that is gone.
_LOOK_S = 1.0


@dataclass(frozen=True)
class Place:
    """A node of the cluster.

    Attributes:
        node_id: As Ray knows it, in hexadecimal digits.
        address: By which Ray names its resource ``node:…``.
    """

    node_id: str
    address: str

    @property
    def strategy(self) -> NodeAffinitySchedulingStrategy:
        """What puts an actor there."""
        return NodeAffinitySchedulingStrategy(self.node_id, soft=False)


def choose_place(unit: GangUnit[Any], *, again: bool) -> Place:
    """Return the node on which a gang is to run: this one, if that is large enough.

    Args:
        unit: What the gang runs.
        again: Whether it has run before: then there was such a node, and it is waited for.

    Raises:
        InvalidSpec: None is.
        WorkerLost: None is any more, and none came back.
    """
    gang = unit.gang
    here = ray.get_runtime_context().get_node_id()
    deadline = time.monotonic() + gang.patience_s
    told = False
    while True:
        try:
            return choose(gang, [node for node in ray.nodes() if node["Alive"]], here)
        except InvalidSpec as error:
            if not again:
                raise
            if time.monotonic() >= deadline:
                raise WorkerLost(
                    f"A part of the cluster is gone and did not come back. {error.message}", hint=error.hint
                ) from None
            if not told:
                say(unit, f"A part of the cluster is gone. {error.message} It waits for it to come back.")
                told = True
        time.sleep(_LOOK_S)


def choose(gang: Gang, nodes: Iterable[Mapping[str, Any]], here: str) -> Place:
    """Return the node, of those that Ray lists, on which a gang is to run.

    Args:
        gang: That is to be started.
        nodes: All that are alive.
        here: Id of the one that is preferred.

    Raises:
        InvalidSpec: None is large enough, even if nothing else ran.
    """
    ordered = sorted(nodes, key=lambda node: (node["NodeID"] != here, node["NodeID"]))
    sizes = [largest_size(gang, [node["Resources"]]) for node in ordered]
    if any(sizes):
        node = ordered[sizes.index(max(sizes))]
        return Place(node["NodeID"], node["NodeManagerAddress"])
    raise too_large(
        gang,
        f"No node has room for {count(gang.sizes[-1], 'worker')} of {describe_member(gang)} each, and the nodes of "
        "this installation share no file system.",
        "Ask for fewer workers, or for less for each (resources); or give the nodes a common data directory.",
    )


def on_node(address: str) -> dict[str, float]:
    """Return the resource that only one node has."""
    return {f"node:{address}": 0.001}
