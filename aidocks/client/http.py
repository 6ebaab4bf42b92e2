"""The client of a running service: :class:`Client`; :class:`~aidocks.client.async_http.AsyncClient` is for ``await``.

Both say the same things: what a request is, how an answer is read, when to try again and where an event
stream goes on live in :mod:`aidocks.client.calls` and :mod:`aidocks.client.events`; here is only the sending.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import httpx

from aidocks.access.entry import AuditEntry
from aidocks.access.keys import ApiKey, NewKey, Scope
from aidocks.client import calls
from aidocks.client.calls import Call, Retries
from aidocks.client.connection import Connection
from aidocks.client.download import Download, ModelFile
from aidocks.client.events import EventCursor, Outage, StreamClock, StreamRefused, check_stream
from aidocks.client.job import JobHandle
from aidocks.client.upload import parts_of
from aidocks.datasets.store import StoredDataset
from aidocks.errors import AIDocksError, InvalidSpec, ServiceUnreachable
from aidocks.jobs.model import Event, Job, Status
from aidocks.models.registry import Manifest, ModelInfo
from aidocks.overview import Overview
from aidocks.specs.base import Spec
from aidocks.specs.retrieve import EmbedAnswer, RerankAnswer

AnswerT = TypeVar("AnswerT")
SpecLike = Spec | Mapping[str, Any] | None

#: What interrupts a stream without ending it.
INTERRUPTIONS = (httpx.TransportError, ServiceUnreachable, StreamRefused)


class Client(Connection):
    """A client of a running service; each operation is a method: ``client.laser(base_model_name=..., ...)``.

    Args:
        url: The service. Default: ``AIDOCKS_URL``, else the service that ``aidocks up`` started.
        timeout: Seconds that one request may take.
        retry_s: Seconds for which requests are repeated while the service is away or asks to come later.
        reconnect_s: Seconds for which an event stream looks for a service that has gone away (a restart).
        api_key: Sent with every request. Default: ``AIDOCKS_API_KEY``; to the service that ``aidocks up`` started in
            this data directory, else the administrator's key.
    """

    def _open(self) -> None:
        self._http = httpx.Client(**self._options)

    def __getattr__(self, name: str) -> Callable[..., JobHandle]:
        operation = self._operation(name)

        def submit(spec: SpecLike = None, **options: Any) -> JobHandle:
            return self.submit(operation, spec, **options)

        return submit

    def submit(
        self,
        operation: str,
        spec: SpecLike = None,
        *,
        idempotency_key: str | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> JobHandle:
        """Submit a job. The methods of the operations take the same keyword arguments.

        Args:
            operation: Such as ``laser``.
            spec: A spec, or a mapping of its fields. ``fields`` are added to it and win.
            idempotency_key: Submitting again under the same key returns the same job.
            priority: -10 to 10; jobs of a higher one get the workers first. Default: 0.
            timeout_s: Seconds after its start at which the job is ended as failed. Default: it takes its time.

        Raises:
            AIDocksError: Whatever the service refuses: :class:`InvalidSpec`, :class:`NameTaken` and so on.
            QuotaExceeded: This client's key has as many unfinished jobs as it may have.
            QueueFull: As many jobs wait as may.
        """
        call = calls.submission(operation, spec, fields, idempotency_key, priority, timeout_s)
        return JobHandle(self, self._answer(call))

    def jobs(
        self,
        status: Status | str | None = None,
        operation: str | None = None,
        limit: int = 50,
        before: str | None = None,
        owner: str | None = None,
    ) -> list[JobHandle]:
        """Return jobs, newest first; ``before`` is the id of the job where the page before ended."""
        listed = self._answer(calls.list_jobs(status, operation, limit, before, owner))
        return [JobHandle(self, job) for job in listed]

    def job(self, job_id: str) -> JobHandle:
        """Return the job with this id, or raise :class:`UnknownJob`."""
        return JobHandle(self, self._answer_job(job_id))

    def resume(
        self,
        job_id: str,
        *,
        idempotency_key: str | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
    ) -> JobHandle:
        """Go on with a training that failed or was cancelled: a new job, from its last checkpoint.

        Priority and time limit are those of the old job where nothing else is said.

        Raises:
            IllegalTransition: It has not been stopped.
            Conflict: It left no checkpoint, or is of a kind that leaves none.
        """
        return JobHandle(self, self._answer(calls.resume_job(job_id, idempotency_key, priority, timeout_s)))

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

    def datasets(self) -> list[StoredDataset]:
        """Return the data sets that were uploaded, newest first."""
        return self._answer(calls.list_datasets())

    def dataset(self, name: str) -> StoredDataset:
        """Return what is known of a data set, by name or id, or raise :class:`NotFound`."""
        return self._answer(calls.get_dataset(name))

    def upload_dataset(
        self,
        path: str | Path,
        name: str | None = None,
        progress: Callable[[int, int], object] = lambda sent, size: None,
    ) -> StoredDataset:
        """Store a file of examples at the service. It is sent in parts; a part that is lost is sent again.

        Args:
            path: A .jsonl, .json, .csv, .parquet or .txt file.
            name: Name for the data set. Default: that of the file, without its ending.
            progress: Called with the bytes sent so far, and those of the file.

        Raises:
            NameTaken: There is a data set of this name.
            InvalidSpec: The file is not what its ending says, or larger than the service takes.
            ServiceUnreachable: The service stayed away; nothing was stored, or all of it.
        """
        path = Path(path)
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == 0:
                raise InvalidSpec(f"{path} is empty.", field="file", hint="Send at least one example.")
            upload = self._answer(calls.begin_upload(path.name, name, size))
            try:
                for offset, part in parts_of(stream, upload):
                    self._answer(calls.upload_part(upload, offset, part))
                    progress(offset + len(part), size)
                return self._answer(calls.complete_upload(upload))
            except AIDocksError as error:
                if not isinstance(error, ServiceUnreachable):  # else it forgets the upload by itself
                    with suppress(AIDocksError):
                        self._answer(calls.discard_upload(upload))
                raise

    def delete_dataset(self, name: str) -> None:
        """Delete a data set; raises :class:`Conflict` while a job under way needs it."""
        self._answer(calls.delete_dataset(name))

    def embed(
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
        return self._answer(calls.embed(model, texts, fields))

    def rerank(
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
        return self._answer(calls.rerank(model, query, documents, fields))

    def health(self) -> dict[str, Any]:
        """Return what the service says of itself."""
        return self._answer(calls.get_health())

    def status(self) -> Overview:
        """Return how the service is and what it does: jobs, workers, nodes, disk."""
        return self._answer(calls.get_status())

    def create_key(
        self,
        name: str,
        scopes: Sequence[Scope | str] = (Scope.SUBMIT,),
        *,
        expires_in_s: float | None = None,
        requests_per_minute: int | None = None,
        max_jobs: int | None = None,
    ) -> NewKey:
        """Make an API key, with an administrator's. The answer's ``key`` is told this once.

        Args:
            name: Whose it is, or what for.
            scopes: What it allows: ``read``, ``submit`` or ``admin``.
            expires_in_s: Seconds after which it is refused. Default: never.
            requests_per_minute: Default: as the service's settings say; 0: any number.
            max_jobs: Unfinished jobs at the same time. Default: as the service's settings say.

        Raises:
            NotPermitted: This client's own key is not an administrator's.
        """
        fields = {
            "requests_per_minute": requests_per_minute,
            "max_jobs": max_jobs,
            "expires_in_s": expires_in_s,
        }
        return self._answer(calls.create_key(name, scopes, fields))

    def keys(self) -> list[ApiKey]:
        """Return the API keys, newest first, also those that are refused."""
        return self._answer(calls.list_keys())

    def revoke_key(self, key_id: str) -> None:
        """Let an API key be refused from now on, everywhere within a few seconds."""
        self._answer(calls.revoke_key(key_id))

    def audit(
        self, limit: int = 100, before: int | None = None, owner: str | None = None
    ) -> list[AuditEntry]:
        """Return what was done, newest first; ``before`` is the number of the entry where the page before ended."""
        return self._answer(calls.list_audit(limit, before, owner))

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
            except INTERRUPTIONS as error:
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
            except INTERRUPTIONS as error:
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
