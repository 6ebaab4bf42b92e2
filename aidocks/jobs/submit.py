"""The one way from a spec to a job: resolve, check, reserve, insert. Every door goes through here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from aidocks.errors import NameTaken, UnknownJob
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
) -> tuple[Job, bool]:
    """Check a spec as far as can be done without work, and insert its job.

    Args:
        settings: Of the installation that will execute the job.
        store: Its job store.
        operation_name: Registered name of the operation.
        spec: The request; a mapping is validated first.
        place: Who is to execute the job.
        idempotency_key: The same key and spec within 24 hours return the job that exists.
        asked: What the caller said in words of another interface, kept in the job's first event.

    Returns:
        The job, and whether this call created it.

    Raises:
        InvalidSpec: The spec cannot succeed as it stands (or a kin of it: unknown model, path not allowed).
        NameTaken: The output's name is in the registry, or a job under way will create it.
        IdempotencyMismatch: The key was used for another spec.
    """
    registration = find_operation(operation_name)
    operation = registration.load()
    checked = spec if isinstance(spec, Spec) else build_spec(operation.spec_type, spec)
    body = checked.model_dump(mode="json")
    if idempotency_key is not None:
        # Before any check: what that job has made since must not speak against it now.
        known = store.find_idempotent(registration.name, idempotency_key, body)
        if known is not None:
            return known, False
    from aidocks.jobs.store import new_job_id

    job_id = new_job_id()
    context = plan_context(settings, job_id)
    inputs = _registry_inputs(operation, checked, context)
    output_name = operation.output_name(checked, job_id)

    require_free_name = partial(_require_free_name, output_name, operation.output_field, context)
    require_free_name()
    operation.preflight(checked, context)
    return store.submit(
        registration.name,
        body,
        output_name=output_name,
        output_field=operation.output_field,
        place=place,
        idempotency_key=idempotency_key,
        inputs=inputs,
        job_id=job_id,
        guard=require_free_name,
        asked=asked,
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
