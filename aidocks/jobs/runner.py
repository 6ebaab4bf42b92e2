"""Runs jobs. ``run_job`` is what every executor calls; ``run_locally`` executes one job in this process.

The latter is the ``--local`` door: no service, but the same store, registry and journal.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from aidocks.errors import IllegalTransition, LeaseLost, WorkerLost
from aidocks.executor import InProcessPool
from aidocks.jobs.attempt import remove_workspace, run_job
from aidocks.jobs.model import Event, Job, Status
from aidocks.jobs.store import LEASE_S, JobStore
from aidocks.jobs.submit import submit_job
from aidocks.jobs.terms import build_terms

if TYPE_CHECKING:
    from aidocks.executor import UnitPool
    from aidocks.jobs.rows import Lease
    from aidocks.processes import ComputeProcesses
    from aidocks.settings import Settings
    from aidocks.specs.base import Spec

__all__ = [
    "end_orphans",
    "process_name",
    "run_job",
    "run_locally",
    "submit_job",
]

EVENT_POLL_S = 0.1


def run_locally(
    operation: str,
    spec: Spec,
    settings: Settings,
    on_event: Callable[[Event], None] | None = None,
    processes: ComputeProcesses | None = None,
    timeout_s: float | None = None,
) -> Job:
    """Submit a job to this process and run it to its end.

    A job of the same spec whose process was killed is continued: it keeps its id and what it had finished.

    Args:
        operation: Registered name of the operation.
        spec: The request.
        settings: Of the installation: registry, workspaces and job store are the same as a service's.
        on_event: Called with every event of the job, in order, from another thread.
        processes: That compute what can be divided; they may be ended. Without, this process computes alone.
        timeout_s: Seconds after its first start at which the job is ended as failed. Default: it takes its time.

    Returns:
        The job as it ended.

    Raises:
        AIDocksError: The job was refused at submission.
        KeyboardInterrupt: After the job was cancelled and its files were removed.
    """
    store = JobStore(settings.store_url)
    try:
        job = _orphan_to_continue(store, settings, operation, spec, timeout_s)
        if job is None:
            terms = build_terms(timeout_s=timeout_s)
            job, _ = submit_job(settings, store, operation, spec, place="local", terms=terms)
        return _run_with_events(job, store, settings, on_event, InProcessPool(processes))
    finally:
        store.close()


def end_orphans(store: JobStore, settings: Settings) -> list[Job]:
    """Fail the local jobs whose process has died, so that they no longer hold their names. Returns them."""
    return [_fail_orphan(store, settings, job) for job in _orphans(store)]


def _run_with_events(
    job: Job,
    store: JobStore,
    settings: Settings,
    on_event: Callable[[Event], None] | None,
    pool: UnitPool,
) -> Job:
    token = store.acquire_lease(lease_place(job.id), process_name())
    after = store.last_sequence(job.id) if job.attempt else 0
    ended = threading.Event()

    def report() -> None:
        nonlocal after
        while on_event is not None:
            last = ended.is_set()
            for event in store.events(job.id, after=after):
                after = event.sequence
                on_event(event)
            if last:
                return
            ended.wait(EVENT_POLL_S)

    def stay_alive() -> None:
        while not ended.wait(LEASE_S / 3):
            with suppress(LeaseLost):
                store.renew_lease(token)

    threads = [threading.Thread(target=work, daemon=True) for work in (report, stay_alive)]
    for thread in threads:
        thread.start()
    try:
        return _claim_and_run(job, store, settings, pool, token)
    finally:
        store.release_lease(token)
        ended.set()
        for thread in threads:
            thread.join()


def _claim_and_run(job: Job, store: JobStore, settings: Settings, pool: UnitPool, token: int) -> Job:
    claimed = store.claim(job.id, token)
    if claimed is None:  # somebody cancelled it in between
        return store.get(job.id)
    try:
        return asyncio.run(run_job(claimed, store, settings, pool, token))
    except KeyboardInterrupt:
        remove_workspace(settings, job.id)
        with suppress(IllegalTransition, LeaseLost):  # it had just ended
            store.request_cancel(job.id)
            store.transition(job.id, Status.CANCELLED, token=token)
        raise


def _orphan_to_continue(
    store: JobStore, settings: Settings, operation: str, spec: Spec, timeout_s: float | None
) -> Job | None:
    asked = (operation, spec.model_dump(mode="json"), timeout_s)
    chosen = None
    for job in _orphans(store):
        same = (job.operation, job.spec, job.timeout_s) == asked and not job.cancel_requested
        if chosen is None and same and job.seconds_left != 0.0:
            chosen = job
        else:
            _fail_orphan(store, settings, job)
    return chosen


def _orphans(store: JobStore) -> list[Job]:
    return [job for job in store.unfinished("local") if _is_orphan(job, store.lease(lease_place(job.id)))]


def _is_orphan(job: Job, lease: Lease | None) -> bool:
    if lease is None:  # its process may be about to take it
        return time.time() - job.created_at.timestamp() > LEASE_S
    return not lease.live or process_is_gone(lease.owner)


def _fail_orphan(store: JobStore, settings: Settings, job: Job) -> Job:
    token = store.acquire_lease(lease_place(job.id), process_name())
    if store.claim(job.id, token) is None:
        return store.get(job.id)
    remove_workspace(settings, job.id)
    error = WorkerLost("The process that ran this local job has ended.")
    status = Status.CANCELLED if job.cancel_requested else Status.FAILED
    problem = None if job.cancel_requested else error.problem(f"/jobs/{job.id}")
    ended = store.transition(job.id, status, token=token, error=problem)
    store.release_lease(token)
    return ended


def lease_place(job_id: str) -> str:
    return f"local:{job_id}"


def process_name(pid: int | None = None) -> str:
    """Return host, process id and time of start: enough to tell later whether the process still runs."""
    pid = pid or os.getpid()
    return f"{socket.gethostname()}/{pid}/{_started(pid)}"


def process_is_gone(name: str) -> bool:
    """Say whether the process is known to have ended; of another host nothing is known."""
    host, _, rest = name.partition("/")
    pid = rest.partition("/")[0]
    return host == socket.gethostname() and pid.isdigit() and process_name(int(pid)) != name


def _started(pid: int) -> str:
    try:
        # Field 22 of stat(5); the second field, the command, may contain spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"
