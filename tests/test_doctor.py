"""`scanloom doctor` finds what would stop a job: each fault put in by itself, and a site without any."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from scanloom import cluster as cluster_module
from scanloom.cli import app
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.store import Store
from tests.fault_proxy import FaultProxy
from tests.remote_cluster import RemoteCluster

ROOT = Path(__file__).resolve().parents[1]
PROD = str(ROOT / "k8s" / "overlays" / "prod" / "recipe.yaml")
ALWAYS = -1

pytestmark = pytest.mark.s3


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture
def proxy(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        monkeypatch.setenv("COLUMNS", "300")
        yield found


def test_a_store_with_all_rights_is_usable_and_left_as_it_was(store_uri: str, proxy: FaultProxy) -> None:
    done = doctor(store_uri)
    assert (done.exit_code, "can be read and written, listed, and created in only once" in done.stdout) == (0, True)
    assert Store(store_uri).list() == []


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials(store_uri: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "wrong")
    done = doctor(store_uri)
    assert (done.exit_code, "refused the credentials" in done.stdout) == (1, True)


@pytest.mark.parametrize(
    "kind, where, reason",
    [
        pytest.param("accept", {"method": "PUT", "times": 2}, "ignores If-None-Match", id="no conditional put"),
        pytest.param("403", {"method": "PUT"}, "these credentials may not do this (PutObject", id="can only be read"),
        pytest.param("403", {"method": "GET", "path": "scanloom-doctor"}, "may not do this", id="cannot be read back"),
    ],
)
def test_a_store_that_cannot_be_used(
    store_uri: str, proxy: FaultProxy, kind: Any, where: dict[str, Any], reason: str
) -> None:
    proxy.inject(kind, **{"times": ALWAYS} | where)
    done = doctor(store_uri)
    assert (done.exit_code, reason in done.stdout) == (1, True)


def test_no_right_to_delete(store_uri: str, proxy: FaultProxy) -> None:
    proxy.inject("403", method="POST|DELETE", times=ALWAYS)
    done = doctor(store_uri)
    assert (done.exit_code, "grant s3:DeleteObject" in done.stdout) == (1, True)
    assert "can be read and written" in done.stdout


def test_a_clock_that_is_wrong(store_uri: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "_now", lambda: datetime.now(UTC) + timedelta(minutes=20))
    done = doctor(store_uri)
    assert (done.exit_code, "set both by NTP" in done.stdout) == (1, True)
    assert "behind" in done.stdout


def test_a_clock_that_is_right(proxy: FaultProxy) -> None:
    assert cluster_module.clock("a clock", format_datetime(datetime.now(UTC), usegmt=True)).usable


# --- a real cluster -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(s3: EmbeddedS3) -> Iterator[RemoteCluster]:
    with RemoteCluster() as found:
        yield found


def examined(cluster: RemoteCluster, *options: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of the command in a process of its own."""
    command = [sys.executable, "-c", "import sys; from scanloom.cli import main; sys.exit(main())"]
    command += ["doctor", "--cluster", cluster.address, *options]
    env = os.environ | cluster.environment() | {"COLUMNS": "300"} | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_rays_own_dashboard_is_understood(cluster: RemoteCluster, store_uri: str, tmp_path: Path) -> None:
    code, told = examined(cluster, store_uri)
    assert (code, "1 nodes" in told, "cluster's Ray" in told) == (0, True, True), told
    assert examined(cluster, RAY_AUTH_TOKEN="", HOME=str(tmp_path))[1].count("RAY_AUTH_TOKEN is not set") == 1
    code, told = examined(cluster, RAY_AUTH_TOKEN="another's")
    assert (code, "RAY_AUTH_TOKEN is not this cluster's" in told) == (1, True)
    code, told = examined(cluster, "--recipe", PROD)
    assert (code, "the recipe needs 4" in told) == (1, True)
    (tmp_path / "ray-9.9.9.dist-info").mkdir()
    (tmp_path / "ray-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 9.9.9\n")
    path = f"{tmp_path}{os.pathsep}{ROOT / 'platform'}"
    code, told = examined(cluster, PYTHONPATH=path)
    assert (code, "9.9.9 is installed here" in told) == (1, True), told
