"""POST /laser/scan: an operation whose path is not its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aidocks.client.calls import submission
from aidocks.jobs.store import JobStore
from aidocks.operations import find_operation

Problem = Callable[..., dict[str, Any]]


def test_a_scan_is_submitted(client: Any, model: str, store: JobStore, supervisor: Any) -> None:
    response = client.post("/laser/scan", json={"model": model})
    assert response.status_code == 202, response.text
    job = response.json()
    assert (job["operation"], job["status"], job["output_name"]) == ("laser-scan", "queued", None)
    assert store.get(job["id"]).spec["top_fractions"] == [0.25, 0.5]
    assert supervisor.woken == 1
    assert [found["id"] for found in client.get("/jobs?operation=laser_scan").json()["jobs"]] == [job["id"]]
    # It makes no model, so the same may be asked again.
    assert client.post("/laser/scan", json={"model": model}).status_code == 202


def test_clients_go_to_the_same_place(client: Any, model: str) -> None:
    call = submission("laser_scan", None, {"model": model}, None)
    assert call.path == find_operation("laser-scan").endpoint == "/laser/scan"
    assert client.post(call.path, json=call.body).status_code == 202


def test_the_name_is_not_another_path(client: Any, model: str, problem: Problem) -> None:
    problem(client.post("/laser-scan", json={"model": model}), 404, "not_found")
    problem(client.get("/laser/scan"), 405, "method_not_allowed")


@pytest.mark.parametrize(
    ("fields", "field", "hint"),
    [
        ({"layers": [99]}, "layers", "Its layers: 0-3."),
        ({"layers": "0-1,x"}, "layers", None),
        ({"kinds": ["q_prj"]}, "kinds", "Its kinds: down_proj"),
        ({"top_fractions": [0]}, "top_fractions", None),
        ({"keep": [2]}, "keep", None),
    ],
)
def test_what_cannot_be_scanned_is_refused(
    client: Any, model: str, problem: Problem, fields: dict[str, Any], field: str, hint: str | None
) -> None:
    found = problem(client.post("/laser/scan", json={"model": model} | fields), 422, "invalid_spec")
    assert found["errors"][0]["field"].startswith(field)
    assert hint is None or hint in found["errors"][0]["hint"]
    assert client.get("/jobs").json()["jobs"] == []


def test_unknown_models_and_fields(client: Any, model: str, problem: Problem) -> None:
    found = problem(client.post("/laser/scan", json={"model": "tiny-bse"}), 404, "unknown_model")
    assert found["errors"][0]["field"] == "model"
    problem(client.post("/laser/scan", json={"model": model, "rule": "laserrmt"}), 422, "invalid_spec")


def test_the_document_describes_it(client: Any) -> None:
    post = client.get("/openapi.json").json()["paths"]["/laser/scan"]["post"]
    assert post["operationId"] == "laser_scan"
    assert post["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/LaserScanSpec"
    }
