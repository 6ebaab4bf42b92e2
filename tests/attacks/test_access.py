"""Ways around the door, and secrets in places where they do not belong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aidocks.access.keys import KeyRequest, Scope, key_text, new_key
from aidocks.log import LOGGERS, log_to_file
from aidocks.settings import Settings
from serve.access import needed_scope
from serve.app import create_api

HUB_TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
ODD_PATHS = [
    "//keys", "/keys/", "/keys//", "/./keys", "/x/../keys", "/%6beys", "/KEYS", "/keys%00", "/keys;x",
    "/keys?x=/health", "/health/../keys", "/docs/../keys", "/docs/assets/../../keys", "/docs/assets//keys",
    "/docs/assets/%2e%2e/%2e%2e/keys", "/health%2f..%2fkeys", "/docs/assets/..%2f..%2faidocks.db",
    "/uploads/../models/tiny", "/uploads/..%2fmodels%2ftiny", "/audit/", "/audit%20", "//audit", "/jobs/",
    "/jobs%2f", "/v1/../keys", "/v1//models",
]  # fmt: skip


@pytest.fixture
def settings(home: Path) -> Settings:
    return Settings(home=home, access="keys")


@pytest.fixture
def ask(settings: Settings) -> Callable[..., httpx.Response]:
    """Ask the service with raw paths, as no polite client would."""
    api = create_api(settings)

    def send(method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
        async def work() -> httpx.Response:
            transport = httpx.ASGITransport(api, client=("203.0.113.9", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                request = client.build_request(method, "/", headers=headers, **options)
                target = path.encode().partition(b"?")
                request.url = request.url.copy_with(raw_path=target[0] + target[1] + target[2])
                return await client.send(request)

        return asyncio.run(work())

    send.api = api  # type: ignore[attr-defined]
    return send


def made(ask: Any, scope: Scope, **fields: Any) -> str:
    text: str = ask.api.state.context.keys.create(KeyRequest(name=scope, scopes=(scope,), **fields))[1]
    return text


@pytest.mark.parametrize("path", ODD_PATHS)
def test_no_path_goes_around_the_door(ask: Any, path: str) -> None:
    key = made(ask, Scope.SUBMIT, requests_per_minute=0)
    admin = made(ask, Scope.ADMIN)
    secret = ask.api.state.context.keys.list()[0].id
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "get", "TRACE", "KEYS"):
        for headers in ({}, {"Authorization": f"Bearer {key}"}):
            answer = ask(method, path, headers)
            assert answer.status_code >= 300, (method, path)
            assert secret not in answer.text
            assert admin not in answer.text


@given(st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"]), st.text(max_size=20))
def test_what_is_not_known_needs_a_key(method: str, path: str) -> None:
    assert needed_scope(method, f"/{path}") is not None or method in ("GET", "HEAD")
    assert needed_scope(method, f"/keys/{path}") is Scope.ADMIN
    assert needed_scope(method, f"/jobs/{path}") is not None


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=80))
def test_no_header_lets_anybody_in_or_breaks_the_service(settings: Settings, ask: Any, sent: bytes) -> None:
    for headers in (
        [(b"authorization", b"Bearer " + sent)],
        [(b"authorization", sent)],
        [(b"x-api-key", sent)],
    ):
        scope = {
            "type": "http", "method": "GET", "path": "/jobs", "query_string": b"", "http_version": "1.1",
            "headers": [(b"host", b"localhost"), *headers], "client": ("203.0.113.9", 1), "root_path": "",
        }  # fmt: skip
        status: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any], status: list[int] = status) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])

        asyncio.run(ask.api(scope, receive, send))
        assert status[0] in (401, 429)


def test_two_keys_in_one_request(ask: Any) -> None:
    good = made(ask, Scope.ADMIN)
    _, secret = new_key()
    wrong = key_text(good.split("_")[1], secret)
    for first, second in ((wrong, good), (f"{wrong}, Bearer {good}", good)):
        assert (
            ask("GET", "/keys", {"Authorization": f"Bearer {first}", "x-api-key": second}).status_code == 401
        )


def test_a_key_cannot_raise_itself(ask: Any) -> None:
    headers = {"Authorization": f"Bearer {made(ask, Scope.SUBMIT)}"}
    for body in ({"name": "me", "scopes": ["admin"]}, {"name": "me", "owner": "local"}):
        assert ask("POST", "/keys", headers, json=body).status_code == 403
    forged = headers | {"x-aidocks-key": "local", "x-forwarded-for": "127.0.0.1", "x-original-url": "/health"}
    assert ask("GET", "/audit", forged).status_code == 403


def test_nobody_without_a_key_writes_into_the_audit_log(ask: Any) -> None:
    for number in range(100):
        ask("POST", f"/laser/{number}", {"Host": "evil.example"})
        ask("DELETE", f"/models/{number}", {"x-api-key": str(number)})
        ask("POST", f"/jobs/{number}/cancel")
    ask.api.state.context.trail.write()
    found = ask.api.state.context.audit.page(1000)
    assert {(entry.owner, entry.object) for entry in found} == {("-", None)}
    assert len(found) <= 25


def test_guesses_of_one_network_count_together(settings: Settings) -> None:
    api = create_api(settings)

    async def guess(address: str, number: int) -> int:
        transport = httpx.ASGITransport(api, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get("/jobs", headers={"x-api-key": f"guess {number}"})).status_code

    async def work() -> list[int]:
        return [await guess(f"2001:db8::{number + 1:x}", number) for number in range(40)]

    found = asyncio.run(work())
    assert set(found) == {401, 429}
    assert found[-1] == 429
    assert asyncio.run(guess("2001:db8:1::1", 0)) == 401


@pytest.fixture
def log(settings: Settings) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    log_to_file(settings, "http.log")
    yield
    for handler in loggers[0].handlers:
        handler.close()
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


def submissions(secret: str) -> Iterator[dict[str, Any]]:
    """Yield requests that carry a secret wherever somebody might put one."""
    body = {"base_model_name": "org/name"}
    for name in (
        "Authorization",
        "X-Api-Key",
        "X-HF-Token",
        "Cookie",
        "Proxy-Authorization",
        "User-Agent",
        "Referer",
    ):
        yield {"json": body, "headers": {name: secret}}
    yield {"json": body, "headers": {"Authorization": f"Bearer {secret}"}}
    for name in ("token", "hf_token", "api_key", "password", "HF_TOKEN", "hub", secret):
        yield {"json": body | {name: secret}}
    yield {"json": body | {"trainer": secret, "publish": "perhaps"}}
    yield {"json": body | {"options": {"token": secret}}}
    for reference in (
        f"https://user:{secret}@huggingface.co/org/name",
        f"hf://{secret}@org/name",
        f"org/name?token={secret}",
        f"{secret}@org/name",
        f"org/name@{secret}",
        f"{secret}/name",
        f"/models/{secret}",
    ):
        yield {"json": body | {"base_model_name": reference}}
    yield {"json": {"base_model_name": secret}}
    yield {"content": secret, "headers": {"Content-Type": "application/json"}}
    yield {"content": secret, "headers": {"Content-Type": f"text/{secret}"}}


@pytest.mark.usefixtures("log")
def test_secrets_are_found_nowhere_afterwards(
    ask: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    key = made(ask, Scope.ADMIN, requests_per_minute=0)
    mine = {"x-api-key": key}
    for secret in (HUB_TOKEN, key):
        for number, options in enumerate(submissions(secret)):
            headers = mine | options.pop("headers", {})
            if "json" in options:  # a name of its own, so that nothing else is in the way
                options["json"] = {"laser_model_name": f"made-{secret[:2]}-{number}"} | options["json"]
            ask("POST", "/laser", headers, **options)
            ask("POST", f"/laser?token={quote(secret)}", mine, json={})
            ask("GET", f"/jobs?status={secret}", mine)
        for path in (f"/jobs/{secret}", f"/models/{secret}/files", f"/{secret}"):
            ask("GET", path, mine)
            ask("POST", path, mine)
            ask("DELETE", path, mine)
    ask.api.state.context.trail.write()
    assert ask.api.state.context.audit.page()
    ask.api.state.context.close()
    files = [path for path in settings.home.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"aidocks.db", "http.log"}
    for path in files:
        content = path.read_bytes()
        for secret in (HUB_TOKEN, key.rpartition("_")[2], key[18:]):
            assert secret.encode() not in content, path
