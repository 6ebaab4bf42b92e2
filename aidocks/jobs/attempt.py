"""Runs one job: drives its plan, gives the units to a pool, journals what they return, and ends the job.

The plan is a deterministic generator, so a job whose executor died is continued by running the plan again:
units whose results are in the journal, and whose files are still the same, are answered from there.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from aidocks.checkpoints.space import FULL
from aidocks.errors import AIDocksError, InsufficientDisk, LeaseLost, TimedOut
from aidocks.executor import Claim
from aidocks.jobs.database import STORE_ERRORS
from aidocks.jobs.model import EventType, Job, Status
from aidocks.jobs.observer import Unobserved
from aidocks.jobs.resume import FIELD as RESUMES
from aidocks.jobs.retries import Hopeless, wait_before_retry
from aidocks.jobs.stages import StageRun, UnitLog
from aidocks.jobs.submit import plan_context
from aidocks.log import about
from aidocks.operations import find_operation
from aidocks.plan import PlanContext, Stage
from aidocks.storage import forget

if TYPE_CHECKING:
    from aidocks.executor import UnitPool
    from aidocks.jobs.observer import Observer
    from aidocks.jobs.store import JobStore
    from aidocks.settings import Settings

CANCEL_POLL_S = 0.5
_MAKE_ROOM = "Free some space, or put the data directory on a larger disk (AIDOCKS_HOME)."

_log = logging.getLogger(__name__)


class _Cancelled(Exception):
    """The job's cancel flag was seen."""


async def run_job(
    job: Job,
    store: JobStore,
    settings: Settings,
    pool: UnitPool,
    token: int,
    observer: Observer | None = None,
) -> Job:
    """Run a job to its end, whatever that end is; or, of a service, until an error that may pass.

    Args:
        job: As returned by ``store.claim``: running, under ``token``.
        store: Where it is journalled.
        settings: Of the installation.
        pool: Where its units run.
        token: The executor's fencing token.
        observer: Who is told of the work. Default: nobody.

    Returns:
        The job as it ended: succeeded, failed or cancelled. Or queued: it waits for another try.

    Raises:
        LeaseLost: Another executor has taken the job over; nothing of it was touched since.
        OperationalError: The job store cannot be reached. The job is still running and can be claimed again.
        asyncio.CancelledError: The caller was cancelled; the job is still running and can be claimed again.
    """
    observer = observer or Unobserved()
    run = _JobRun(job, store, settings, pool, token, observer)
    with about(job.id):
        observer.job_began(job)
        ended = await _run_to_end(run, job)
    observer.job_ended(ended)
    return ended


async def _run_to_end(run: _JobRun, job: Job) -> Job:
    try:
        result = (await run.to_result()).model_dump(mode="json")
    except _Cancelled:
        return await run.end(Status.CANCELLED)
    except (LeaseLost, *STORE_ERRORS):
        raise
    except Hopeless as hopeless:
        return await run.fail(hopeless.error)
    except AIDocksError as error:
        return await _put_back_or_fail(run, error)
    except Exception as error:  # noqa: BLE001 - the job ends with it; the traceback goes to the log
        _log.exception("job %s failed unexpectedly", job.id)
        if isinstance(error, OSError) and error.errno in FULL:
            return await _put_back_or_fail(
                run, InsufficientDisk(f"The disk is full: {error}", hint=_MAKE_ROOM)
            )
        return await run.fail(AIDocksError(f"{type(error).__name__}: {error}"))
    return await run.end(Status.SUCCEEDED, result=result)


async def _put_back_or_fail(run: _JobRun, error: AIDocksError) -> Job:
    wait_s = run.wait_before_retry(error)
    return await (run.fail(error) if wait_s is None else run.put_back(error, wait_s))


