"""Ends a supervisor that hangs, so that Ray starts it anew: Ray sees no fault in a process that is stopped or stuck."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aidocks.jobs.model import SERVICE
from aidocks.jobs.runner import process_is_gone
from aidocks.jobs.store import JobStore
from aidocks.settings import Settings

if TYPE_CHECKING:
    from cluster.signs import Place

log = logging.getLogger("serve.hung")


class HungProcess:
    """The process that held the supervisor's lease last, when it neither answers nor renews it.

    It is ended by its process id and time of start, as the lease names them: a younger one that is just coming up is
    never meant, whoever decides this, and however many do. One that is out of reach, because its node is away, holds
    no valid token any more once the cluster has made another.

    Args:
        settings: Of the installation.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store: JobStore | None = None

    async def end(self) -> bool:
        """End it, if its lease has run out; to be called when the supervisor does not answer.

        Returns:
            Whether a process was found, and is gone.
        """
        place = await asyncio.to_thread(self._find)
        if place is None:
            return False
        from cluster.signs import ensure_end

        gone = await ensure_end(place)
        log.warning(
            "the supervisor was silent and %s: %s", "was killed" if gone else "is out of reach", place
        )
        return gone

    def _find(self) -> Place | None:
        if self._store is None:
            self._store = JobStore(self._settings.store_url)
        lease = self._store.lease(SERVICE)
        if lease is None or lease.live or process_is_gone(lease.owner):
            return None
        host, _, process = lease.owner.partition("/")
        pid, _, began = process.partition("/")
        return _place(host, pid, began) if pid.isdigit() else None


def _place(host: str, pid: str, began: str) -> Place | None:
    """Return where a process is; None where its machine is no node of the cluster."""
    import ray

    from cluster.signs import Place

    rows = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [str(row["NodeID"]) for row in rows if row["Alive"] and row["NodeManagerHostname"] == host]
    if not nodes:
        return None
    here = ray.get_runtime_context().get_node_id()
    return Place(host, here if here in nodes else nodes[0], int(pid), began, 0)
