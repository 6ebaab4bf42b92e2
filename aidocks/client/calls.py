"""What is said over HTTP, without saying it: requests as values, shared by the sync and the async client."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from aidocks.access.entry import AuditEntry
from aidocks.access.keys import ApiKey, KeyRequest, NewKey, Scope
from aidocks.client.download import ModelFile
from aidocks.client.problems import error_from_response
from aidocks.datasets.parts import PartedUpload
from aidocks.datasets.store import StoredDataset
from aidocks.errors import AIDocksError, ServiceUnreachable
from aidocks.jobs.model import Event, Job, Status
from aidocks.models.registry import Manifest, ModelInfo
from aidocks.operations import find_operation
from aidocks.overview import Overview
from aidocks.specs.base import Spec
from aidocks.specs.read import build_spec
from aidocks.specs.retrieve import EmbedAnswer, RerankAnswer

AnswerT = TypeVar("AnswerT")

#: Answers that say "try again": too many requests, and a service that is starting, stopping or full.
_TRY_AGAIN = frozenset({429, 503})
#: What even a slow disk can do.
_READ_BYTES_PER_S = 20e6
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 5.0
#: A model that is asked for the first time has to be loaded, and others may wait before.
_LOADING_S = 600.0


@dataclass(frozen=True)
class Call(Generic[AnswerT]):
    """One request, and how its answer is read.

    Attributes:
        read: Turns the JSON of a successful answer into what the caller gets.
        body: Sent as JSON.
        content: Sent as it is.
        repeatable: Sending it twice has the effect of sending it once, so a lost answer is asked for again.
        timeout_s: Seconds that it may take, where that is longer than for others.
    """

    method: str
    path: str
    read: Callable[[Any], AnswerT]
    params: dict[str, str] = field(default_factory=dict)
    body: Any = None
    headers: dict[str, str] = field(default_factory=lambda: {"Accept": "application/json"})
    repeatable: bool = True
    content: bytes | None = None
    timeout_s: float | None = None

    def request(self) -> dict[str, Any]:
        """Return the keyword arguments of an httpx ``request``."""
        arguments: dict[str, Any] = {"method": self.method, "url": self.path, "headers": self.headers}
        if self.params:
            arguments["params"] = self.params
        if self.body is not None:
            arguments["json"] = self.body
        if self.content is not None:
            arguments["content"] = self.content
        if self.timeout_s is not None:
            arguments["timeout"] = self.timeout_s
        return arguments

    def answer(self, response: httpx.Response) -> AnswerT:
        """Read a response.

        Raises:
            AIDocksError: The one that an unsuccessful response describes.
        """
        if not response.is_success:
            raise error_from_response(response)
        try:
            return self.read(response.json() if response.content else None)
        except (ValueError, TypeError, KeyError) as error:
            raise ServiceUnreachable(
                f"What answers {self.method} {response.request.url} is not AIDocks of this version.",
                hint="See `aidocks status`, or set AIDOCKS_URL.",
            ) from error


class Retries:
    """Decides after each failure of one call how long to wait for the next attempt, or that there is none."""

    def __init__(self, call: Call[Any], url: str, patience_s: float) -> None:
        self._call = call
        self._url = url
        self._deadline = time.monotonic() + patience_s
        self._delay = _FIRST_DELAY_S

    def after_error(self, error: httpx.TransportError) -> float:
        """Return the seconds to wait after a failed transport.

        Raises:
            ServiceUnreachable: Patience is over, or the request may have had its effect already.
        """
        never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        delay = self._next()
        if delay is None or not (never_sent or self._call.repeatable):
            raise unreachable(self._url, error) from error
        return delay

    def after_response(self, response: httpx.Response) -> float | None:
        """Return the seconds to wait after a response that asks to try again, None when it is the answer."""
        if response.status_code not in _TRY_AGAIN:
            return None
        asked = response.headers.get("Retry-After", "")
        return self._next(float(asked) if asked.isdecimal() else 0.0)

    def _next(self, at_least: float = 0.0) -> float | None:
        delay = max(self._delay, at_least)
        self._delay = min(2 * self._delay, _LONGEST_DELAY_S)
        return delay if time.monotonic() + delay < self._deadline else None


def unreachable(url: str, error: Exception | None = None) -> ServiceUnreachable:
    """Return the error that says so, with the reason when it is not simply a refused connection."""
    reason = (
        ""
        if error is None or isinstance(error, httpx.ConnectError)
        else f" ({error or type(error).__name__})"
    )
    return ServiceUnreachable(
        f"No AIDocks service answers at {url}{reason}.",
        hint="Start it with `aidocks up`, or set AIDOCKS_URL to where it is.",
    )


def submission(
    operation: str,
    spec: Spec | Mapping[str, Any] | None,
    fields: Mapping[str, Any],
    idempotency_key: str | None,
    priority: int | None = None,
    timeout_s: float | None = None,
) -> Call[Job]:
    """Return the call that submits a job. Without a key of the caller's it carries one of its own.

    Raises:
        NotFound: There is no such operation.
    """
    body = spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, Spec) else dict(spec or {})
    return Call(
        "POST",
        find_operation(operation).endpoint,
        Job.model_validate,
        params=_terms(priority, timeout_s),
        body=body | dict(fields),
        headers=_submitting(idempotency_key),
    )


def get_job(job_id: str) -> Call[Job]:
    return Call("GET", f"/jobs/{_segment(job_id)}", Job.model_validate)


def cancel_job(job_id: str) -> Call[Job]:
    return Call("POST", f"/jobs/{_segment(job_id)}/cancel", Job.model_validate, repeatable=False)


def resume_job(
    job_id: str, idempotency_key: str | None, priority: int | None = None, timeout_s: float | None = None
) -> Call[Job]:
    """Return the call that submits a job which goes on with another. It carries a key, as any submission does."""
    return Call(
        "POST",
        f"/jobs/{_segment(job_id)}/resume",
        Job.model_validate,
        params=_terms(priority, timeout_s),
        headers=_submitting(idempotency_key),
    )


def list_jobs(
    status: Status | str | None,
    operation: str | None,
    limit: int,
    before: str | None,
    owner: str | None = None,
) -> Call[list[Job]]:
    params = {
        "status": status,
        "operation": operation,
        "owner": owner,
        "limit": str(limit),
        "before": before,
    }
    return Call(
        "GET",
        "/jobs",
        _listing("jobs", Job.model_validate),
        params={k: str(v) for k, v in params.items() if v},
    )


def list_events(job_id: str, after: int) -> Call[list[Event]]:
    return Call(
        "GET", events_path(job_id), _listing("events", Event.model_validate), params={"after": str(after)}
    )


def list_files(model: str) -> Call[list[ModelFile]]:
    return Call("GET", f"/models/{_segment(model)}/files", _listing("files", ModelFile.model_validate))


def list_models() -> Call[list[ModelInfo]]:
    return Call("GET", "/models", _listing("models", ModelInfo.model_validate))


def get_model(name: str) -> Call[Manifest]:
    return Call("GET", f"/models/{_segment(name)}", Manifest.model_validate)


def delete_model(name: str) -> Call[None]:
    return Call("DELETE", f"/models/{_segment(name)}", lambda _: None, repeatable=False)


def list_datasets() -> Call[list[StoredDataset]]:
    return Call("GET", "/datasets", _listing("datasets", StoredDataset.model_validate))


def get_dataset(name: str) -> Call[StoredDataset]:
    return Call("GET", f"/datasets/{_segment(name)}", StoredDataset.model_validate)


def begin_upload(filename: str, name: str | None, size: int) -> Call[PartedUpload]:
    """Return the call that begins to store a file, which is then sent in parts."""
    params = {"filename": filename, "bytes": str(size)} | ({"name": name} if name is not None else {})
    return Call("POST", "/uploads", PartedUpload.model_validate, params=params)


def upload_part(upload: PartedUpload, offset: int, part: bytes) -> Call[None]:
    headers = {"Accept": "application/json", "Content-Type": "application/octet-stream"}
    return Call(
        "PUT",
        f"/uploads/{upload.id}",
        lambda _: None,
        params={"offset": str(offset)},
        headers=headers,
        content=part,
    )


def complete_upload(upload: PartedUpload) -> Call[StoredDataset]:
    """Return the call that makes the file a data set. The service reads all of it for that."""
    patience = 60.0 + upload.bytes / _READ_BYTES_PER_S
    return Call("POST", f"/uploads/{upload.id}/complete", StoredDataset.model_validate, timeout_s=patience)


def discard_upload(upload: PartedUpload) -> Call[None]:
    return Call("DELETE", f"/uploads/{upload.id}", lambda _: None, repeatable=False)


def delete_dataset(name: str) -> Call[None]:
    return Call("DELETE", f"/datasets/{_segment(name)}", lambda _: None, repeatable=False)


def embed(model: str, texts: str | Sequence[str], fields: Mapping[str, Any]) -> Call[EmbedAnswer]:
    """Return the call for vectors of texts; ``fields`` are those of :class:`~aidocks.specs.retrieve.EmbedRequest`."""
    given = texts if isinstance(texts, str) else list(texts)
    # The numbers in a third of the bytes, and none is written in decimals.
    body = {"model": model, "input": given} | _given(fields) | {"encoding_format": "base64"}
    return Call("POST", "/embed", _vectors, body=body, timeout_s=_LOADING_S)


def rerank(model: str, query: str, documents: Sequence[str], fields: Mapping[str, Any]) -> Call[RerankAnswer]:
    """Return the call for passages in order; ``fields`` as :class:`~aidocks.specs.retrieve.RerankRequest` has them."""
    body = {"model": model, "query": query, "documents": list(documents)} | _given(fields)
    return Call("POST", "/rerank", RerankAnswer.model_validate, body=body, timeout_s=_LOADING_S)


def get_health() -> Call[dict[str, Any]]:
    return Call("GET", "/health", dict)


def get_status() -> Call[Overview]:
    return Call("GET", "/status", Overview.model_validate)


def create_key(name: str, scopes: Sequence[Scope | str], fields: Mapping[str, Any]) -> Call[NewKey]:
    """Return the call for an API key; ``fields`` are those of :class:`~aidocks.access.keys.KeyRequest`."""
    asked = build_spec(KeyRequest, {"name": name, "scopes": list(scopes)} | _given(fields))
    body = asked.model_dump(mode="json", exclude_unset=True)
    return Call("POST", "/keys", NewKey.model_validate, body=body, repeatable=False)


def list_keys() -> Call[list[ApiKey]]:
    return Call("GET", "/keys", _listing("keys", ApiKey.model_validate))


def revoke_key(key_id: str) -> Call[None]:
    return Call("DELETE", f"/keys/{_segment(key_id)}", lambda _: None)


def list_audit(limit: int, before: int | None, owner: str | None) -> Call[list[AuditEntry]]:
    params = {"limit": limit, "before": before, "owner": owner}
    read = _listing("entries", AuditEntry.model_validate)
    return Call("GET", "/audit", read, params={name: str(value) for name, value in _given(params).items()})


def events_path(job_id: str) -> str:
    return f"/jobs/{_segment(job_id)}/events"


def file_path(model: str, path: str) -> str:
    return f"/models/{_segment(model)}/files/{quote(path)}"


def _submitting(idempotency_key: str | None) -> dict[str, str]:
    return {"Accept": "application/json", "Idempotency-Key": idempotency_key or uuid.uuid4().hex}


def _terms(priority: int | None, timeout_s: float | None) -> dict[str, str]:
    return {
        name: str(value) for name, value in _given({"priority": priority, "timeout_s": timeout_s}).items()
    }


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _vectors(answer: Any) -> EmbedAnswer:
    rows = (_floats(base64.b64decode(text)) for text in answer["embeddings"])
    return EmbedAnswer.model_validate(answer | {"embeddings": tuple(rows)})


def _floats(data: bytes) -> tuple[float, ...]:
    """Return little-endian float32 values."""
    return struct.unpack(f"<{len(data) // 4}f", data)


def _segment(name: str) -> str:
    if not name:
        raise AIDocksError("The name is empty.")
    return quote(name, safe="")


def _listing(key: str, read: Callable[[Any], AnswerT]) -> Callable[[Any], list[AnswerT]]:
    return lambda answer: [read(item) for item in (answer[key] if isinstance(answer, dict) else answer)]
