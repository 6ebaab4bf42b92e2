"""The client of a running service for use with ``await``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import httpx

from aidocks.access.entry import AuditEntry
from aidocks.access.keys import ApiKey, NewKey, Scope
from aidocks.client import calls
from aidocks.client.calls import Call, Retries
from aidocks.client.connection import Connection
from aidocks.client.download import ModelFile
from aidocks.client.events import EventCursor, Outage, StreamClock, check_stream
from aidocks.client.http import INTERRUPTIONS, AnswerT, Client, SpecLike
from aidocks.client.job import AsyncJobHandle
from aidocks.datasets.store import StoredDataset
from aidocks.jobs.model import Event, Job, Status
from aidocks.models.registry import Manifest, ModelInfo
from aidocks.overview import Overview
from aidocks.specs.retrieve import EmbedAnswer, RerankAnswer


class AsyncClient(Connection):
    """:class:`~aidocks.client.http.Client` for use with ``await``: the same methods, as coroutines."""

    def _open(self) -> None:
        self._http = httpx.AsyncClient(**self._options)

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, AsyncJobHandle]]:
        operation = self._operation(name)

        async def submit(spec: SpecLike = None, **options: Any) -> AsyncJobHandle:
            return await self.submit(operation, spec, **options)

        return submit

    async def submit(
        self,
        operation: str,
        spec: SpecLike = None,
        *,
        idempotency_key: str | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> AsyncJobHandle:
        call = calls.submission(operation, spec, fields, idempotency_key, priority, timeout_s)
        return AsyncJobHandle(self, await self._answer(call))

    async def jobs(
        self,
        status: Status | str | None = None,
        operation: str | None = None,
        limit: int = 50,
        before: str | None = None,
        owner: str | None = None,
    ) -> list[AsyncJobHandle]:
        listed = await self._answer(calls.list_jobs(status, operation, limit, before, owner))
        return [AsyncJobHandle(self, job) for job in listed]

    async def job(self, job_id: str) -> AsyncJobHandle:
        return AsyncJobHandle(self, await self._answer_job(job_id))

    async def resume(
        self,
        job_id: str,
        *,
        idempotency_key: str | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncJobHandle:
        call = calls.resume_job(job_id, idempotency_key, priority, timeout_s)
        return AsyncJobHandle(self, await self._answer(call))

    async def models(self) -> list[ModelInfo]:
        return await self._answer(calls.list_models())

    async def model(self, name: str) -> Manifest:
        return await self._answer(calls.get_model(name))

    async def files(self, name: str) -> list[ModelFile]:
        return await self._answer(calls.list_files(name))

    async def delete_model(self, name: str) -> None:
        await self._answer(calls.delete_model(name))

    async def datasets(self) -> list[StoredDataset]:
        return await self._answer(calls.list_datasets())

    async def dataset(self, name: str) -> StoredDataset:
        return await self._answer(calls.get_dataset(name))

    async def upload_dataset(
        self,
        path: str | Path,
        name: str | None = None,
        progress: Callable[[int, int], object] = lambda sent, size: None,
    ) -> StoredDataset:
        return await self._in_thread(lambda client: client.upload_dataset(path, name, progress))

    async def delete_dataset(self, name: str) -> None:
        await self._answer(calls.delete_dataset(name))

    async def embed(
        self,
        model: str,
        texts: str | Sequence[str],
        *,
        role: Literal["query", "passage"] | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
    ) -> EmbedAnswer:
        """Return vectors of texts.

        Args:
            model: An embedding model: a registry name, or a path below an allowed root.
            texts: A text, or up to 2048.
            role: Which of the model's prompts is put before each text; none without one.
            prompt: Another prompt, in place of the model's.
            dimensions: Cut the vectors to so many values, and make their length 1 again.

        Raises:
            UnknownModel: There is no such model.
            IncompatibleModels: It makes no vectors.
            TooBusy: Too much waited for longer than this client repeats requests.
        """
        fields = {"role": role, "prompt": prompt, "dimensions": dimensions}
        return await self._answer(calls.embed(model, texts, fields))

    async def rerank(
        self,
        model: str,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        return_documents: bool = False,
        raw_scores: bool = False,
    ) -> RerankAnswer:
        """Return passages in the order in which they answer a query, the best first.

        Args:
            model: A reranker: a registry name, or a path below an allowed root.
            query: The question.
            documents: Up to 2048 passages.
            top_n: Return so many of the best alone.
            return_documents: Repeat the texts in the answer.
            raw_scores: Scores as the model makes them, rather than between 0 and 1.

        Raises:
            AIDocksError: As :meth:`embed`.
        """
        fields = {"top_n": top_n, "return_documents": return_documents, "raw_scores": raw_scores}
        return await self._answer(calls.rerank(model, query, documents, fields))

    async def health(self) -> dict[str, Any]:
        return await self._answer(calls.get_health())

    async def status(self) -> Overview:
        return await self._answer(calls.get_status())

    async def create_key(
        self,
        name: str,
        scopes: Sequence[Scope | str] = (Scope.SUBMIT,),
        *,
        expires_in_s: float | None = None,
        requests_per_minute: int | None = None,
        max_jobs: int | None = None,
    ) -> NewKey:
        fields = {
            "requests_per_minute": requests_per_minute,
            "max_jobs": max_jobs,
            "expires_in_s": expires_in_s,
        }
        return await self._answer(calls.create_key(name, scopes, fields))

    async def keys(self) -> list[ApiKey]:
        return await self._answer(calls.list_keys())

    async def revoke_key(self, key_id: str) -> None:
        await self._answer(calls.revoke_key(key_id))

    async def audit(
        self, limit: int = 100, before: int | None = None, owner: str | None = None
    ) -> list[AuditEntry]:
        return await self._answer(calls.list_audit(limit, before, owner))

    async def download(self, name: str, directory: str | Path) -> Path:
        return await self._in_thread(lambda client: client.download(name, directory))

    async def _in_thread(self, work: Callable[[Client], AnswerT]) -> AnswerT:
        """Let the synchronous client do what reads or writes files, which blocks."""

        def do() -> AnswerT:
            with Client(
                self.url,
                self._timeout,
                retry_s=self._retry_s,
                reconnect_s=self._reconnect_s,
                api_key=self._api_key,
            ) as client:
                return work(client)

        return await asyncio.to_thread(do)

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
            except INTERRUPTIONS as error:
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
