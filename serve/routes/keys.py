"""``/keys`` and ``/audit``: who may use the service, and what was done with it. For administrators' keys alone."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from aidocks.access.entry import AuditEntry
from aidocks.access.keys import ApiKey, KeyRequest, NewKey
from aidocks.specs.read import build_spec, parse_json
from serve.context import ID_PATTERN, Here, problems
from serve.routes.operations import require_json

MAX_ENTRIES = 1000

router = APIRouter(tags=["access"])

_FORBIDDEN = problems((403, "The key is not an administrator's."))


_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/KeyRequest"}}},
}


class KeyList(BaseModel):
    """The keys, newest first."""

    keys: list[ApiKey]


class AuditPage(BaseModel):
    """What was done, newest first."""

    entries: list[AuditEntry]
    has_more: bool = Field(
        description="There are older ones: ask again with `before`, the number of the last."
    )


@router.post(
    "/keys",
    status_code=201,
    response_description="The key. It is told this once.",
    responses=_FORBIDDEN
    | problems((415, "The body is not `application/json`."), (422, "The request is not valid.")),
    openapi_extra={"requestBody": _BODY},
)
async def create_key(here: Here, request: Request, response: Response) -> NewKey:
    """Make an API key. The answer has the key itself, which is stored nowhere."""
    require_json(request)
    asked = build_spec(KeyRequest, parse_json(await request.body()))
    made, text = await run_in_threadpool(here.keys.create, asked)
    response.headers["Location"] = f"/keys/{made.id}"
    response.headers["Cache-Control"] = "no-store"
    return NewKey(**made.model_dump(), key=text)


@router.get("/keys", responses=_FORBIDDEN)
def list_keys(here: Here) -> KeyList:
    """List the API keys, also those that were revoked or have expired."""
    return KeyList(keys=here.keys.list())


@router.delete(
    "/keys/{key_id}", status_code=204, responses=_FORBIDDEN | problems((404, "There is no such key."))
)
def revoke_key(
    here: Here, key_id: Annotated[str, Path(description="Id of a key.", pattern=ID_PATTERN)]
) -> Response:
    """Revoke an API key. A few seconds later it is refused everywhere; its jobs go on."""
    here.keys.revoke(key_id)
    return Response(status_code=204)


@router.get("/audit", responses=_FORBIDDEN)
def list_audit(
    here: Here,
    limit: Annotated[int, Query(ge=1, le=MAX_ENTRIES, description="Entries on a page.")] = 100,
    before: Annotated[
        int | None,
        Query(ge=1, le=2**31 - 1, description="Number of the entry at which the page before ended."),
    ] = None,
    owner: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="Only what was done with the key of this id.")
    ] = None,
) -> AuditPage:
    """List the requests that were to change something, newest first."""
    here.trail.write()  # what this process has noted so far
    found = here.audit.page(limit + 1, before, owner)
    return AuditPage(entries=found[:limit], has_more=len(found) > limit)
