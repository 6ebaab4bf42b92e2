"""Keys at the service's door: which request needs which, how often, whose a job is, and what is recorded."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from sqlalchemy.exc import OperationalError

from aidocks import AsyncClient, Client
from aidocks.access.keys import KeyRequest, Scope
from aidocks.access.local import admin_key_file
from aidocks.errors import NotFound, NotPermitted, Unauthenticated
from aidocks.jobs.model import Job
from aidocks.jobs.store import JobStore
from aidocks.jobs.terms import Terms
from aidocks.operations import OPERATIONS
from aidocks.settings import Settings
from serve.app import create_api
from serve.door import WRONG_KEYS_PER_MINUTE

Problem = Callable[..., dict[str, Any]]

#: What each route needs. A new one is to be decided here, and in docs/security.md.
DECIDED: dict[str, str | None] = {
    **{f"POST {registration.endpoint}": "submit" for registration in OPERATIONS},
    "GET /": None,
    "GET /docs": None,
    "GET /redoc": None,
    "GET /openapi.json": None,
    "HEAD /openapi.json": None,
    "GET /health": None,
    "GET /status": "read",
    "POST /embed": "submit",
    "POST /rerank": "submit",
    "GET /jobs": "read",
    "GET /jobs/{job_id}": "read",
    "GET /jobs/{job_id}/events": "read",
    "POST /jobs/{job_id}/cancel": "submit",
    "POST /jobs/{job_id}/resume": "submit",
    "GET /models": "read",
    "GET /models/{name}": "read",
    "DELETE /models/{name}": "admin",
    "GET /models/{name}/files": "read",
    "GET /models/{name}/files/{path:path}": "read",
    "HEAD /models/{name}/files/{path:path}": "read",
    "GET /datasets": "read",
    "POST /datasets": "submit",
    "GET /datasets/{name}": "read",
    "GET /datasets/{name}/content": "read",
    "DELETE /datasets/{name}": "admin",
    "POST /uploads": "submit",
    "PUT /uploads/{upload_id}": "submit",
    "POST /uploads/{upload_id}/complete": "submit",
    "DELETE /uploads/{upload_id}": "submit",
    "POST /v1/embeddings": "submit",
    "POST /v1/rerank": "submit",
    "POST /v1/files": "submit",
    "GET /v1/files": "read",
    "GET /v1/files/{file_id}": "read",
    "GET /v1/files/{file_id}/content": "read",
    "DELETE /v1/files/{file_id}": "admin",
    "POST /v1/fine_tuning/jobs": "submit",
    "GET /v1/fine_tuning/jobs": "read",
    "GET /v1/fine_tuning/jobs/{tuning}": "read",
    "POST /v1/fine_tuning/jobs/{tuning}/pause": "submit",
    "POST /v1/fine_tuning/jobs/{tuning}/cancel": "submit",
    "POST /v1/fine_tuning/jobs/{tuning}/resume": "submit",
    "GET /v1/fine_tuning/jobs/{tuning}/events": "read",
    "GET /v1/fine_tuning/jobs/{tuning}/checkpoints": "read",
    "GET /v1/models": "read",
    "GET /v1/models/{name}": "read",
    "DELETE /v1/models/{name}": "admin",
    "POST /keys": "admin",
    "GET /keys": "admin",
    "DELETE /keys/{key_id}": "admin",
    "GET /audit": "admin",
}
_ALLOWED = {"read": {"read"}, "submit": {"read", "submit"}, "admin": {"read", "submit", "admin"}}


@pytest.fixture
def settings(home: Path) -> Settings:
    return Settings(home=home, access="keys")


@pytest.fixture
def make_key(api: FastAPI) -> Callable[..., str]:
    def make(scope: str = "submit", **fields: Any) -> str:
        asked = KeyRequest(name=f"a {scope} key", scopes=(Scope(scope),), **fields)
        text: str = api.state.context.keys.create(asked)[1]
        return text

    return make


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def owner_of(key: str) -> str:
    return key.split("_")[1]


def routes_of(api: FastAPI) -> set[str]:
    return {
        f"{method} {route.path}"
        for route in iter_route_contexts(api.routes)
        for method in route.methods or ()
    }


def test_every_route_is_decided(api: FastAPI) -> None:
    assert routes_of(api) - DECIDED.keys() == set()
    documented = {
        f"{method.upper()} {path}"
        for path, methods in api.openapi()["paths"].items()
        for method in methods
        if "{path}" not in path
    }
    assert documented <= DECIDED.keys()


def test_each_route_with_each_key(api: FastAPI, client: Any, make_key: Any, problem: Problem) -> None:
    keys = {scope: make_key(scope, requests_per_minute=0) for scope in _ALLOWED}
    for route in sorted(routes_of(api)):
        needed = DECIDED[route]
        method, path = route.split(" ")
        path = path.replace("{path:path}", "x").replace("{", "").replace("}", "")

        def status(method: str = method, path: str = path, **headers: str) -> int:
            return int(client.request(method, path, headers=headers).status_code)

        refused = client.request(method, path)
        assert (refused.status_code == 401) == (needed is not None), route
        if needed and method != "HEAD" and not path.startswith("/v1"):
            problem(refused, 401, "unauthenticated")
        for scope, key in keys.items():
            found = status(**bearer(key))
            assert found != 401, route
            assert (found == 403) == (needed is not None and needed not in _ALLOWED[scope]), (route, scope)
        assert status(**{"x-api-key": keys["admin"]}) not in (401, 403), route
        # After a while, because this address has tried too many.
        assert (status(Authorization="Bearer aidk_0_0") in (401, 429)) == (needed is not None), route


def test_what_a_refusal_says(client: Any, make_key: Any, problem: Problem) -> None:
    missing = client.get("/jobs")
    assert missing.headers["www-authenticate"] == 'Bearer realm="AIDocks"'
    assert "Authorization: Bearer" in problem(missing, 401, "unauthenticated")["hint"]
    wrong = problem(client.get("/jobs", headers=bearer("aidk_x")), 401, "unauthenticated")
    assert "not valid" in wrong["detail"]
    key = make_key("read")
    refused = problem(client.post("/laser", headers=bearer(key), json={}), 403, "not_permitted")
    assert "read" in refused["detail"]
    assert "--scope submit" in refused["hint"]
    assert key not in str((missing.text, wrong, refused))


def test_ways_to_send_a_key(client: Any, make_key: Any) -> None:
    key = make_key("read")

    def status(**headers: str) -> int:
        return int(client.get("/jobs", headers=headers).status_code)

    assert status(Authorization=f"bearer  {key} ") == 200
    assert status(**{"X-API-Key": key}) == 200
    assert status(Authorization=f"Basic {key}") == 401
    assert status(Authorization=key) == 401
    assert status(Authorization="Bearer", **{"x-api-key": key}) == 401
    assert status(Authorization=f"Bearer {key}{key}") == 401
    assert client.get(f"/jobs?api_key={key}").status_code == 401


def test_the_service_is_open_on_loopback_alone(tmp_path: Path, problem: Problem) -> None:
    from tests.contract.conftest import ApiClient

    def status(**fields: Any) -> int:
        api = create_api(Settings(home=tmp_path, allowed_hosts=("*",), **fields))
        return int(ApiClient(api).get("/jobs").status_code)

    assert status() == status(host="::1") == status(host="0.0.0.0", access="open") == 200
    assert status(host="0.0.0.0") == status(host="::") == status(access="keys") == 401


def test_below_another_path(api: FastAPI, make_key: Any) -> None:
    async def statuses(key: str) -> list[int]:
        transport = httpx.ASGITransport(api, root_path="/aidocks")
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/aidocks") as client:
            return [
                (await client.get(path, headers=bearer(key))).status_code
                for path in ("/health", "/jobs", "/keys", "/audit")
            ]

    assert asyncio.run(statuses("none")) == [200, 401, 401, 401]
    assert asyncio.run(statuses(make_key("read"))) == [200, 200, 403, 403]
    assert asyncio.run(statuses(make_key("admin"))) == [200, 200, 200, 200]


def test_a_key_may_ask_so_often(client: Any, make_key: Any, problem: Problem, settings: Settings) -> None:
    key, other = make_key(requests_per_minute=2), make_key()
    assert [client.get("/jobs", headers=bearer(key)).status_code for _ in range(2)] == [200, 200]
    late = client.get("/jobs", headers=bearer(key))
    problem(late, 429, "rate_limited")
    assert 25 <= int(late.headers["retry-after"]) <= 30
    assert client.get("/jobs", headers=bearer(other)).status_code == 200
    assert client.get("/health", headers=bearer(key)).status_code == 200
    answer = client.get("/v1/models", headers=bearer(key))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")


def test_an_address_may_guess_so_often(client: Any, make_key: Any, problem: Problem) -> None:
    known, fresh = make_key(), make_key()
    assert client.get("/jobs", headers=bearer(known)).status_code == 200
    found = [
        client.get("/jobs", headers=bearer(f"guess {number}")) for number in range(WRONG_KEYS_PER_MINUTE)
    ]
    assert {answer.status_code for answer in found} == {401}
    late = client.get("/jobs", headers=bearer("another guess"))
    problem(late, 429, "rate_limited")
    assert int(late.headers["retry-after"]) == 2
    # Whoever is known works on, whatever others do at the same address; nobody is found out meanwhile.
    assert client.get("/jobs", headers=bearer(known)).status_code == 200
    assert client.get("/jobs", headers=bearer(fresh)).status_code == 429
    assert client.get("/jobs").status_code == 401


def test_jobs_belong_to_keys(
    client: Any, make_key: Any, store: JobStore, laser_body: dict[str, Any], problem: Problem
) -> None:
    mine, other, admin = make_key(), make_key(), make_key("admin")
    submitted = client.post("/laser", json=laser_body, headers=bearer(mine))
    job = submitted.json()["id"]
    assert store.get(job).owner == submitted.json()["owner"] == owner_of(mine)
    assert client.get(f"/jobs/{job}", headers=bearer(make_key("read"))).status_code == 200
    for action in ("cancel", "resume"):
        answer = client.post(f"/jobs/{job}/{action}", headers=bearer(other))
        problem(answer, 403, "not_permitted")
    problem(client.post("/jobs/job-1/cancel", headers=bearer(other)), 404, "unknown_job")
    assert client.post(f"/jobs/{job}/cancel", headers=bearer(mine)).json()["status"] == "cancelled"
    problem(client.post(f"/jobs/{job}/cancel", headers=bearer(admin)), 409, "illegal_transition")


def test_fine_tunings_belong_to_keys(client: Any, make_key: Any, store: JobStore) -> None:
    mine, other = make_key(), make_key()
    spec = {"base_model": "m", "dataset": "d", "name": "n"}
    job = store.submit("train-llm", spec, output_name="n", terms=Terms(owner=owner_of(mine)))[0]
    for action in ("cancel", "pause", "resume"):
        answer = client.post(f"/v1/fine_tuning/jobs/ft{job.id}/{action}", headers=bearer(other))
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_permitted")
    assert store.get(job.id).status == "queued"
    client.post(f"/v1/fine_tuning/jobs/ft{job.id}/cancel", headers=bearer(mine))
    assert store.get(job.id).status == "cancelled"


def test_keys_are_made_and_revoked(client: Any, make_key: Any, problem: Problem) -> None:
    admin = bearer(make_key("admin"))
    asked = {"name": "builds", "scopes": ["submit"], "expires_in_s": 86400, "max_jobs": 2}
    made = client.post("/keys", json=asked, headers=admin)
    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    key = made.json()
    assert made.headers["location"] == f"/keys/{key['id']}"
    listed = client.get("/keys", headers=admin)
    assert key["key"] not in listed.text
    (found,) = [entry for entry in listed.json()["keys"] if entry["id"] == key["id"]]
    assert found == {**{name: value for name, value in key.items() if name != "key"}, "last_used_at": None}
    assert client.get("/jobs", headers=bearer(key["key"])).status_code == 200
    assert client.request("DELETE", f"/keys/{key['id']}", headers=admin).status_code == 204
    assert client.get("/jobs", headers=bearer(key["key"])).status_code == 401
    problem(client.request("DELETE", "/keys/ffffffffffff", headers=admin), 404, "not_found")
    problem(client.post("/keys", json={"name": "", "scopes": ["root"]}, headers=admin), 422, "invalid_spec")
    # A foreign page could send this without asking first.
    plain = client.post("/keys", content='{"name": "x"}', headers={"Content-Type": "text/plain", **admin})
    problem(plain, 415, "unsupported_media_type")


def test_what_was_done_is_recorded(
    client: Any, make_key: Any, laser_body: dict[str, Any], make_job: Callable[..., Job]
) -> None:
    mine, admin = make_key(), make_key("admin")
    headers = {**bearer(mine), "x-request-id": "find-me"}
    job = client.post("/laser", json=laser_body, headers=headers).json()["id"]
    other = make_job().id
    client.post(f"/jobs/{other}/cancel", headers=bearer(mine))
    client.get("/jobs", headers=bearer(mine))
    client.get("/jobs", headers=bearer("aidk_wrong"))
    client.request("DELETE", "/models/none", headers=bearer(admin))
    client.post("/v1/rerank", headers=bearer(mine))
    page = client.get("/audit?limit=2", headers=bearer(admin)).json()
    rest = client.get(f"/audit?before={page['entries'][-1]['number']}", headers=bearer(admin)).json()
    assert (page["has_more"], rest["has_more"]) == (True, False)
    found = [
        (entry["owner"], entry["action"], entry["object"], entry["status"])
        for entry in page["entries"] + rest["entries"]
    ]
    assert found == [
        (owner_of(admin), "DELETE /models/{name}", "none", 404),
        ("-", "GET without a right key", None, 401),
        (owner_of(mine), "POST /jobs/{job_id}/cancel", other, 403),
        (owner_of(mine), "POST /laser", job, 202),
    ]
    last = rest["entries"][-1]
    assert (last["request_id"], last["address"]) == ("find-me", "127.0.0.1")
    assert laser_body["laser_model_name"] not in str((page, rest))
    only = client.get(f"/audit?owner={owner_of(admin)}", headers=bearer(admin)).json()["entries"]
    assert [entry["object"] for entry in only] == ["none"]


def test_a_store_that_does_not_answer(
    client: Any, api: FastAPI, make_key: Any, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make_key()

    def locked(*_: Any) -> None:
        raise OperationalError("SELECT", {}, Exception("database is locked"))

    monkeypatch.setattr(api.state.context.keys, "check", locked)
    answer = client.get("/jobs", headers=bearer(key))
    problem(answer, 503, "service_unreachable")
    assert answer.headers["retry-after"] == "1"


def test_the_key_of_this_machine(url: str, settings: Settings, api: FastAPI, home: Path) -> None:
    path = admin_key_file(settings)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Client(url, retry_s=0) as client, pytest.raises(Unauthenticated):
        client.jobs()
    settings.state_file.write_text(f'{{"url": "{url}"}}')
    with Client(url) as client:
        made = client.create_key("reader", ["read"], expires_in_s=60)
        listed = client.keys()
        assert [key.name for key in listed] == ["reader", "admin-key"]
        assert client.audit()[0].object == made.id

    async def read() -> None:
        async with AsyncClient(url, api_key=made.key) as reader:
            assert await reader.jobs() == []
            with pytest.raises(NotPermitted):
                await reader.keys()
        async with AsyncClient(url) as admin:
            assert (await admin.audit(1))[0].action == "POST /keys"
            await admin.revoke_key(made.id)
            with pytest.raises(NotFound):
                await admin.revoke_key("f" * 12)

    asyncio.run(read())


def test_uses_and_deeds_are_written_by_themselves(settings: Settings) -> None:
    api = create_api(settings)
    key = api.state.context.keys.create(KeyRequest(name="mine"))[1]

    async def ask() -> None:
        async with (
            api.router.lifespan_context(api),
            httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as client,
        ):
            await client.post("/laser", json={}, headers=bearer(key))

    asyncio.run(ask())
    again = create_api(settings).state.context  # what the first one has written at its end
    assert [(entry.owner, entry.action) for entry in again.audit.page()] == [(owner_of(key), "POST /laser")]
    assert {known.name: known.last_used_at is not None for known in again.keys.list()}["mine"]


def test_openai_s_client_with_a_key(url: str, make_key: Any, model: str) -> None:
    def asking(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

    with asking(make_key("read")) as ai:
        assert [found.id for found in ai.models.list()] == [model]
        with pytest.raises(openai.PermissionDeniedError, match="needs admin"):
            ai.models.delete(model)
    with asking("sk-wrong") as ai, pytest.raises(openai.AuthenticationError) as refused:
        ai.models.list()
    assert refused.value.code == "unauthenticated"
    with asking(make_key(requests_per_minute=1)) as ai:
        ai.models.list()
        with pytest.raises(openai.RateLimitError):
            ai.models.list()


def test_the_commands(
    url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: Any, terminal_width: Any
) -> None:
    import sys

    from aidocks.cli.main import main

    terminal_width(200)
    settings.state_file.write_text(f'{{"url": "{url}"}}')

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aidocks", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    code, key, told = run("keys", "create", "night builds", "--expires", "90d", "--max-jobs", "3")
    assert (code, key.count("\n")) == (0, 1)
    assert owner_of(key) in told
    listed = run("keys", "list")[1]
    assert "night builds" in listed
    assert "valid" in listed
    assert key.strip() not in listed
    assert run("keys", "revoke", owner_of(key))[0] == 0
    assert "revoked" in run("keys", "list")[1]
    assert "POST /keys" in run("audit")[1]
    assert run("keys", "create", "x", "--expires", "soon")[0] == 2
    assert run("keys", "create", "x", "--scope", "root")[0] == 3
    monkeypatch.setenv("AIDOCKS_API_KEY", key.strip())
    code, _, told = run("keys", "list")
    assert code == 11
    assert "not valid" in told
