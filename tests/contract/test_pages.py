"""/docs, /redoc and the OpenAPI document: complete, current, and without the internet."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from aidocks.operations import OPERATIONS
from serve.schema import PATH, openapi_text


def test_the_root_leads_to_the_documentation(client: Any) -> None:
    response = client.get("/")
    assert (response.status_code, response.headers["location"]) == (307, "/docs")


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_pages_load_nothing_from_elsewhere(client: Any, page: str) -> None:
    response = client.get(page)
    assert response.status_code == 200
    loaded = re.findall(r"""(?:src|href|url)\s*[=(:]\s*["']([^"']+)["']""", response.text)
    assert len(loaded) >= 2
    for url in loaded:
        assert url.startswith("/"), url
        assert not url.startswith("//")
        assert client.get(url).status_code == 200
    assert not re.search(
        r"(?:https?:)?//[\w.-]+\.\w", re.sub(r"<!--.*?-->", "", response.text, flags=re.DOTALL)
    )
    # The browser enforces the same, also of what the scripts would like to load.
    assert "default-src 'self'" in response.headers["content-security-policy"]


def test_no_validator_on_the_internet_is_asked(client: Any) -> None:
    assert '"validatorUrl": null' in client.get("/docs").text


def test_the_document_is_valid_openapi(api: FastAPI) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    document = api.openapi()
    assert document["openapi"].startswith("3.1")
    validator.validate(document)


def test_the_kept_document_is_current() -> None:
    assert Path(__file__).resolve().parents[2] / "docs" / "openapi.json" == PATH
    assert PATH.read_text(encoding="utf-8") == openapi_text(), "run: python -m serve.schema"


def test_the_document_describes_every_operation_and_error(api: FastAPI) -> None:
    document = api.openapi()
    schemas = document["components"]["schemas"]
    for registration in OPERATIONS:
        post = document["paths"][registration.endpoint]["post"]
        reference = post["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = schemas[reference.rpartition("/")[2]]
        assert schema["title"] == registration.spec_type().__name__
        assert post["responses"]["202"]["content"]["application/json"]["schema"]["$ref"].endswith("/Job")
        assert post["description"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
            for status, response in operation["responses"].items():
                if status == "default" or (int(status) >= 400 and path != "/health"):
                    assert list(response["content"]) == ["application/problem+json"], (method, path, status)
    assert "HTTPValidationError" not in json.dumps(document)
