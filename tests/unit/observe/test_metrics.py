"""What is counted of jobs, and that no label has a value without end."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aidocks.jobs.model import Job, Status
from cluster.metrics import METRICS, JobMetrics, stage_label
from cluster.observers import Observers
from serve import traffic

_OF = {metric.name: metric for metric in METRICS}


class Written:
    """Keeps what is recorded, and takes only what the list of metrics has."""

    def __init__(self) -> None:
        self.values: Counter[tuple[Any, ...]] = Counter()

    def record(self, name: str, value: float, **tags: str) -> None:
        metric = _OF[name]
        assert set(tags) == set(metric.tags)
        assert all(isinstance(tag, str) for tag in tags.values())
        key = (name, *(tags[tag] for tag in metric.tags))
        match metric.kind:
            case "counter":
                assert value >= 0
                self.values[key] += value
            case "gauge":
                self.values[key] = value
            case "histogram":
                self.values[(f"{name} count", *key[1:])] += 1


@pytest.fixture
def written() -> Written:
    return Written()


def _job(**fields: Any) -> Job:
    now = datetime.now(UTC)
    values = {
        "id": "job-1",
        "operation": "train-llm",
        "status": Status.RUNNING,
        "spec": {},
        "created_at": now,
    }
    return Job(**(values | {"attempt": 1, "started_at": now} | fields))


def test_a_job_is_counted_with_its_units_and_bytes(watched: Any, written: Written, tmp_path: Path) -> None:
    watched(JobMetrics(tmp_path, written), units=4)
    assert written.values == {
        ("aidocks_jobs_begun", "trivial"): 1,
        ("aidocks_units_ended", "trivial", "squares"): 4,
        ("aidocks_units_ended", "trivial", "sum"): 1,
        ("aidocks_unit_seconds count", "trivial", "squares"): 4,
        ("aidocks_unit_seconds count", "trivial", "sum"): 1,
        ("aidocks_bytes_written", "trivial"): len("0149"),
        ("aidocks_jobs_ended", "trivial", "succeeded", "none"): 1,
        ("aidocks_job_seconds count", "trivial", "succeeded"): 1,
    }


def test_a_failed_job_is_counted_by_the_code_of_its_error(
    watched: Any, written: Written, tmp_path: Path
) -> None:
    watched(JobMetrics(tmp_path, written), units=2, fails_at=1)
    assert written.values["aidocks_jobs_ended", "trivial", "failed", "invalid_spec"] == 1


def test_trainings_are_added_up_while_they_run(written: Written, tmp_path: Path) -> None:
    metrics = JobMetrics(tmp_path, written)
    unit: Any = None
    one, two = _job(), _job(id="job-2")
    metrics.told(one, unit, {"tokens_per_s": 100.0, "loss": 2.0, "step": 1})
    metrics.told(two, unit, {"tokens_per_s": 50, "loss": 1.0})
    metrics.told(two, unit, {"eval_loss": 1.5})
    assert written.values["aidocks_training_tokens_per_second", "train-llm"] == 150
    assert written.values["aidocks_training_loss", "train-llm"] == 1.5
    metrics.job_ended(one.model_copy(update={"status": Status.SUCCEEDED}))
    assert written.values["aidocks_training_tokens_per_second", "train-llm"] == 50
    metrics.job_ended(two.model_copy(update={"status": Status.CANCELLED}))
    assert written.values["aidocks_training_tokens_per_second", "train-llm"] == 0


def test_recoveries_have_a_cause_and_what_waits_for_another_try_has_not_ended(
    written: Written, tmp_path: Path
) -> None:
    metrics = JobMetrics(tmp_path, written)
    unit: Any = None
    metrics.job_began(_job(attempt=2))
    metrics.worker_lost(_job(), unit, "killed")
    metrics.job_ended(_job(status=Status.QUEUED))
    assert written.values == {
        ("aidocks_recoveries", "attempt"): 1,
        ("aidocks_recoveries", "worker"): 1,
        ("aidocks_workers_lost",): 1,
    }


def test_the_queue_and_the_workers_of_now(written: Written, tmp_path: Path) -> None:
    observers = Observers(JobMetrics(tmp_path, written))
    observers.queue(3, 12.5, 2)
    observers.workers(1, 4)
    assert written.values["aidocks_jobs", "queued"] == 3
    assert written.values["aidocks_jobs", "running"] == 2
    assert written.values[("aidocks_queue_age_seconds",)] == 12.5
    assert written.values["aidocks_workers", "idle"] == 4
    assert written.values[("aidocks_disk_free_bytes",)] > 0


def test_an_observer_that_fails_hinders_nobody(watched: Any, written: Written, tmp_path: Path) -> None:
    class Broken(JobMetrics):
        def unit_ended(self, *_: Any) -> None:
            raise RuntimeError("broken")

    broken, counting = Broken(tmp_path, Written()), JobMetrics(tmp_path, written)
    job = watched(Observers(broken, counting), units=2)
    assert job.status is Status.SUCCEEDED
    assert written.values["aidocks_units_ended", "trivial", "squares"] == 2


def test_no_label_names_a_job_or_its_owner() -> None:
    endless = {"job", "job_id", "unit", "unit_id", "owner", "tenant", "key", "model", "path", "reason"}
    assert not [metric.name for metric in METRICS if endless & set(metric.tags)]
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert {stage_label(f"train to step {step}") for step in range(40)} == {"train to step N"}
    assert all(metric.bounds == tuple(sorted(metric.bounds)) for metric in METRICS)
    assert all(bool(metric.bounds) == (metric.kind == "histogram") for metric in METRICS)


def test_trainings_end_where_the_job_fell_back_into_the_queue(written: Written, tmp_path: Path) -> None:
    metrics = JobMetrics(tmp_path, written)
    unit: Any = None
    metrics.told(_job(), unit, {"tokens_per_s": 10.0})
    metrics.job_ended(
        _job(status=Status.QUEUED, finished_at=None, started_at=datetime.now(UTC) - timedelta(1))
    )
    assert written.values["aidocks_training_tokens_per_second", "train-llm"] == 0


def test_requests_are_counted_by_template(
    written: Written, api_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "_instruments", None)
    api_client("GET", "/health")
    assert not written.values
    traffic.measure_requests(written)
    api_client("GET", "/jobs/job-0815")
    api_client("GET", "/jobs/job-4711")
    api_client("BREW", "/no-such-thing")
    counted = {key: value for key, value in written.values.items() if key[0] == "aidocks_http_requests"}
    assert counted["aidocks_http_requests", "/jobs/{job_id}", "GET", "404"] == 2
    assert sum(counted.values()) == 3
    assert ("aidocks_http_requests", "other", "other", "404") in counted
    assert written.values["aidocks_http_request_seconds count", "/jobs/{job_id}", "GET"] == 2
