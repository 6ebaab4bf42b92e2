"""What every request passes: request id, host check, size limit, key, access log, audit, and the last resort."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aidocks.access.redaction import without_secrets
from aidocks.errors import BodyTooLarge, HostNotAllowed, UnsupportedMediaType
from serve.access import KEY
from serve.door import Door, Refusal, path_of
from serve.problems import REQUEST_ID, problem_answer, unexpected_problem
from serve.traffic import observe_request, route_of
from serve.trail import Trail

MAX_BODY_BYTES = 1_000_000
#: What a file may have that comes in one request, as OpenAI's may. Ray Serve takes a body as fast as it comes and keeps
#: in memory what was not read yet, about a third of it; of a file in parts (`/uploads`) that is never more than a part.
MAX_FILE_BYTES = 512_000_000

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
#: Asked every second by whoever watches the service; logged only when it is not well.
_QUIET = frozenset({"/health"})

_access = logging.getLogger("serve.access")
log = logging.getLogger("serve.gate")


class Gate:
    """The outermost layer of the application.

    Args:
        app: What it protects.
        door: Asks for keys.
        trail: Is told what was done.
        allowed_hosts: Names for which the service answers, ``*`` for any. A web page can make a browser call
            a service on its user's machine under a name of the page's own (DNS rebinding), which is not here.
        max_body_bytes: Largest request body that is read.
        max_upload_bytes: The same for what is sent (POST) to certain paths, to which files are uploaded.
        returns_request_id: Put ``x-request-id`` into the answers. Ray Serve does so itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        door: Door,
        trail: Trail,
        allowed_hosts: Iterable[str],
        max_body_bytes: int = MAX_BODY_BYTES,
        returns_request_id: bool = True,
        max_upload_bytes: Mapping[str, int] | None = None,
    ) -> None:
        self._returns_request_id = returns_request_id
        self._app = app
        self._door = door
        self._trail = trail
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = dict(max_upload_bytes or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        scope[REQUEST_ID] = request_id if _REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
        limit = self._limit(scope)
        exchange = _Exchange(scope, receive, send, limit, self._returns_request_id)
        try:
            if refusal := await self._refusal(scope, headers, limit):
                answer = problem_answer(scope, refusal.error, refusal.headers)
                await answer(scope, receive, exchange.send)
            else:
                await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            log.exception(
                "%s %s failed",
                scope["method"],
                without_secrets(scope["path"]),
                extra={"fields": exchange.record()},
            )
            if exchange.status:
                raise  # the server breaks the connection, so that half an answer does not look whole
            await unexpected_problem(scope)(scope, receive, exchange.send)
        finally:
            observe_request(route_of(scope), scope["method"], exchange.status, exchange.seconds)
            self._trail.note(scope, path_of(scope), exchange.status, exchange.location)
            if scope["path"] not in _QUIET or exchange.status != 200:
                _access.info(
                    "%s %s",
                    scope["method"],
                    without_secrets(scope["path"]),
                    extra={"fields": exchange.record()},
                )

    def _limit(self, scope: Scope) -> int:
        """Return the bytes that the body of a request may have."""
        path = path_of(scope).rstrip("/")
        upload = self._max_upload_bytes.get(path) if scope["method"] == "POST" else None
        return self._max_body_bytes if upload is None else upload

    async def _refusal(self, scope: Scope, headers: Headers, limit: int) -> Refusal | None:
        host = headers.get("host", "")
        if "*" not in self._hosts and _without_port(host) not in self._hosts:
            return Refusal(
                HostNotAllowed(
                    f"This service does not answer to the host name {host[:200]!r}.",
                    hint="Add the name to AIDOCKS_ALLOWED_HOSTS where the service runs.",
                )
            )
        holder, refusal = await self._door.admit(scope, headers)
        if holder is not None:
            scope[KEY] = holder
        if refusal is not None:
            return refusal
        packing = headers.get("content-encoding", "identity").strip().lower()
        if packing not in ("", "identity"):
            packed = f"The body is packed ({packing[:40]!r})."
            return Refusal(UnsupportedMediaType(packed, hint="Send it as it is: nothing is unpacked here."))
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            return Refusal(_too_large(limit))
        return None


class _Exchange:
    """One request and its answer, as they pass."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int, returns_id: bool
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._returns_id = returns_id
        self._received = 0
        self._begun = time.perf_counter()
        self.status = 0
        self.location: str | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            self.location = headers.get("location")
            if self._returns_id:
                headers["x-request-id"] = self._scope[REQUEST_ID]
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def record(self) -> dict[str, Any]:
        """Return what the logs tell of the exchange; never a body or a query."""
        return {
            "request_id": self._scope[REQUEST_ID],
            "method": self._scope["method"],
            "path": without_secrets(self._scope["path"]),
            "status": self.status,
            "ms": round(self.seconds * 1000, 2),
        }


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body is larger than {limit:,} bytes.",
        hint="Specs name models and texts by reference. Data sets are uploaded to /datasets; large ones in parts, as "
        "`aidocks datasets upload` does (POST /uploads), up to AIDOCKS_MAX_UPLOAD_BYTES.",
    )


def _without_port(host: str) -> str:
    host = host.strip().lower()
    name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    return name.removesuffix(".")
