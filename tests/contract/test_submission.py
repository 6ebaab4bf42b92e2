"""POST to an operation: a durable job, at once, exactly once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aidocks.jobs.store import JobStore
from aidocks.operations import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]
Problem = Callable[..., dict[str, Any]]

# As the original project's README printed it: the commas between the prompts are missing.
PRINTED = """
{
  "base_model": "tiny-base",
  "gate_mode": "hidden",
  "dtype": "bfloat16",
  "experts": [
    {
      "source_model": "tiny-base",
      "positive_prompts": [
        "Mathematics"
        "Physics"
      ],
      "negative_prompts": [
        "History"
        "Philosophy"
      ]
    },
    {
      "source_model": "tiny-base",
      "positive_prompts": [
        "Biology"
        "Chemistry"
      ]
    }
  ]
}
"""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({name for registration in OPERATIONS for name in registration.spec_type().model_fields})
BODIES = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), JSON, max_size=5)


def test_a_submission_is_answered_with_a_queued_job(
    client: Any, laser_body: dict[str, Any], store: JobStore, supervisor: Any
) -> None:
    response = client.post("/laser", json=laser_body)
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert (job["operation"], job["status"], job["output_name"]) == ("laser", "queued", "made")
    assert job["spec"]["laser_model_name"] == "made"
    assert client.get(response.headers["location"]).json() == job
    assert store.get(job["id"]).status == "queued"
    assert supervisor.woken == 1
    assert "idempotency-replayed" not in response.headers


def test_the_printed_moe_body_works(client: Any, model: str) -> None:
    response = client.post("/byo-moe", content=PRINTED, headers={"Content-Type": "application/json"})
    assert response.status_code == 202, response.text
    experts = response.json()["spec"]["experts"]
    assert experts[0]["positive_prompts"] == ["Mathematics", "Physics"]
    assert experts[1]["positive_prompts"] == ["Biology", "Chemistry"]


def test_the_same_key_and_body_are_the_same_job(
    client: Any, laser_body: dict[str, Any], supervisor: Any, problem: Problem
) -> None:
    headers = {"Idempotency-Key": "abc"}
    first = client.post("/laser", json=laser_body, headers=headers)
    again = client.post("/laser", json=laser_body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert supervisor.woken == 1
    other = client.post("/laser", json=laser_body | {"laser_model_name": "other"}, headers=headers)
    problem(other, 409, "idempotency_mismatch")
    assert len(client.get("/jobs").json()["jobs"]) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "a\tb"])
def test_keys_have_a_form(client: Any, laser_body: dict[str, Any], problem: Problem, key: str) -> None:
    response = client.post("/laser", json=laser_body, headers={"Idempotency-Key": key})
    assert problem(response, 422, "invalid_spec")["errors"][0]["field"].lower() == "idempotency-key"


def test_a_name_is_given_once(client: Any, laser_body: dict[str, Any], problem: Problem) -> None:
    client.post("/laser", json=laser_body)
    problem(client.post("/laser", json=laser_body), 409, "name_taken")
    problem(client.post("/laser", json=laser_body | {"laser_model_name": "tiny-base"}), 409, "name_taken")


def test_unknown_models_are_named(client: Any, laser_body: dict[str, Any], problem: Problem) -> None:
    found = problem(
        client.post("/laser", json=laser_body | {"base_model_name": "tiny-bse"}), 404, "unknown_model"
    )
    assert found["errors"][0]["field"] == "base_model_name"
    assert found["errors"][0]["value"] == "tiny-bse"


@pytest.mark.parametrize(
    "reference", ["/etc", "../../etc", "./x", "~/x", "a/../../b", "/dev/zero", "x%2e%2e/y"]
)
def test_paths_are_refused(client: Any, laser_body: dict[str, Any], reference: str) -> None:
    response = client.post("/laser", json=laser_body | {"base_model_name": reference})
    assert response.status_code in (403, 404, 422), response.text
    assert "errors" in response.json()


def test_only_json_is_read(client: Any, problem: Problem) -> None:
    problem(client.post("/laser", content=b"{}"), 415, "unsupported_media_type")
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        response = client.post("/laser", content=b"{}", headers={"Content-Type": media_type})
        problem(response, 415, "unsupported_media_type")
    response = client.post(
        "/laser", content=b"{}", headers={"Content-Type": "Application/JSON; charset=utf-8"}
    )
    problem(response, 422, "invalid_spec")


def test_large_bodies_are_refused(client: Any, problem: Problem) -> None:
    headers = {"Content-Type": "application/json"}
    problem(client.post("/laser", content=b" " * 1_000_001, headers=headers), 413, "body_too_large")

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b" " * 100_000

    problem(client.post("/laser", content=pieces(), headers=headers), 413, "body_too_large")
    problem(client.post("/laser", content=b" " * 1_000_000, headers=headers), 422, "invalid_spec")


def test_syntax_errors_are_located(client: Any, problem: Problem) -> None:
    body = b'{\n  "base_model_name": "x"\n  "laser_model_name": "y"\n}'
    found = problem(
        client.post("/laser", content=body, headers={"Content-Type": "application/json"}), 422, "invalid_spec"
    )
    assert "line 3, column 3" in found["detail"]
    assert '"laser_model_name": "y"' in found["hint"]


def test_fields_of_nested_models_are_named(client: Any, problem: Problem) -> None:
    body = {
        "base_model": "m",
        "gate_mode": "hiden",
        "experts": [{"source_model": "m"}, {"source_modle": "m"}],
    }
    found = problem(client.post("/byo-moe", json=body), 422, "invalid_spec")
    faults = {fault["field"]: fault for fault in found["errors"]}
    assert set(faults) == {"gate_mode", "experts[1].source_model", "experts[1].source_modle"}
    assert faults["experts[1].source_modle"]["hint"] == "Did you mean 'source_model'?"
    assert faults["gate_mode"]["hint"] == "Did you mean 'hidden'?"


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(OPERATIONS), BODIES | JSON)
def test_no_body_makes_the_service_fail(client: Any, problem: Problem, operation: Any, body: Any) -> None:
    text = json.dumps(body).encode("utf-8", "surrogatepass")
    response = client.post(f"/{operation.name}", content=text, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500
    problem(response, response.status_code, response.json()["code"])


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200))
def test_no_bytes_make_the_service_fail(client: Any, problem: Problem, body: bytes) -> None:
    response = client.post("/laser", content=body, headers={"Content-Type": "application/json"})
    problem(response, 422, "invalid_spec")


def test_every_operation_has_its_endpoint(api: FastAPI) -> None:
    paths = api.openapi()["paths"]
    for registration in OPERATIONS:
        assert paths[registration.endpoint]["post"]["summary"] == registration.summary


def test_submitting_loads_neither_torch_nor_ray(home: Path, client: Any, laser_body: dict[str, Any]) -> None:
    # The model is in the registry of `home`; another process serves the same installation.
    script = f"""
import asyncio, sys, httpx
from aidocks.settings import Settings
from serve.app import create_api
api = create_api(Settings())
async def main():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as client:
        answer = await client.post("/laser", json={laser_body!r})
        assert answer.status_code == 202, answer.text
        assert (await client.get("/docs")).status_code == 200
asyncio.run(main())
print(sorted({{"torch", "transformers", "ray"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
