"""Gangs on the cluster, through the supervisor: stories, checkpoints, deaths, cancellation, what stays behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from aidocks.errors import InvalidSpec
from aidocks.jobs.model import EventType, Status
from aidocks.jobs.store import JobStore
from aidocks.plan import Gang
from aidocks.settings import Settings
from cluster.gang import require_room
from tests.support.gang_jobs import GangJob, until
from tests.support.gang_operation import members

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


#: Another user of the cluster, who has most of its CPUs for a while.
HOLD = """
from pathlib import Path
from ray.util.placement_group import placement_group
from tests.support.gang_jobs import until
ray.get(placement_group([{"CPU": 3}]).ready(), timeout=60)
Path(sys.argv[1], "held").touch()
until(Path(sys.argv[1], "release").exists, "the word")
answer = None
"""


def test_a_gang_waits_for_room_fails_for_good_and_is_resumed(
    begin: Callable[..., GangJob], drive: Callable[..., Any], tmp_path: Path
) -> None:
    with ThreadPoolExecutor() as threads:
        other = threads.submit(drive, HOLD, tmp_path)
        try:
            until((tmp_path / "held").exists, "the other user")
            failed = begin(steps=4, fails_at=3)
            until(lambda: failed.events(EventType.MESSAGE), "a word of the gang that waits")
        finally:
            (tmp_path / "release").touch()
        other.result()
    (said,) = failed.events(EventType.MESSAGE)
    assert "waits for room for 2 workers of 1 CPU each" in said.data["text"]
    ended = failed.ended()
    assert ended.status is Status.FAILED
    assert ended.error is not None
    assert (ended.error["code"], ended.error["detail"]) == ("invalid_spec", "Step 3 cannot be.")
    assert len(members(failed.traces)) == 2, "what would happen again is not tried again"
    assert failed.checkpoints == ["checkpoint-00000002"]

    # With all CPUs of the cluster: nothing of the other one holds any.
    last = failed.settings.checkpoints_dir / failed.id / failed.checkpoints[-1]
    job = begin(steps=6, waits_after=6, cpus=2, resume=str(last))
    job.wait_inside()
    assert job.checkpoints == ["checkpoint-00000004", "checkpoint-00000006"]
    parts = sorted(
        path.name for path in (job.settings.checkpoints_dir / job.id / job.checkpoints[-1]).iterdir()
    )
    assert parts == ["part-0.json", "part-1.json"]
    said = (job.settings.workspaces_dir / job.id / "training" / "log-1.txt").read_text()
    assert "member 1 begins at 2" in said
    (job.traces / "go").touch()

    ended = job.ended()
    assert ended.status is Status.SUCCEEDED, ended.error
    assert ended.result is not None
    assert (ended.result["total"], ended.result["begun_at"]) == (6 * 3, [2])
    metrics = [event.data for event in job.events(EventType.METRICS)]
    assert [data["step"] for data in metrics] == [3, 4, 5, 6]
    assert metrics[1]["loss"] == 0.25
    told = job.events(EventType.METRICS, EventType.MESSAGE, EventType.UNIT_FINISHED)
    assert [event.data.get("text") for event in told[-2:]] == ["added up", None], "all is told before the end"
    fractions = [event.data["fraction"] for event in job.events(EventType.PROGRESS)]
    assert fractions == sorted(fractions)
    assert {member["threads"] for member in members(job.traces)} == {2}
    until(lambda: not (job.settings.checkpoints_dir / job.id).exists(), "checkpoints of no use to be removed")
    until(lambda: not job.processes(), "all processes to end")


def test_a_gang_does_not_wait_for_workers_that_have_become_idle(
    begin: Callable[..., GangJob], drive: Callable[..., Any], trivial_settings: Settings, tmp_path: Path
) -> None:
    store = JobStore(trivial_settings.store_url)
    with ThreadPoolExecutor() as threads:
        other = threads.submit(drive, HOLD, tmp_path)
        try:
            until((tmp_path / "held").exists, "the other user")
            # It has the CPU that is left when the gang gets its turn, and would keep it afterwards.
            spec = {"traces": str(tmp_path), "units": 1, "seconds": 2.0}
            unit = store.submit("trivial", spec, output_name=None)[0].id
            until(lambda: any(e.type is EventType.UNIT_STARTED for e in store.events(unit)), "a busy worker")
            assert begin(members=1, steps=2).ended().status is Status.SUCCEEDED
        finally:
            (tmp_path / "release").touch()
        other.result()
    store.close()


def test_whoever_dies_it_costs_what_came_after_the_last_checkpoint(begin: Callable[..., GangJob]) -> None:
    job = begin(steps=6, waits_after=3)
    # A member's own death: tests/ray/test_two_nodes.py, and tests/chaos/test_training_kills.py with a real training.
    deaths = ("ray::RayGang", "ray::SupervisorActor")
    for number, title in enumerate(deaths, start=1):
        job.wait_for_members(2 * number)
        present = [member["pid"] for member in members(job.traces)[-2:]]
        job.wait_inside()
        (job.traces / "waiting").unlink()
        job.kill(title)
        job.wait_for_members(2 * number + 1)
        assert not [pid for pid in present if psutil.pid_exists(pid)], f"two gangs at once after {title}"
    (job.traces / "go").touch()
    ended = job.ended()
    assert ended.status is Status.SUCCEEDED, ended.error
    assert ended.result is not None
    assert (ended.result["total"], ended.result["begun_at"]) == (6 * 3, [0, 2, 2])
    assert ended.attempt == 2
    messages = [event.data["text"] for event in job.events(EventType.MESSAGE)]
    assert "gang-1 died; it begins anew from its last checkpoint" in messages
    assert len(messages) == len(set(messages)), "the next supervisor tells nothing twice"


def test_cancelling_leaves_the_checkpoints_and_no_process(begin: Callable[..., GangJob]) -> None:
    job = begin(steps=6, waits_after=3)
    job.wait_inside()
    pids = [member["pid"] for member in members(job.traces)]
    requested = time.monotonic()
    job.store.request_cancel(job.id)
    assert job.ended().status is Status.CANCELLED
    assert time.monotonic() - requested < 5
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert not (job.settings.workspaces_dir / job.id).exists()
    assert job.checkpoints == ["checkpoint-00000002"]

    # One that is cancelled while it starts, when it has all CPUs and no members yet.
    starting = begin(steps=4, cpus=2)
    until(lambda: starting.processes("ray::TrainController"), "the controller")
    starting.store.request_cancel(starting.id)
    assert starting.ended().status is Status.CANCELLED
    until(lambda: not job.processes(), "all processes to end")


def test_a_gang_that_the_cluster_cannot_hold_is_refused() -> None:
    nodes = [{"CPU": 4.0, "memory": 8e9}, {"CPU": 2.0, "memory": 8e9}]
    checkpoints = Path("none")
    require_room(Gang(members=3, checkpoints=checkpoints, cpus=2), nodes)
    with pytest.raises(InvalidSpec, match=r"room for 3 workers of 2 CPU each, on 2 nodes") as caught:
        require_room(Gang(members=4, checkpoints=checkpoints, cpus=2), nodes)
    assert (caught.value.field, caught.value.value) == ("workers", 4)
    with pytest.raises(InvalidSpec, match=r"room for 2 workers of 1 CPU, 6 GB of memory each"):
        require_room(Gang(members=3, checkpoints=checkpoints, memory=6 * 10**9), nodes)
    with pytest.raises(InvalidSpec, match="1 GPU"):
        require_room(Gang(members=1, checkpoints=checkpoints, gpus=1), nodes)
