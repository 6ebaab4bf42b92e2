"""Terms of a submission over HTTP, who is turned away, and what a store without room answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from aidocks.access.keys import Limits, Scope
from aidocks.jobs.model import Status
from aidocks.jobs.store import JobStore
from aidocks.operations import OPERATIONS
from aidocks.settings import Settings
from serve.access import KeyHolder, _caller
from tests.support.training_jobs import ROWS, Executor

Problem = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(home: Any) -> Settings:
    return Settings(home=home, max_queued_jobs=3)


@contextmanager
def asked_by(
    api: Any, owner: str, max_jobs: int | None = None, scope: Scope = Scope.SUBMIT
) -> Iterator[None]:
    """Let requests come from the holder of a key."""
    holder = KeyHolder(owner, (scope,), Limits(requests_per_minute=0, max_jobs=max_jobs))
    api.dependency_overrides[_caller] = lambda: holder
    try:
        yield
    finally:
        api.dependency_overrides.clear()


def test_the_terms_come_with_the_request(
    client: Any, api: Any, laser_body: dict[str, Any], store: JobStore
) -> None:
    with asked_by(api, "key-a"):
        job = client.post("/laser", params={"priority": -10, "timeout_s": 90.5}, json=laser_body).json()
    assert (job["owner"], job["priority"], job["timeout_s"]) == ("key-a", -10, 90.5)
    assert store.get(job["id"]).timeout_s == 90.5
    usual = client.post("/laser", json=laser_body | {"laser_model_name": "other"}).json()
    assert (usual["owner"], usual["priority"], usual["timeout_s"]) == ("local", 0, None)
    assert (usual["failures"], usual["retry_at"]) == (0, None)
    listed = client.get("/jobs", params={"owner": "key-a"}).json()["jobs"]
    assert [one["id"] for one in listed] == [job["id"]]
    assert client.get("/jobs", params={"owner": "key-z"}).json()["jobs"] == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("priority=11", "priority"),
        ("priority=-11", "priority"),
        ("priority=high", "priority"),
        ("timeout_s=0", "timeout_s"),
        ("timeout_s=1e9", "timeout_s"),
        ("timeout_s=nan", "timeout_s"),
        ("timeout_s=2h", "timeout_s"),
    ],
)
def test_terms_that_are_none(
    client: Any, laser_body: dict[str, Any], problem: Problem, query: str, field: str
) -> None:
    found = problem(client.post(f"/laser?{query}", json=laser_body), 422, "invalid_spec")
    assert [fault["field"] for fault in found["errors"]] == [field]


def test_a_full_queue_says_when_to_come_back(
    client: Any, laser_body: dict[str, Any], problem: Problem
) -> None:
    for n in range(3):
        body = laser_body | {"laser_model_name": f"made-{n}"}
        answer = client.post("/laser", json=body, headers={"Idempotency-Key": f"k{n}"})
        assert answer.status_code == 202
    refused = client.post("/laser", json=laser_body)
    assert "3 jobs wait" in problem(refused, 503, "queue_full")["detail"]
    assert refused.headers["retry-after"] == "30"
    # What was accepted stays so.
    again = client.post("/laser", json=body, headers={"Idempotency-Key": "k2"})
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
    client.post(f"/jobs/{again.json()['id']}/cancel")
    assert client.post("/laser", json=laser_body).status_code == 202


def test_a_key_has_a_limit_of_its_own(
    client: Any, api: Any, laser_body: dict[str, Any], problem: Problem
) -> None:
    with asked_by(api, "key-a", max_jobs=1):
        assert client.post("/laser", json=laser_body).status_code == 202
        refused = client.post("/laser", json=laser_body | {"laser_model_name": "other"})
        assert "key-a" in problem(refused, 429, "quota_exceeded")["detail"]
        assert refused.headers["retry-after"] == "30"
    with asked_by(api, "key-b", max_jobs=1):
        assert client.post("/laser", json=laser_body | {"laser_model_name": "other"}).status_code == 202


def test_one_keys_idempotency_keys_are_not_anothers(
    client: Any, api: Any, laser_body: dict[str, Any]
) -> None:
    key = {"Idempotency-Key": "once"}
    with asked_by(api, "key-a"):
        first = client.post("/laser", json=laser_body, headers=key).json()
    with asked_by(api, "key-b"):
        body = laser_body | {"laser_model_name": "other"}
        second = client.post("/laser", json=body, headers=key)
        assert (second.status_code, second.json()["owner"]) == (202, "key-b")
    assert second.json()["id"] != first["id"]


@pytest.fixture
def stopped(client: Any, model: str, store: JobStore, settings: Settings) -> str:
    """A training with terms that was cancelled after its first checkpoint."""
    client.post("/datasets?name=sums&filename=s.jsonl", content=ROWS)
    body = {"base_model": model, "dataset": "sums"}
    job = client.post("/train/llm?priority=4&timeout_s=600", json=body).json()["id"]
    executor = Executor(store, settings)
    executor.start(job)
    executor.checkpoint(job, 20)
    executor.end(job, Status.CANCELLED)
    return str(job)


def test_a_resumed_job_keeps_the_terms_but_not_the_owner(client: Any, api: Any, stopped: str) -> None:
    with asked_by(api, "key-a", scope=Scope.ADMIN):
        answer = client.post(f"/jobs/{stopped}/resume")
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert (job["owner"], job["priority"], job["timeout_s"]) == ("key-a", 4, 600.0)


def test_a_resumed_job_may_have_other_terms(client: Any, stopped: str) -> None:
    job = client.post(f"/jobs/{stopped}/resume?priority=0&timeout_s=1200").json()
    assert (job["owner"], job["priority"], job["timeout_s"]) == ("local", 0, 1200.0)


def test_trainings_in_their_words_have_terms_too(
    client: Any, api: Any, model: str, store: JobStore, problem: Problem
) -> None:
    client.post("/datasets?name=sums&filename=s.jsonl", content=ROWS)
    body = {"model": model, "training_file": "sums"}
    with asked_by(api, "key-a", max_jobs=1):
        answer = client.post("/v1/fine_tuning/jobs?priority=2&timeout_s=60", json=body)
        assert answer.status_code == 200, answer.text
        (job,) = store.list()
        assert (job.owner, job.priority, job.timeout_s) == ("key-a", 2, 60.0)
        refused = client.post("/v1/fine_tuning/jobs", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")


def test_every_operation_takes_terms(api: Any) -> None:
    paths = api.openapi()["paths"]
    for registration in OPERATIONS:
        taken = {one["name"]: one["schema"] for one in paths[registration.endpoint]["post"]["parameters"]}
        assert {"Idempotency-Key", "priority", "timeout_s"} <= set(taken)
        assert (taken["priority"]["minimum"], taken["priority"]["maximum"]) == (-10, 10)
        answers = paths[registration.endpoint]["post"]["responses"]
        assert {"429", "503"} <= set(answers)


def test_a_disk_without_room_for_the_store_is_no_fault_of_the_service(
    client: Any, laser_body: dict[str, Any], store: JobStore, problem: Problem
) -> None:
    database = store._database
    with database.durable() as connection:  # the one connection of the pool
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    refused = None
    for n in range(100):
        answer = client.post("/laser", json=laser_body | {"laser_model_name": f"made-{n}"})
        if answer.status_code != 202:
            refused = answer
            break
        with suppress(OperationalError):
            store.request_cancel(answer.json()["id"])
    assert refused is not None
    problem(refused, 503, "service_unreachable")
    assert refused.headers["retry-after"] == "1"
    with database.durable() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert client.post("/laser", json=laser_body).status_code == 202
