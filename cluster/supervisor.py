"""Makes what runs agree with the job store: claims jobs, runs them on the pool, takes over after any restart.

Ray restarts the actor that holds a :class:`Supervisor`; each incarnation takes a newer fencing token than the
last, and finds everything else in the store.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from aidocks.errors import LeaseLost
from aidocks.jobs.database import STORE_ERRORS, store_away
from aidocks.jobs.model import SERVICE, EventType, Job
from aidocks.jobs.queue import QueueLength, Started, next_job
from aidocks.jobs.retention import remove_leftovers, remove_old_jobs
from aidocks.jobs.runner import end_orphans, process_name, run_job
from aidocks.jobs.store import LEASE_S, JobStore
from aidocks.jobs.submit import submit_job
from aidocks.jobs.terms import build_terms
from aidocks.log import log_to_file
from aidocks.models.registry import Registry
from aidocks.settings import Settings
from cluster.observers import Observers, supervisor_observers
from cluster.pool import RayPool

POLL_S = 0.5
SWEEP_S = 60.0
COUNT_S = 5.0
RESTART_DELAY_S, LONGEST_DELAY_S = 1.0, 30.0
READY_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Running:
    job: Job
    work: asyncio.Task[Job]

    @property
    def counts(self) -> Started:
        return Started(self.job.owner, self.job.priority)


class Supervisor:
    """The supervisor of one installation, at work from its construction on.

    Args:
        settings: Of the installation.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        log_to_file(self._settings, "supervisor.log")
        self._store: JobStore | None = None
        self._pool: RayPool | None = None
        self._token = 0
        self._running: dict[str, _Running] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._queue = QueueLength()
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
        self._ready.wait(READY_S)
        pool = self._pool
        return {
            "pid": os.getpid(),
            "token": self._token,
            "superseded": self._superseded,
            "jobs": list(self._running),
            "running": len(self._running),
            "waiting": self._queue.waiting,
            "parallelism": pool.parallelism if pool else 0,
            "workers": pool.workers() if pool else [],
        }

    def submit(
        self,
        operation: str,
        spec: dict[str, Any],
        idempotency_key: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Submit a job and return it. Whoever holds the actor's handle is the owner of the cluster: ``local``.

        Raises:
            AIDocksError: The request was refused.
        """
        terms = build_terms(priority=priority, timeout_s=timeout_s)
        with self._opened() as store:
            job, _ = submit_job(
                self._settings, store, operation, spec, idempotency_key=idempotency_key, terms=terms
            )
        self.wake()
        return job.model_dump(mode="json")

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job."""
        with self._opened() as store:
            return store.get(job_id).model_dump(mode="json")

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask for a job to be cancelled and return it."""
        with self._opened() as store:
            return store.request_cancel(job_id).model_dump(mode="json")

    @contextmanager
    def _opened(self) -> Iterator[JobStore]:
        """Hand out the job store.

        Raises:
            ServiceUnreachable: It does not answer.
        """
        if not self._ready.wait(READY_S) or self._store is None:
            raise store_away()
        try:
            yield self._store
        except STORE_ERRORS as error:
            _log.error("the job store failed: %s", error)
            # Not with its cause: whoever asks need not have what the store is made of.
            raise store_away() from None

    # The supervisor's own thread.

    def _work(self) -> None:
        delay_s = RESTART_DELAY_S
        while True:
            begin = time.monotonic()
            try:
                self._loop.run_until_complete(self._supervise())
            except LeaseLost as error:
                # Ray must not restart this one: it would take the lease back, and the two would quarrel for ever.
                _log.warning("superseded: %s", error)
                self._superseded = True
                return
            except STORE_ERRORS as error:
                # Begun again from the store, as by a new incarnation: each job goes on from its journal.
                if time.monotonic() - begin > 2 * LONGEST_DELAY_S:
                    delay_s = RESTART_DELAY_S
                _log.error("the job store fails; tried again in %.0f s: %s", delay_s, error)
                time.sleep(delay_s)
                delay_s = min(2 * delay_s, LONGEST_DELAY_S)
            except BaseException:  # noqa: BLE001 - not swallowed: the process ends with it
                # The store is the truth; whatever broke here, a new incarnation starts from it.
                _log.exception("the supervisor stops and will be restarted")
                logging.shutdown()
                time.sleep(RESTART_DELAY_S)
                os._exit(1)

    async def _supervise(self) -> None:
        if self._store is None:
            self._store = await asyncio.to_thread(JobStore, self._settings.store_url)
        store = self._store
        self._token = await asyncio.to_thread(store.acquire_lease, SERVICE, process_name())
        serving = self._settings.serving_replicas * self._settings.serving_gpus
        self._pool = pool = RayPool(
            self._settings.workers,
            reserved_gpus=serving,
            growth=self._settings.scale_out,
            silence_s=self._settings.worker_silence_s,
            tell=partial(self._tell, store),
        )
        observers = supervisor_observers(self._settings)
        self._ready.set()
        _log.info("supervising %s with token %d", self._settings.store_url, self._token)
        renewal = swept = counted = 0.0
        try:
            while True:
                now = time.monotonic()
                if now >= renewal:
                    renewal = now + LEASE_S / 3
                    await asyncio.to_thread(store.renew_lease, self._token)
                if now >= swept:
                    swept = now + SWEEP_S
                    await asyncio.to_thread(self._sweep, store)
                if now >= counted:
                    counted = now + COUNT_S
                    await self._count(store, pool, observers)
                pool.release_idle()
                self._reap()
                await self._start_jobs(store, pool, observers)
                await self._rest()
        finally:
            for running in self._running.values():
                running.work.cancel()
            await asyncio.gather(*(one.work for one in self._running.values()), return_exceptions=True)
            self._running.clear()
            await pool.close()

    def _sweep(self, store: JobStore) -> None:
        """Clear away what processes that were killed have left behind, and what is too old."""
        try:
            end_orphans(store, self._settings)
            remove_leftovers(store, self._settings)
            Registry(self._settings.models_dir).sweep_trash()
            remove_old_jobs(store, self._settings)
        except OSError:
            # No reason to stop what runs; the next one tries again.
            _log.exception("not everything could be cleared away")

    async def _count(self, store: JobStore, pool: RayPool, observers: Observers) -> None:
        self._queue = await asyncio.to_thread(store.queue_length, SERVICE)
        observers.queue(self._queue.waiting, self._queue.oldest_s, len(self._running))
        workers = pool.workers()
        busy = sum(1 for worker in workers if worker["unit"])
        observers.workers(busy, len(workers) - busy)

    async def _start_jobs(self, store: JobStore, pool: RayPool, observers: Observers) -> None:
        waiting = await asyncio.to_thread(store.waiting, SERVICE, self._token)
        places = self._settings.jobs_at_once
        while chosen := next_job(waiting, [one.counts for one in self._running.values()], places):
            waiting.remove(chosen)
            job = await asyncio.to_thread(store.claim, chosen.id, self._token)
            if job is None:  # cancelled meanwhile
                continue
            _log.info("job %s: %s, attempt %d", job.id, job.operation, job.attempt)
            work = run_job(job, store, self._settings, pool, self._token, observers)
            task = asyncio.create_task(work, name=job.id)
            task.add_done_callback(lambda _: self._woken.set())
            self._running[job.id] = _Running(job, task)

    def _tell(self, store: JobStore, job_id: str, text: str) -> None:
        """Let people read in a job's events what the pool has to say of it. Called on the loop."""

        def append() -> None:
            with suppress(LeaseLost, *STORE_ERRORS):  # it has just ended; or there is worse to tell
                store.append(job_id, EventType.MESSAGE, {"text": text}, token=self._token)

        telling = asyncio.create_task(asyncio.to_thread(append))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    def _reap(self) -> None:
        for job_id in [job_id for job_id, running in self._running.items() if running.work.done()]:
            job = self._running.pop(job_id).work.result()
            _log.info("job %s %s", job.id, job.status.value)

    async def _rest(self) -> None:
        try:
            await asyncio.wait_for(self._woken.wait(), POLL_S)
        except TimeoutError:
            return
        self._woken.clear()
