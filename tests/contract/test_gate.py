"""What holds for every request: hosts, request ids, one error shape, the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from aidocks.log import LOGGERS, JsonLines, log_to_file
from aidocks.settings import Settings
from serve.app import create_api

Problem = Callable[..., dict[str, Any]]
PARTS = st.sampled_from(["jobs", "models", "laser", "files", "events", "cancel", "docs"])


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8723", "127.0.0.1:1", "[::1]:8723", "localhost.:8723"]
)
def test_own_names(client: Any, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8723", "[::2]", "", "localhost@evil"],
)
def test_other_names(client: Any, problem: Problem, host: str) -> None:
    problem(client.get("/health", headers={"Host": host}), 421, "host_not_allowed")


def test_names_of_the_settings(settings: Settings, tmp_path: Any) -> None:
    from tests.contract.conftest import ApiClient

    def status(name: str, **options: Any) -> int:
        api = create_api(Settings(home=tmp_path, **options))
        return int(ApiClient(api).get("/health", headers={"Host": name}).status_code)

    assert status("models.example", allowed_hosts=("Models.example",)) == 200
    assert status("localhost", allowed_hosts=("models.example",)) == 200
    assert status("any.example", allowed_hosts=("*",)) == 200
    assert status("10.1.2.3", host="10.1.2.3") == 200
    assert status("0.0.0.0", host="0.0.0.0") == 421


def test_request_ids(client: Any) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    first, second = (client.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second
    for bad in ("", "a b", "x" * 129, '"<script>'):
        assert client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] not in ("", bad)


def test_no_other_origin_is_let_in(client: Any) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET"):
        answer = client.request(method, "/jobs", headers=headers)
        assert not [name for name in answer.headers if name.startswith("access-control")]


@hypothesis_settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]),
    st.lists(PARTS | st.text(min_size=1, max_size=5)),
)
def test_no_path_makes_the_service_fail(client: Any, problem: Problem, method: str, parts: list[str]) -> None:
    from urllib.parse import quote

    path = "/" + "/".join(quote(part.encode("utf-8", "surrogatepass"), safe="") for part in parts)
    response = client.request(method, path)
    assert response.status_code < 500
    if response.status_code >= 400:
        problem(response, response.status_code, response.json()["code"])


def test_paths_and_methods_that_are_not(client: Any, problem: Problem) -> None:
    assert problem(client.post("/byo_moe"), 404, "not_found")["hint"] == "Did you mean /byo-moe?"
    assert problem(client.get("/helth"), 404, "not_found")["hint"] == "Did you mean /health?"
    response = client.get("/laser")
    assert "POST" in problem(response, 405, "method_not_allowed")["hint"]
    assert response.headers["allow"] == "POST"


@pytest.fixture
def log(settings: Settings) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The lines of the service's log."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    log_to_file(settings, "http.log")

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (settings.log_dir / "http.log").read_text().splitlines()]

    yield lines
    for handler in loggers[0].handlers:
        handler.close()
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


def test_mistakes_of_ours_tell_nothing(
    client: Any, api: FastAPI, problem: Problem, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the secret inside")

    monkeypatch.setattr(api.state.context.store, "list", broken)
    response = client.get("/jobs", headers={"x-request-id": "find-me"})
    found = problem(response, 500, "internal")
    assert "secret" not in response.text
    assert "find-me" in found["hint"]
    (line,) = [line for line in log() if "traceback" in line]
    assert line["request_id"] == "find-me"
    assert "the secret inside" in line["traceback"]


def test_a_store_that_does_not_answer(
    client: Any, api: FastAPI, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: Any, **__: Any) -> None:
        raise OperationalError("SELECT", {}, Exception("database is locked"))

    monkeypatch.setattr(api.state.context.store, "get", locked)
    response = client.get("/jobs/job-1")
    problem(response, 503, "service_unreachable")
    assert "SELECT" not in response.text
    assert response.headers["retry-after"] == "1"


def test_the_log_has_one_line_for_each_request_and_no_body(client: Any, log: Any) -> None:
    client.get("/health")
    client.get("/jobs?status=queued", headers={"x-request-id": "r1"})
    client.post("/laser", json={"base_model_name": "a-private-name"})
    lines = [line for line in log() if line["logger"] == "serve.access"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("GET", "/jobs", 200),
        ("POST", "/laser", 422),
    ]
    assert lines[0]["request_id"] == "r1"
    assert lines[0]["ms"] >= 0
    assert "a-private-name" not in json.dumps(lines)


def test_log_lines_are_json_whatever_the_message() -> None:
    record = logging.LogRecord("serve", logging.INFO, "", 0, 'line\n"%s"', ("é\ud800",), None)
    assert json.loads(JsonLines().format(record))["message"].startswith("line\n")
