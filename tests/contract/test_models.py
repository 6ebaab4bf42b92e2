"""/models: listing, manifest, files in whole and in part, deletion; and nothing from outside."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aidocks.settings import Settings

Problem = Callable[..., dict[str, Any]]
WEIGHTS = "/models/tiny-base/files/model.safetensors"


@pytest.fixture
def weights(settings: Settings, model: str) -> bytes:
    return (settings.models_dir / model / "model.safetensors").read_bytes()


def test_listing_and_manifest(client: Any, model: str) -> None:
    (row,) = client.get("/models").json()["models"]
    assert (row["name"], row["operation"]) == (model, "import")
    manifest = client.get(f"/models/{model}").json()
    assert manifest["name"] == model
    assert manifest["bytes"] == row["bytes"]


def test_every_listed_file_can_be_fetched(client: Any, model: str) -> None:
    files = client.get(f"/models/{model}/files").json()["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "aidocks.json"} <= {
        file["path"] for file in files
    }
    for file in files:
        response = client.get(f"/models/{model}/files/{file['path']}")
        assert response.status_code == 200
        assert len(response.content) == file["bytes"]
        assert file["sha256"] in (None, hashlib.sha256(response.content).hexdigest())
        assert "default-src 'none'" in response.headers["content-security-policy"]


@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_ranges(client: Any, weights: bytes, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(weights) - 1))
    last = data.draw(st.integers(first, len(weights) + 10))
    for text, expected in [
        (f"{first}-{last}", weights[first : last + 1]),
        (f"{first}-", weights[first:]),
        (f"-{last + 1}", weights[-(last + 1) :]),
    ]:
        response = client.get(WEIGHTS, headers={"Range": f"bytes={text}"})
        assert response.status_code == 206
        assert response.content == expected


@pytest.mark.parametrize("text", ["bytes=99999999-", "items=0-1", "bytes=5-2", "bytes=x", "bytes=", "0-1"])
def test_ranges_outside_the_file(client: Any, weights: bytes, problem: Problem, text: str) -> None:
    response = client.get(WEIGHTS, headers={"Range": text})
    problem(response, 416, "range_not_satisfiable")
    assert response.headers["content-range"] == f"bytes */{len(weights)}"


def test_files_are_not_sent_twice(client: Any, weights: bytes) -> None:
    first = client.get(WEIGHTS)
    tag = first.headers["etag"]
    assert first.headers["accept-ranges"] == "bytes"
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get(WEIGHTS, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get(WEIGHTS, headers={"If-None-Match": '"other"'}).status_code == 200
    part = client.get(WEIGHTS, headers={"Range": "bytes=0-9", "If-Range": tag})
    assert (part.status_code, part.content) == (206, weights[:10])
    changed = client.get(WEIGHTS, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (changed.status_code, changed.content) == (200, weights)


def test_head(client: Any, weights: bytes) -> None:
    response = client.request("HEAD", WEIGHTS)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(len(weights))


@pytest.mark.parametrize(
    "path",
    [
        "..%2f..%2faidocks.db", "%2e%2e/%2e%2e/aidocks.db", "../other/secret", "..%5c..%5caidocks.db",
        "%2fetc%2fpasswd", "/etc/passwd", "link", "linked/secret", "config.json%00", "%252e%252e/aidocks.db",
        "x" * 5000, "%2e", "%2e%2e", "", "report", "nothing.json", "~/x", "．．/aidocks.db",
    ],
)  # fmt: skip
def test_nothing_outside_the_model(client: Any, settings: Settings, model: str, path: str) -> None:
    other = settings.models_dir / "other"
    other.mkdir()
    (other / "secret").write_text("secret")
    directory = settings.models_dir / model
    (directory / "report").mkdir()
    (directory / "link").symlink_to(other / "secret")
    (directory / "linked").symlink_to(other)
    response = client.get(f"/models/{model}/files/{path}")
    assert response.status_code in (403, 404, 422), response.text[:200]
    assert response.headers["content-type"] == "application/problem+json"
    assert "root:" not in response.text


def test_unknown_models(client: Any, model: str, problem: Problem) -> None:
    for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/files"), ("GET", "/files/config.json")]:
        problem(client.request(method, f"/models/tiny-bse{path}"), 404, "unknown_model")
    assert "tiny-base" in client.get("/models/tiny-bse").json()["hint"]
    problem(client.get(f"/models/{model}/files/nothing"), 404, "not_found")


def test_deleting(client: Any, settings: Settings, model: str, problem: Problem) -> None:
    assert client.request("DELETE", f"/models/{model}").status_code == 204
    assert client.get("/models").json() == {"models": []}
    assert not (settings.models_dir / model).exists()
    problem(client.request("DELETE", f"/models/{model}"), 404, "unknown_model")


def test_models_in_use_stay(client: Any, laser_body: dict[str, Any], model: str, problem: Problem) -> None:
    job = client.post("/laser", json=laser_body).json()["id"]
    found = problem(client.request("DELETE", f"/models/{model}"), 409, "model_in_use")
    assert job in found["detail"]
    client.post(f"/jobs/{job}/cancel")
    assert client.request("DELETE", f"/models/{model}").status_code == 204


def test_damaged_models_can_be_deleted(client: Any, settings: Settings, model: str, problem: Problem) -> None:
    Path(settings.models_dir / model / "aidocks.json").write_text("{")
    problem(client.get(f"/models/{model}"), 422, "corrupt_checkpoint")
    assert client.get("/models").json() == {"models": []}
    assert client.request("DELETE", f"/models/{model}").status_code == 204
