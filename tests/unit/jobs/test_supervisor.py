"""The supervisor's loop, with a pool that needs no cluster: who is started, and what a failing store costs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from aidocks.errors import InsufficientDisk, InvalidSpec, ServiceUnreachable
from aidocks.jobs.model import EventType, Job, Status
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import submit_job
from aidocks.jobs.terms import Terms
from aidocks.plan import Unit
from aidocks.settings import Settings
from tests.support.fake_pool import FakePool

supervision = pytest.importorskip("cluster.supervisor")

pytestmark = pytest.mark.timeout(60)


class Observed:
    """Takes down what it was told."""

    def __init__(self) -> None:
        self.queues: list[tuple[int, int]] = []
        self.ended: list[tuple[str, Status]] = []

    def queue(self, waiting: int, oldest_s: float, running: int) -> None:
        self.queues.append((waiting, running))

    def job_ended(self, job: Job) -> None:
        self.ended.append((job.id, job.status))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class Pool(FakePool):
    """Waits with units that take long until the test ends."""

    def __init__(self, before: Callable[[Unit[Any]], None], tell: Callable[[str, str], None]) -> None:
        super().__init__(before)
        self.tell = tell
        self.closed = False

    def release_idle(self) -> None:
        return

    def workers(self) -> list[dict[str, Any]]:
        return []

    async def close(self) -> None:
        self.closed = True


class Scene:
    """A supervisor at work on the store of ``settings``, until a later one takes over."""

    def __init__(self, settings: Settings, store: JobStore, traces: Path) -> None:
        self.settings, self.store, self.traces = settings, store, traces
        self.before: Callable[[Unit[Any]], None] = lambda _: None
        self.observed = Observed()
        self.pools: list[Pool] = []
        self.away = threading.Event()
        self.supervisor: Any = None

    def make_pool(self, *_: Any, tell: Callable[[str, str], None], **__: Any) -> Pool:
        pool = Pool(lambda unit: self.before(unit), tell)
        self.pools.append(pool)
        return pool

    def submit(self, priority: int = 0, owner: str = "local", **spec: Any) -> str:
        terms = Terms(owner=owner, priority=priority)
        body = {"traces": str(self.traces), "units": 2, **spec}
        return submit_job(self.settings, self.store, "trivial", body, terms=terms)[0].id

    def start(self, **settings: Any) -> None:
        self.settings = self.settings.model_copy(update=settings)
        self.supervisor = supervision.Supervisor(self.settings)

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 30
        while not (found := condition()):
            assert time.monotonic() < deadline, self.store.list()
            time.sleep(0.01)
        return found

    def ended(self, *jobs: str) -> list[Job]:
        self.until(lambda: all(self.store.get(job).status.terminal for job in jobs))
        return [self.store.get(job) for job in jobs]

    def stop(self) -> None:
        self.away.clear()
        if self.supervisor is not None:
            self.until(self.is_superseded)

    def is_superseded(self) -> bool:
        # Again and again: one that waits for its store takes the lease when that is back.
        self.store.acquire_lease("service", "the test")
        return bool(self.supervisor.ping()["superseded"])


@pytest.fixture
def scene(
    settings: Settings, local_store: JobStore, trivial: str, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    scene = Scene(settings, local_store, traces)
    monkeypatch.setattr(supervision, "RayPool", scene.make_pool)
    monkeypatch.setattr(supervision, "supervisor_observers", lambda *_: scene.observed)
    monkeypatch.setattr("os._exit", sys.exit)
    for name, seconds in (("POLL_S", 0.05), ("COUNT_S", 0.0), ("RESTART_DELAY_S", 0.02), ("LEASE_S", 0.3)):
        monkeypatch.setattr(supervision, name, seconds)
    yield scene
    scene.stop()


def started(scene: Scene, jobs: list[str]) -> list[str]:
    found = [scene.store.get(job) for job in jobs]
    running = [job for job in found if job.started_at is not None]
    return [job.id for job in sorted(running, key=lambda job: job.started_at or job.created_at)]


def test_jobs_are_started_by_priority_then_by_who_has_the_fewest(scene: Scene) -> None:
    long = {"seconds": 1e6, "units": 1}
    first = scene.submit(owner="key-a", **long)
    second = scene.submit(owner="key-a", **long)
    other = scene.submit(owner="key-b", **long)
    urgent = scene.submit(priority=5, owner="key-a", **long)
    jobs = [first, second, other, urgent]
    scene.start(jobs_at_once=2)
    scene.until(lambda: len(started(scene, jobs)) == 2 and scene.observed.queues[-1] == (2, 2))
    assert started(scene, jobs) == [urgent, other]
    told = scene.supervisor.ping()
    assert (told["running"], told["waiting"], set(told["jobs"])) == (2, 2, {urgent, other})
    # More urgent than all that run: it need not wait for a place.
    overtaking = scene.submit(priority=9, units=1)
    assert scene.ended(overtaking)[0].status is Status.SUCCEEDED
    assert len(started(scene, jobs)) == 2
    scene.store.request_cancel(other)
    scene.until(lambda: len(started(scene, jobs)) == 3)
    assert started(scene, jobs)[-1] == first
    for job in jobs:
        if not scene.store.get(job).status.terminal:
            scene.store.request_cancel(job)
    scene.ended(*jobs)


def test_a_job_that_met_a_full_disk_is_tried_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aidocks.jobs.retries.FIRST_WAIT_S", 0.05)
    full = iter([True])

    def fail_once(unit: Unit[Any]) -> None:
        if next(full, False):
            raise InsufficientDisk("The disk is full.", hint="Free some space.")

    scene.before = fail_once
    job = scene.submit()
    scene.start()
    (ended,) = scene.ended(job)
    assert (ended.status, ended.attempt, ended.failures) == (Status.SUCCEEDED, 2, 1)
    scene.until(lambda: len(scene.observed.ended) == 2)
    assert scene.observed.ended == [(job, Status.QUEUED), (job, Status.SUCCEEDED)]


def test_a_store_that_is_away_for_a_while_fails_no_job_and_loses_none(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = scene.away
    asked: list[float] = []

    def unless_away(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(store: JobStore, *arguments: Any, **options: Any) -> Any:
            if away.is_set() and store is not scene.store:
                if method.__name__ == "acquire_lease":
                    asked.append(time.monotonic())
                raise OperationalError("", None, Exception("database or disk is full"))
            return method(store, *arguments, **options)

        return call

    for name in ("acquire_lease", "record_unit", "append", "waiting", "claim", "get", "transition"):
        monkeypatch.setattr(JobStore, name, unless_away(getattr(JobStore, name)))
    scene.before = lambda unit: away.set() if unit.label == "square of 1" and len(scene.pools) == 1 else None
    running, waiting = scene.submit(units=4), scene.submit()
    scene.start(jobs_at_once=1)
    scene.until(lambda: len(asked) >= 4)
    with pytest.raises(ServiceUnreachable, match="job store"):
        scene.supervisor.job(running)
    assert scene.store.get(running).status is Status.RUNNING
    assert scene.store.get(waiting).status is Status.QUEUED
    for n, (sooner, later) in enumerate(pairwise(asked), 1):
        assert later - sooner >= 0.02 * 2**n, "each time it waits longer"
    away.clear()
    for job in scene.ended(running, waiting):
        assert job.status is Status.SUCCEEDED
    assert scene.store.get(running).attempt == 2
    assert scene.pools[0].closed
    finished = [e.data["unit_id"] for e in scene.store.events(running) if e.type is EventType.UNIT_FINISHED]
    assert len(finished) == len(set(finished)) == 5


def test_a_store_that_cannot_be_opened_is_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    job = scene.submit(units=1)
    opened, tries = supervision.JobStore, []

    def open_later(url: str) -> JobStore:
        tries.append(url)
        if len(tries) < 3:
            raise OperationalError("", None, Exception("connection refused"))
        return opened(url)

    monkeypatch.setattr(supervision, "JobStore", open_later)
    scene.start()
    assert scene.ended(job)[0].status is Status.SUCCEEDED


def test_what_the_pool_says_of_a_job_is_one_of_its_events(scene: Scene) -> None:
    scene.before = lambda unit: scene.pools[0].tell(job, "no node has room")
    job = scene.submit(units=1, seconds=1e6)
    scene.start()
    scene.until(lambda: "no node has room" in {e.data.get("text") for e in scene.store.events(job)})
    scene.store.request_cancel(job)
    scene.ended(job)


def test_the_ray_door(scene: Scene) -> None:
    scene.start()
    spec = {"traces": str(scene.traces), "units": 1}
    with pytest.raises(InvalidSpec, match="priority"):
        scene.supervisor.submit("trivial", spec, priority=11)
    job = scene.supervisor.submit("trivial", spec, "key", priority=3, timeout_s=60.0)
    assert (job["owner"], job["priority"], job["timeout_s"]) == ("local", 3, 60.0)
    assert scene.supervisor.submit("trivial", spec, "key")["id"] == job["id"]
    assert scene.ended(job["id"])[0].status is Status.SUCCEEDED
