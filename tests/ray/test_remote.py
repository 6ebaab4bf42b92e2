"""``aidocks.remote`` and the supervisor behind it, from a driver of the cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aidocks.jobs.model import EventType
from aidocks.jobs.store import JobStore
from aidocks.settings import Settings
from cluster.bringup import service_status
from tests.conftest import service_environment
from tests.support.trivial_operation import count_traces

pytestmark = pytest.mark.slow

Drive = Callable[..., Any]


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    directory = tmp_path / "traces"
    directory.mkdir()
    return directory


def test_a_remote_function_returns_the_typed_result(drive: Drive, traces: Path) -> None:
    kind, total, same = drive(
        """
        from pathlib import Path
        from tests.support.trivial_operation import TrivialSpec
        spec = {"traces": sys.argv[1], "units": 4}
        by_mapping, by_spec = ray.get([
            remote.trivial.remote(spec),
            remote.trivial.remote(TrivialSpec(traces=Path(sys.argv[1]), units=4)),
        ])
        answer = [type(by_mapping).__name__, by_mapping.total, by_mapping.total == by_spec.total]
        """,
        traces,
    )
    assert (kind, total, same) == ("TrivialResult", 14, True)
    assert set(count_traces(traces).values()) == {2}, "two jobs, each of which ran every unit once"


def test_refusals_and_failures_are_exceptions(drive: Drive, traces: Path) -> None:
    invalid, failed, unknown = drive(
        """
        from aidocks.errors import InvalidSpec, JobFailed
        def raised(kind, **spec):
            try:
                ray.get(remote.trivial.remote({"traces": sys.argv[1], **spec}))
            except kind as error:
                return str(error.cause)
        try:
            remote.no_such_thing
        except AttributeError as error:
            unknown = str(error)
        answer = [raised(InvalidSpec, units="many"), raised(JobFailed, fails_at=2), unknown]
        """,
        traces,
    )
    assert "units" in invalid
    assert "2 has no square." in failed
    assert "no_such_thing" in unknown
    assert "laser" in unknown


def test_a_repeated_submission_is_the_same_job(drive: Drive, traces: Path) -> None:
    first, second = drive(
        """
        spec = {"traces": sys.argv[1], "output": "mine"}
        submit = remote.supervisor().submit
        answer = ray.get([submit.remote("trivial", spec, "a key") for _ in range(2)])
        """,
        traces,
    )
    assert first["id"] == second["id"]


def test_cancelling_the_task_cancels_the_job(drive: Drive, traces: Path, trivial_settings: Settings) -> None:
    status, seconds = drive(
        """
        import time
        actor = remote.supervisor()
        job = ray.get(actor.submit.remote("trivial", {"traces": sys.argv[1], "seconds": 60}, None))
        while not any(worker["unit"] for worker in ray.get(actor.ping.remote())["workers"]):
            time.sleep(0.05)
        begin = time.monotonic()
        ray.get(actor.cancel.remote(job["id"]))
        while job["status"] not in ("cancelled", "failed", "succeeded"):
            time.sleep(0.05)
            job = ray.get(actor.job.remote(job["id"]))
        answer = job["status"], time.monotonic() - begin
        """,
        traces,
    )
    assert status == "cancelled"
    assert seconds < 5
    assert list(trivial_settings.workspaces_dir.iterdir()) == []


def test_a_killed_supervisor_continues_its_jobs(
    drive: Drive, traces: Path, trivial_settings: Settings
) -> None:
    job, before, after = drive(
        """
        import os, signal, time
        actor = remote.supervisor()
        before = ray.get(actor.ping.remote())
        result = remote.trivial.remote({"traces": sys.argv[1], "units": 12, "seconds": 0.3})
        while not (jobs := ray.get(actor.ping.remote())["jobs"]):
            time.sleep(0.05)
        from aidocks.jobs.store import JobStore
        from aidocks.settings import Settings
        store = JobStore(Settings().store_url)
        while len(store.units(jobs[0])) < 4:
            time.sleep(0.05)
        os.kill(before["pid"], signal.SIGKILL)
        assert ray.get(result).total == sum(n * n for n in range(12))
        answer = jobs[0], before, ray.get(actor.ping.remote())
        """,
        traces,
    )
    assert after["pid"] != before["pid"]
    assert after["token"] > before["token"]
    store = JobStore(trivial_settings.store_url)
    events = store.events(job)
    store.close()
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    finished = [event.data["unit_id"] for event in events if event.type is EventType.UNIT_FINISHED]
    assert len(finished) == len(set(finished)) == 13
    recovered = [event.data for event in events if event.type is EventType.RECOVERED]
    assert len(recovered) == 1
    assert recovered[0]["units_done"] >= 4


def test_ray_job_submit_reaches_the_service(trivial_settings: Settings, traces: Path) -> None:
    environment = service_environment(trivial_settings) | service_status(trivial_settings).environment
    program = (
        "import ray; from aidocks import remote; ray.init(); "
        f"print('total', ray.get(remote.trivial.remote({{'traces': '{traces}'}})).total)"
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("ray"), "job", "submit", "--", "python", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "total 14" in done.stdout
