"""What a gang needs of the cluster: room for all its members, and to be the only one that writes its files."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aidocks.checkpoints.files import write_text
from aidocks.errors import InvalidSpec, WorkerLost
from aidocks.plan import Gang, GangUnit
from aidocks.telling import Told, tell
from aidocks.training.checkpoints import newest_checkpoint
from cluster.room import Kind, Node, count, describe, places

#: Import string of the actor that runs one; ``cluster`` is below ``train`` and must not import it.
ACTOR = "train.ray_gang:RayGang"
#: How long a member waits for one of the same rank, of a gang that is being killed.
PREDECESSOR_WAIT_S = 60.0
_POLL_S = 0.02
#: What a file system says that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

_log = logging.getLogger(__name__)


def resources_of_a_member(gang: Gang) -> dict[str, float]:
    """Return what one member takes, by Ray's names of resources (memory in bytes)."""
    return Kind(gang.cpus, gang.gpus, gang.memory or 0).resources


def require_room(gang: Gang, nodes: Iterable[Node]) -> None:
    """Refuse a gang that would wait for ever.

    Args:
        gang: That is to be started.
        nodes: All resources of each node, by Ray's names.

    Raises:
        InvalidSpec: Not even the fewest members would fit, if nothing else ran.
    """
    held = places(resources_of_a_member(gang), list(nodes))
    if sum(held) < gang.sizes[-1]:
        raise too_large(
            gang,
            f"The cluster has room for {count(sum(held), 'worker')} of {describe_member(gang)} each, "
            f"on {count(len(held), 'node')}.",
            "Ask for fewer workers, or for less for each (resources), or add nodes.",
        )


def too_large(gang: Gang, message: str, hint: str) -> InvalidSpec:
    """Return the refusal of a gang of which not even the fewest members would fit, blamed on what says how many."""
    field = "min_workers" if gang.fewer else "workers"
    return InvalidSpec(message, field=field, value=gang.sizes[-1], hint=hint)


def largest_size(gang: Gang, nodes: Iterable[Node], running: int = 0) -> int:
    """Return the largest number of members of which there is room; 0: not even for the fewest.

    Args:
        gang: That is to be started.
        nodes: Resources of each node, by Ray's names: all of them, or those that nobody uses.
        running: Members that have what they need already.
    """
    held = running + sum(places(resources_of_a_member(gang), list(nodes)))
    return next((size for size in gang.sizes if size <= held), 0)


def describe_member(gang: Gang) -> str:
    """Say what one member takes, such as ``1 CPU, 6 GB of memory``."""
    return describe(resources_of_a_member(gang))


def count_failure(gang: Gang, directory: Path) -> int:
    """Note that a gang has failed; return how often it has in a row, whoever saw it, in all attempts at the job.

    Whoever has written another checkpoint since the last time has come further, and is counted anew.
    """
    path = directory / "failures"
    newest = newest_checkpoint(gang.checkpoints)
    reached = newest.name if newest is not None else "-"
    before, _, then = path.read_text().partition(" ") if path.exists() else ("0", "", reached)
    failures = 1 + (int(before) if then == reached else 0)
    write_text(path, f"{failures} {reached}")
    return failures


def given_up(unit: GangUnit[Any], what: str, failures: int = 1, value: str | None = None) -> WorkerLost:
    """Return why a gang is not begun anew.

    Args:
        unit: What it ran.
        what: It died of, in sentences.
        failures: How often it has died in a row.
        value: End of the log that may say more.
    """
    times = f" That was failure {failures} in a row." if failures > 1 else ""
    return WorkerLost(
        f"{unit.label} was given up. {what[:1000]}{times}",
        value=value,
        hint="Its checkpoints are kept, if it came that far: the job can be resumed.",
    )


def remove_orphaned_placements() -> int:
    """Give back what gangs of this process's Ray job hold although their controller is dead; says of how many.

    A controller reserves the members' resources in a placement group, which outlives it. Ray Train's own cleaner does
    not hear of one whose members were not up yet when the controller was killed. Who made which group is in the
    cluster's table, but in no public function. A group that was asked for in the moment of the controller's death is
    noted there after that death, and so not as that of a dead one: hence the look at the controller itself.
    """
    import ray
    from ray._private.state import state
    from ray._raylet import PlacementGroupID
    from ray.core.generated.gcs_pb2 import (  # type: ignore[attr-defined]
        ActorTableData,
        PlacementGroupTableData,
    )
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job_id = bytes.fromhex(ray.get_runtime_context().get_job_id())
    cluster = state._connect_and_get_accessor()

    def is_dead(actor_id: bytes) -> bool:
        known = cluster.get_actor_info(ray.ActorID(actor_id))
        return known is None or ActorTableData.FromString(known).state == ActorTableData.DEAD

    removed = 0
    for row in cluster.get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        if (
            group.is_detached
            or group.creator_job_id != job_id
            or group.state == PlacementGroupTableData.REMOVED
        ):
            continue
        if group.creator_actor_dead or (any(group.creator_actor_id) and is_dead(group.creator_actor_id)):
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            removed += 1
    return removed


def say(unit: GangUnit[Any], text: str) -> None:
    """Tell people something in the unit's story."""
    if unit.story is not None:
        tell(unit.story, Told(kind="message", text=text))


def hold_place(directory: Path, rank: int) -> None:
    """Take the place of a member until this process ends; waits for whoever has it to die.

    Two processes of one rank would write the same files: an old gang's members live on for a moment after whoever
    started them has died.

    Raises:
        WorkerLost: The other one does not die.
    """
    descriptor = os.open(_lock(directory, rank), os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + PREDECESSOR_WAIT_S
    while not _lock_now(descriptor):
        if time.monotonic() > deadline:
            raise WorkerLost(f"Another process still has the place of member {rank} in {directory}.")
        time.sleep(_POLL_S)


def is_empty(directory: Path, members: int) -> bool:
    """Say whether no process has the place of a member."""
    for rank in range(members):
        try:
            descriptor = os.open(_lock(directory, rank), os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            if not _lock_now(descriptor):
                return False
        finally:
            os.close(descriptor)
    return True


def _lock(directory: Path, rank: int) -> Path:
    return directory / f"member-{rank}.lock"


def _lock_now(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning("the workspace's file system has no locks: %s", error)
    return True
