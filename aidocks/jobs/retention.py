"""What is cleared away of jobs that have ended: workspaces at once, checkpoints after days, records on request."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from aidocks.errors import UnknownJob
from aidocks.jobs.attempt import remove_checkpoints, remove_workspace
from aidocks.jobs.model import Status
from aidocks.jobs.resume import FIELD as RESUMES

if TYPE_CHECKING:
    from aidocks.jobs.store import JobStore
    from aidocks.settings import Settings

_DAY_S = 86_400.0
#: Transactions in one go; a store that has grown for years is cleared bit by bit.
MOST_BATCHES = 20


def remove_leftovers(store: JobStore, settings: Settings) -> None:
    """Remove what nobody needs any more of jobs that have ended.

    Workspaces, where an executor died between a job's end and their removal; checkpoints, when the job has succeeded
    or ended so long ago that nobody will resume it. Nothing is kept for ever for a job that the store does not know.
    """
    for workspace in settings.workspaces_dir.glob("job-*"):
        with suppress(UnknownJob):
            if store.get(workspace.name).status.terminal:
                remove_workspace(settings, workspace.name)
    found = list(settings.checkpoints_dir.glob("job-*"))
    if not found:
        return
    under_way = [*store.unfinished("service"), *store.unfinished("local")]
    resumed = {job.spec.get(RESUMES) for job in under_way}
    kept_until = time.time() - settings.checkpoint_retention_days * _DAY_S
    for checkpoints in found:
        if _is_useless(checkpoints, store, resumed, kept_until):
            remove_checkpoints(settings, checkpoints.name)


def remove_old_jobs(store: JobStore, settings: Settings) -> list[str]:
    """Remove the records of jobs that ended more than ``settings.job_retention_days`` ago; return their ids.

    A job whose checkpoints are still there stays until they go, so that it can be resumed. The models that jobs made
    stay, and their manifests go on naming the job.
    """
    if settings.job_retention_days is None:
        return []
    before = time.time() - settings.job_retention_days * _DAY_S
    resumable = [path.name for path in settings.checkpoints_dir.glob("job-*")]
    removed: list[str] = []
    for _ in range(MOST_BATCHES):
        batch = store.remove_ended(before, keep=resumable)
        removed += batch
        if not batch:
            break
    return removed


def _is_useless(checkpoints: Path, store: JobStore, resumed: Collection[object], kept_until: float) -> bool:
    try:
        job = store.get(checkpoints.name)
    except UnknownJob:
        with suppress(FileNotFoundError):
            return checkpoints.stat().st_mtime < kept_until
        return False
    if not job.status.terminal or job.id in resumed:
        return False
    ended = job.finished_at.timestamp() if job.finished_at else time.time()
    return job.status is Status.SUCCEEDED or ended < kept_until
