"""How every job starts and how it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs import OWN_CLUSTER
from jobs.cluster import SPARE_CPUS, connected, interruptible, require_room, run_recipe
from jobs.release import main as release
from scanloom.errors import RecipeError

ROOT = Path(__file__).resolve().parents[1]

# Stands for Ray Train's fit: in the main thread it would take Ctrl-C for itself and wait on.
STUBBORN = """
import signal, sys, threading
from jobs.cluster import SPARE_CPUS, connected, interruptible, require_room
from scanloom.errors import RecipeError
def fit():
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: threading.Event().wait())
    print("working", flush=True)
    threading.Event().wait()
try:
    interruptible(fit)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_interruptible_work_gives_its_result_and_its_error() -> None:
    assert interruptible(lambda: 7) == 7
    with pytest.raises(ValueError, match="in the thread"):
        interruptible(lambda: int("in the thread"))


def test_interruptible_work_does_not_run_where_ray_train_would_take_the_interrupt() -> None:
    assert interruptible(threading.current_thread) is not threading.main_thread()


def test_one_interrupt_ends_work_that_would_wait_without_end() -> None:
    job = subprocess.Popen([sys.executable, "-c", STUBBORN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "working\n"
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=60) == 130
    finally:
        job.kill()
        job.wait()


def test_more_workers_than_the_machine_can_ever_start_are_refused_with_its_real_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0 + SPARE_CPUS})
    require_room(3, 0, "finetune.workers 3 x 1 CPUs")
    with pytest.raises(RecipeError, match=r"finetune\.workers 4 x 1 CPUs: this machine has 2 CPUs;"):
        require_room(4, 0, "finetune.workers 4 x 1 CPUs")
    with pytest.raises(RecipeError, match="needs 1 GPUs, this machine has 0;"):
        require_room(1, 1, "finetune.workers 1 x 1 CPUs")


@pytest.mark.parametrize(
    "given, address, spares", [(None, "local", True), ("", "local", True), ("10.0.0.1:6379", "10.0.0.1:6379", False)]
)
def test_no_cluster_is_joined_but_the_one_of_ray_address(
    monkeypatch: pytest.MonkeyPatch, given: str | None, address: str, spares: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: asked.update(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with connected():
        assert asked["address"] == address
    assert asked["num_cpus"] == ((os.cpu_count() or 1) + SPARE_CPUS if spares else None)


def ray_settings(**given: str) -> dict[str, str]:
    """What a job's process that is about to import Ray has set of OWN_CLUSTER."""
    environment = {name: value for name, value in os.environ.items() if name not in (*OWN_CLUSTER, "RAY_ADDRESS")}
    said = subprocess.run(
        [sys.executable, "-c", "import jobs, json, os; print(json.dumps(dict(os.environ)))"],
        cwd=ROOT, env=environment | given, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name: value for name, value in json.loads(said.stdout).items() if name in OWN_CLUSTER}


def test_rays_own_processes_are_quiet_on_a_cluster_of_the_jobs_own_alone() -> None:
    assert ray_settings() == OWN_CLUSTER
    assert ray_settings(RAY_event_stats="1") == OWN_CLUSTER | {"RAY_event_stats": "1"}
    assert ray_settings(RAY_ADDRESS="10.0.0.1:6379") == {}


def test_ray_reads_every_setting_of_a_cluster_of_the_jobs_own() -> None:
    installed = Path(ray.__file__).parent
    readers = [
        "core/src/ray/raylet/raylet", "_private/log_monitor.py", "dashboard/modules/reporter/reporter_consts.py",
        "train/v2/_internal/constants.py",
    ]  # fmt: skip
    known = b"".join((installed / reader).read_bytes() for reader in readers)
    assert not [name for name in OWN_CLUSTER if name.encode() not in known]


def test_a_cluster_that_may_grow_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    require_room(1000, 8, "finetune.workers 1000 x 1 CPUs")


HOST = """
import pathlib, subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
subprocess.run([sys.executable, "-c", sys.argv[1], cluster.address], check=True)
files = [file for file in pathlib.Path(cluster.head_node.get_session_dir_path()).rglob("*") if file.is_file()]
print(len(files), sum(b"a secret that links" in file.read_bytes() for file in files))
cluster.shutdown()
"""
DRIVER = """
import os, sys
os.environ["RAY_ADDRESS"] = sys.argv[1]
os.environ["SCANLOOM_PSEUDONYM_KEY"] = "a secret that links patients to names"
from jobs.cluster import connected
import ray, ray.data
def told(row):
    return {"key": os.environ.get("SCANLOOM_PSEUDONYM_KEY", "")}
with connected():
    print(*ray.get(ray.remote(told).remote({})).values())
    print(*ray.data.from_items([1]).map(told).take_all()[0].values())
"""


def test_the_workers_of_a_cluster_get_the_key_and_its_logs_do_not() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "platform")))}
    run = subprocess.run(
        [sys.executable, "-c", HOST, DRIVER], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    *told, searched = run.stdout.splitlines()
    assert told == ["a secret that links patients to names"] * 2
    files, leaks = map(int, searched.split())
    assert files > 10
    assert leaks == 0


def test_ray_is_told_no_secret_that_it_would_log(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: started.append(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("SCANLOOM_PSEUDONYM_KEY", "a secret that links patients to names")
    with connected():
        pass
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    with connected():
        pass
    ours, another = started
    assert "a secret" not in repr(ours)
    assert "a secret" not in repr(another)


def test_an_option_has_one_name_and_no_shorter_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_recipe(lambda _: None, "generate", "", ["recipe.yaml", "--se", "generate.images=4"])
    with pytest.raises(SystemExit):
        release(["recipe.yaml", "--policy", "p.yaml", "--to", "there", "--sign", "curl"])
    told = capsys.readouterr().err
    assert "unrecognized arguments: --se generate.images=4" in told
    assert "unrecognized arguments: --sign curl" in told
