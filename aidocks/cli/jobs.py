"""`aidocks jobs`: what was submitted, what runs, what became of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aidocks.cli.options import Json, Local, Priority, Timeout, Url, connect
from aidocks.cli.output import manner, out, print_json, print_text, remark
from aidocks.errors import MissingExtra

if TYPE_CHECKING:
    from aidocks.jobs.model import Event, Job, Status
    from aidocks.jobs.store import JobStore
    from aidocks.settings import Settings

app = typer.Typer(no_args_is_help=True, help="List, watch, cancel and resume jobs.", rich_markup_mode="rich")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.", show_default=False)]


@app.command("list")
def list_jobs(
    status: Annotated[
        str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.", metavar="STATUS")
    ] = None,
    operation: Annotated[
        str | None, typer.Option(help="Only jobs of this operation.", metavar="NAME")
    ] = None,
    owner: Annotated[
        str | None, typer.Option(help="Only jobs that this API key submitted.", metavar="KEY_ID")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Jobs to show.")] = 20,
    before: Annotated[
        str | None, typer.Option(metavar="JOB", help="Only jobs submitted before this one.")
    ] = None,
    local: Local = False,
    json: Json = False,
    url: Url = None,
) -> None:
    """List jobs, newest first."""
    if local:
        with _store_here() as (_, store):
            listed = store.list(_status(status), operation, limit, before, owner=owner)
    else:
        with connect(url) as client:
            listed = [handle.job for handle in client.jobs(status, operation, limit, before, owner)]
    if manner.json:
        print_json([job.model_dump(mode="json") for job in listed])
    elif not listed:
        remark("There are no such jobs.")
    else:
        from aidocks.cli.render import table_of

        out().print(table_of([_row(job) for job in listed]), soft_wrap=True)


@app.command("show")
def show_job(job: JobId, local: Local = False, json: Json = False, url: Url = None) -> None:
    """Show one job: its request, progress, result or error."""
    if local:
        with _store_here() as (_, store):
            shown = store.get(job)
    else:
        with connect(url) as client:
            shown = client.job(job).job
    document = shown.model_dump(mode="json")
    if manner.json:
        print_json(document)
        return
    from aidocks.cli.render import fact_table

    spec = document.pop("spec")
    out().print(fact_table({name: value for name, value in document.items() if value is not False}))
    out().print("[bold]request[/]")
    out().print(fact_table({f"  {name}": value for name, value in spec.items()}))


@app.command("watch")
def watch_job(job: JobId, json: Json = False, url: Url = None) -> None:
    """Show a job's progress until it is over, then its result."""
    from aidocks.cli.run import watch

    with connect(url) as client:
        watch(client.job(job))


@app.command("cancel")
def cancel_job(job: JobId, json: Json = False, url: Url = None) -> None:
    """Cancel a job. What it had not published is removed."""
    with connect(url) as client:
        cancelled = client.job(job).cancel().job
    if manner.json:
        print_json(cancelled.model_dump(mode="json"))
    else:
        print_text(f"{cancelled.id} {'cancelled' if cancelled.status.terminal else 'is being cancelled'}")


@app.command("resume")
def resume_job(
    job: JobId,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the job's id and do not wait for it.")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="Run in this process, without a service.")] = False,
    priority: Priority = None,
    timeout: Timeout = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Go on with a training that was stopped: a new job, from its last checkpoint."""
    if local and (detach or url or priority is not None):
        raise typer.BadParameter("--local runs here and now: --detach, --url and --priority need a service.")
    if local:
        _resume_here(job, timeout)
        return
    from aidocks.cli.run import watch

    with connect(url) as client:
        handle = client.resume(job, priority=priority, timeout_s=timeout)
        if detach:
            print_json(handle.job.model_dump(mode="json")) if manner.json else print_text(handle.id)
        else:
            remark(f"job {handle.id} goes on with {job}")
            watch(handle)


@app.command("events")
def list_events(
    job: JobId,
    after: Annotated[int, typer.Option(min=0, help="Begin behind the event of this number.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document a line.")] = False,
    url: Url = None,
) -> None:
    """Print a job's history."""
    with connect(url) as client:
        handle = client.job(job)
        history = handle.events(after) if follow else handle.history(after)
        for event in history:
            print_text(event.model_dump_json() if json else _line(event))


@contextmanager
def _store_here() -> Iterator[tuple[Settings, JobStore]]:
    """Open the job store of the data directory."""
    from aidocks.settings import Settings

    settings = Settings()
    try:
        from aidocks.jobs.store import JobStore
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"--local needs {error.name}, which is not installed.",
            hint="Install what runs operations: pip install 'aidocks[local]'.",
        ) from error
    with closing(JobStore(settings.store_url)) as store:
        yield settings, store


def _status(name: str | None) -> Status | None:
    from aidocks.jobs.model import Status

    try:
        return None if name is None else Status(name)
    except ValueError:
        raise typer.BadParameter(f"--status is one of {', '.join(Status)}.") from None


def _resume_here(job_id: str, timeout_s: float | None) -> None:
    from aidocks.cli.run import run_here
    from aidocks.operations import find_operation
    from aidocks.specs.read import build_spec

    with _store_here() as (settings, store):
        from aidocks.jobs.resume import resumed_spec
        from aidocks.jobs.runner import end_orphans

        end_orphans(store, settings)  # one whose process was killed counts as running until somebody looks
        operation, spec = resumed_spec(settings, store, job_id)
        timeout_s = store.get(job_id).timeout_s if timeout_s is None else timeout_s
    remark(f"a new job goes on with {job_id}")
    run_here(operation, build_spec(find_operation(operation).spec_type(), spec), timeout_s)


def _row(job: Job) -> dict[str, Any]:
    status = str(job.status)
    if job.progress and not job.status.terminal:
        status += f", {job.progress.stage} {100 * job.progress.fraction:.0f}%"
    end = job.finished_at or datetime.now(UTC)
    return {
        "job": job.id,
        "operation": job.operation,
        "status": status,
        "model": job.output_name or "",
        "created": f"{job.created_at.astimezone():%m-%d %H:%M}",
        "ran_s": (end - job.started_at).total_seconds() if job.started_at else None,
    }


def _line(event: Event) -> str:
    from aidocks.client.wording import sentence

    told = sentence(event)
    facts = told if told is not None else " ".join(f"{name}={value}" for name, value in event.data.items())
    return f"{event.sequence:5d}  {event.time.astimezone():%H:%M:%S}  {event.type:<16} {facts}".rstrip()
