"""What watches a gang from Ray Train's controller: it tells of members that fail, or find no room, and knows an end.

Imports Ray Train, and with it much else: for the gang's actor and the controller alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.train import ScalingConfig, UserCallback
from ray.train.v2._internal.exceptions import (
    RayTrainError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, _is_preempted_actor

from aidocks.errors import InvalidSpec
from aidocks.plan import GangUnit
from aidocks.training.checkpoints import newest_checkpoint
from cluster.gang import (
    count_failure,
    describe_member,
    largest_size,
    require_room,
    resources_of_a_member,
    say,
)
from cluster.room import Node, count
from train.one_node import on_node

#: How often those who wait for room are heard of.
SAY_EVERY_S = 600.0
#: For how long all members wait for others that use the cluster, before fewer begin where that is allowed.
FEWER_AFTER_S = 60.0


class EndedForGood(Exception):
    """Raised in a callback, it keeps Ray Train from beginning anew.

    Args:
        reason: A sentence.
        rank: The member that may have said more in its log.
        failures: How often the gang has failed in a row.
    """

    def __init__(self, reason: str, rank: int = 0, failures: int = 1) -> None:
        super().__init__(reason, rank, failures)
        self.reason = reason
        self.rank = rank
        self.failures = failures

    def __str__(self) -> str:
        return self.reason


class MemberWatcher(UserCallback):
    """Tells of members that failed, and puts an end to it where they would meet the same again.

    Args:
        unit: What they run.
        workspace: The job's.
    """

    def __init__(self, unit: GangUnit[Any], workspace: Path) -> None:
        self._unit = unit
        self._workspace = workspace
        self._starter = os.getpid()
        self._newest: Path | None = None
        self._fruitless = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        _end_with(self._starter)
        unit = self._unit
        if unit.failure(self._workspace).exists():
            raise EndedForGood("See what they have written.")
        errors = sorted(worker_exceptions.items())
        what = "; ".join(f"{rank}: {in_a_line(error)}" for rank, error in errors)[:500]
        newest = newest_checkpoint(unit.gang.checkpoints)
        by_themselves = [rank for rank, error in errors if not isinstance(error, RayTrainError)]
        all_by_themselves = len(by_themselves) == len(errors)
        self._fruitless = self._fruitless + 1 if all_by_themselves and newest == self._newest else 0
        self._newest = newest
        # The one that was killed comes first: the others fail because it is gone.
        culprit = next((rank for rank, _ in errors if rank not in by_themselves), errors[0][0])
        if self._fruitless > 1:
            raise EndedForGood(f"It failed again without having come further ({what}).", culprit)
        # Machines that are taken back are no fault of the training, however often that happens.
        preempted = any(_is_preempted_actor(error) for _, error in errors)
        if not preempted:
            count_or_end(unit, self._workspace, f"Its processes have failed ({what}).", culprit)
        whence = f"from {newest.name}" if newest else "from the beginning"
        say(unit, f"Processes of the training have failed ({what}). It goes on {whence}.")


class Resized(Exception):
    """Raised in a callback, it ends this run of Ray Train, for one with another number of members.

    Args:
        members: How many there are to be.
    """

    def __init__(self, members: int) -> None:
        super().__init__(members)
        self.members = members


class RoomWatcher(WorkerGroupCallback):
    """Tells of members that wait for room, which they do as long as the cluster would have it if nothing else ran.

    Where fewer of them can do, as many begin as there is room for, and more when there is room again.

    Args:
        unit: What they run.
        workspace: The job's.
        members: How many are to be started.
        address: Of the node on which all of them have to be; None: on any.
    """

    def __init__(self, unit: GangUnit[Any], workspace: Path, members: int, address: str | None) -> None:
        self._unit = unit
        self._workspace = workspace
        self._members = members
        self._resource = None if address is None else next(iter(on_node(address)))
        self._starter = os.getpid()
        self._said = ("", 0.0)
        self._waits_since: float | None = None
        self._lost_since: float | None = None
        self._newest: Path | None = None
        self._missing = TrainAutoscalingCoordinatorClient(f"{workspace.name}-missing")

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        except WorkerGroupStartupTimeoutError:
            self._wait(begin)
            raise
        except WorkerGroupStartupFailedError as error:
            _end_with(self._starter)
            what = f"Its processes could not be started ({in_a_line(error)})."
            count_or_end(self._unit, self._workspace, what)
            say(self._unit, f"{what} It is tried again.")
            raise
        self._said, self._waits_since, self._lost_since = ("", 0.0), None, None
        self._newest = newest_checkpoint(self._unit.gang.checkpoints)

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        """Let more members begin when a checkpoint has just been written, so that nothing is done twice."""
        gang = self._unit.gang
        if self._members == gang.members or worker_group_status.errors:
            return
        if self._asks_for_missing:
            self._missing.maybe_send_resource_request(*self._those_missing)
        newest = newest_checkpoint(gang.checkpoints)
        if newest == self._newest:
            return
        self._newest = newest
        self._resize(largest_size(gang, self._free(), self._members), least=self._members + 1)

    def _resize(self, members: int, least: int = 1) -> None:
        """Have other numbers of members begin, unless it is the same or below ``least``."""
        if members < least or members == self._members:
            return
        text = f"There is room for {members} of {self._unit.gang.members} workers: the training goes on with these."
        say(self._unit, text)
        if self._asks_for_missing:
            self._missing.cancel_resource_request()
        raise Resized(members)

    @property
    def _asks_for_missing(self) -> bool:
        """Whether an autoscaler, where there is one, is asked for nodes: not where all have to be on one."""
        return self._members < self._unit.gang.members and self._resource is None

    @property
    def _those_missing(self) -> tuple[ScalingConfig, int]:
        gang = self._unit.gang
        missing = gang.members - self._members
        each = ScalingConfig(
            num_workers=missing, use_gpu=gang.gpus > 0, resources_per_worker=resources_of_a_member(gang)
        )
        return each, missing

    def _free(self) -> list[Node]:
        """Return what nobody uses of each node, by Ray's names of resources."""
        return self._allowed(available_resources_per_node().values())

    def _allowed(self, nodes: Iterable[Node]) -> list[Node]:
        return [node for node in nodes if self._resource is None or self._resource in node]

    def _wait(self, begin: float) -> None:
        gang = self._unit.gang
        nodes = self._allowed(node["Resources"] for node in ray.nodes() if node["Alive"])
        if gang.fewer:
            self._waits_since = self._waits_since or begin
            gone = largest_size(gang, nodes) < self._members
            if gone or time.monotonic() - self._waits_since >= FEWER_AFTER_S:
                self._resize(largest_size(gang, self._free()))
        try:
            require_room(gang, nodes)
        except InvalidSpec as error:
            self._lost_since = self._lost_since or begin
            if time.monotonic() - self._lost_since >= gang.patience_s:
                raise EndedForGood(
                    f"A part of the cluster is gone and did not come back. {error.message}"
                ) from None
            text = f"A part of the cluster is gone. {error.message} The training waits for it to come back."
        else:
            self._lost_since = None
            text = (
                f"The training waits for room for {count(self._members, 'worker')} of {describe_member(gang)} each: "
                "others are using the cluster."
            )
        said, when = self._said
        if text != said or time.monotonic() - when >= SAY_EVERY_S:
            self._said = (text, time.monotonic())
            say(self._unit, text)


def count_or_end(unit: GangUnit[Any], workspace: Path, what: str, rank: int = 0) -> None:
    """Count a failure of the gang.

    Raises:
        EndedForGood: It was one too many.
    """
    failures = count_failure(unit.gang, unit.directory(workspace))
    if failures > unit.gang.max_failures:
        raise EndedForGood(what, rank, failures)


def _end_with(process: int) -> None:
    """End this process, which is the controller, if the gang's actor on the same node has ended.

    The members were killed with it, and the controller is about to be: it must neither begin anew nor count that.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        os._exit(1)


def in_a_line(error: Exception) -> str:
    """Return the beginning of what an error says, without the names that Ray Train puts around it."""
    reason = getattr(error, "health_check_failure", error)
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(reason).__name__
