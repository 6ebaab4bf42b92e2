"""The whole service dies by ``kill -9``; ``aidocks up`` on the same data directory continues its jobs."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from aidocks.jobs.model import EventType, Status
from aidocks.jobs.store import JobStore
from aidocks.settings import Settings
from cluster.bringup import service_status, start_service, stop_service
from tests.conftest import free_port
from tests.support.trivial_operation import count_traces

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(280)]

SITE = Path(__file__).resolve().parents[1] / "support" / "site"
APPLICATION = "tests.support.trivial_app:build_app"


def test_a_service_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SITE))
    settings = Settings(home=tmp_path / "home", port=free_port(), workers=2)
    traces = tmp_path / "traces"
    traces.mkdir()
    store = JobStore(settings.store_url)
    # Submitted before the service runs: whoever accepts a job need not be who executes it.
    spec = {"traces": str(traces), "units": 20, "seconds": 0.3}
    job, _ = store.submit("trivial", spec, output_name=None)
    try:
        start_service(settings, wait=False, application=APPLICATION)
        while len(store.units(job.id)) < 4:
            time.sleep(0.05)
        pid = service_status(settings).pid
        assert pid is not None
        head = psutil.Process(pid)
        head.kill()
        head.wait()
        start_service(settings, application=APPLICATION)
        while not store.get(job.id).status.terminal:
            time.sleep(0.05)
    finally:
        stop_service(settings)
    ended = store.get(job.id)
    assert ended.status is Status.SUCCEEDED
    assert ended.result is not None
    assert ended.result["total"] == sum(number * number for number in range(20))
    events = store.events(job.id)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    finished = [event.data["unit_id"] for event in events if event.type is EventType.UNIT_FINISHED]
    assert len(finished) == len(set(finished)) == 21
    recovered = next(event for event in events if event.type is EventType.RECOVERED)
    assert recovered.data["units_done"] >= 4
    assert sum(count_traces(traces).values()) <= 20 + settings.workers * ended.attempt  # type: ignore[operator]
    store.close()
