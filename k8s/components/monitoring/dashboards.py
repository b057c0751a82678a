"""Writes the Grafana dashboards beside it: `python k8s/components/monitoring/dashboards.py`. A test keeps them equal.

Ray's own (nodes, Serve, Data, Train) lie on every head in the folder of its session, in metrics/grafana/dashboards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, HEIGHT = 24, 8


@dataclass(frozen=True)
class Panel:
    """One chart: expressions by legend, `stat` for a number over the whole time shown."""

    title: str
    expressions: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    told: str = ""


GPU_HOURS = "sum_over_time(sum(ray_node_gpus_available)[$__range:1m]) / 60"
IMAGES = "sum(increase(ray_scanloom_engine_images_total[$__range]))"
SHARDS = 'ray_data_rows_task_outputs_generated{operator=~".*write_shard.*"}'
REQUESTS = "ray_scanloom_requests_total"
LATENCY = "histogram_quantile({q}, sum by (le, route) (rate(ray_scanloom_request_seconds_bucket[5m])))"

OVERVIEW = (
    Panel("Images", {"": IMAGES}, kind="stat", width=4, told="Made and let out by the service."),
    Panel("GPU-hours", {"": GPU_HOURS}, kind="stat", width=4, told="Held, busy or not, by service and jobs."),
    Panel(
        "Cost of 1,000 images", {"": f"{GPU_HOURS} * $gpu_hour / ({IMAGES} / 1000)"}, "currencyUSD", "stat", 4,
        "All GPU-hours at the price above, by the service's images.",
    ),
    Panel("Engines ready", {"": 'sum(ray_serve_deployment_replica_healthy{deployment="engines"})'}, "short", "stat", 4),
    Panel("Images waiting", {"": "sum(ray_scanloom_engine_images_waiting)"}, "short", "stat", 4),
    Panel(
        "Errors",
        {"": f'sum(rate({REQUESTS}{{status=~"5.."}}[$__range])) / sum(rate({REQUESTS}[$__range]))'},
        "percentunit", "stat", 4,
    ),
    Panel("Requests", {"{{route}} {{status}}": f"sum by (route, status) (rate({REQUESTS}[5m]))"}, "reqps"),
    Panel("Latency", {f"p{p} {{{{route}}}}": LATENCY.format(q=f"0.{p}") for p in ("50", "95", "99")}, "s"),
    Panel("Refused", {"{{reason}}": "sum by (reason) (rate(ray_scanloom_refused_total[5m]))"}, "reqps"),
    Panel(
        "Slots", {"there": "sum(ray_scanloom_engine_slots)", "in use": "sum(ray_scanloom_engine_slots_used)",
                  "images waiting": "sum(ray_scanloom_engine_images_waiting)"},
    ),
    Panel("Images a second", {"made": "sum(rate(ray_scanloom_engine_images_total[5m]))",
                              "asked for": "sum(rate(ray_scanloom_images_asked_total[5m]))"}),
    Panel("Drawn again", {"{{reason}}": "sum by (reason) (rate(ray_scanloom_engine_redrawn_total[5m]))"}),
    Panel(
        "Replicas", {"wanted": 'sum(ray_serve_autoscaling_desired_replicas{deployment="engines"})',
                     "aimed at": 'sum(ray_serve_autoscaling_target_replicas{deployment="engines"})',
                     "healthy": 'sum(ray_serve_deployment_replica_healthy{deployment="engines"})'},
    ),
    Panel(
        "GPUs busy",
        {"{{ray_io_cluster}} {{ray_io_group}}": "avg by (ray_io_cluster, ray_io_group) (ray_node_gpus_utilization)"},
        "percent",
    ),
    Panel("Shards a second", {"{{ray_io_cluster}}": f"sum by (ray_io_cluster) (rate({SHARDS}[10m]))"}),
    Panel("Tasks of jobs", {"{{operator}}": "sum by (operator) (ray_data_num_tasks_running)"}),
    Panel(
        "Memory of nodes", {"{{instance}}": "max by (instance) (ray_node_mem_used / ray_node_mem_total)"}, "percentunit"
    ),
    Panel("Object store", {"{{ray_io_cluster}}": "sum by (ray_io_cluster) (ray_object_store_used_memory)"}, "bytes"),
)  # fmt: skip


def dashboard(title: str, uid: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    """Grafana's model of a dashboard; panels flow from left to right."""
    placed: list[dict[str, Any]] = []
    x = y = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > COLUMNS:
            x, y = 0, y + placed[-1]["gridPos"]["h"]
        placed.append(_panel(panel, number, x, y))
        x += panel.width
    return {
        "title": title, "uid": uid, "schemaVersion": 39, "editable": False, "tags": ["scanloom"], "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"}, "timezone": "utc", "panels": placed,
        "templating": {"list": [
            {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
            {"name": "gpu_hour", "label": "Price of a GPU-hour", "type": "textbox", "query": "2.00",
             "current": {"text": "2.00", "value": "2.00"}},
        ]},
    }  # fmt: skip


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + place), "expr": expression, "legendFormat": legend or "__auto", "datasource": SOURCE}
        for place, (legend, expression) in enumerate(panel.expressions.items())
    ]
    return {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.told, "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": HEIGHT if panel.kind == "timeseries" else HEIGHT // 2},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []}, "targets": targets,
    }  # fmt: skip


def written() -> dict[str, str]:
    """Files by name, as they are to be."""
    made = {"scanloom-overview.json": dashboard("scanloom: platform overview", "scanloom-overview", OVERVIEW)}
    return {name: json.dumps(content, indent=1) + "\n" for name, content in made.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in written().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
