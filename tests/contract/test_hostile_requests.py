"""Requests that no client of ours sends: packed, nested, contradictory, slow. None breaks or holds up the service."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from aidocks.settings import Settings

Problem = Callable[..., dict[str, Any]]

JSON = {"Content-Type": "application/json"}
NESTED = {
    "lists": b"[" * 100_000 + b"]" * 100_000,
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "inside": b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "open": b"[" * 500_000,
}


@pytest.mark.parametrize("body", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("path", ["/merge", "/embed", "/keys", "/v1/embeddings", "/v1/fine_tuning/jobs"])
def test_json_that_nests_deeply(client: Any, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    assert len(answer.content) < 2000


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, gzip"])
def test_packed_bodies_are_never_unpacked(client: Any, settings: Settings, coding: str) -> None:
    packed = gzip.compress(json.dumps({"model": "x" * 10_000_000}).encode())
    headers = {"Content-Encoding": coding}
    for path in ("/merge", "/embed", "/v1/embeddings"):
        assert client.post(path, content=packed, headers=JSON | headers).status_code == 415
    answer = client.post("/datasets?name=x&filename=x.jsonl", content=packed, headers=headers)
    assert answer.status_code == 415, answer.text
    assert client.get("/datasets").json() == {"datasets": []}


def sent(url: str, *pieces: bytes) -> bytes:
    """Send bytes as they are; return all that comes back until the service hangs up, or has answered once."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while more := connection.recv(65536):
            answer += more
    return answer


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 2\r\nContent-Length: 40\r\n",
        b"Content-Length: 40\r\nContent-Length: 2\r\n",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 2, 40\r\n",
        b"Content-Length: 0x2\r\n",
        b"Content-Length : 2\r\n",
    ],
)
def test_no_second_request_hides_in_the_first(url: str, headers: bytes) -> None:
    """Two readers that disagree where a request ends would see different requests in the same bytes."""
    start = b"POST /merge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    hidden = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = sent(url, start + headers + b"\r\n{}" + hidden)
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert b"openapi" not in answer
    assert httpx.get(f"{url}/health").status_code in (200, 503)


def test_a_header_without_end(url: str) -> None:
    answer = sent(url, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ", b"x" * 100_000)
    assert b" 200 " not in answer.partition(b"\r\n")[0]
    assert httpx.get(f"{url}/models").status_code == 200


def test_who_sends_slowly_holds_up_nobody(url: str, problem: Problem) -> None:
    place = urlsplit(url)
    start = b"POST /merge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    start += b"Content-Length: 900000\r\n\r\n{"
    waiting = [socket.create_connection((place.hostname, place.port), timeout=30) for _ in range(100)]
    try:
        for connection in waiting:
            connection.sendall(start)
        assert httpx.get(f"{url}/models", timeout=20).status_code == 200
        problem(httpx.post(f"{url}/merge", content=b"{}", headers=JSON, timeout=20), 422, "invalid_spec")
    finally:
        for connection in waiting:
            connection.close()
    assert httpx.get(f"{url}/jobs").json()["jobs"] == []
