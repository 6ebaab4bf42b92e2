"""What decides whether a gang begins anew, and what keeps two gangs apart; without a cluster."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aidocks.errors import InsufficientDisk, InvalidSpec, WorkerLost
from aidocks.plan import Gang, PlanContext
from aidocks.telling import StoryReader
from cluster import gang as gangs
from tests.support.gang_operation import AddUp, GangSpec, make_training

ray_gang = pytest.importorskip("train.ray_gang")
watching = pytest.importorskip("train.ray_watching")


@pytest.fixture
def unit(tmp_path: Path) -> AddUp:
    """A gang whose job's directory is ``tmp_path / "workspace"``."""
    context: Any = PlanContext(
        "job-1", tmp_path / "workspace", None, None, tmp_path, tmp_path / "checkpoints"
    )  # type: ignore[arg-type]
    spec = GangSpec(traces=tmp_path)
    unit = AddUp(training=make_training(spec, context), spec=spec)
    unit.directory(context.workspace).mkdir(parents=True)
    return unit


@pytest.fixture
def fail(unit: AddUp, tmp_path: Path) -> Callable[[dict[int, Exception]], None]:
    """Tell the gang's watcher that members have failed; raises what ends the training."""
    watcher = watching.MemberWatcher(unit, tmp_path / "workspace")
    return lambda errors: watcher.after_exception(None, errors)


def killed(preempted: bool = False) -> Exception:
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    death = (
        RayActorError(error_msg="Taken back.", preempted=True)
        if preempted
        else RuntimeError("It was killed.")
    )
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=death)


NODE = {"CPU": 2.0, "node:10.0.0.1": 1.0}
OTHER = {"CPU": 3.0, "node:10.0.0.2": 1.0}


@pytest.mark.parametrize(
    ("nodes", "running", "size"),
    [
        ([NODE, OTHER], 0, 4),
        ([NODE], 0, 2),
        ([{"CPU": 1.9}], 0, 1),
        ([{"CPU": 0.5}, {"CPU": 0.5}], 0, 0),
        ([{"CPU": 1.0}], 2, 2),
        ([NODE], 2, 4),
        ([], 1, 1),
    ],
)
def test_the_largest_size_that_there_is_room_for(
    nodes: list[dict[str, float]], running: int, size: int
) -> None:
    gang = Gang(members=4, checkpoints=Path("none"), fewer=(2, 1))
    assert gangs.largest_size(gang, nodes, running) == size


def test_not_even_the_fewest_is_refused() -> None:
    gang = Gang(members=4, checkpoints=Path("none"), fewer=(3,))
    gangs.require_room(gang, [NODE, {"CPU": 1.0}])
    with pytest.raises(InvalidSpec, match="room for 2 workers of 1 CPU each, on 1 node") as caught:
        gangs.require_room(gang, [NODE])
    assert (caught.value.field, caught.value.value) == ("min_workers", 3)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What an autoscaler is asked for: resources of a member, and how many of them; None: nothing any more."""
    told: list[Any] = []

    class Client:
        def __init__(self, requester: str) -> None:
            pass

        def maybe_send_resource_request(self, each: Any, count: int) -> None:
            told.append((each.resources_per_worker, count))

        def cancel_resource_request(self) -> None:
            told.append(None)

    monkeypatch.setattr(watching, "TrainAutoscalingCoordinatorClient", Client)
    return told


@pytest.fixture
def room(unit: AddUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a watcher of a gang of four, or two, or one, where some cores of a cluster are free."""

    def make(members: int, *, of: float, free: float, address: str | None = None) -> Any:
        elastic = unit.model_copy(
            update={"spec": unit.spec.model_copy(update={"members": 4, "fewer": (2, 1)})}
        )
        alive = {"Alive": True, "Resources": {"CPU": of, "node:10.0.0.1": 1.0}}
        unused = {"a": {"CPU": free, "node:10.0.0.1": 1.0}}
        monkeypatch.setattr(watching.ray, "nodes", lambda: [alive])
        monkeypatch.setattr(watching, "available_resources_per_node", lambda: unused)
        return watching.RoomWatcher(elastic, tmp_path / "workspace", members, address)

    return make


def wait_in_vain(watcher: Any) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    with watcher.on_worker_group_start():
        raise WorkerGroupStartupTimeoutError(4)