class _JobRun:
    """One attempt at one job."""

    def __init__(
        self,
        job: Job,
        store: JobStore,
        settings: Settings,
        pool: UnitPool,
        token: int,
        observer: Observer,
    ) -> None:
        self._observer = observer
        self._job = job
        self._store = store
        self._settings = settings
        self._pool = pool
        self._token = token

    async def to_result(self) -> BaseModel:
        """Drive the plan until it returns, the cancel flag is seen, or time is up."""
        watching = asyncio.create_task(self._watch_cancel_flag())
        driving = asyncio.create_task(self._drive())
        try:
            await asyncio.wait(
                (watching, driving), timeout=self._job.seconds_left, return_when=asyncio.FIRST_COMPLETED
            )
            # A job that finished just before its flag was seen has finished.
            if not driving.done():
                driving.cancel()
                await asyncio.wait((driving,))
                if not watching.done():
                    raise self._timed_out()
                watching.result()
                raise _Cancelled
            return driving.result()
        finally:
            for task in (watching, driving):
                task.cancel()
            await asyncio.gather(watching, driving, return_exceptions=True)

    def _timed_out(self) -> TimedOut:
        resumable = RESUMES in find_operation(self._job.operation).spec_type().model_fields
        return TimedOut(
            f"The job was not over {self._job.timeout_s:g} seconds after its start.",
            field="timeout_s",
            value=self._job.timeout_s,
            hint=f"Its checkpoints are kept: aidocks jobs resume {self._job.id} --timeout ..."
            if resumable
            else "Submit it again with a longer --timeout, or with none.",
        )

    async def _watch_cancel_flag(self) -> None:
        while not (await asyncio.to_thread(self._store.get, self._job.id)).cancel_requested:
            await asyncio.sleep(CANCEL_POLL_S)

    async def _drive(self) -> BaseModel:
        registration = find_operation(self._job.operation)
        operation = await asyncio.to_thread(registration.load)
        spec = operation.spec_type.model_validate(self._job.spec)
        context = plan_context(
            self._settings, self._job.id, parallelism=self._pool.parallelism, say=self._say
        )
        journal = await asyncio.to_thread(self._store.units, self._job.id)
        await asyncio.to_thread(context.workspace.mkdir, parents=True, exist_ok=True)
        await self._announce(len(journal))
        if self._job.attempt <= 1:
            # Later attempts would find fault with what the first one has made.
            await asyncio.to_thread(operation.preflight, spec, context)
        log = UnitLog(self._store, self._job, self._token, journal, self._observer)
        claim = Claim(self._job.id, self._job.owner, self._job.priority, getattr(spec, "resources", None))
        plan = operation.plan(spec, context)
        try:
            return await self._step_through(plan, context, log, claim)
        finally:
            await asyncio.to_thread(plan.close)

    async def _step_through(
        self,
        plan: Generator[Stage, list[Any], BaseModel],
        context: PlanContext,
        log: UnitLog,
        claim: Claim,
    ) -> BaseModel:
        results: list[Any] | None = None
        number = 0
        while True:
            stage = await _in_thread(_advance, plan, results)
            if isinstance(stage, _Returned):
                await log.flush()
                return stage.result
            number += 1
            results = await StageRun(stage, number, context, self._pool, log, claim).to_results()

    async def _announce(self, units_done: int) -> None:
        if self._job.attempt <= 1:
            data = {"attempt": self._job.attempt, "parallelism": self._pool.parallelism}
            await self._append(EventType.STARTED, data)
        else:
            data = {"attempt": self._job.attempt, "units_done": units_done}
            await self._append(EventType.RECOVERED, data)

    async def _append(self, type: EventType, data: dict[str, Any]) -> None:
        await asyncio.to_thread(self._store.append, self._job.id, type, data, token=self._token)

    def _say(self, text: str) -> None:
        self._store.append(self._job.id, EventType.MESSAGE, {"text": text}, token=self._token)

    def wait_before_retry(self, error: AIDocksError) -> float | None:
        """Return the seconds after which the job is tried again, None where it fails now."""
        if self._job.place == "local":
            return None  # whoever waits for it sees the error, and can decide
        wait_s, left_s = wait_before_retry(error, self._job.failures), self._job.seconds_left
        return None if wait_s is None or (left_s is not None and left_s <= wait_s) else wait_s

    async def put_back(self, error: AIDocksError, wait_s: float) -> Job:
        """Let the job wait for another try. Its journal and its files stay."""
        _log.info("job %s is tried again in %.0f s: %s", self._job.id, wait_s, error)
        reason = error.problem(f"/jobs/{self._job.id}")
        job = await asyncio.to_thread(self._store.put_back, self._job.id, reason, wait_s, token=self._token)
        if job.status.terminal:  # cancelled meanwhile
            await asyncio.to_thread(remove_workspace, self._settings, self._job.id)
        return job

    async def fail(self, error: AIDocksError) -> Job:
        _log.info("job %s failed: %s", self._job.id, error)
        return await self.end(Status.FAILED, error=error.problem(f"/jobs/{self._job.id}"))

    async def end(
        self, status: Status, *, result: dict[str, Any] | None = None, error: dict[str, Any] | None = None
    ) -> Job:
        """Close the job; of a job that did not succeed nothing half-written remains when its end is seen."""
        if result is not None and self._job.started_at is not None and result.get("seconds", 0) is None:
            result["seconds"] = round(time.time() - self._job.started_at.timestamp(), 3)
        if status is not Status.SUCCEEDED:
            await asyncio.to_thread(remove_workspace, self._settings, self._job.id)
        job = await asyncio.to_thread(
            self._store.transition, self._job.id, status, token=self._token, result=result, error=error
        )
        if status is Status.SUCCEEDED:
            await asyncio.to_thread(remove_workspace, self._settings, self._job.id)
            await asyncio.to_thread(remove_checkpoints, self._settings, self._job.id)
        return job


def remove_workspace(settings: Settings, job_id: str) -> None:
    """Delete what a job has written outside the registry, but for what it can be resumed from."""
    _remove(settings.workspaces_dir / job_id)
    forget(settings.workspaces_dir / job_id)


def remove_checkpoints(settings: Settings, job_id: str) -> None:
    """Delete what a job could be resumed from."""
    _remove(settings.checkpoints_dir / job_id)
    forget(settings.checkpoints_dir / job_id)


def _remove(directory: Path) -> None:
    for _ in range(10):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)  # something that is being stopped still wrote a file


class _Returned:
    """What the plan's generator returned (StopIteration cannot leave a thread or a coroutine)."""

    def __init__(self, result: BaseModel) -> None:
        self.result = result


def _advance(plan: Generator[Stage, list[Any], BaseModel], results: list[Any] | None) -> Stage | _Returned:
    try:
        return next(plan) if results is None else plan.send(results)
    except StopIteration as stop:
        return _Returned(stop.value)


async def _in_thread(call: Callable[..., Any], *args: Any) -> Any:
    """Call in a thread and, also when cancelled, wait for it: two must not drive one plan."""
    future = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait((future,))
        raise
