"""A real service under observation: its metrics on the agents' port, its log lines by job, what it says it does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aidocks.client.http import Client
from cluster.head import ray_dir
from cluster.metrics import METRICS
from tests.support.merge_jobs import add_models, make_family

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

#: Ray exports every ten seconds.
EXPORTED_S = 40.0


def _scraped(service: Any) -> dict[str, list[dict[str, str]]]:
    """Return the labels of every series that Prometheus would find, by the way that its configuration shows."""
    groups = json.loads((ray_dir(service.settings) / "prom_metrics_service_discovery.json").read_text())
    series: dict[str, list[dict[str, str]]] = {}
    for target in [target for group in groups for target in group["targets"]]:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
            for family in text_string_to_metric_families(response.read().decode()):
                for sample in family.samples:
                    series.setdefault(sample.name, []).append(sample.labels)
    return series


def test_a_job_leaves_metrics_lines_and_an_overview(service: Any, tmp_path: Path) -> None:
    make_family(tmp_path, "watched-one", "watched-two")
    add_models(service.settings, tmp_path / "watched-one", tmp_path / "watched-two")
    request = {
        "name": "watched",
        "merge_method": "linear",
        "models": [{"model": f"watched-{which}", "parameters": {"weight": 0.5}} for which in ("one", "two")],
    }
    with Client(service.url) as client:
        job = client.submit("merge", request)
        job.wait(timeout=60)
        told = client.status()
    assert told.supervisor == "running"
    assert told.jobs is not None
    assert told.jobs.succeeded_today >= 1
    assert told.workers is not None
    assert told.nodes is not None
    assert [node.cpus > 0 for node in told.nodes] == [True]

    wanted = {metric.exported for metric in METRICS if metric.group in ("Jobs", "Units", "HTTP")}
    wanted = {
        f"{name}_count" if name.endswith("_seconds") and "queue" not in name else name for name in wanted
    }
    deadline = time.monotonic() + EXPORTED_S
    while not wanted <= set(found := _scraped(service)) and time.monotonic() < deadline:
        time.sleep(1)
    assert wanted <= set(found)
    ended = [labels for labels in found["ray_aidocks_jobs_ended_total"] if labels["operation"] == "merge"]
    assert {(labels["status"], labels["code"]) for labels in ended} >= {("succeeded", "none")}
    routes = {labels["route"] for labels in found["ray_aidocks_http_requests_total"]}
    assert "/jobs/{job_id}" in routes
    assert not [route for route in routes if job.id in route]
    assert {labels["ip"] for labels in found["ray_node_mem_total"]} == {"127.0.0.1"}

    command = [sys.executable, "-m", "aidocks", "logs", "--job", job.id]
    lines = subprocess.run(command, env=service.env, capture_output=True, text=True, check=True).stdout
    assert "job" in lines
    assert job.id in lines
    records = [
        json.loads(line)
        for name in ("http.log", "supervisor.log")
        for line in (service.settings.log_dir / name).read_text().splitlines()
    ]
    assert all({"time", "level", "logger", "message"} <= set(record) for record in records)
