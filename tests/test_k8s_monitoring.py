"""Alerts and dashboards ask for what is there, alerts fire when they should, and each has a page of what to do."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import ray
import yaml

from scanloom.sampling.quality import Reason
from serve.config_file import DEPLOYMENTS
from serve.problem import STATUS
from tests.k8s_site import ROOT

MONITORING = ROOT / "k8s" / "components" / "monitoring"
PAGES = ROOT / "docs" / "operations.md"
PROMTOOL = shutil.which("promtool")
LABELS = {"ray_io_cluster", "ray_io_group"}
"""Of pods, as the PodMonitor hands them on; they look like names of Ray's metrics."""
OF_SCRAPES = {
    "ray_serve_deployment_queued_queries", "ray_serve_autoscaling_desired_replicas",
    "ray_serve_autoscaling_target_replicas", "ray_serve_replica_utilization_percent", "ray_object_store_used_memory",
}  # fmt: skip
"""Seen on the page of a Ray 2.60 node, and not among the names in Ray's own dashboards."""


def alerts() -> list[dict[str, Any]]:
    tree = yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))
    return [rule for group in tree["spec"]["groups"] for rule in group["rules"]]


def written() -> dict[str, str]:
    """What the program of the dashboards would write."""
    made: dict[str, str] = runpy.run_path(str(MONITORING / "dashboards.py"))["written"]()
    return made


def expressions() -> Iterator[tuple[str, str]]:
    """Where each stands, and itself."""
    yield from ((alert["alert"], alert["expr"]) for alert in alerts())
    for file in (MONITORING / "dashboards").glob("*.json"):
        for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]:
            yield from ((panel["title"], target["expr"]) for target in panel["targets"])


def ours() -> set[str]:
    """What serve/metrics.py counts, as a page of metrics spells it."""
    source = (ROOT / "serve" / "metrics.py").read_text(encoding="utf-8")
    kinds: dict[str, tuple[str, ...]] = {}
    kinds |= dict.fromkeys(re.findall(r'Histogram\(\s*"(scanloom_\w+)"', source), ("_bucket", "_sum", "_count"))
    kinds |= dict.fromkeys(re.findall(r'Counter\(\s*"(scanloom_\w+)"', source), ("_total",))
    gauges = source[source.index("self.gauges = {") :]
    kinds |= {f"scanloom_engine_{name}": ("",) for name in re.findall(r'^\s+"(\w+)": "', gauges, re.MULTILINE)}
    return {f"ray_{name}{ending}" for name, endings in kinds.items() for ending in endings}


def rays() -> set[str]:
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    text = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*_panels.py"))
    return set(re.findall(r"\bray_[a-z0-9_]+", text)) | OF_SCRAPES


def test_every_metric_that_is_asked_for_is_there() -> None:
    assert len(ours()) >= 12
    known = ours() | rays() | LABELS
    asked = {(where, name) for where, text in expressions() for name in re.findall(r"\bray_[a-z0-9_]+", text)}
    assert {name for _, name in asked if name.startswith("ray_scanloom_")} <= ours()
    assert [pair for pair in sorted(asked) if pair[1] not in known] == []


def test_values_of_labels_are_those_that_are_counted() -> None:
    values: dict[str, set[str]] = {}
    for _, text in expressions():
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', text):
            values.setdefault(label, set()).update(value.split("|"))
    assert values.pop("deployment") <= set(DEPLOYMENTS)
    assert values.pop("reason") <= set(STATUS) | set(get_args(Reason))
    assert values.pop("operator") == {".*write_shard.*"}  # Ray Data names an operator after its function
    assert "partial(write_shard," in (ROOT / "jobs" / "generate.py").read_text(encoding="utf-8")
    assert values.pop("route") == {"/v1/images"}
    assert values.pop("status") == {"5.."}
    assert values.pop("app_kubernetes_io_component") == {"service"}
    assert values.pop("ray_io_group") == {"engines"}
    assert not values


def test_labels_of_pods_that_are_asked_for_are_handed_on() -> None:
    monitor = yaml.safe_load((MONITORING / "podmonitors.yaml").read_text(encoding="utf-8"))
    handed_on = {re.sub(r"\W", "_", label) for label in monitor["spec"]["podTargetLabels"]}
    assert {*LABELS, "app_kubernetes_io_component"} <= handed_on


def test_every_alert_has_a_page() -> None:
    headings = re.findall(r"^## (\w+)$", PAGES.read_text(encoding="utf-8"), re.M)
    names = [alert["alert"] for alert in alerts()]
    assert [heading for heading in headings if heading.startswith("Scanloom")] == names
    for alert in alerts():
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["for"]


def test_dashboards_are_what_their_program_writes() -> None:
    made = written()
    assert {file.name for file in (MONITORING / "dashboards").iterdir()} == set(made)
    for name, content in made.items():
        assert (MONITORING / "dashboards" / name).read_text(encoding="utf-8") == content, "run dashboards.py"
        assert len(content) < 1_000_000, "a ConfigMap holds no more"


