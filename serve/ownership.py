"""Whose a job is: a key stops and goes on with its own jobs alone, an administrator's with all."""

from __future__ import annotations

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from aidocks.jobs.model import Job
from serve.access import READING, Caller
from serve.context import Context, Here
from serve.routes.openai.tunings import tuning_of


async def require_own_job(request: Request, here: Here, caller: Caller) -> None:
    """Refuse to change a job of another key. A dependency of all routes: what names no job is not concerned.

    Raises:
        NotPermitted: The job belongs to another key.
        UnknownJob: There is no such job.
    """
    named = request.path_params
    if request.method in READING or not named.keys() & {"job_id", "tuning"} or caller.allows("admin"):
        return
    job = await run_in_threadpool(_job, here, named)
    caller.require_own(job.owner, f"The job {job.id}")


def _job(here: Context, named: dict[str, str]) -> Job:
    if "job_id" in named:
        return here.store.get(named["job_id"])
    return tuning_of(here.store, named["tuning"]).last
