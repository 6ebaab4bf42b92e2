"""Where units run. A pool hides whether that is a thread of this process or actors of a cluster."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from aidocks.log import about
from aidocks.plan import Unit, UnitContext, WorkerCache
from aidocks.processes import ComputeProcesses, Divisible
from aidocks.specs.resources import Resources
from aidocks.storage.units import run_shared


@dataclass(frozen=True)
class Outcome:
    """What became of a unit.

    Attributes:
        result: What ``Unit.run`` returned.
        seconds: How long it ran.
        worker: Readable name of the worker that ran it, such as ``worker-1``.
    """

    result: BaseModel
    seconds: float
    worker: str


@dataclass(frozen=True)
class Claim:
    """On whose behalf a unit asks for a worker, and what kind of worker it asks for.

    Attributes:
        job: Id of the job.
        owner: Id of the API key that submitted it.
        priority: Higher ones come first; among equals, whoever has the fewest workers.
        resources: What the job's request says that each worker shall have; None: the pool's choice.
    """

    job: str = ""
    owner: str = ""
    priority: int = 0
    resources: Resources | None = None


NOBODY = Claim()


class UnitPool(Protocol):
    """Runs units, at most :attr:`parallelism` at a time; further calls of :meth:`run` wait their turn."""

    @property
    def parallelism(self) -> int: ...

    async def run(
        self,
        unit: Unit[Any],
        workspace: Path,
        started: Callable[[str], None],
        claim: Claim = NOBODY,
    ) -> Outcome:
        """Run one unit. Cancelling this coroutine stops the unit as fast as the pool can.

        Args:
            unit: What to run.
            workspace: The job's directory.
            started: Called with the worker's name when the unit begins to run there.
            claim: On whose behalf.

        Raises:
            WorkerLost: The worker died; the unit may be run again.
            Exception: Whatever the unit raised.
        """
        ...

    async def close(self) -> None:
        """Let go of all workers."""
        ...


class InProcessPool:
    """One unit that computes at a time, in a thread of this process, on the GPU when there is one.

    Units that only move bytes run beside it, two at a time: one mostly waits for the disk.

    Native code in a thread cannot be stopped: a cancelled unit is waited for, but not for long.

    Args:
        processes: That compute divisible units where there is no GPU, until one of them dies or another unit computes.
    """

    parallelism = 1
    #: How long a cancelled unit is waited for, so that whoever cancelled can remove its files after it.
    cancel_grace_s = 5.0

    def __init__(self, processes: ComputeProcesses | None = None) -> None:
        self._processes = processes
        self._cache = WorkerCache()
        self._turn = asyncio.Lock()
        self._beside = asyncio.Semaphore(2)
        self._device: str | None = None

    async def run(
        self,
        unit: Unit[Any],
        workspace: Path,
        started: Callable[[str], None],
        claim: Claim = NOBODY,
    ) -> Outcome:
        """Run one unit in a daemon thread (the process may exit although native code still runs)."""
        async with self._turn if unit.computes else self._beside:
            started("local")
            stopping = threading.Event()
            done = _in_daemon_thread(lambda: self._run(unit, workspace, stopping))
            try:
                return await asyncio.shield(done)
            except asyncio.CancelledError:
                stopping.set()
                self._end_processes()
                await asyncio.wait([done], timeout=self.cancel_grace_s)
                raise

    def _run(self, unit: Unit[Any], workspace: Path, stopping: threading.Event) -> Outcome:
        if not unit.computes:
            return run_unit(unit, UnitContext(workspace, stopping=stopping), "local")
        if self._processes is not None and isinstance(unit, Divisible) and self._processes.device == "cpu":
            begin = time.perf_counter()
            processes = self._processes
            result = run_shared(unit, workspace, lambda: processes.run(unit, workspace))
            return Outcome(result, time.perf_counter() - begin, "local")
        self._end_processes()
        if self._device is None:
            self._device = best_device()
        threads = os.cpu_count() or 1
        context = UnitContext(workspace, self._device, threads, self._cache, stopping)
        return run_unit(unit, context, "local")

    def _end_processes(self) -> None:
        if self._processes is not None:
            self._processes.close()

    async def close(self) -> None:
        self._end_processes()
        self._cache = WorkerCache()


def run_unit(unit: Unit[Any], context: UnitContext, worker: str) -> Outcome:
    """Run a unit here and now, and give memory that it no longer uses back to the system.

    Where nodes share no file system, what it needs is brought before, and what it wrote is kept after.
    """
    begin = time.perf_counter()
    with about(context.workspace.name, unit.label):
        result = run_shared(unit, context.workspace, lambda: unit.run(context))
    seconds = time.perf_counter() - begin
    if unit.computes:
        _trim_memory()
    return Outcome(result, seconds, worker)


def _trim_memory() -> None:
    # The allocator of the GNU C library keeps what every thread has freed: gigabytes, after a few units that train.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def let_threads_sleep() -> None:
    """Make threads of torch that wait for each other sleep rather than spin. Call it before torch is imported.

    Spinning threads starve each other on a busy machine: 30 times slower was measured. A user's own choice stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def best_device() -> str:
    """Return ``cuda`` where torch is installed and sees a device, else ``cpu``."""
    let_threads_sleep()
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _in_daemon_thread(call: Callable[[], Outcome]) -> asyncio.Future[Outcome]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Outcome] = loop.create_future()

    def settle(outcome: Outcome | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            assert outcome is not None
            future.set_result(outcome)

    def work() -> None:
        outcome: Outcome | None = None
        failure: BaseException | None = None
        try:
            outcome = call()
        except StopIteration as error:  # a future cannot carry it
            failure = RuntimeError(f"The unit raised {error!r}.")
        except BaseException as error:  # noqa: BLE001 - carried over to the awaiting side, whatever it is
            failure = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome, failure)

    threading.Thread(target=work, name="aidocks-unit", daemon=True).start()
    return future