def test_fewer_begin_when_a_part_of_the_cluster_is_gone(room: Callable[..., Any]) -> None:
    with pytest.raises(watching.Resized) as caught:
        wait_in_vain(room(4, of=3, free=3))
    assert caught.value.members == 2


def test_fewer_begin_when_others_have_used_the_cluster_for_long(
    room: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, unit: AddUp
) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    watcher = room(4, of=8, free=1)
    with pytest.raises(WorkerGroupStartupTimeoutError):
        wait_in_vain(watcher)
    assert "waits for room for 4 workers" in StoryReader(unit.story).read()[-1].text
    monkeypatch.setattr(watching, "FEWER_AFTER_S", 0.0)
    with pytest.raises(watching.Resized) as caught:
        wait_in_vain(watcher)
    assert caught.value.members == 1


def test_where_there_is_no_room_for_one_all_wait(room: Callable[..., Any]) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    for watcher in (room(4, of=2, free=0), room(4, of=4, free=4, address="10.0.0.2")):
        with pytest.raises(WorkerGroupStartupTimeoutError):
            wait_in_vain(watcher)


def test_more_begin_when_a_checkpoint_was_written(
    room: Callable[..., Any], asked: list[Any], tmp_path: Path
) -> None:
    status = SimpleNamespace(errors={})
    watcher = room(2, of=8, free=1)
    with watcher.on_worker_group_start():
        pass
    watcher.after_worker_group_poll_status(status)
    (tmp_path / "checkpoints" / "checkpoint-00000002").mkdir(parents=True)
    watcher.after_worker_group_poll_status(status)  # with one core there are three, which is no size of it
    room(2, of=8, free=2)
    watcher.after_worker_group_poll_status(status)  # has looked at this checkpoint before
    (tmp_path / "checkpoints" / "checkpoint-00000004").mkdir()
    with pytest.raises(watching.Resized) as caught:
        watcher.after_worker_group_poll_status(status)
    assert caught.value.members == 4
    assert asked == [({"CPU": 1.0}, 2)] * 4 + [None]


def test_a_death_is_told_and_no_reason_to_stop(
    fail: Callable[..., None], unit: AddUp, tmp_path: Path
) -> None:
    fail({1: killed(), 0: ConnectionError("peer closed\nand more")})
    (tmp_path / "checkpoints" / "checkpoint-00000012").mkdir(parents=True)
    fail({1: killed()})
    texts = [told.text for told in StoryReader(unit.story).read()]
    assert texts[0] == (
        "Processes of the training have failed (0: peer closed; 1: It was killed.). It goes on from the beginning."
    )
    assert texts[-1] is not None
    assert texts[-1].endswith("It goes on from checkpoint-00000012.")


def test_all_failures_count_together_whoever_saw_them(
    fail: Callable[..., None], unit: AddUp, tmp_path: Path
) -> None:
    directory = unit.directory(tmp_path / "workspace")
    assert unit.gang.max_failures == 2
    assert gangs.count_failure(unit.gang, directory) == 1, "the gang's actor died"
    fail({1: killed()})
    for _ in range(3):
        fail({0: killed(preempted=True), 1: ConnectionError("peer closed")})
    (directory / "log-1.txt").write_text("a line\nthe last words\n")
    with pytest.raises(watching.EndedForGood, match=r"1: It was killed") as caught:
        fail({1: killed(), 0: ConnectionError("peer closed")})
    lost = ray_gang._lost(unit, tmp_path / "workspace", caught.value)
    assert lost.message.endswith("That was failure 3 in a row.")
    assert lost.value == "a line\nthe last words", "of the member that was killed"


def test_who_has_come_further_is_counted_anew(fail: Callable[..., None], unit: AddUp, tmp_path: Path) -> None:
    for step in range(1, 5):
        for _ in range(unit.gang.max_failures):
            fail({1: killed()})
        (tmp_path / "checkpoints" / f"checkpoint-{step:08d}").mkdir(parents=True)
    fail({1: killed()})
    assert gangs.count_failure(unit.gang, unit.directory(tmp_path / "workspace")) == 2


