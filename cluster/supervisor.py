"""Makes what runs agree with the job store: claims jobs, runs them on the pool, takes over after any restart.

Ray restarts the actor that holds a :class:`Supervisor`; each incarnation takes a newer fencing token than the
last, and finds everything else in the store.
"""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import os
import threading
import time
from typing import Any

from aidocks.errors import LeaseLost
from aidocks.jobs.model import Job
from aidocks.jobs.runner import end_orphans, process_name, remove_leftovers, run_job
from aidocks.jobs.store import LEASE_S, JobStore
from aidocks.jobs.submit import submit_job
from aidocks.models.registry import Registry
from aidocks.settings import Settings
from cluster.pool import RayPool

PLACE = "service"
JOBS_AT_ONCE = 2
POLL_S = 0.5
SWEEP_S = 60.0
RESTART_DELAY_S = 1.0

_log = logging.getLogger(__name__)


class Supervisor:
    """The supervisor of one installation, at work from its construction on.

    Args:
        settings: Of the installation.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        _log_to_file(self._settings)
        self._store = JobStore(self._settings.store_url)
        self._pool: RayPool | None = None
        self._token = 0
        self._running: dict[str, asyncio.Task[Job]] = {}
        self._superseded = False
        self._loop = asyncio.new_event_loop()
        self._woken = asyncio.Event()
        self._ready = threading.Event()
        threading.Thread(target=self._work, name="aidocks-supervisor", daemon=True).start()

    # What other processes may ask; called on Ray's threads.

    def wake(self) -> None:
        """Look for new jobs now rather than at the next poll."""
        self._loop.call_soon_threadsafe(self._woken.set)

    def ping(self) -> dict[str, Any]:
        """Return what the supervisor is doing."""
        self._ready.wait(10)
        pool = self._pool
        return {
            "pid": os.getpid(),
            "token": self._token,
            "superseded": self._superseded,
            "jobs": list(self._running),
            "parallelism": pool.parallelism if pool else 0,
            "workers": pool.workers() if pool else [],
        }

    def submit(
        self, operation: str, spec: dict[str, Any], idempotency_key: str | None = None
    ) -> dict[str, Any]:
        """Submit a job and return it.

        Raises:
            AIDocksError: The request was refused.
        """
        job, _ = submit_job(self._settings, self._store, operation, spec, idempotency_key=idempotency_key)
        self.wake()
        return job.model_dump(mode="json")

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job."""
        return self._store.get(job_id).model_dump(mode="json")

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask for a job to be cancelled and return it."""
        return self._store.request_cancel(job_id).model_dump(mode="json")

    # The supervisor's own thread.

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._supervise())
        except LeaseLost as error:
            # Ray must not restart this one: it would take the lease back, and the two would quarrel for ever.
            _log.warning("superseded: %s", error)
            self._superseded = True
        except BaseException:  # noqa: BLE001 - not swallowed: the process ends with it
            # The store is the truth; whatever broke here, a new incarnation starts from it.
            _log.exception("the supervisor stops and will be restarted")
            logging.shutdown()
            time.sleep(RESTART_DELAY_S)
            os._exit(1)

    async def _supervise(self) -> None:
        self._token = await asyncio.to_thread(self._store.acquire_lease, PLACE, process_name())
        serving = self._settings.serving_replicas * self._settings.serving_gpus
        self._pool = RayPool(self._settings.workers, reserved_gpus=serving)
        self._ready.set()
        _log.info("supervising %s with token %d", self._settings.store_url, self._token)
        renewal = swept = 0.0
        try:
            while True:
                now = time.monotonic()
                if now >= renewal:
                    renewal = now + LEASE_S / 3
                    await asyncio.to_thread(self._store.renew_lease, self._token)
                if now >= swept:
                    swept = now + SWEEP_S
                    await asyncio.to_thread(self._sweep)
                self._pool.release_idle()
                self._reap()
                await self._start_jobs(self._pool)
                await self._rest()
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)
            await self._pool.close()

    def _sweep(self) -> None:
        """Clear away what processes that were killed have left behind."""
        end_orphans(self._store, self._settings)
        remove_leftovers(self._store, self._settings)
        Registry(self._settings.models_dir).sweep_trash()

    async def _start_jobs(self, pool: RayPool) -> None:
        if len(self._running) >= JOBS_AT_ONCE:
            return
        for waiting in await asyncio.to_thread(self._store.claimable, PLACE, self._token):
            if len(self._running) >= JOBS_AT_ONCE:
                return
            job = await asyncio.to_thread(self._store.claim, waiting.id, self._token)
            if job is not None:
                _log.info("job %s: %s, attempt %d", job.id, job.operation, job.attempt)
                work = run_job(job, self._store, self._settings, pool, self._token)
                self._running[job.id] = asyncio.create_task(work, name=job.id)
                self._running[job.id].add_done_callback(lambda _: self._woken.set())

    def _reap(self) -> None:
        for job_id in [job_id for job_id, task in self._running.items() if task.done()]:
            job = self._running.pop(job_id).result()
            _log.info("job %s %s", job.id, job.status.value)

    async def _rest(self) -> None:
        try:
            await asyncio.wait_for(self._woken.wait(), POLL_S)
        except TimeoutError:
            return
        self._woken.clear()


def _log_to_file(settings: Settings) -> None:
    settings.log_dir.mkdir(parents=True, exist_ok=True)
    path = settings.log_dir / "supervisor.log"
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=10_000_000, backupCount=3)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("aidocks", "cluster"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
