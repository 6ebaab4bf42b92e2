"""The Grafana dashboard, made from the list of metrics: ``python -m cluster.monitoring.dashboard`` writes it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.metrics import METRICS, Metric

PATH = Path(__file__).parent / "grafana" / "dashboards" / "aidocks.json"
UID = "aidocks"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 7
#: Grafana's names of units; of a counter's, that of its rate.
_UNITS = {"seconds": "s", "bytes": "bytes", "tokens/s": "suffix: tokens/s", "": "short"}
_RATES = {"bytes": "Bps", "": "cps"}


@dataclass(frozen=True)
class Panel:
    """One picture of the dashboard.

    Attributes:
        lines: PromQL expressions, each with the legend of what it yields.
        unit: By Grafana's name.
    """

    title: str
    help: str
    lines: tuple[tuple[str, str], ...]
    unit: str = "short"


#: What Ray itself exports of nodes and of the HTTP front.
NODES: tuple[Panel, ...] = (
    Panel("nodes", "Nodes that report.", (("count(ray_node_cpu_count)", "nodes"),)),
    Panel("processors", "Share of the cores at work.", (("ray_node_cpu_utilization", "{{ip}}"),), "percent"),
    Panel(
        "memory",
        "Main memory in use.",
        (("ray_node_mem_used", "{{ip}} used"), ("ray_node_mem_total", "{{ip}} total")),
        "bytes",
    ),
    Panel(
        "GPUs",
        "Share of the time at work.",
        (("ray_node_gpus_utilization", "{{ip}} {{GpuIndex}}"),),
        "percent",
    ),
    Panel(
        "GPU memory",
        "Ray counts it in MiB.",
        (
            ("ray_node_gram_used", "{{ip}} {{GpuIndex}} used"),
            ("ray_node_gram_available", "{{ip}} {{GpuIndex}} free"),
        ),
        "decmbytes",
    ),
    Panel("disks", "Free on the disks of Ray's own files.", (("ray_node_disk_free", "{{ip}}"),), "bytes"),
    Panel(
        "Ray's resources",
        "CPUs and GPUs that actors have taken.",
        (('sum by (Name) (ray_resources{State="USED", Name=~"CPU|GPU"})', "{{Name}}"),),
    ),
    Panel(
        "replicas of the front",
        "1: healthy.",
        (("ray_serve_deployment_replica_healthy", "{{deployment}} {{replica}}"),),
    ),
)


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in _rows():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": top},
            }
        )
        for number, panel in enumerate(row):
            line, column = divmod(number, _COLUMNS)
            place = {"h": _HEIGHT, "w": _WIDTH, "x": column * _WIDTH, "y": top + 1 + line * _HEIGHT}
            panels.append(_drawn(panel, len(panels) + 1, place))
        top += 1 + -(-len(row) // _COLUMNS) * _HEIGHT
    return {
        "uid": UID,
        "title": "AIDocks",
        "tags": ["aidocks"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_source_variable()]},
        "annotations": {"list": []},
        "panels": panels,
    }


def panel_of(metric: Metric) -> Panel:
    """Return how a metric is shown: rates of what is counted, quantiles of what is measured, the sum over processes."""
    by = ", ".join(metric.tags)
    legend = " ".join(f"{{{{{tag}}}}}" for tag in metric.tags) or metric.name
    title = metric.name.removeprefix("aidocks_").replace("_", " ")
    match metric.kind:
        case "counter":
            total = _summed(f"rate({metric.exported}[$__rate_interval])", by)
            return Panel(f"{title} per second", metric.help, ((total, legend),), _RATES[metric.unit])
        case "gauge":
            return Panel(title, metric.help, ((_summed(metric.exported, by), legend),), _UNITS[metric.unit])
        case "histogram":
            first = metric.tags[0]
            rate = f"sum by (le, {first}) (rate({metric.exported}_bucket[$__rate_interval]))"
            lines = tuple(
                (f"histogram_quantile({share}, {rate})", f"{{{{{first}}}}} {name}")
                for share, name in ((0.5, "half"), (0.95, "95 %"))
            )
            return Panel(title, f"{metric.help} Below it: half, and 95 %.", lines, _UNITS[metric.unit])


def dashboard_text() -> str:
    """Return the dashboard as it is kept in the repository."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


def _summed(expression: str, by: str) -> str:
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"


def _rows() -> Iterator[tuple[str, tuple[Panel, ...]]]:
    for group in dict.fromkeys(metric.group for metric in METRICS):
        yield group, tuple(panel_of(metric) for metric in METRICS if metric.group == group)
    yield "Nodes, as Ray sees them", NODES


def _drawn(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + place),
            "expr": expression,
            "legendFormat": legend,
            "datasource": _DATASOURCE,
        }
        for place, (expression, legend) in enumerate(panel.lines)
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _source_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
    }


def main() -> None:
    """Write the dashboard."""
    PATH.write_text(dashboard_text(), encoding="utf-8")
    sys.stdout.write(f"{PATH}\n")


if __name__ == "__main__":
    main()
