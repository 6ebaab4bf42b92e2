"""A gang on a cluster: the actor that starts its members by Ray Train, and what each of them does first.

Imported by the process that starts the actor, so nothing here loads torch or Ray Train at the top.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from pydantic import BaseModel
from ray.exceptions import RayActorError, RayTaskError

from aidocks.errors import AIDocksError, WorkerLost
from aidocks.executor import Outcome
from aidocks.log import about, log_to_file
from aidocks.plan import Gang, GangUnit
from aidocks.settings import Settings
from aidocks.storage import shared
from aidocks.storage.checkpoints import bring_checkpoints, has_begun, sharing_checkpoints
from aidocks.storage.units import run_shared
from aidocks.telling import last_words
from aidocks.threads import give_way
from cluster.gang import given_up, hold_place, resources_of_a_member, say
from train.one_node import Place, choose_place, on_node

if TYPE_CHECKING:
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchTrainer

    from train.ray_watching import EndedForGood

#: How often Ray Train looks at its workers: so long a dead one, and the end, can stay unnoticed.
POLL_S = 0.5
#: For how long it asks for room before it looks again whether the cluster has any.
ROOM_S = 5.0
#: How long a member waits for the others in a collective operation.
COLLECTIVE_TIMEOUT_S = 1800

_log = logging.getLogger(__name__)


class RayGang:
    """Runs one gang. Killed, it takes all members with it: they are actors of an actor of its own.

    Args:
        name: Readable name, such as ``gang-1``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        log_to_file(Settings(), f"{name}.log")
        #: Of the node on which all members have to be; None where they share a file system.
        self._address: str | None = None
        # Read when Ray Train is first imported, and handed on to its workers. Its print goes to a logger, through
        # which fingerprints of data sets miss nested functions.
        os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(ROOM_S))
        # One more process at each start, for checkpoints that members would write when their node is about to go.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    def place(self) -> tuple[str, int]:
        """Return host name and process id; answers as soon as the actor is up."""
        return socket.gethostname(), os.getpid()

    def run(self, unit: GangUnit[Any], workspace: Path) -> Outcome:
        """Run one unit to its end, from its last checkpoint on.

        Where nodes share no file system, all of it runs on one node: the members write parts of the same files.

        Raises:
            AIDocksError: What the members would meet again; or, when they died too often, of what.
        """
        here = shared(workspace)
        if here is None:
            return self._run(unit, workspace)
        unit.directory(workspace).mkdir(parents=True, exist_ok=True)
        place = choose_place(unit, again=has_begun(here, unit.gang.checkpoints))
        if place.node_id != ray.get_runtime_context().get_node_id():
            return self._run_there(place, unit, workspace)
        self._address = place.address
        begin = time.perf_counter()
        bring_checkpoints(unit.gang.checkpoints)

        def run() -> BaseModel:
            with sharing_checkpoints(here, unit.gang.checkpoints, unit.story):
                return self._run(unit, workspace).result

        result = run_shared(unit, workspace, run)
        return Outcome(result, time.perf_counter() - begin, self._name)

    def _run_there(self, place: Place, unit: GangUnit[Any], workspace: Path) -> Outcome:
        """Run a unit by an actor on another node, which dies with this one; and this one with it."""
        there = ray.remote(RayGang).options(num_cpus=0, max_restarts=0, scheduling_strategy=place.strategy)
        try:
            outcome: Outcome = ray.get(there.remote(self._name).run.remote(unit, workspace))
        except RayTaskError as error:
            if isinstance(error.cause, AIDocksError):
                raise error.cause from None
            raise
        except RayActorError:
            # For whoever watches this one it is the same: the gang is gone, and can begin anew.
            os._exit(1)
        return outcome

    def _run(self, unit: GangUnit[Any], workspace: Path) -> Outcome:
        begin = time.perf_counter()
        gang = unit.gang
        unit.directory(workspace).mkdir(parents=True, exist_ok=True)
        for said_before in (unit.failure(workspace), unit.outcome(workspace)):
            said_before.unlink(missing_ok=True)
        gang.checkpoints.mkdir(parents=True, exist_ok=True)
        with about(workspace.name, unit.label):
            self._fit(unit, workspace)
            result = unit.collect(workspace)
        return Outcome(result, time.perf_counter() - begin, self._name)

    def _fit(self, unit: GangUnit[Any], workspace: Path) -> None:
        """Have Ray Train run the members until they have come to an end, or to what they would meet again.

        Raises:
            WorkerLost: They failed too often.
        """
        from ray.train import TrainingFailedError

        from train.ray_watching import EndedForGood, Resized

        members = unit.gang.members
        while True:
            # Ray Train's list of checkpoints; what is on the disk counts, and that need not agree after a crash.
            (unit.gang.checkpoints / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
            try:
                _trainer(unit, workspace, members, self._address).fit()
            except TrainingFailedError as error:
                resized = getattr(error, "controller_failure", None)
                if isinstance(resized, Resized):
                    members = resized.members
                    continue
                _log.warning("%s: the members of %s failed", self._name, unit.label, exc_info=True)
                if unit.failure(workspace).exists():
                    return
                try:
                    what = _reason(error, unit, workspace)
                except EndedForGood as end:
                    raise _lost(unit, workspace, end) from error
                say(unit, f"{what} It is tried again.")
            else:
                return


def _reason(error: TrainingFailedError, unit: GangUnit[Any], workspace: Path) -> str:
    """Say what has failed where that was not the members, but what joins them.

    Raises:
        EndedForGood: That was the end, or one failure too many.
        AIDocksError: It was no failure of theirs.
    """
    from train.ray_watching import EndedForGood, count_or_end, in_a_line

    failure = getattr(error, "controller_failure", error)
    if isinstance(failure, EndedForGood):
        raise failure
    if isinstance(failure, AIDocksError):  # such as a full disk: the job is tried again as any other
        raise failure
    what = f"Its processes could not be joined ({in_a_line(failure)})."
    count_or_end(unit, workspace, what)
    return what


def _lost(unit: GangUnit[Any], workspace: Path, end: EndedForGood) -> WorkerLost:
    """Say why the members are not begun anew, with the end of the log that may say more; the log goes with the job."""
    words = last_words(unit.directory(workspace) / f"log-{end.rank}.txt")
    return given_up(unit, end.reason, end.failures, words or None)


def _trainer(unit: GangUnit[Any], workspace: Path, members: int, address: str | None) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from train.ray_watching import MemberWatcher, RoomWatcher

    gang = unit.gang
    resources = resources_of_a_member(gang) | ({} if address is None else on_node(address))
    return TorchTrainer(
        _work,
        train_loop_config={"unit": unit, "workspace": workspace},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=members,
            use_gpu=gang.gpus > 0,
            resources_per_worker=resources,
            placement_strategy="SPREAD" if gang.spread and address is None else "PACK",
        ),
        run_config=RunConfig(
            name=gang.checkpoints.name,
            storage_path=str(gang.checkpoints.parent),
            # How often they begin anew is the callbacks' matter, and which checkpoints are kept the reporter's.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[MemberWatcher(unit, workspace), RoomWatcher(unit, workspace, members, address)],
            worker_runtime_env={"env_vars": _environment(gang)},
        ),
    )


def _environment(gang: Gang) -> dict[str, str]:
    """Return what a member's libraries read when they are imported, which Ray Train does before the member's code."""
    threads = str(max(1, math.floor(gang.cpus)))
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    if not gang.gpus:
        variables["DS_ACCELERATOR"] = "cpu"
    return variables


def _work(config: dict[str, Any]) -> None:
    """What every member does, on a thread of its own."""
    import ray.train

    unit: GangUnit[Any] = config["unit"]
    workspace: Path = config["workspace"]
    directory = unit.directory(workspace)
    rank = ray.train.get_context().get_world_rank()
    hold_place(directory, rank)
    give_way()
    _log_to(directory / f"log-{rank}.txt")
    module, _, name = unit.entry.partition(":")
    getattr(import_module(module), name)(unit)


def _log_to(path: Path) -> None:
    """Write whatever this process says from now on to a file of the job."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
