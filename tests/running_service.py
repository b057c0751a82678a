"""The generation service in processes of its own, as `scanloom serve` runs it, for tests that speak HTTP to it."""

from __future__ import annotations

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

from tests.processes import descendants, kill, named

ROOT = Path(__file__).resolve().parents[1]
STARTS_S = 180
ENDS_S = 90
WORKERS = {"engine": "ServeReplica:scanloom:engines", "gateway": "ServeReplica:scanloom:gateway",
           "dispatcher": "ServeReplica:scanloom:dispatcher", "controller": "ServeController"}  # fmt: skip
"""What Ray calls the process of a part."""
QUICK = {"RAY_metrics_report_interval_ms": "500"}
"""Numbers reach the metrics agents every half second, not every ten."""


def plain_environment(**more: str) -> dict[str, str]:
    """This process's, without what would tell the service of other stores, clusters and keys."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SCANLOOM_", "RAY_"))}
    return kept | {"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"} | more


def config(args: Mapping[str, Any], port: int = 0) -> dict[str, Any]:
    """A Serve config file of these settings."""
    application = {"name": "scanloom", "route_prefix": "/", "import_path": "serve.app:app", "args": dict(args)}
    return {"http_options": {"host": "127.0.0.1", "port": port or free_port()}, "applications": [application]}


def free_port() -> int:
    """One that nobody has; below those that the kernel and Ray give away."""
    while True:
        with socket.socket() as probe:
            port = random.randrange(23000, 32000)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class RunningService:
    """`with RunningService(folder, "--port=0", "generator-uri") as service:` up and ready, ended at the end."""

    def __init__(self, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.env_file = folder / "serve-env"
        command = [sys.executable, "-m", "serve.local", *arguments, f"--env={self.env_file}"]
        with (folder / "errors.log").open("ab") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=plain_environment(**QUICK) | dict(environment or {}), stdout=subprocess.PIPE,
                stderr=errors, text=True, start_new_session=True,
            )  # fmt: skip
        self.told: list[str] = []

    def __enter__(self) -> Self:
        alarm = threading.Timer(STARTS_S, self.process.kill)
        alarm.start()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.told.append(line.strip())
            if line.strip().startswith("all routes:"):
                alarm.cancel()
                return self
        alarm.cancel()
        self.kill()
        raise AssertionError(f"the service did not start: {self.told} {self.errors()[-4000:]}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()
        self.kill()

    @property
    def url(self) -> str:
        return self._environment()["SCANLOOM_URL"]

    @property
    def key(self) -> str:
        return self._environment()["SCANLOOM_API_KEY"]

    def client(self, timeout_s: float = 60.0) -> httpx.Client:
        """With URL and key, over connections of its own."""
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=timeout_s, trust_env=False
        )

    def errors(self) -> str:
        """What it said on standard error."""
        return (self.folder / "errors.log").read_text(errors="replace")

    def logs(self) -> str:
        """What its processes said on standard error."""
        folder = Path(self.told[-1].rpartition("logs: ")[2])
        return "".join(file.read_text(errors="replace") for file in sorted(folder.glob("worker-*.err")))

    def workers(self, part: str) -> list[int]:
        """Process ids of a part."""
        return named(self.process.pid, WORKERS[part])

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """Kill what is left of it."""
        for process in [self.process.pid, *descendants(self.process.pid)] if self.process.poll() is None else ():
            kill(process)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _environment(self) -> dict[str, str]:
        words = (shlex.split(line) for line in self.env_file.read_text(encoding="utf-8").splitlines())
        return dict(assignment.split("=", 1) for export, assignment in words if export == "export")


def written(folder: Path, tree: Mapping[str, Any]) -> str:
    """A config file of this content."""
    file = folder / "service.yaml"
    file.write_text(yaml.safe_dump(dict(tree)), encoding="utf-8")
    return str(file)


def wait_until(condition: Callable[[], bool], within_s: float, what: str) -> float:
    """Seconds until the condition held. AssertionError where it does not within `within_s`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > within_s:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        threading.Event().wait(0.05)
    return time.monotonic() - began
