"""``/jobs``: what was submitted, how it goes, and how to stop it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from aidocks.errors import InvalidSpec, NotFound, ServiceUnreachable
from aidocks.jobs.model import Event, Job, Status
from aidocks.jobs.resume import resume_job
from aidocks.jobs.terms import HIGHEST, LONGEST_S, LOWEST
from aidocks.operations import find_operation
from serve import sse
from serve.access import Caller
from serve.context import ID_PATTERN, Context, Here, JobId, problems
from serve.routes.operations import IdempotencyKey, announce

MAX_JOBS, MAX_EVENTS = 200, 1000

router = APIRouter(prefix="/jobs", tags=["jobs"])


class JobPage(BaseModel):
    """Jobs, newest first."""

    jobs: list[Job]
    has_more: bool = Field(description="There are older ones: ask again with `before`, the id of the last.")


class EventPage(BaseModel):
    """Events of one job, oldest first."""

    events: list[Event]
    has_more: bool = Field(description="There are later ones: ask again with `after`, the last sequence.")


_UNKNOWN = problems((404, "There is no such job."))
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page of events; or, when asked for, the stream of events: of each, `id` is the "
        "sequence, `event` the type and `data` the event as JSON. It ends after the event that ends the job.",
        "content": {"text/event-stream": {"example": "id: 1\nevent: queued\ndata: {...}\n\n"}},
    }
}


@router.get("", response_model=JobPage)
async def list_jobs(
    here: Here,
    status: Annotated[Status | None, Query(description="Only jobs of this status.")] = None,
    operation: Annotated[str | None, Query(description="Only jobs of this operation.", max_length=64)] = None,
    owner: Annotated[
        str | None, Query(description="Only jobs that this API key (its id) submitted.", pattern=ID_PATTERN)
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_JOBS, description="Jobs on a page.")] = 50,
    before: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="Id of the job at which the page before ended.")
    ] = None,
) -> Response:
    """List jobs, newest first."""
    name = _operation_name(operation)

    def read() -> bytes:
        found = here.store.list(status, name, limit + 1, before, owner=owner)
        return _json(JobPage(jobs=found[:limit], has_more=len(found) > limit))

    return await _answer(here, ("jobs", status, name, limit, before, owner), read)


@router.get("/{job_id}", response_model=Job, responses=_UNKNOWN)
async def get_job(here: Here, job_id: JobId) -> Response:
    """Return one job with its progress, and its result or error."""
    return await _answer(here, ("job", job_id), lambda: _json(here.store.get(job_id)))


@router.post(
    "/{job_id}/cancel",
    response_description="The job has ended.",
    responses={
        202: {"model": Job, "description": "The job runs and has been asked to stop."},
        **problems((404, "There is no such job."), (409, "The job has ended already.")),
    },
)
def cancel_job(here: Here, job_id: JobId, response: Response) -> Job:
    """Cancel a job: one that waits ends at once, one that runs after the units under way."""
    job = here.store.request_cancel(job_id)
    if not job.status.terminal:
        response.status_code = 202
    return job


@router.post(
    "/{job_id}/resume",
    status_code=202,
    name="resume_job",
    response_description="The new job, queued. `Location` is where to ask for it.",
    responses=problems(
        (404, "There is no such job."),
        (409, "The job has not been stopped, or left no checkpoint; or the name of its model is taken."),
        (422, "What the job was asked for is no longer possible."),
        (429, "The API key has as many unfinished jobs as it may have."),
        (503, "As many jobs wait as may."),
    ),
)
async def resume(
    here: Here,
    caller: Caller,
    request: Request,
    response: Response,
    job_id: JobId,
    idempotency_key: IdempotencyKey = None,
    priority: Annotated[
        int | None, Query(ge=LOWEST, le=HIGHEST, description="Default: that of the old job.")
    ] = None,
    timeout_s: Annotated[
        float | None,
        Query(
            gt=0,
            le=LONGEST_S,
            description="Counted from the start of the new job. Default: as the old one had.",
        ),
    ] = None,
) -> Job:
    """Go on with a training that failed or was cancelled: a new job, from the last checkpoint of the old one."""
    job, created = await run_in_threadpool(
        resume_job,
        here.settings,
        here.store,
        job_id,
        idempotency_key=idempotency_key,
        owner=caller.owner,
        priority=priority,
        timeout_s=timeout_s,
        most_unfinished=caller.limits.max_jobs,
    )
    announce(here, request, response, job, created)
    return job


@router.get("/{job_id}/events", response_model=EventPage, responses=_STREAM | _UNKNOWN)
async def job_events(
    here: Here,
    request: Request,
    job_id: JobId,
    after: Annotated[
        int, Query(ge=0, le=2**31 - 1, description="Sequence of the last event that is known.")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS, description="Events on a page.")] = 500,
    stream: Annotated[bool | None, Query(description="Stream or page, whatever `Accept` says.")] = None,
    last_event_id: Annotated[
        str | None,
        Header(alias="Last-Event-ID", description="As `after`; sent when a reader connects again."),
    ] = None,
) -> Any:
    """Return a page of events, or with `Accept: text/event-stream` (or `?stream=true`) follow them."""
    if last_event_id:
        after = _sequence(last_event_id)
    if not (_accepts_stream(request) if stream is None else stream):

        def read() -> bytes:
            found = here.store.events(job_id, after, limit + 1)
            return _json(EventPage(events=found[:limit], has_more=len(found) > limit))

        return await _answer(here, ("events", job_id, after, limit), read)
    await run_in_threadpool(here.store.get, job_id)
    if here.streams >= sse.MAX_STREAMS:
        raise ServiceUnreachable(
            f"{sse.MAX_STREAMS} readers follow jobs already.",
            hint="Try again later, or ask for pages: GET /jobs/{id}/events?after=<sequence>.",
        )
    events = _counted(here, sse.event_stream(here.store, job_id, after))
    return StreamingResponse(events, media_type="text/event-stream", headers=sse.HEADERS)


async def _answer(here: Context, what: tuple[object, ...], read: Callable[[], bytes]) -> Response:
    """Return what is read as it is: these are asked for all the time."""
    return Response(await here.reads.read(what, read), media_type="application/json")


def _json(model: BaseModel) -> bytes:
    return model.model_dump_json(by_alias=True).encode()


async def _counted(here: Context, events: AsyncIterator[str]) -> AsyncIterator[str]:
    here.streams += 1
    try:
        async for event in events:
            yield event
    finally:
        here.streams -= 1


def _accepts_stream(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "").lower()


def _sequence(last_event_id: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", last_event_id):
        raise InvalidSpec(
            "Last-Event-ID: Must be the sequence of an event.",
            field="Last-Event-ID",
            value=last_event_id[:100],
            hint="Send the `id` of the last event that was received.",
        )
    return int(last_event_id)


def _operation_name(name: str | None) -> str | None:
    try:
        return find_operation(name).name if name is not None else None
    except NotFound as error:
        raise InvalidSpec(error.message, field="operation", value=name, hint=error.hint) from None
