"""The one way from a spec to a job: resolve, check, reserve, insert. Every door goes through here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from aidocks.access.redaction import refuse_secrets
from aidocks.errors import NameTaken, UnknownJob
from aidocks.jobs.terms import USUAL, Terms
from aidocks.operations import find_operation
from aidocks.plan import Operation, PlanContext
from aidocks.specs.base import Spec
from aidocks.specs.read import build_spec

if TYPE_CHECKING:
    from aidocks.jobs.model import Job, Place
    from aidocks.jobs.store import JobStore
    from aidocks.settings import Settings


def submit_job(
    settings: Settings,
    store: JobStore,
    operation_name: str,
    spec: Spec | Mapping[str, Any],
    *,
    place: Place = "service",
    idempotency_key: str | None = None,
    asked: dict[str, Any] | None = None,
    terms: Terms = USUAL,
    most_unfinished: int | None = None,
) -> tuple[Job, bool]:
    """Check a spec as far as can be done without work, and insert its job.

    Args:
        settings: Of the installation that will execute the job.
        store: Its job store.
        operation_name: Registered name of the operation.
        spec: The request; a mapping is validated first.
        place: Who is to execute the job.
        idempotency_key: The same key and spec of the same owner within 24 hours return the job that exists,
            whatever the terms.
        asked: What the caller said in words of another interface, kept in the job's first event.
        terms: Owner, priority and time limit of the job.
        most_unfinished: How many unfinished jobs its owner may have. Default: any number.

    Returns:
        The job, and whether this call created it.

    Raises:
        InvalidSpec: The spec cannot succeed as it stands (or a kin of it: unknown model, path not allowed).
        NameTaken: The output's name is in the registry, or a job under way will create it.
        IdempotencyMismatch: The key was used for another spec.
        QueueFull: As many jobs wait as may.
        QuotaExceeded: The owner has ``most_unfinished`` jobs.
    """
    from aidocks.jobs.queue import UNLIMITED, Limits

    registration = find_operation(operation_name)
    operation = registration.load()
    checked = spec if isinstance(spec, Spec) else build_spec(operation.spec_type, spec)
    body = checked.model_dump(mode="json")
    refuse_secrets(body | (asked or {}))
    if idempotency_key is not None:
        # Before any check: what that job has made since must not speak against it now.
        known = store.find_idempotent(registration.name, idempotency_key, body, terms.owner)
        if known is not None:
            return known, False
    told = {
        "place": place,
        "idempotency_key": idempotency_key,
        "asked": asked,
        "terms": terms,
        "limits": Limits(settings.max_queued_jobs, most_unfinished) if place == "service" else UNLIMITED,
    }
    return _insert(settings, store, registration.name, operation, checked, body, told)


def _insert(
    settings: Settings,
    store: JobStore,
    name: str,
    operation: Operation[Any, Any],
    spec: Spec,
    body: dict[str, Any],
    told: Mapping[str, Any],
) -> tuple[Job, bool]:
    """Insert a job of which nothing in the world speaks against it."""
    from aidocks.jobs.store import new_job_id

    job_id = new_job_id()
    context = plan_context(settings, job_id)
    inputs = _registry_inputs(operation, spec, context)
    output_name = operation.output_name(spec, job_id)

    require_free_name = partial(_require_free_name, output_name, operation.output_field, context)
    require_free_name()
    operation.preflight(spec, context)
    return store.submit(
        name,
        body,
        output_name=output_name,
        output_field=operation.output_field,
        inputs=inputs,
        job_id=job_id,
        guard=require_free_name,
        **told,
    )


def plan_context(
    settings: Settings,
    job_id: str,
    *,
    parallelism: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> PlanContext:
    """Return what the plan of a job may use."""
    from aidocks.models.registry import Registry
    from aidocks.models.resolve import ModelResolver

    return PlanContext(
        job_id=job_id,
        workspace=settings.workspaces_dir / job_id,
        registry=Registry(settings.models_dir),
        resolver=ModelResolver(settings.models_dir, settings.allowed_roots),
        cache_dir=settings.cache_dir,
        checkpoints_dir=settings.checkpoints_dir / job_id,
        datasets_dir=settings.datasets_dir,
        result_of=lambda other: _result_of(settings, other),
        remote_code=settings.remote_code_models,
        parallelism=parallelism,
        say=say,
    )


def _result_of(settings: Settings, job_id: str) -> dict[str, Any] | None:
    from aidocks.jobs.store import JobStore

    store = JobStore(settings.store_url)
    try:
        return store.get(job_id).result
    except UnknownJob:
        return None
    finally:
        store.close()


def _require_free_name(name: str | None, field: str, context: PlanContext) -> None:
    if name is not None and context.registry.exists(name):
        raise NameTaken(
            f"The registry already holds a model called {name!r}.",
            field=field,
            value=name,
            hint=f"Choose another name, or remove it: aidocks models delete {name}.",
        )


def _registry_inputs(operation: Operation[Any, Any], spec: Spec, context: PlanContext) -> list[str]:
    names = []
    for field, reference in operation.inputs(spec).items():
        if context.resolver.needs_download(reference, field=field):
            continue
        model = context.resolver.resolve(reference, field=field)
        if model.kind == "registry":
            names.append(model.path.name)
    return list(dict.fromkeys(names))
