"""``POST /<operation>``: one endpoint for each line of ``aidocks.operations.OPERATIONS``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from aidocks.errors import UnsupportedMediaType
from aidocks.jobs.model import Job
from aidocks.jobs.submit import submit_job
from aidocks.jobs.terms import HIGHEST, LONGEST_S, LOWEST, Terms
from aidocks.operations import OPERATIONS, Registration
from aidocks.specs.read import build_spec, parse_json
from serve.access import Caller, KeyHolder
from serve.context import Context, Here, problems

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[!-~]+$",
        description="Any text of the caller's own. Submitting the same body again with the same key within "
        "24 hours returns the job that exists, so a request whose answer was lost can be repeated.",
    ),
]

Priority = Annotated[
    int,
    Query(
        ge=LOWEST,
        le=HIGHEST,
        description="Jobs of a higher priority are started first and get the workers first; among equals, whoever has "
        "the fewest.",
    ),
]
TimeoutS = Annotated[
    float | None,
    Query(
        gt=0,
        le=LONGEST_S,
        description="Seconds after its start at which the job is ended as failed (`timed_out`), whatever was tried "
        "again meanwhile. Without: it takes its time.",
    ),
]


async def _terms(caller: Caller, priority: Priority = 0, timeout_s: TimeoutS = None) -> Terms:
    return Terms(owner=caller.owner, priority=priority, timeout_s=timeout_s)


#: For the signature of a route that submits.
AskedTerms = Annotated[Terms, Depends(_terms)]

_PROBLEMS = problems(
    (403, "A path in the request is outside the allowed roots."),
    (404, "The request names a model that does not exist."),
    (409, "The name of the output is taken, or the idempotency key belongs to another body."),
    (413, "The body is larger than 1 MB."),
    (415, "The body is not `application/json`."),
    (422, "The request is not valid; `errors` lists the fields."),
    (429, "The API key has as many unfinished jobs as it may have. `Retry-After` says when to ask again."),
    (503, "As many jobs wait as may. `Retry-After` says when to ask again."),
)


def operations_router() -> APIRouter:
    """Return the router with an endpoint for every registered operation."""
    router = APIRouter(tags=["operations"])
    for registration in OPERATIONS:
        router.add_api_route(
            registration.endpoint,
            _submission(registration),
            methods=["POST"],
            status_code=202,
            response_model=Job,
            operation_id=registration.method,
            name=registration.name,
            summary=registration.summary,
            description=_description(registration),
            response_description="The job, queued. `Location` is where to ask for it.",
            responses=_PROBLEMS,
            openapi_extra={"requestBody": _request_body(registration)},
        )
    return router


def _description(registration: Registration) -> str:
    about = " ".join((registration.spec_type().__doc__ or "").replace("``", "`").split())
    return f"{about}\n\nAnswers at once with a job; follow it at `/jobs/{{id}}/events`."


def _request_body(registration: Registration) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{registration.spec_type().__name__}"}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _submission(registration: Registration) -> Callable[..., Awaitable[Job]]:
    # Not read by FastAPI: what is wrong with a spec is said in the same words at every door.
    async def submit(
        here: Here,
        caller: Caller,
        request: Request,
        response: Response,
        terms: AskedTerms,
        idempotency_key: IdempotencyKey = None,
    ) -> Job:
        require_json(request)
        body = await request.body()
        job, created = await run_in_threadpool(
            _submit, here, caller, registration, body, idempotency_key, terms
        )
        announce(here, request, response, job, created)
        return job

    return submit


def announce(here: Context, request: Request, response: Response, job: Job, created: bool) -> None:
    """Say where a job is that was submitted, and to the supervisor that there is one."""
    response.headers["Location"] = str(request.app.url_path_for("get_job", job_id=job.id))
    if created:
        here.supervisor.wake()
    else:
        response.headers["Idempotency-Replayed"] = "true"


def _submit(
    here: Context,
    caller: KeyHolder,
    registration: Registration,
    body: bytes,
    key: str | None,
    terms: Terms,
) -> tuple[Job, bool]:
    spec = build_spec(registration.spec_type(), parse_json(body))
    return submit_job(
        here.settings,
        here.store,
        registration.name,
        spec,
        idempotency_key=key,
        terms=terms,
        most_unfinished=caller.limits.max_jobs,
    )


def require_json(request: Request) -> None:
    """Refuse a body that is not declared as JSON."""
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(
            f"The body has the media type {given[:100]!r}." if given else "The body has no media type.",
            hint="Send JSON, with the header 'Content-Type: application/json'.",
        )
