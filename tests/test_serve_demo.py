"""`make serve` as a newcomer meets it: the commands of docs/serving.md work as printed, and it ends cleanly."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from scanloom.artefact import open_artefact
from scanloom.embedded_s3 import EmbeddedS3
from tests.processes import descendants
from tests.running_service import ROOT, RunningService, free_port, plain_environment, wait_until
from tests.tiny_generator import SIZE, publish_generator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GENERATOR = "s3://scanloom-demo/run/generator"


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a demo that has run, with a small generator."""
    folder = tmp_path / "demo"
    folder.mkdir()
    with EmbeddedS3(folder / "s3") as s3:
        s3.create_bucket("scanloom-demo")
        with monkeypatch.context() as patched:
            for name, value in s3.environment.items():
                patched.setenv(name, value)
            publish_generator(GENERATOR)
    return folder


@pytest.fixture
def service(demo: Path) -> Iterator[RunningService]:
    with RunningService(demo, "--demo", str(demo), "--port", str(free_port())) as service:
        yield service


def blocks(language: str) -> list[str]:
    """The code of that language in docs/serving.md."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def shell(folder: Path, script: str) -> None:
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=plain_environment(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr


def test_the_commands_of_the_page_work_as_printed(service: RunningService, demo: Path) -> None:
    [printed] = [line for line in service.told if line.startswith("curl")]
    source = f"source {shlex.quote(str(service.env_file))}\n"
    shell(demo, source + printed)
    assert Image.open(demo / "image.png").size == (SIZE, SIZE)
    (demo / "image.png").unlink()
    [curl] = [block for block in blocks("sh") if "curl" in block]
    shell(demo.parent, curl)
    assert Image.open(demo.parent / "image.png").size == (SIZE, SIZE)
    [example] = blocks("python")
    (demo / "example.py").write_text(example, encoding="utf-8")
    shell(demo, source + f"{sys.executable} example.py")
    assert len(list((demo / "images").glob("*.png"))) == 4
    assert open_artefact(str(demo / "dataset"), "dataset").manifest.statistics["rows"] == 48


def test_when_told_to_end_it_finishes_what_it_has_and_leaves_nothing_behind(service: RunningService) -> None:
    processes = [service.process.pid, *descendants(service.process.pid)]
    done = threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        with service.client(120) as client:
            statuses.append(client.post("/v1/images", json={"steps": 1000, "count": 4}).status_code)
        done.set()

    asking = threading.Thread(target=ask)
    asking.start()
    with service.client() as client:
        wait_until(lambda: "ray_scanloom_engine_slots_used" in client.get("/metrics").text, 30, "engines report")
        wait_until(lambda: used(client.get("/metrics").text), 30, "it is being made")
    assert not done.is_set()
    assert service.end(signal.SIGINT) == 0
    asking.join(timeout=30)
    assert statuses == [200]
    wait_until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes), 20, "no process is left")
    assert "Traceback" not in service.errors()


def used(page: str) -> bool:
    return any(
        line.startswith("ray_scanloom_engine_slots_used{") and not line.endswith(" 0.0") for line in page.splitlines()
    )
