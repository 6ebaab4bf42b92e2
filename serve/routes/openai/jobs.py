"""``/v1/fine_tuning/jobs``: trainings of ``/train/llm`` as OpenAI's clients submit, follow and stop them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool

from aidocks.datasets.store import FILE_ID
from aidocks.errors import AIDocksError, InvalidSpec
from aidocks.jobs.model import Job, Status
from aidocks.jobs.resume import checkpoints_of, resume_job
from aidocks.jobs.submit import submit_job
from aidocks.jobs.terms import Terms
from aidocks.specs.read import build_spec, parse_json
from serve.access import Caller, KeyHolder
from serve.context import Context, Here
from serve.routes.openai.asked import PARAMETERS, TuningRequest, train_spec
from serve.routes.openai.ids import checkpoint_id
from serve.routes.openai.listing import After, Limit, behind, page
from serve.routes.openai.tunings import OPERATION, Tuning, goes_on, tuning_of, whole
from serve.routes.openai.views import job_object
from serve.routes.operations import AskedTerms, IdempotencyKey, announce, require_json

#: Figures of a checkpoint, by their names.
_FIGURES = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")

router = APIRouter(prefix="/fine_tuning/jobs")

TuningId = Annotated[str, Path(description="Id of a fine-tuning job.", max_length=64)]


@router.post("", name="openai_create_tuning")
async def create(
    here: Here,
    caller: Caller,
    request: Request,
    response: Response,
    terms: AskedTerms,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Submit a training."""
    require_json(request)
    body = await request.body()
    job, created = await run_in_threadpool(_submit, here, caller, body, idempotency_key, terms)
    announce(here, request, response, job, created)
    return await run_in_threadpool(_object, here, job)


@router.get("", name="openai_list_tunings")
def list_tunings(here: Here, request: Request, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """List trainings, newest first; ``metadata[key]=value`` picks those that say so."""
    wanted = {
        name[9:-1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    before = None if after is None else tuning_of(here.store, after).first.id
    found: list[dict[str, Any]] = []
    while len(found) <= limit and (
        jobs := here.store.list(operation=OPERATION, limit=limit + 1, before=before)
    ):
        before = jobs[-1].id
        objects = [_object(here, job) for job in jobs if not goes_on(here.store, job)]
        found += [item for item in objects if wanted.items() <= item["metadata"].items()]
    return page(found, limit)


@router.get("/{tuning}", name="openai_get_tuning")
def get_tuning(here: Here, tuning: TuningId) -> dict[str, Any]:
    """Return one training."""
    return job_object(tuning_of(here.store, tuning), here.store)


@router.post("/{tuning}/cancel", name="openai_cancel_tuning")
@router.post("/{tuning}/pause", name="openai_pause_tuning")
def stop(here: Here, tuning: TuningId) -> dict[str, Any]:
    """Stop a training. Its checkpoints stay, so that either can be taken up again with ``resume``."""
    return _object(here, here.store.request_cancel(tuning_of(here.store, tuning).last.id))


@router.post("/{tuning}/resume", name="openai_resume_tuning")
async def resume(
    here: Here,
    caller: Caller,
    request: Request,
    response: Response,
    tuning: TuningId,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Go on with a training that was stopped. It keeps its id; one that goes on already is answered as it is."""

    def work() -> tuple[Job, bool, dict[str, Any]]:
        known = tuning_of(here.store, tuning)
        job, created = known.last, False
        if len(known.jobs) == 1 or job.status.terminal:
            job, created = resume_job(
                here.settings,
                here.store,
                job.id,
                idempotency_key=idempotency_key,
                owner=caller.owner,
                most_unfinished=caller.limits.max_jobs,
            )
        return job, created, _object(here, job)

    job, created, answer = await run_in_threadpool(work)
    announce(here, request, response, job, created)
    return answer


@router.get("/{tuning}/events", name="openai_tuning_events")
def list_events(here: Here, tuning: TuningId, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """List what happened in a training, newest first."""
    known = tuning_of(here.store, tuning)
    return page(known.newest_events(here.store, after, limit + 1), limit)


@router.get("/{tuning}/checkpoints", name="openai_tuning_checkpoints")
def list_checkpoints(here: Here, tuning: TuningId, after: After = None, limit: Limit = 10) -> dict[str, Any]:
    """List the checkpoints of a training that are kept, newest first; of a finished one, its model."""
    known = tuning_of(here.store, tuning)
    job, result = known.last, known.last.result or {}
    # What a later job has written at a step is what the training goes on from.
    made = {
        step: (one, int(path.stat().st_mtime))
        for one in known.jobs
        for step, path in checkpoints_of(here.settings, one.id)
    }
    last = result.get("steps")
    if job.status is Status.SUCCEEDED and isinstance(last, int) and job.finished_at is not None:
        made = {last: (job, int(job.finished_at.timestamp()))}
    figures = _figures(here, known) if made else {}
    found = [
        {
            "object": "fine_tuning.job.checkpoint",
            "id": checkpoint_id(one.id, step),
            "created_at": written,
            "fine_tuning_job_id": known.id,
            "fine_tuned_model_checkpoint": job.output_name
            if job.status is Status.SUCCEEDED
            else f"{job.output_name}:ckpt-step-{step}",
            "metrics": {"step": step} | figures.get(step, {}),
            "step_number": step,
        }
        for step, (one, written) in sorted(made.items(), reverse=True)
    ]
    return page(behind(found, after)[: limit + 1], limit)


def _figures(here: Context, tuning: Tuning) -> dict[int, dict[str, Any]]:
    """Return what was measured, by step."""
    found: dict[int, dict[str, Any]] = {}
    for point in tuning.points(here.store):
        named = {name: point[name] for name in _FIGURES if point.get(name) is not None}
        if isinstance(point.get("step"), int):
            found.setdefault(point["step"], {}).update(named)
    return found


def _object(here: Context, job: Job) -> dict[str, Any]:
    return job_object(whole(here.store, job), here.store)


def _submit(here: Context, caller: KeyHolder, body: bytes, key: str | None, terms: Terms) -> tuple[Job, bool]:
    asked = build_spec(TuningRequest, parse_json(body))
    for field in ("training_file", "validation_file"):
        file = getattr(asked, field)
        if file is not None and FILE_ID.fullmatch(file) and here.datasets.resolve(file) is None:
            raise InvalidSpec(
                f"There is no file {file!r}.",
                field=field,
                value=file,
                hint="Upload it first: POST /v1/files.",
            )
    try:
        return submit_job(
            here.settings,
            here.store,
            OPERATION,
            train_spec(asked, key),
            idempotency_key=key,
            asked={"asked": asked.model_dump(mode="json", exclude_unset=True)},
            terms=terms,
            most_unfinished=caller.limits.max_jobs,
        )
    except AIDocksError as error:
        error.field = PARAMETERS.get(error.field or "", error.field)
        raise
