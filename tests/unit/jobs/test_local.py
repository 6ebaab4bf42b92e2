"""Jobs without a service: ``run_locally``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aidocks.errors import InvalidSpec
from aidocks.jobs.model import Event, EventType, Status
from aidocks.jobs.runner import end_orphans, process_name, run_locally
from aidocks.jobs.store import JobStore
from aidocks.settings import Settings
from tests.support.trivial_operation import TrivialSpec, count_traces

ROOT = Path(__file__).resolve().parents[3]

# A process that dies in the middle of its job, as by kill -9.
DYING = """
import sys
from pathlib import Path
from aidocks import operations
from aidocks.jobs.runner import run_locally
from aidocks.settings import Settings
from tests.support.trivial_operation import REGISTRATION, TrivialSpec
operations.OPERATIONS += (REGISTRATION,)
run_locally("trivial", TrivialSpec(traces=Path(sys.argv[1]), units=4, crashes=1, output="x"), Settings())
"""


def test_a_local_job_reports_every_event_in_order(settings: Settings, trivial: str, traces: Path) -> None:
    events: list[Event] = []
    job = run_locally(trivial, TrivialSpec(traces=traces), settings, events.append)
    assert (job.status, job.place) == (Status.SUCCEEDED, "local")
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events[-1].type is EventType.SUCCEEDED


def test_a_refused_local_job_raises(settings: Settings, trivial: str, traces: Path) -> None:
    with pytest.raises(InvalidSpec):
        run_locally(trivial, TrivialSpec(traces=traces, refused=True), settings)


def test_a_failing_local_job_is_returned(settings: Settings, trivial: str, traces: Path) -> None:
    job = run_locally(trivial, TrivialSpec(traces=traces, fails_at=0), settings)
    assert (job.status, job.error and job.error["code"]) == (Status.FAILED, "invalid_spec")


def test_the_same_command_continues_a_killed_one(
    settings: Settings, trivial: str, traces: Path, local_store: JobStore
) -> None:
    died = subprocess.run([sys.executable, "-c", DYING, str(traces)], check=False, cwd=ROOT)
    assert died.returncode == -9
    (left,) = local_store.unfinished("local")
    assert left.status is Status.RUNNING
    journalled = {int(unit.label.rpartition(" ")[2]) for unit in local_store.units(left.id).values()}
    events: list[Event] = []
    spec = TrivialSpec(traces=traces, units=4, crashes=1, output="x")
    job = run_locally(trivial, spec, settings, events.append)
    assert (job.id, job.status, job.attempt) == (left.id, Status.SUCCEEDED, 2)
    assert all(count_traces(traces)[number] == 1 for number in journalled)
    assert count_traces(traces)[1] == 2
    assert events[0].type is EventType.RECOVERED


def test_an_orphan_gives_its_name_back(
    settings: Settings, trivial: str, traces: Path, local_store: JobStore
) -> None:
    subprocess.run([sys.executable, "-c", DYING, str(traces)], check=False, cwd=ROOT)
    other = TrivialSpec(traces=traces, units=2, output="x")
    job = run_locally(trivial, other, settings)
    assert job.status is Status.SUCCEEDED
    failed = local_store.list(status="failed")
    assert len(failed) == 1
    assert failed[0].error is not None
    assert failed[0].error["code"] == "worker_lost"
    assert not (settings.workspaces_dir / failed[0].id).exists()


def test_a_living_local_job_is_no_orphan(
    settings: Settings, trivial: str, traces: Path, local_store: JobStore
) -> None:
    job, _ = local_store.submit(trivial, {}, output_name=None, place="local")
    assert end_orphans(local_store, settings) == [], "its process may be about to take the lease"
    local_store.claim(job.id, local_store.acquire_lease(f"local:{job.id}", process_name()))
    assert end_orphans(local_store, settings) == []
    # The same process id, started at another time: another process.
    local_store.acquire_lease(f"local:{job.id}", process_name().rpartition("/")[0] + "/1")
    assert [ended.id for ended in end_orphans(local_store, settings)] == [job.id]
