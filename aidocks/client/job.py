"""Handles of submitted jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from aidocks.client.problems import error_from_problem
from aidocks.errors import JobCancelled, JobFailed
from aidocks.jobs.model import Event, Job, Status
from aidocks.operations import find_operation
from aidocks.specs.base import OperationResult

if TYPE_CHECKING:
    from aidocks.client.async_http import AsyncClient  # noqa: F401 - named in strings below
    from aidocks.client.http import Client  # noqa: F401

ClientT = TypeVar("ClientT")
#: True shows progress on standard error, as bars or plain lines; a callable gets the events.
ProgressOption = bool | Callable[[Event], object]


class _Handle(Generic[ClientT]):
    """What the two kinds of handles share: the last known state of the job."""

    def __init__(self, client: ClientT, job: Job) -> None:
        self._client = client
        self.job = job

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def status(self) -> Status:
        """The status when the job was last asked for; see :meth:`refresh`."""
        return self.job.status

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.job.id} {self.job.operation} {self.job.status}>"


class JobHandle(_Handle["Client"]):
    """A job at a service."""

    def refresh(self) -> JobHandle:
        """Ask the service for the job's present state."""
        self.job = self._client._answer_job(self.job.id)
        return self

    def cancel(self) -> JobHandle:
        """Ask for the job to be cancelled; a running unit may still finish.

        Raises:
            IllegalTransition: The job is over.
        """
        self.job = self._client._cancel(self.job.id)
        return self

    def resume(self) -> JobHandle:
        """Go on with a training that was stopped: return the handle of a new job, from the last checkpoint."""
        return self._client.resume(self.job.id)

    def events(self, after: int = 0) -> Iterator[Event]:
        """Yield the job's events after sequence ``after``, as they come, until the job is over.

        Broken connections are made again and the stream goes on where it was.

        Raises:
            ServiceUnreachable: The service stayed away for longer than the client's ``reconnect_s``.
        """
        return self._client._events(self.job.id, after)

    def history(self, after: int = 0) -> list[Event]:
        """Return the events so far, from the one after sequence ``after`` on."""
        return self._client._history(self.job.id, after)

    def wait(self, progress: ProgressOption = False, timeout: float | None = None) -> OperationResult:
        """Wait until the job is over.

        Args:
            progress: True for progress bars, or a function that is called with each event.
            timeout: Seconds to wait at most. The job goes on when they are over.

        Returns:
            The operation's own result class, such as ``LaserResult``.

        Raises:
            JobFailed: With the job's own error as its cause.
            JobCancelled: Somebody cancelled the job.
            TimeoutError: It was not over in time.
        """
        with _shown(progress) as show:
            for event in self._client._events(self.job.id, 0, timeout):
                show(event)
        return result_of(self.refresh().job)


class AsyncJobHandle(_Handle["AsyncClient"]):
    """A job at a service, for use with ``await``; see :class:`JobHandle`."""

    async def refresh(self) -> AsyncJobHandle:
        self.job = await self._client._answer_job(self.job.id)
        return self

    async def cancel(self) -> AsyncJobHandle:
        self.job = await self._client._cancel(self.job.id)
        return self

    async def resume(self) -> AsyncJobHandle:
        return await self._client.resume(self.job.id)

    def events(self, after: int = 0) -> AsyncIterator[Event]:
        return self._client._events(self.job.id, after)

    async def history(self, after: int = 0) -> list[Event]:
        return await self._client._history(self.job.id, after)

    async def wait(self, progress: ProgressOption = False, timeout: float | None = None) -> OperationResult:
        with _shown(progress) as show:
            async for event in self._client._events(self.job.id, 0, timeout):
                show(event)
        return result_of((await self.refresh()).job)


def result_of(job: Job) -> OperationResult:
    """Return the typed result of a job that is over.

    Raises:
        JobFailed: With the job's own error as its cause.
        JobCancelled: Somebody cancelled the job.
    """
    if job.status is Status.FAILED:
        cause = error_from_problem(job.error or {})
        raise JobFailed(
            f"Job {job.id} ({job.operation}) failed: {cause.message}",
            field=cause.field,
            value=cause.value,
            hint=cause.hint,
        ) from cause
    if job.status is Status.CANCELLED:
        raise JobCancelled(f"Job {job.id} ({job.operation}) was cancelled.")
    assert job.status is Status.SUCCEEDED, f"job {job.id} is {job.status}"
    return find_operation(job.operation).load().read_result(job.result or {})


def _shown(progress: ProgressOption) -> AbstractContextManager[Callable[[Event], Any]]:
    if progress is True:
        from aidocks.client.progress import shown_progress

        return shown_progress()
    return nullcontext(progress if callable(progress) else lambda _: None)
