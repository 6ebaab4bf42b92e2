"""What Prometheus and Grafana are given: files that parse, and no expression over a metric that nobody exports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from aidocks.settings import Settings
from cluster import monitoring
from cluster.head import ray_dir
from cluster.metrics import METRICS, Metric
from cluster.monitoring.__main__ import write_configuration
from cluster.monitoring.dashboard import PATH, dashboard, dashboard_text

HERE = Path(monitoring.__file__).parent
PAGE = Path(__file__).resolve().parents[3] / "docs" / "observability.md"
#: Seen on the metrics port of a node of Ray 2.60; those of GPUs in its source alone.
RAY = {
    "ray_node_cpu_count",
    "ray_node_cpu_utilization",
    "ray_node_disk_free",
    "ray_node_disk_usage",
    "ray_node_gpus_utilization",
    "ray_node_gram_available",
    "ray_node_gram_used",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_resources",
    "ray_serve_deployment_replica_healthy",
}


def _exported(metric: Metric) -> set[str]:
    ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
    return {f"{metric.exported}{end}" for end in ends}


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((HERE / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _expressions() -> Iterator[str]:
    for rule in _rules():
        yield rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"].replace("$__rate_interval", "1m")


def _selectors(node: Any) -> Iterator[tuple[str, set[str]]]:
    """Yield name and labels of every series that a parsed expression reads."""
    import promql_parser

    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, {matcher.name for matcher in node.matchers.matchers}
    for part in ("lhs", "rhs", "expr", "args", "vector_selector", "vs"):
        child = getattr(node, part, None)
        for one in child if isinstance(child, list) else [child]:
            if isinstance(one, promql_parser.Expr):
                yield from _selectors(one)


@pytest.mark.parametrize("expression", sorted(set(_expressions())))
def test_expressions_read_what_is_exported(expression: str) -> None:
    promql = pytest.importorskip("promql_parser")
    known = {name: metric for metric in METRICS for name in _exported(metric)}
    found = list(_selectors(promql.parse(expression)))
    assert found
    for name, labels in found:
        assert name in RAY or name in known
        if name in known:
            assert labels <= set(known[name].tags)


def test_the_kept_dashboard_is_that_of_the_metrics() -> None:
    assert PATH.read_text(encoding="utf-8") == dashboard_text(), "run: python -m cluster.monitoring.dashboard"


def test_the_dashboard_shows_every_metric_in_a_place_of_its_own() -> None:
    panels = dashboard()["panels"]
    shown = "\n".join(_expressions())
    assert not [metric.name for metric in METRICS if metric.exported not in shown]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == set(range(24))


def test_rules_say_when_how_bad_and_what_to_do() -> None:
    for rule in _rules():
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}
    assert len({rule["alert"] for rule in _rules()}) == len(_rules())


def test_prometheus_finds_the_nodes_and_is_given_no_secret() -> None:
    configuration = yaml.safe_load((HERE / "prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    assert not {"authorization", "basic_auth"} & set(job)
    for name in configuration["rule_files"]:
        assert (HERE / name).is_file()


def test_a_configuration_for_this_installation(settings: Settings, tmp_path: Path) -> None:
    write_configuration(settings, tmp_path / "watch")
    write_configuration(settings, tmp_path / "watch")
    configuration = yaml.safe_load((tmp_path / "watch" / "prometheus.yml").read_text())
    (found,) = configuration["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert Path(found).parent == ray_dir(settings)
    grafana = tmp_path / "watch" / "grafana"
    provider = yaml.safe_load((grafana / "provisioning" / "dashboards" / "aidocks.yml").read_text())
    dashboards = Path(provider["providers"][0]["options"]["path"])
    assert json.loads((dashboards / "aidocks.json").read_text())["uid"] == "aidocks"
    source = yaml.safe_load((grafana / "provisioning" / "datasources" / "prometheus.yml").read_text())
    assert source["datasources"][0]["type"] == "prometheus"


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_page_has_a_row_for_each_metric(metric: Metric) -> None:
    labels = ", ".join(f"`{tag}`" for tag in metric.tags)
    kind = metric.kind + (f", {metric.unit}" if metric.unit else "")
    row = f"| `{metric.exported}` | {kind} | {labels} | {metric.help} |"
    assert row in PAGE.read_text(encoding="utf-8").splitlines()
