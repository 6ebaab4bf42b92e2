"""Gathers what `GET /status` tells, each part from whoever knows it, and none for long."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from aidocks._version import __version__
from aidocks.jobs.store import JobStore
from aidocks.overview import Disk, JobCounts, Node, Overview, WorkerCounts
from aidocks.settings import Settings
from serve.context import Context

#: What did not answer by then is left out.
PATIENCE_S = 3.0
_DAY_S = 86_400

PartT = TypeVar("PartT")

log = logging.getLogger("serve.overview")


async def gather_overview(here: Context) -> Overview:
    """Return how the service is. It waits for no part longer than ``PATIENCE_S``."""
    jobs, nodes, disk, up_since = await asyncio.gather(
        _patiently(count_jobs, here.store),
        _patiently(_nodes),
        _patiently(_disk, here.settings),
        _patiently(_up_since, here.settings),
    )
    health = here.readiness.health
    return Overview(
        version=__version__,
        status=health.status,
        supervisor=health.supervisor,
        up_since=up_since or _BEGUN,
        jobs=jobs,
        workers=count_workers(here.supervisor.answer()),
        nodes=nodes,
        disk=disk,
    )


def count_jobs(store: JobStore) -> JobCounts:
    """Return how many jobs of the service there are."""
    queue = store.queue_length("service")
    counts = store.counts("service", time.time() - _DAY_S)
    return JobCounts(
        running=counts.get("running", 0),
        queued=counts.get("queued", 0),
        oldest_queued_s=round(queue.oldest_s, 1),
        succeeded_today=counts.get("succeeded", 0),
        failed_today=counts.get("failed", 0),
        cancelled_today=counts.get("cancelled", 0),
    )


def count_workers(answer: dict[str, Any]) -> WorkerCounts | None:
    """Return how many workers the supervisor has told of; None where it has not."""
    workers = answer.get("workers")
    if workers is None:
        return None
    busy = sum(1 for worker in workers if worker.get("unit"))
    return WorkerCounts(busy=busy, idle=len(workers) - busy, most=answer.get("parallelism", len(workers)))


async def _patiently(look: Callable[..., PartT], *arguments: Any) -> PartT | None:
    try:
        return await asyncio.wait_for(asyncio.to_thread(look, *arguments), PATIENCE_S)
    except Exception:
        log.exception("%s did not answer", look.__name__)
        return None


def _nodes() -> tuple[Node, ...] | None:
    if "ray" not in sys.modules:
        return None  # the application runs without a cluster
    from cluster.nodes import alive_nodes

    return alive_nodes()


def _disk(settings: Settings) -> Disk:
    usage = shutil.disk_usage(settings.home)
    return Disk(free_bytes=usage.free, total_bytes=usage.total)


def _up_since(settings: Settings) -> datetime | None:
    """Return when the embedded service was started; this process may have been started again since."""
    try:
        started = json.loads(settings.state_file.read_text())["started"]
    except (OSError, ValueError, KeyError):
        return None
    return datetime.fromtimestamp(started, UTC) if started else None


_BEGUN = datetime.now(UTC)
