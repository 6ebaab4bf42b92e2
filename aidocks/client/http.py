"""The clients of a running service: :class:`Client` and, for use with ``await``, :class:`AsyncClient`.

Both say the same things: what a request is, how an answer is read, when to try again and where an event
stream goes on live in :mod:`aidocks.client.calls` and :mod:`aidocks.client.events`; here is only the sending.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from aidocks.client import calls
from aidocks.client.address import is_loopback, service_url
from aidocks.client.calls import Call, Retries
from aidocks.client.download import Download, ModelFile
from aidocks.client.events import EventCursor, Outage, StreamClock, StreamRefused, check_stream
from aidocks.client.job import AsyncJobHandle, JobHandle
from aidocks.errors import NotFound, ServiceUnreachable
from aidocks.jobs.model import Event, Job, Status
from aidocks.models.registry import Manifest, ModelInfo
from aidocks.operations import OPERATIONS, find_operation
from aidocks.specs.base import Spec

AnswerT = TypeVar("AnswerT")
SpecLike = Spec | Mapping[str, Any] | None

#: What interrupts a stream without ending it.
_INTERRUPTIONS = (httpx.TransportError, ServiceUnreachable, StreamRefused)


class _Connection:
    """What both clients share; the arguments are described at :class:`Client`."""

    def __init__(
        self,
        url: str | None = None,
        timeout: float = 30.0,
        *,
        retry_s: float = 5.0,
        reconnect_s: float = 300.0,
    ) -> None:
        self.url = (url or service_url()).rstrip("/")
        self._timeout = timeout
        self._retry_s = retry_s
        self._reconnect_s = reconnect_s
        self._open()

    def _open(self) -> None:
        raise NotImplementedError

    @property
    def _options(self) -> dict[str, Any]:
        # A proxy of the environment is not asked for this machine's own addresses.
        return {"base_url": self.url, "timeout": self._timeout, "trust_env": not is_loopback(self.url)}

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(registration.method for registration in OPERATIONS)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _operation(self, name: str) -> str:
        """Return the operation that the unknown attribute ``name`` stands for."""
        try:
            return find_operation(name).name
        except NotFound as error:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}. {error.hint}") from None

    def _outage(self) -> Outage:
        return Outage(self.url, self._reconnect_s)


class Client(_Connection):
    """A client of a running service; each operation is a method: ``client.laser(base_model_name=..., ...)``.

    Args:
        url: The service. Default: ``AIDOCKS_URL``, else the service that ``aidocks up`` started.
        timeout: Seconds that one request may take.
        retry_s: Seconds for which requests are repeated while the service is away or asks to come later.
        reconnect_s: Seconds for which an event stream looks for a service that has gone away (a restart).
    """

    def _open(self) -> None:
        self._http = httpx.Client(**self._options)

    def __getattr__(self, name: str) -> Callable[..., JobHandle]:
        operation = self._operation(name)

        def submit(spec: SpecLike = None, *, idempotency_key: str | None = None, **fields: Any) -> JobHandle:
            return self.submit(operation, spec, idempotency_key=idempotency_key, **fields)

        return submit

    def submit(
        self, operation: str, spec: SpecLike = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> JobHandle:
        """Submit a job.

        Args:
            operation: Such as ``laser``.
            spec: A spec, or a mapping of its fields. ``fields`` are added to it and win.
            idempotency_key: Submitting again under the same key returns the same job.

        Raises:
            AIDocksError: Whatever the service refuses: :class:`InvalidSpec`, :class:`NameTaken` and so on.
        """
        return JobHandle(self, self._answer(calls.submission(operation, spec, fields, idempotency_key)))

    def jobs(
        self,
        status: Status | str | None = None,
        operation: str | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> list[JobHandle]:
        """Return jobs, newest first; ``before`` is the id of the job where the page before ended."""
        return [
            JobHandle(self, job) for job in self._answer(calls.list_jobs(status, operation, limit, before))
        ]

    def job(self, job_id: str) -> JobHandle:
        """Return the job with this id, or raise :class:`UnknownJob`."""
        return JobHandle(self, self._answer_job(job_id))

    def models(self) -> list[ModelInfo]:
        """Return the models of the registry."""
        return self._answer(calls.list_models())

    def model(self, name: str) -> Manifest:
        """Return the manifest of a registry model, or raise :class:`UnknownModel`."""
        return self._answer(calls.get_model(name))

    def files(self, name: str) -> list[ModelFile]:
        """Return the files of a registry model."""
        return self._answer(calls.list_files(name))

    def delete_model(self, name: str) -> None:
        """Delete a registry model; raises :class:`ModelInUse` while a job under way needs it."""
        self._answer(calls.delete_model(name))

    def health(self) -> dict[str, Any]:
        """Return what the service says of itself."""
        return self._answer(calls.get_health())

    def download(self, name: str, directory: str | Path) -> Path:
        """Copy a registry model to ``directory / name``, which appears when all of it is there.

        A download that was broken off goes on where it was.

        Raises:
            Conflict: ``directory / name`` exists.
            CorruptCheckpoint: A file is not what the manifest says.
        """
        download = Download(name, self.files(name), Path(directory))
        outage = self._outage()
        while file := download.next_file():
            try:
                with self._http.stream(
                    "GET", calls.file_path(name, file.path), headers=file.headers()
                ) as response:
                    if response.is_error:
                        response.read()
                    check_stream(response)
                    with file.sink(response) as sink:
                        for chunk in response.iter_bytes():
                            outage.over()
                            sink.write(chunk)
            except _INTERRUPTIONS as error:
                time.sleep(outage.delay(error))
        return download.publish()

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer_job(self, job_id: str) -> Job:
        return self._answer(calls.get_job(job_id))

    def _cancel(self, job_id: str) -> Job:
        return self._answer(calls.cancel_job(job_id))

    def _answer(self, call: Call[AnswerT]) -> AnswerT:
        retries = Retries(call, self.url, self._retry_s)
        while True:
            try:
                response = self._http.request(**call.request())
            except httpx.TransportError as error:
                delay: float | None = retries.after_error(error)
            else:
                delay = retries.after_response(response)
            if delay is None:
                return call.answer(response)
            time.sleep(delay)

    def _history(self, job_id: str, after: int) -> list[Event]:
        events: list[Event] = []
        while page := self._answer(calls.list_events(job_id, events[-1].sequence if events else after)):
            events += page
        return events

    def _events(self, job_id: str, after: int, timeout: float | None = None) -> Iterator[Event]:
        cursor, outage, clock = EventCursor(after), self._outage(), StreamClock(job_id, timeout)
        while not cursor.ended:
            try:
                yield from self._connected(calls.events_path(job_id), cursor, outage, clock)
                delay = 0.0 if cursor.ended else cursor.closed(self._answer_job(job_id).status.terminal)
            except _INTERRUPTIONS as error:
                clock.check()
                delay = outage.delay(error)
            time.sleep(delay)

    def _connected(
        self, path: str, cursor: EventCursor, outage: Outage, clock: StreamClock
    ) -> Iterator[Event]:
        headers, timeout = cursor.connect(), clock.timeouts(self._timeout)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
            check_stream(response)
            for chunk in response.iter_bytes():
                outage.over()
                yield from cursor.feed(chunk)
                if cursor.ended:
                    return
                clock.check()


class AsyncClient(_Connection):
    """:class:`Client` for use with ``await``: the same methods, as coroutines."""

    def _open(self) -> None:
        self._http = httpx.AsyncClient(**self._options)

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, AsyncJobHandle]]:
        operation = self._operation(name)

        async def submit(
            spec: SpecLike = None, *, idempotency_key: str | None = None, **fields: Any
        ) -> AsyncJobHandle:
            return await self.submit(operation, spec, idempotency_key=idempotency_key, **fields)

        return submit

    async def submit(
        self, operation: str, spec: SpecLike = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> AsyncJobHandle:
        job = await self._answer(calls.submission(operation, spec, fields, idempotency_key))
        return AsyncJobHandle(self, job)

    async def jobs(
        self,
        status: Status | str | None = None,
        operation: str | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> list[AsyncJobHandle]:
        listed = await self._answer(calls.list_jobs(status, operation, limit, before))
        return [AsyncJobHandle(self, job) for job in listed]

    async def job(self, job_id: str) -> AsyncJobHandle:
        return AsyncJobHandle(self, await self._answer_job(job_id))

    async def models(self) -> list[ModelInfo]:
        return await self._answer(calls.list_models())

    async def model(self, name: str) -> Manifest:
        return await self._answer(calls.get_model(name))

    async def files(self, name: str) -> list[ModelFile]:
        return await self._answer(calls.list_files(name))

    async def delete_model(self, name: str) -> None:
        await self._answer(calls.delete_model(name))

    async def health(self) -> dict[str, Any]:
        return await self._answer(calls.get_health())

    async def download(self, name: str, directory: str | Path) -> Path:
        # Disk writes block, so a thread does what the synchronous client does.
        def work() -> Path:
            with Client(
                self.url, self._timeout, retry_s=self._retry_s, reconnect_s=self._reconnect_s
            ) as client:
                return client.download(name, directory)

        return await asyncio.to_thread(work)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _answer_job(self, job_id: str) -> Job:
        return await self._answer(calls.get_job(job_id))

    async def _cancel(self, job_id: str) -> Job:
        return await self._answer(calls.cancel_job(job_id))

    async def _answer(self, call: Call[AnswerT]) -> AnswerT:
        retries = Retries(call, self.url, self._retry_s)
        while True:
            try:
                response = await self._http.request(**call.request())
            except httpx.TransportError as error:
                delay: float | None = retries.after_error(error)
            else:
                delay = retries.after_response(response)
            if delay is None:
                return call.answer(response)
            await asyncio.sleep(delay)

    async def _history(self, job_id: str, after: int) -> list[Event]:
        events: list[Event] = []
        while page := await self._answer(calls.list_events(job_id, events[-1].sequence if events else after)):
            events += page
        return events

    async def _events(self, job_id: str, after: int, timeout: float | None = None) -> AsyncIterator[Event]:
        cursor, outage, clock = EventCursor(after), self._outage(), StreamClock(job_id, timeout)
        while not cursor.ended:
            try:
                async with aclosing(
                    self._connected(calls.events_path(job_id), cursor, outage, clock)
                ) as events:
                    async for event in events:
                        yield event
                job_is_over = cursor.ended or (await self._answer_job(job_id)).status.terminal
                delay = cursor.closed(job_is_over)
            except _INTERRUPTIONS as error:
                clock.check()
                delay = outage.delay(error)
            await asyncio.sleep(delay)

    async def _connected(
        self, path: str, cursor: EventCursor, outage: Outage, clock: StreamClock
    ) -> AsyncGenerator[Event]:
        headers, timeout = cursor.connect(), clock.timeouts(self._timeout)
        async with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.is_error:
                await response.aread()
            check_stream(response)
            async for chunk in response.aiter_bytes():
                outage.over()
                for event in cursor.feed(chunk):
                    yield event
                if cursor.ended:
                    return
                clock.check()