def test_a_full_disk_is_no_failure_of_the_members(unit: AddUp, tmp_path: Path) -> None:
    from ray.train import ControllerError

    full = InsufficientDisk("The disk is full.")
    with pytest.raises(InsufficientDisk):
        ray_gang._reason(ControllerError(full), unit, tmp_path / "workspace")
    assert not (unit.directory(tmp_path / "workspace") / "failures").exists()


def test_members_that_cannot_be_started_are_a_failure(unit: AddUp, tmp_path: Path) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    room = watching.RoomWatcher(unit, tmp_path / "workspace", 2, None)

    def start() -> None:
        with room.on_worker_group_start():
            raise WorkerGroupStartupFailedError("One of them died.")

    for _ in range(unit.gang.max_failures):
        with pytest.raises(WorkerGroupStartupFailedError):
            start()
    with pytest.raises(watching.EndedForGood, match="could not be started"):
        start()


@pytest.mark.parametrize(("cpus", "lost"), [(4.0, False), (1.0, True)])
def test_those_who_wait_for_room_say_so_once_and_not_for_ever(
    unit: AddUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: float, lost: bool
) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    monkeypatch.setattr(watching.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": cpus}}])
    now = 0.0
    monkeypatch.setattr(watching.time, "monotonic", lambda: now)
    room = watching.RoomWatcher(unit, tmp_path / "workspace", 2, None)

    def wait(seconds: float) -> None:
        nonlocal now
        with room.on_worker_group_start():
            now += seconds
            raise WorkerGroupStartupTimeoutError(2)

    for _ in range(3):
        with pytest.raises(WorkerGroupStartupTimeoutError):
            wait(10)
    (text,) = [told.text for told in StoryReader(unit.story).read()]
    assert ("is gone" in str(text)) is lost
    with pytest.raises(watching.EndedForGood if lost else WorkerGroupStartupTimeoutError):
        wait(unit.gang.patience_s)
    assert not (unit.directory(tmp_path / "workspace") / "failures").exists(), "to wait is no failure"


def test_what_fails_by_itself_without_coming_further_ends(fail: Callable[..., None], tmp_path: Path) -> None:
    fail({0: ValueError("no")})
    with pytest.raises(watching.EndedForGood, match="without having come further"):
        fail({0: ValueError("no")})


def test_who_comes_further_may_fail_again(fail: Callable[..., None], unit: AddUp, tmp_path: Path) -> None:
    for step in range(1, 1 + unit.gang.max_failures):
        (tmp_path / "checkpoints" / f"checkpoint-{step:08d}").mkdir(parents=True)
        fail({0: ValueError("no")})


def test_what_the_members_would_meet_again_ends_at_once(
    fail: Callable[..., None], unit: AddUp, tmp_path: Path
) -> None:
    unit.failure(tmp_path / "workspace").write_text("{}")
    with pytest.raises(watching.EndedForGood):
        fail({0: killed()})


def test_threads_are_the_cores_of_a_member(unit: AddUp) -> None:
    from dataclasses import replace

    assert ray_gang._environment(replace(unit.gang, cpus=3.0))["OMP_NUM_THREADS"] == "3"
    assert ray_gang._environment(replace(unit.gang, cpus=0.5))["OMP_NUM_THREADS"] == "1"
    assert ray_gang._environment(unit.gang)["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in ray_gang._environment(replace(unit.gang, gpus=1.0))


HOLD = """
import sys
from pathlib import Path
from cluster.gang import hold_place
hold_place(Path(sys.argv[1]), 1)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.timeout(60)
def test_a_place_is_free_when_its_process_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gangs.is_empty(tmp_path, 2)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            assert not gangs.is_empty(tmp_path, 2)
            assert gangs.is_empty(tmp_path, 1), "the place of another rank"
            monkeypatch.setattr(gangs, "PREDECESSOR_WAIT_S", 0.05)
            with pytest.raises(WorkerLost, match="member 1"):
                gangs.hold_place(tmp_path, 1)
            monkeypatch.setattr(gangs, "PREDECESSOR_WAIT_S", 30.0)
            successor = threading.Thread(target=gangs.hold_place, args=(tmp_path, 1))
            successor.start()
        finally:
            other.kill()
        successor.join(30)
        assert not successor.is_alive()
    assert not gangs.is_empty(tmp_path, 2)
