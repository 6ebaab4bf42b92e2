"""A service of a few lines whose every answer, and every failure, the test decides."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

CREATED = "2026-01-01T00:00:00Z"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Answer:
    """What to answer; ``breaks`` closes the connection in the middle of the body, or before any answer."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    breaks: bool = False
    stream: list[bytes] | None = None


class ScriptedService:
    """Answers each request with ``script(request)`` and remembers it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.script: Callable[[Request], Answer] = lambda _: Answer({}, 404)
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                request = Request(self.command, self.path, dict(self.headers.items()), body)
                service.requests.append(request)
                service._send(self, service.script(request))

            do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - the names that http.server calls

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        if answer.breaks and answer.stream is None:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        if answer.stream is not None:
            handler.send_header("Transfer-Encoding", "chunked")
            for name, value in answer.headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            for chunk in answer.stream:
                handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                handler.wfile.flush()
            if answer.breaks:
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True
            else:
                handler.wfile.write(b"0\r\n\r\n")
            return
        body = b"" if answer.body is None else answer.body if isinstance(answer.body, bytes) else None
        content = json.dumps(answer.body).encode() if body is None else body
        handler.send_header("Content-Length", str(len(content)))
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scripted() -> Iterator[ScriptedService]:
    service = ScriptedService()
    yield service
    service.close()


def job_json(status: str = "running", **more: Any) -> dict[str, Any]:
    return {
        "id": "job-1", "operation": "laser", "status": status, "spec": {}, "created_at": CREATED, **more,
    }  # fmt: skip


def frame(sequence: int, type: str, /, **data: Any) -> bytes:
    """Return one event as the service's stream has it."""
    event = {"job_id": "job-1", "sequence": sequence, "time": CREATED, "type": type, "data": data}
    return f"id: {sequence}\nevent: {type}\ndata: {json.dumps(event)}\n\n".encode()


@pytest.fixture
def job() -> Callable[..., dict[str, Any]]:
    return job_json


@pytest.fixture
def event_frame() -> Callable[..., bytes]:
    return frame


@pytest.fixture
def answer() -> type[Answer]:
    return Answer
