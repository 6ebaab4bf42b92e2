"""Running an operation: at a service, watched or not, or in this process."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from aidocks.cli.options import connect
from aidocks.cli.output import err, manner, print_json, print_text, remark, report
from aidocks.errors import JobFailed, MissingExtra

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aidocks.client.job import JobHandle
    from aidocks.jobs.model import Event, Job
    from aidocks.settings import Settings
    from aidocks.specs.base import Spec

INTERRUPTED = 130
#: Name of the threads in which units run in this process.
UNIT_THREAD = "aidocks-unit"
# How long a thread that reads or hashes waits for one that runs Python; the default, 5 ms, is what 10 MB take.
_SWITCH_S = 5e-4


def submit(
    operation: str,
    spec: Spec,
    *,
    url: str | None,
    detach: bool,
    idempotency_key: str | None,
    priority: int | None,
    timeout_s: float | None,
) -> None:
    """Submit a job to a service and, unless ``detach``, watch it to its end."""
    with connect(url) as client:
        handle = client.submit(
            operation, spec, idempotency_key=idempotency_key, priority=priority, timeout_s=timeout_s
        )
        if detach:
            print_json(handle.job.model_dump(mode="json")) if manner.json else print_text(handle.id)
        else:
            remark(f"job {handle.id} at {client.url}")
            watch(handle)


def watch(handle: JobHandle) -> None:
    """Show a job's progress until it is over, then its result.

    Raises:
        JobFailed: It failed.
        JobCancelled: It was cancelled.
    """
    try:
        with _progress() as show:
            for event in handle.events():
                show(event)
        job = handle.refresh().job
    except KeyboardInterrupt:
        remark(
            "The job goes on.\n"
            f"  watch it:  aidocks jobs watch {handle.id}\n"
            f"  cancel it: aidocks jobs cancel {handle.id}"
        )
        raise typer.Exit(INTERRUPTED) from None
    finish(job)


def run_here(operation: str, spec: Spec, timeout_s: float | None = None) -> None:
    """Run an operation in this process, for at most ``timeout_s`` seconds.

    Raises:
        MissingExtra: This installation is a client only.
    """
    from aidocks.cli.ahead import processes
    from aidocks.settings import Settings

    try:
        settings = Settings()
        _hash_ahead(operation, spec, settings)
        from aidocks.jobs.runner import run_locally

        with _progress() as show:
            job = run_locally(
                operation, spec, settings, on_event=show, processes=processes(), timeout_s=timeout_s
            )
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"--local needs {error.name}, which is not installed.",
            hint="Install what runs operations: pip install 'aidocks[local]'.",
        ) from error
    except KeyboardInterrupt:
        remark(_cancelled(spec))
        _leave(INTERRUPTED)
    try:
        finish(job)
    except JobFailed as error:
        # A unit whose time was up may still run.
        report(error)
        _leave(error.exit_code)


def _hash_ahead(operation: str, spec: Spec, settings: Settings) -> None:
    """Begin to hash the models that the job is to read, on another core than the one that starts the job.

    The manifest of what it makes tells their hashes. A short run takes as long to import what it needs, and to check
    the request, as to read its models; what is wrong with the request is said there, not here.
    """
    from aidocks.checkpoints.hashes import FileHashes
    from aidocks.errors import AIDocksError
    from aidocks.models.resolve import ModelResolver, is_path
    from aidocks.operations import find_operation

    sys.setswitchinterval(_SWITCH_S)
    resolver = ModelResolver(settings.models_dir, settings.allowed_roots)
    files: dict[Path, None] = {}
    with suppress(AIDocksError, OSError):
        for field, reference in find_operation(operation).load().inputs(spec).items():
            if is_path(reference) or resolver.registry.exists(reference):
                directory = resolver.resolve(reference, field=field).path
                files |= dict.fromkeys(sorted(directory.glob("*.safetensors")))
    if files:
        FileHashes(settings.cache_dir).compute_ahead(tuple(files))


def _cancelled(spec: Spec) -> str:
    from aidocks.jobs.resume import FIELD

    if FIELD not in type(spec).model_fields:
        return "The job was cancelled; nothing of it remains."
    return (
        "The job was cancelled; its checkpoints remain.\n"
        "  find it:       aidocks jobs list --local\n"
        "  go on with it: aidocks jobs resume --local JOB_ID"
    )


def finish(job: Job) -> None:
    """Print the result of a job that is over.

    Raises:
        JobFailed: It failed.
        JobCancelled: It was cancelled.
    """
    from aidocks.client.job import result_of

    result = result_of(job)
    if manner.json:
        print_json(job.model_dump(mode="json"))
        return
    from aidocks.cli.output import out
    from aidocks.cli.render import result_view

    for part in result_view(result.model_dump(mode="json")):
        out().print(part, soft_wrap=True)


def _leave(code: int) -> NoReturn:
    """End the process although a cancelled unit still runs native code, which aborts a regular exit."""
    if any(thread.name == UNIT_THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


def _progress() -> AbstractContextManager[Callable[[Event], Any]]:
    if manner.json:
        return nullcontext(lambda _: None)
    from aidocks.client.progress import shown_progress

    return shown_progress(err())
