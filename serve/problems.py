"""Errors as HTTP answers: one shape (RFC 9457 problem details) whatever went wrong, and wherever."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from aidocks.errors import (
    AIDocksError,
    BodyTooLarge,
    InvalidSpec,
    MethodNotAllowed,
    NotFound,
)
from aidocks.jobs.database import STORE_ERRORS, store_away
from aidocks.specs.faults import invalid_spec

MEDIA_TYPE = "application/problem+json"
REQUEST_ID = "aidocks.request_id"

log = logging.getLogger("serve.problems")


class Fault(BaseModel):
    """One field of a request that is not valid."""

    field: str = Field(description="Path of the field.", examples=["experts[1].source_model"])
    value: Any = Field(None, description="What was given, when it is short.")
    message: str = Field(description="What is wrong with it.")
    hint: str | None = Field(None, description="What would be right.")


class Problem(BaseModel):
    """Problem details (RFC 9457): the body of every answer that is an error."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {
            "type": "urn:aidocks:error:unknown_model",
            "title": "There is no such model",
            "status": 404,
            "code": "unknown_model",
            "detail": "There is no model 'smollm'.",
            "hint": "Did you mean 'smollm2-135m-instruct'?",
            "instance": "/laser",
        }
    ]})  # fmt: skip

    type: str = Field(description="`urn:aidocks:error:` and the code.")
    title: str = Field(description="What the code means.")
    status: int = Field(description="The HTTP status.")
    code: str = Field(description="Stable name of the error; see docs/errors.md.")
    detail: str = Field(description="What was wrong with this request.")
    hint: str | None = Field(None, description="What to do instead.")
    instance: str | None = Field(None, description="Path of the request.")
    errors: list[Fault] | None = Field(None, description="Every field that is not valid.")


def problem_answer(
    scope: Mapping[str, Any], error: AIDocksError, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return ``error`` as an answer to the request of ``scope``; below ``/v1`` as OpenAI's clients read it."""
    if scope["path"].removeprefix(scope.get("root_path", "")).startswith("/v1/"):
        return _openai_answer(error, headers)
    details = error.problem(instance=scope["path"].encode("utf-8", "replace").decode())
    return JSONResponse(details, details["status"], headers=dict(headers or {}), media_type=MEDIA_TYPE)


def _openai_answer(error: AIDocksError, headers: Mapping[str, str] | None) -> JSONResponse:
    # Their clients repeat what was answered with 409, which here is no passing state; and know 400 for "not valid".
    status = 400 if error.http_status in (409, 422) else error.http_status
    body = {
        "message": str(error),
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "param": error.field,
        "code": error.code,
    }
    return JSONResponse({"error": body}, status, headers=dict(headers or {}))


def unexpected_problem(scope: Mapping[str, Any]) -> JSONResponse:
    """Return the answer to a request that met a mistake of ours: its id, and nothing from inside."""
    error = AIDocksError(
        "The service met an error that it did not expect.",
        hint=f"The service's log has it under the request id {scope[REQUEST_ID]}.",
    )
    return problem_answer(scope, error)


def handle_problems(api: FastAPI) -> None:
    """Make ``api`` answer every exception that it can expect with problem details."""
    api.add_exception_handler(AIDocksError, _refused)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _not_routed)
    for error in STORE_ERRORS:
        api.add_exception_handler(error, _store_unavailable)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AIDocksError)
    if error.http_status >= 500:
        log.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
    return problem_answer(
        request.scope, error, {"Retry-After": str(error.retry_after_s)} if _passes(error) else None
    )


def _passes(error: AIDocksError) -> bool:
    """Tell whether the same request may be answered a moment later."""
    return error.retryable and error.http_status in (429, 503)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # The first part of a location is where the parameter was: query, path or header.
    errors = [found | {"loc": found["loc"][1:]} for found in error.errors()]
    return problem_answer(request.scope, invalid_spec(errors))


async def _store_unavailable(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s: the job store failed", request.method, request.url.path, exc_info=error)
    return problem_answer(request.scope, store_away(), {"Retry-After": "1"})


async def _not_routed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.url.path
    refusal: AIDocksError
    if error.status_code == 404:
        refusal = NotFound(f"There is nothing at {path!r}.", hint=_nearest_path(request, path))
    elif error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").replace(",", " ").split()))
        refusal = MethodNotAllowed(
            f"{request.method} is not possible at {path!r}.", hint=f"Possible: {allowed}. See /docs."
        )
    elif error.status_code == 413:
        refusal = BodyTooLarge("The request body is too large.")
    else:
        answer = InvalidSpec(str(error.detail)).problem(path) | {"status": error.status_code}
        return JSONResponse(answer, error.status_code, headers=error.headers, media_type=MEDIA_TYPE)
    return problem_answer(request.scope, refusal, error.headers)


def _nearest_path(request: Request, path: str) -> str:
    paths = list(request.app.openapi()["paths"])
    close = get_close_matches(path.rstrip("/").replace("_", "-"), paths, n=1)
    return f"Did you mean {close[0]}?" if close else "See /docs for what there is."
