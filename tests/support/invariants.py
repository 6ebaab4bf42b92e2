"""What must hold when faults have fallen on a service: nothing lost, nothing twice, nothing half, nothing left."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from aidocks.checkpoints.files import hash_file
from aidocks.jobs.model import EventType, Job, Status
from aidocks.jobs.retention import remove_leftovers
from aidocks.models.registry import MANIFEST_FILE, Registry
from aidocks.settings import Settings
from tests.support.nodes import Nodes
from tests.support.orders import BASES, Made, Order, Stream, made_by

#: What a job may fail with when nodes die, and disks fill, around it; anything else is not the true cause.
CAUSES = ("worker_lost", "insufficient_disk")
CLEAN_S = 40.0
#: Run as a driver: placement groups that are held, and the processes that the supervisor knows.
PROGRAM = """
import json, ray
ray.init(namespace="aidocks", log_to_driver=False, configure_logging=False)
from ray.util import placement_group_table
held = [group["placement_group_id"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
known = ray.get(ray.get_actor("aidocks-supervisor").ping.remote(), timeout=30)
print(json.dumps({"groups": held, "workers": [worker["pid"] for worker in known["workers"]]}))
"""


def violations(nodes: Nodes, stream: Stream, expected: Mapping[str, Made]) -> list[str]:
    """Return everything that does not hold; the stream must have ended."""
    settings = nodes.settings
    found = []
    for order in stream.orders:
        found += [f"{order.key}: {what}" for what in _of_order(settings, stream, order, expected)]
    found += _of_registry(settings, stream)
    found += _leftovers(settings, stream)
    found += _of_cluster(nodes)
    return found


def _of_order(
    settings: Settings, stream: Stream, order: Order, expected: Mapping[str, Made]
) -> Iterator[str]:
    jobs = stream.jobs(order)
    if order.refused is not None and not jobs:
        return
    if len(jobs) != 1:
        yield f"has {len(jobs)} jobs, after {order.submissions} submissions; refused: {order.refused}"
        return
    (job,) = jobs
    yield from _of_history(stream, job)
    if order.refused is not None:
        yield f"was refused ({order.refused}), but is job {job.id}"
    if job.status is Status.FAILED:
        code = (job.error or {}).get("code")
        if code not in CAUSES:
            yield f"failed with {code}: {(job.error or {}).get('detail')}"
    elif job.status is not Status.SUCCEEDED:
        yield f"is {job.status}"
    elif made_by(settings, job) != expected[order.kind]:
        yield f"job {job.id} made something else: {made_by(settings, job)} rather than {expected[order.kind]}"


def _of_history(stream: Stream, job: Job) -> Iterator[str]:
    events = stream.store.events(job.id, limit=100_000)
    if [event.sequence for event in events] != list(range(1, len(events) + 1)):
        yield f"job {job.id}: its events have gaps"
    finished = Counter(event.data["unit_id"] for event in events if event.type is EventType.UNIT_FINISHED)
    twice = [unit_id for unit_id, count in finished.items() if count > 1]
    if twice:
        yield f"job {job.id}: units were journalled twice: {twice}"
    if set(finished) != set(stream.store.units(job.id)):
        yield f"job {job.id}: journal and events differ"
    ends = [event.type for event in events if event.type in ("succeeded", "failed", "cancelled")]
    if len(ends) != 1 and job.status.terminal:
        yield f"job {job.id}: ended {len(ends)} times"


def _of_registry(settings: Settings, stream: Stream) -> Iterator[str]:
    registry = Registry(settings.models_dir)
    wanted = {order.output for order in stream.orders if order.output and order.kind != "trivial"}
    for path in sorted(settings.models_dir.iterdir()):
        if path.name.startswith("."):
            inside = [inner.name for inner in path.iterdir()] if path.is_dir() else []
            if path.name != ".staging" and inside:
                yield f"the registry has left {path.name}: {inside}"
            continue
        if path.name not in wanted | {*BASES, "chaos-train"}:
            yield f"the registry has a model that nobody ordered: {path.name}"
        if not (path / MANIFEST_FILE).is_file():
            yield f"{path.name} has no manifest"
            continue
        for file in registry.manifest(path.name).files:
            if (path / file.path).stat().st_size != file.bytes or hash_file(path / file.path) != file.sha256:
                yield f"{path.name}/{file.path} is not what its manifest says"


def _leftovers(settings: Settings, stream: Stream) -> Iterator[str]:
    """Name what is there after what the supervisor does every minute was done once more."""
    deadline = time.monotonic() + CLEAN_S
    while True:
        remove_leftovers(stream.store, settings)
        left = [*_entries(settings.workspaces_dir), *_entries(settings.models_dir / ".staging")]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    yield from (f"left behind: {path} with {[inner.name for inner in path.rglob('*')][:5]}" for path in left)


def _of_cluster(nodes: Nodes) -> Iterator[str]:
    deadline = time.monotonic() + CLEAN_S
    while True:
        known = json.loads(nodes.run_on_head(sys.executable, "-c", PROGRAM).splitlines()[-1])
        orphans = [
            f"{process.pid} {title}"
            for node in nodes.nodes
            for process in nodes.processes(node)
            if (title := _title(process)).startswith(("ray::Worker", "ray::RayGang", "ray::RayTrainWorker"))
            and process.pid not in known["workers"]
        ]
        if (not orphans and not known["groups"]) or time.monotonic() > deadline:
            break
        time.sleep(1)
    if known["groups"]:
        yield f"placement groups are held that nobody uses: {known['groups']}"
    if orphans:
        yield f"processes that no supervisor knows: {orphans}"


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
