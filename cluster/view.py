"""What the pool knows of the cluster: its nodes, read now and then, off the event loop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from cluster.room import Node


@dataclass(frozen=True)
class View:
    """The nodes that are alive.

    Attributes:
        nodes: All resources of each.
        ids: Ray's ids of them.
        cores: Real ones of those that have CPUs.
    """

    nodes: tuple[Node, ...]
    ids: frozenset[str]
    cores: float


def look() -> View:
    """Ask the cluster. Takes milliseconds, or as long as a head that is not there."""
    return view_of(ray.nodes(), ray.get_runtime_context().get_node_id(), os.cpu_count() or 1)  # type: ignore[no-untyped-call]


def view_of(rows: list[Mapping[str, Any]], here: str, cores_here: int) -> View:
    """Make a view of what ``ray.nodes()`` returns.

    Args:
        rows: One for each node.
        here: Id of the node of this process, which may be told of more CPUs than it has cores: the embedded head is.
        cores_here: Its cores.
    """
    alive = [row for row in rows if row["Alive"]]
    cores = [
        min(cpus, cores_here) if row["NodeID"] == here else cpus
        for row in alive
        if (cpus := row["Resources"].get("CPU", 0.0))
    ]
    return View(
        tuple(row["Resources"] for row in alive), frozenset(row["NodeID"] for row in alive), sum(cores)
    )
