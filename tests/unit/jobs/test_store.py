"""The job store through its public methods, on SQLite and, where there is one, on PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from aidocks.errors import (
    Conflict,
    IdempotencyMismatch,
    IllegalTransition,
    LeaseLost,
    NameTaken,
    UnknownJob,
)
from aidocks.jobs.model import EventType, Job, Progress, Status
from aidocks.jobs.store import JobStore
from aidocks.jobs.terms import Terms

PROGRESS = Progress(stage="s", stage_number=1, done=1, total=2, fraction=0.5)


def submit(store: JobStore, name: str | None = None, **more: object) -> Job:
    return store.submit("laser", {"a": 1}, output_name=name, **more)[0]  # type: ignore[arg-type]


def running(store: JobStore, name: str | None = None) -> tuple[Job, int]:
    job = submit(store, name)
    token = store.acquire_lease("service", "me")
    claimed = store.claim(job.id, token)
    assert claimed is not None
    return claimed, token


def finish(store: JobStore, job: Job, token: int, to: Status = Status.SUCCEEDED) -> Job:
    return store.transition(job.id, to, token=token, result={"ok": True})


def test_a_job_from_submission_to_success(store: JobStore) -> None:
    job, created = store.submit("laser", {"a": [1, None]}, output_name="x", inputs=["base"])
    assert created
    assert (job.status, job.spec, job.attempt) == (Status.QUEUED, {"a": [1, None]}, 0)
    assert store.model_in_use("x") == store.model_in_use("base") == [job.id]
    token = store.acquire_lease("service", "me")
    assert [waiting.id for waiting in store.waiting("service", token)] == [job.id]
    claimed = store.claim(job.id, token)
    assert claimed is not None
    assert (claimed.status, claimed.attempt, claimed.started_at is None) == (Status.RUNNING, 1, False)
    assert store.claim(job.id, token) is None
    store.append(job.id, EventType.MESSAGE, {"text": "hello"}, token=token)
    store.save_progress(job.id, PROGRESS, token)
    store.record_unit(job.id, "u1", "s", "one", {"v": 1}, 0.5, "worker-1", token=token)
    ended = store.transition(job.id, Status.SUCCEEDED, token=token, result={"model": "x"})
    assert (ended.status, ended.result, ended.progress) == (Status.SUCCEEDED, {"model": "x"}, PROGRESS)
    assert ended.finished_at is not None
    assert [(event.sequence, event.type) for event in store.events(job.id)] == [
        (1, EventType.QUEUED),
        (2, EventType.MESSAGE),
        (3, EventType.PROGRESS),
        (4, EventType.UNIT_FINISHED),
        (5, EventType.SUCCEEDED),
    ]
    assert store.last_sequence(job.id) == 5
    assert [event.sequence for event in store.events(job.id, after=2, limit=2)] == [3, 4]
    assert store.events(job.id, after=5) == []
    assert store.units(job.id)["u1"].result == {"v": 1}
    assert store.model_in_use("x") == []


def test_an_older_token_can_do_nothing(store: JobStore) -> None:
    job, old = running(store)
    new = store.acquire_lease("service", "another")
    writes = [
        lambda: store.append(job.id, EventType.MESSAGE, {}, token=old),
        lambda: store.save_progress(job.id, PROGRESS, old),
        lambda: store.record_unit(job.id, "u", "s", "l", {}, 1.0, "w", token=old),
        lambda: finish(store, job, old),
        lambda: store.renew_lease(old),
        lambda: store.claim(job.id, old),
    ]
    for write in writes:
        with pytest.raises(LeaseLost):
            write()
    # The new one holds the lease, but not yet the job.
    with pytest.raises(LeaseLost):
        store.append(job.id, EventType.MESSAGE, {}, token=new)
    (left,) = store.waiting("service", new)
    assert (left.id, left.abandoned) == (job.id, True)
    again = store.claim(job.id, new)
    assert again is not None
    assert again.attempt == 2
    assert store.waiting("service", new) == []
    assert store.units(job.id) == {}
    assert finish(store, job, new).status is Status.SUCCEEDED
    assert store.last_sequence(job.id) == 2


def test_places_do_not_disturb_each_other(store: JobStore) -> None:
    service_job, token = running(store)
    local_job = submit(store, place="local")
    local = store.acquire_lease(f"local:{local_job.id}", "a shell")
    assert store.claim(local_job.id, local) is not None
    store.append(service_job.id, EventType.MESSAGE, {}, token=token)
    store.append(local_job.id, EventType.MESSAGE, {}, token=local)
    assert store.waiting("service", token) == []
    assert [job.id for job in store.unfinished("local")] == [local_job.id]
    with pytest.raises(LeaseLost):
        store.append(service_job.id, EventType.MESSAGE, {}, token=local)


def test_leases_say_who_and_for_how_long(store: JobStore) -> None:
    assert store.lease("service") is None
    token = store.acquire_lease("service", "host/1", seconds=60)
    lease = store.lease("service")
    assert lease is not None
    assert (lease.token, lease.owner, lease.live) == (token, "host/1", True)
    store.release_lease(token)
    released = store.lease("service")
    assert released is not None
    assert not released.live
    store.renew_lease(token)


def test_an_ended_job_stays_as_it_is(store: JobStore) -> None:
    job, token = running(store)
    finish(store, job, token)
    with pytest.raises(IllegalTransition):
        finish(store, job, token, Status.FAILED)
    with pytest.raises(LeaseLost):
        store.append(job.id, EventType.MESSAGE, {}, token=token)
    with pytest.raises(LeaseLost):
        store.record_unit(job.id, "u", "s", "l", {}, 1.0, "w", token=token)
    assert store.units(job.id) == {}
    with pytest.raises(IllegalTransition, match="succeeded"):
        store.request_cancel(job.id)
    assert store.claim(job.id, store.acquire_lease("service")) is None


def test_cancelling(store: JobStore) -> None:
    waiting = submit(store, "x")
    assert store.request_cancel(waiting.id).status is Status.CANCELLED
    types = [event.type for event in store.events(waiting.id)]
    assert types == [EventType.QUEUED, EventType.CANCEL_REQUESTED, EventType.CANCELLED]
    job, token = running(store, "x")
    assert store.request_cancel(job.id).status is Status.RUNNING
    assert store.request_cancel(job.id).cancel_requested
    assert [event.type for event in store.events(job.id)].count(EventType.CANCEL_REQUESTED) == 1
    assert store.transition(job.id, Status.CANCELLED, token=token).status is Status.CANCELLED


def test_unknown_jobs(store: JobStore) -> None:
    token = store.acquire_lease("service")
    for ask in (
        lambda: store.get("job-0"),
        lambda: store.events("job-0"),
        lambda: store.last_sequence("job-0"),
        lambda: store.request_cancel("job-0"),
        lambda: store.list(before="job-0"),
        lambda: store.append("job-0", EventType.MESSAGE, {}, token=token),
    ):
        with pytest.raises(UnknownJob, match="job-0"):
            ask()
    assert store.claim("job-0", token) is None


def test_listing_pages_from_the_newest_on(store: JobStore) -> None:
    ids = [submit(store).id for _ in range(5)]
    other = store.submit("byo-moe", {}, output_name=None)[0].id
    store.request_cancel(ids[0])
    assert [job.id for job in store.list(limit=3)] == [other, ids[4], ids[3]]
    assert [job.id for job in store.list(limit=3, before=ids[3])] == [ids[2], ids[1], ids[0]]
    assert [job.id for job in store.list(operation="byo-moe")] == [other]
    assert [job.id for job in store.list(status="cancelled")] == [ids[0]]
    assert store.list(status=Status.RUNNING) == []


def test_a_name_is_held_until_its_job_has_ended(store: JobStore) -> None:
    job, token = running(store, "x")
    with pytest.raises(NameTaken, match=job.id) as caught:
        submit(store, "x")
    assert caught.value.field == "output_name"
    submit(store, "y")
    finish(store, job, token)
    submit(store, "x")


def test_the_guard_undoes_the_submission(store: JobStore) -> None:
    def guard() -> None:
        raise NameTaken("in the registry")

    with pytest.raises(NameTaken, match="registry"):
        submit(store, "x", guard=guard)
    assert store.list() == []
    submit(store, "x")


def test_idempotency_keys(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, created = store.submit("laser", {"a": 1}, output_name="x", idempotency_key="k")
    assert created
    assert store.submit("laser", {"a": 1}, output_name="x", idempotency_key="k") == (first, False)
    found = store.find_idempotent("laser", "k", {"a": 1})
    assert found is not None
    assert found.id == first.id
    assert store.find_idempotent("laser", "other", {"a": 1}) is None
    with pytest.raises(IdempotencyMismatch, match=first.id):
        store.submit("laser", {"a": 2}, output_name="z", idempotency_key="k")
    other, created = store.submit("byo-moe", {"a": 2}, output_name=None, idempotency_key="k")
    assert created
    assert other.id != first.id
    monkeypatch.setattr("aidocks.jobs.rows.IDEMPOTENCY_S", -1.0)
    _, created = store.submit("laser", {"a": 3}, output_name=None, idempotency_key="k")
    assert created


def test_what_one_owner_calls_a_request_says_nothing_of_anothers(store: JobStore) -> None:
    first, _ = store.submit("laser", {"a": 1}, output_name=None, idempotency_key="k")
    terms = Terms(owner="key-a", priority=3, timeout_s=60.0)
    other, created = store.submit("laser", {"a": 2}, output_name=None, idempotency_key="k", terms=terms)
    assert created
    assert (other.owner, other.priority, other.timeout_s) == ("key-a", 3, 60.0)
    found = store.find_idempotent("laser", "k", {"a": 2}, owner="key-a")
    assert found is not None
    assert found.id == other.id
    with pytest.raises(IdempotencyMismatch, match=first.id):
        store.find_idempotent("laser", "k", {"a": 2})
    assert [job.id for job in store.list(owner="key-a")] == [other.id]
    # Other terms make no other request.
    assert store.submit("laser", {"a": 1}, output_name=None, idempotency_key="k")[0].id == first.id


def test_a_job_that_was_put_back_waits_for_its_time(store: JobStore) -> None:
    job, token = running(store, "x")
    store.record_unit(job.id, "u", "s", "l", {}, 1.0, "w", token=token)
    waiting = store.put_back(job.id, {"code": "insufficient_disk"}, 60.0, token=token)
    assert (waiting.status, waiting.failures, waiting.started_at) == (Status.QUEUED, 1, job.started_at)
    assert waiting.retry_at is not None
    assert store.events(job.id)[-1].data == {
        "attempt": 1,
        "reason": {"code": "insufficient_disk"},
        "wait_s": 60.0,
    }
    writes = [
        lambda: store.append(job.id, EventType.MESSAGE, {}, token=token),
        lambda: store.record_unit(job.id, "u", "s", "l", {}, 1.0, "w", token=token),
        lambda: store.put_back(job.id, {}, 1.0, token=token),
        lambda: finish(store, job, token),
    ]
    for write in writes:
        with pytest.raises(LeaseLost):
            write()
    with pytest.raises(NameTaken):
        submit(store, "x")
    again = store.claim(job.id, token)
    assert again is not None
    assert (again.attempt, again.failures, again.retry_at) == (2, 1, None)
    assert set(store.units(job.id)) == {"u"}
    finish(store, job, token)
    with pytest.raises(IllegalTransition, match="succeeded"):
        store.put_back(job.id, {}, 1.0, token=token)


def test_old_jobs_are_removed_with_all_that_is_known_of_them(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    for _ in range(5):
        job, token = running(store)
        store.record_unit(job.id, "u", "s", "l", {}, 1.0, "w", token=token)
        ended.append(finish(store, job, token).id)
    keyed = submit(store, idempotency_key="k").id
    store.request_cancel(keyed)
    unfinished = submit(store).id
    later = time.time() + 100
    assert store.remove_ended(time.time() - 100) == []
    assert store.remove_ended(later, keep=[ended[0]], limit=2) == ended[1:3]
    assert store.remove_ended(later, keep=[ended[0]]) == ended[3:], "its key may still be asked for"
    with pytest.raises(UnknownJob):
        store.events(ended[1])
    assert store.units(ended[1]) == {}
    assert [job.id for job in store.list()] == [unfinished, keyed, ended[0]]
    monkeypatch.setattr("aidocks.jobs.rows.IDEMPOTENCY_S", -1.0)
    assert store.remove_ended(later) == [ended[0], keyed]


def test_a_unit_is_finished_once(store: JobStore) -> None:
    job, token = running(store)
    assert store.record_unit(job.id, "u", "s", "l", {"v": 1}, 1.0, "w", token=token) is not None
    assert store.record_unit(job.id, "u", "s", "l", {"v": 2}, 1.0, "w", token=token) is None
    assert store.units(job.id)["u"].result == {"v": 2}
    assert [event.type for event in store.events(job.id)].count(EventType.UNIT_FINISHED) == 1


def test_concurrent_writers_leave_no_gap(store_url: str) -> None:
    store = JobStore(store_url)
    job, token = running(store)

    def write() -> None:
        mine = JobStore(store_url)
        for _ in range(20):
            mine.append(job.id, EventType.MESSAGE, {}, token=token)
        mine.close()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    store.request_cancel(job.id)
    for thread in threads:
        thread.join()
    assert [event.sequence for event in store.events(job.id)] == list(range(1, 83))
    store.close()


def test_concurrent_submissions_make_one_job(store_url: str) -> None:
    outcomes: list[object] = []
    stores = [JobStore(store_url) for _ in range(4)]
    barrier = threading.Barrier(8)

    def send(store: JobStore, key: str | None) -> None:
        barrier.wait()
        try:
            outcomes.append(store.submit("laser", {"a": 1}, output_name="x", idempotency_key=key)[0].id)
        except NameTaken:
            outcomes.append("taken")

    threads = [
        threading.Thread(target=send, args=(store, key)) for store in stores for key in ("the same", None)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (job,) = stores[0].list()
    assert len(outcomes) == 8
    assert set(outcomes) <= {job.id, "taken"}
    for store in stores:
        store.close()


def test_whoever_repeats_a_submission_is_never_told_that_its_own_name_is_taken(store_url: str) -> None:
    stores = [JobStore(store_url) for _ in range(4)]
    barrier = threading.Barrier(4, timeout=10)

    def send(store: JobStore) -> list[str]:
        ids = []
        for n in range(15):
            barrier.wait()
            ids.append(store.submit("laser", {"a": n}, output_name=f"x{n}", idempotency_key=f"k{n}")[0].id)
        return ids

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(send, stores)
    assert all(ids == first for ids in others)
    for store in stores:
        store.close()


def test_other_processes_see_what_is_written(store_url: str) -> None:
    store = JobStore(store_url)
    job, token = running(store)
    program = (
        "import sys; from aidocks.jobs.store import JobStore; from aidocks.jobs.model import EventType\n"
        "store = JobStore(sys.argv[1]); job = store.list()[0]\n"
        "store.append(job.id, EventType.MESSAGE, {'text': 'from afar'}, token=int(sys.argv[2]))"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", program, store_url, str(token)], check=True, cwd=root)
    assert store.events(job.id)[-1].data == {"text": "from afar"}
    store.close()


def test_several_processes_may_open_a_new_store_at_once(store_url: str) -> None:
    stores: list[JobStore] = []
    threads = [threading.Thread(target=lambda: stores.append(JobStore(store_url))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 6
    for store in stores:
        store.close()


def test_a_store_of_another_version_is_refused(store_url: str) -> None:
    JobStore(store_url).close()
    address = make_url(store_url)
    if address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
    engine = create_engine(address)
    with engine.begin() as connection:
        connection.execute(text("UPDATE meta SET value = 99 WHERE key = 'schema_version'"))
    engine.dispose()
    with pytest.raises(Conflict, match="99"):
        JobStore(store_url)
