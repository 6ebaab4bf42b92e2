"""The machines of the cluster."""

from __future__ import annotations

from typing import Any

import ray

from aidocks.overview import Node


def alive_nodes() -> tuple[Node, ...] | None:
    """Return the nodes that are there, the head first; None where this process is not connected to a cluster."""
    if not ray.is_initialized():
        return None
    found: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    found.sort(
        key=lambda node: ("node:__internal_head__" not in node["Resources"], node["NodeManagerAddress"])
    )
    return tuple(
        Node(
            name=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            memory_bytes=int(node["Resources"].get("memory", 0)),
        )
        for node in found
    )
