"""Going on with a job that was stopped: a new job of the same spec, from the old one's last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aidocks.errors import Conflict, IllegalTransition, UnknownJob
from aidocks.jobs.model import Status
from aidocks.jobs.submit import submit_job
from aidocks.jobs.terms import LOCAL, Terms
from aidocks.operations import find_operation
from aidocks.storage.checkpoints import bring_checkpoints
from aidocks.training.checkpoints import complete_checkpoints, step_of

if TYPE_CHECKING:
    from aidocks.jobs.model import Job
    from aidocks.jobs.store import JobStore
    from aidocks.settings import Settings

#: Field of the specs whose jobs can be resumed.
FIELD = "resume_from_checkpoint"


def resume_job(
    settings: Settings,
    store: JobStore,
    job_id: str,
    *,
    idempotency_key: str | None = None,
    owner: str = LOCAL,
    priority: int | None = None,
    timeout_s: float | None = None,
    most_unfinished: int | None = None,
) -> tuple[Job, bool]:
    """Submit a job that goes on where another one was stopped, and makes the model that it was to make.

    Args:
        settings: Of the installation.
        store: Its job store.
        job_id: A job that failed or was cancelled.
        idempotency_key: As of any submission.
        owner: Of the new job: who resumes, not who submitted the old one.
        priority: Default: that of the old job.
        timeout_s: Counted from the start of the new job. Default: as the old one had.
        most_unfinished: As of any submission.

    Returns:
        The new job, and whether this call created it.

    Raises:
        NameTaken: Its model is there by now, or another job is about to make it.
        AIDocksError: As :func:`resumed_spec`.
    """
    operation, spec = resumed_spec(settings, store, job_id)
    former = store.get(job_id)
    terms = Terms(
        owner=owner,
        priority=former.priority if priority is None else priority,
        timeout_s=former.timeout_s if timeout_s is None else timeout_s,
    )
    return submit_job(
        settings,
        store,
        operation,
        spec,
        idempotency_key=idempotency_key,
        asked=store.events(job_id, limit=1)[0].data,
        terms=terms,
        most_unfinished=most_unfinished,
    )


def resumed_spec(settings: Settings, store: JobStore, job_id: str) -> tuple[str, dict[str, Any]]:
    """Return the operation and the request of a job that goes on where another one was stopped.

    Raises:
        UnknownJob: There is none of this id.
        IllegalTransition: It has not been stopped.
        Conflict: It left no checkpoint, or is of a kind that leaves none.
    """
    job = store.get(job_id)
    registration = find_operation(job.operation)
    if FIELD not in registration.spec_type().model_fields:
        raise Conflict(
            f"The job {job_id} is of the operation {job.operation!r}, which cannot be resumed.",
            field="job_id",
            value=job_id,
            hint="Submit it again; what was finished of the same work is not always done again.",
        )
    if job.status not in (Status.FAILED, Status.CANCELLED):
        raise IllegalTransition(
            f"The job {job_id} is {job.status.value}; only one that failed or was cancelled can be resumed.",
            field="job_id",
            value=job_id,
            hint="It has its result."
            if job.status.terminal
            else f"Cancel it first: aidocks jobs cancel {job_id}.",
        )
    spec = job.spec | {FIELD: _checkpointed(settings, store, job)}
    output_field = registration.load().output_field
    if job.output_name is not None:
        spec[output_field] = job.output_name
    return registration.name, spec


def checkpoints_of(settings: Settings, job_id: str) -> list[tuple[int, Path]]:
    """Return step and directory of every complete checkpoint of a job, oldest first."""
    return [(step_of(path), path) for path in complete_checkpoints(settings.checkpoints_dir / job_id)]


def _checkpointed(settings: Settings, store: JobStore, job: Job) -> str:
    """Return the job whose checkpoints are the newest: this one, or the one that it was itself resumed from."""
    source: Job | None = job
    seen = set()
    while source is not None and source.id not in seen:
        bring_checkpoints(settings.checkpoints_dir / source.id)
        if checkpoints_of(settings, source.id):
            return source.id
        seen.add(source.id)
        source = _known(store, source.spec.get(FIELD))
    raise Conflict(
        f"The job {job.id} left no checkpoint to go on from.",
        field="job_id",
        value=job.id,
        hint="It was stopped before the first one, or its checkpoints were removed. Submit it again.",
    )


def _known(store: JobStore, job_id: Any) -> Job | None:
    try:
        return store.get(job_id) if isinstance(job_id, str) else None
    except UnknownJob:
        return None
