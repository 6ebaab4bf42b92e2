"""The OpenAPI document: what FastAPI gathers from the routes, and the schemas of specs and problems."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from aidocks.access.keys import KeyRequest
from aidocks.operations import OPERATIONS
from aidocks.specs.retrieve import EmbedRequest, RerankRequest
from serve.problems import Problem

TAGS = [
    {"name": "operations", "description": "Submit work. Every answer is a job."},
    {"name": "retrieval", "description": "Answered at once: vectors of texts, and passages in order."},
    {"name": "jobs", "description": "Follow and stop work."},
    {"name": "models", "description": "The models that this installation made or imported."},
    {"name": "datasets", "description": "Files of examples that requests name."},
    {"name": "access", "description": "API keys, and what was done with them. For administrators."},
    {"name": "service", "description": "The service itself."},
]


def describe(api: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of ``api``."""
    document = get_openapi(
        title=api.title,
        version=api.version,
        openapi_version=api.openapi_version,
        summary=api.summary,
        description=api.description,
        routes=api.routes,
        tags=TAGS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    models: list[type[BaseModel]] = [
        *(registration.spec_type() for registration in OPERATIONS),
        EmbedRequest,
        RerankRequest,
        KeyRequest,
        Problem,
    ]
    _, added = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name, schema in added["$defs"].items():
        assert schemas.setdefault(name, schema) == schema, f"two models are called {name}"
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    document["components"]["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
    # Needed where the service asks for keys; see docs/security.md.
    document["security"] = [{}, {"ApiKey": []}]
    return document