def test_panels_lie_beside_each_other() -> None:
    for content in written().values():
        panels = json.loads(content)["panels"]
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in panels)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells))
        assert max(x for x, _ in cells) < 24
        assert len({panel["id"] for panel in panels}) == len(panels)


# --- promtool -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Series, by name, in promtool's notation, and after how long the alert fires or does not."""

    alert: str
    fires: dict[str, str]
    quiet: dict[str, str]
    after: str = "1h"


HEALTHY = 'ray_serve_deployment_replica_healthy{deployment="engines"}'
REQUESTS = "ray_scanloom_requests_total"
ENGINES = 'ray_node_gpus_utilization{app_kubernetes_io_component="service", ray_io_group="engines"}'
REDRAWN = 'ray_scanloom_engine_redrawn_total{reason="gate"}'
SHARDS = 'ray_data_rows_task_outputs_generated{operator="Map(write_shard)", ray_io_cluster="a"}'
RUNNING = 'ray_data_num_tasks_running{ray_io_cluster="a"}'
SLOW = 'ray_scanloom_request_seconds_bucket{{route="/v1/images", le="{}"}}'
NODE = '{instance="n", ray_io_cluster="a"}'
CASES = (
    Case("ScanloomNoReadyReplica", {HEALTHY: "2x5 0x60"}, {HEALTHY: "1x70"}),
    Case("ScanloomNoReadyReplica", {"ray_node_mem_used": "1x70"}, {HEALTHY: "0x2 1x70"}),
    Case(
        "ScanloomErrors", {f'{REQUESTS}{{status="503"}}': "0+5x70", f'{REQUESTS}{{status="200"}}': "0+95x70"},
        {f'{REQUESTS}{{status="503"}}': "0+1x70", f'{REQUESTS}{{status="200"}}': "0+99x70"},
    ),
    Case(
        "ScanloomQueueFull", {'ray_scanloom_refused_total{reason="busy"}': "0+10x70", REQUESTS: "0+100x70"},
        {'ray_scanloom_refused_total{reason="quota"}': "0+10x70", REQUESTS: "0+100x70"},
    ),
    Case(
        "ScanloomSlow", {SLOW.format(30): "0+90x70", SLOW.format(60): "0+100x70", SLOW.format("+Inf"): "0+100x70"},
        {SLOW.format(30): "0+99x70", SLOW.format(60): "0+100x70", SLOW.format("+Inf"): "0+100x70"},
    ),
    Case(
        "ScanloomGpuIdleWhileQueueWaits", {ENGINES: "5x70", "ray_scanloom_engine_images_waiting": "40x70"},
        {ENGINES: "5x70", "ray_scanloom_engine_images_waiting": "0x70"},
    ),
    Case(
        "ScanloomGateRejects", {REDRAWN: "0+10x100", "ray_scanloom_engine_images_total": "0+90x100"},
        {REDRAWN: "0+1x100", "ray_scanloom_engine_images_total": "0+99x100"}, "90m",
    ),
    Case("ScanloomNoMetrics", {"up": "1x70"}, {'ray_node_mem_used{app_kubernetes_io_component="service"}': "1x70"}),
    Case("ScanloomShardsStalled", {SHARDS: "7x100", RUNNING: "3x100"}, {SHARDS: "0+1x100", RUNNING: "3x100"}, "90m"),
    Case("ScanloomShardsStalled", {SHARDS: "7x100", RUNNING: "3x100"}, {SHARDS: "7x100", RUNNING: "0x100"}, "90m"),
    Case(
        "ScanloomNodeMemory", {f"ray_node_mem_used{NODE}": "95x70", f"ray_node_mem_total{NODE}": "100x70"},
        {f"ray_node_mem_used{NODE}": "60x70", f"ray_node_mem_total{NODE}": "100x70"},
    ),
)  # fmt: skip


def test_every_alert_has_a_case() -> None:
    assert {case.alert for case in CASES} == {alert["alert"] for alert in alerts()}


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: it comes with Debian's prometheus")
def test_alerts_fire_when_they_should_and_not_when_they_should_not(tmp_path: Path) -> None:
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    checked = promtool("check", "rules", str(tmp_path / "rules.yaml"))
    assert "SUCCESS" in checked
    groups = []
    for case in CASES:
        for series, wanted in ((case.fires, 1), (case.quiet, 0)):
            groups.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": name, "values": values} for name, values in series.items()],
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="{case.alert}", alertstate="firing"}}) or vector(0)',
                            "eval_time": case.after,
                            "exp_samples": [{"labels": "{}", "value": wanted}],
                        }
                    ],
                }
            )
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": groups}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    assert "SUCCESS" in promtool("test", "rules", str(tmp_path / "tests.yaml"))


def promtool(*arguments: str) -> str:
    done = subprocess.run([str(PROMTOOL), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
