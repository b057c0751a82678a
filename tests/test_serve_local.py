"""`scanloom serve` before anything is started: what it refuses, in one line, and what it would run."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scanloom.api_key import fingerprint
from scanloom.errors import ArtefactError, RecipeError
from serve import local
from serve.config import Service
from tests.running_service import ROOT, config, plain_environment, written
from tests.tiny_generator import publish_generator


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_generator(str(tmp_path_factory.mktemp("store") / "generator")).uri


def options(place: str, folder: Path, **given: Any) -> argparse.Namespace:
    empty = dict.fromkeys(("demo", "host", "port", "name", "gate", "datasets")) | {"env": folder / "serve-env"}
    return argparse.Namespace(**(empty | {"place": place} | given))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which the command refuses its arguments, before anything is started."""
    # Put back at the end, whatever the command makes of them.
    for name in ("PYTHONPATH", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def refuse(*arguments: str) -> str:
        assert local.main(arguments) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1, told
        return told

    return refuse


def test_without_ray_in_the_process_its_variables_can_still_be_settled() -> None:
    told = "import sys, serve.local; print('ray' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", told], cwd=ROOT, env=plain_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "False False\n"


def test_a_folder_without_a_demo_says_what_to_run(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"{tmp_path}: no demo was run there; run `make demo` first" in refused("--demo", str(tmp_path))


def test_a_place_without_a_generator_says_what_to_run(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "make demo" in refused(str(tmp_path / "none"), "--name", "none")


def test_a_cluster_of_somebody_else_is_not_joined(
    refused: Callable[..., str], generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "serve deploy" in refused(generator)


def test_a_typo_in_a_config_file_is_one_line(refused: Callable[..., str], generator: str, tmp_path: Path) -> None:
    tree = config({"generators": [{"name": "tiny", "uri": generator}], "limits": {"image": 3}})
    assert "limits: unknown key 'image'; did you mean 'images'?" in refused(written(tmp_path, tree))


def test_a_port_that_is_taken_is_one_line(refused: Callable[..., str], generator: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = refused(generator, "--port", port, "--env", str(tmp_path / "env"))
    assert f"--port {port}: Address already in use; choose another" in told


def test_everybody_may_ask_on_loopback_only(generator: str, tmp_path: Path) -> None:
    tree = config({"generators": [{"name": "tiny", "uri": generator}], "access": {"open": True}})
    file = written(tmp_path, tree)
    plan = local._plan(options(file, tmp_path))
    assert plan.key is None
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org"):
        with pytest.raises(RecipeError, match=r"access\.open lets everybody in"):
            local._plan(options(file, tmp_path, host=host))
    for host in ("127.0.0.1", "::1", "localhost"):
        assert local._plan(options(file, tmp_path, host=host)).address[0] == host


def test_a_generator_alone_gets_a_key_that_stays_and_is_known_by_its_hash_only(generator: str, tmp_path: Path) -> None:
    plan = local._plan(options(generator, tmp_path, datasets=str(tmp_path / "served")))
    assert plan.key is not None
    assert [key.sha256 for key in plan.service.access.keys] == [fingerprint(plan.key)]
    assert plan.key not in repr(plan.config)
    assert Service.model_validate(plan.config["applications"][0]["args"]) == plan.service
    assert plan.address == ("127.0.0.1", 8000)
    assert plan.service.generators[0].name == "tiny"
    [offer] = local._require_generators(plan.service)
    plan.env_file.write_text("too open before", encoding="utf-8")
    local._tell(plan, offer, "/logs")
    assert plan.env_file.stat().st_mode & 0o777 == 0o600
    again = local._plan(options(generator, tmp_path))
    assert again.key == plan.key


def test_keys_of_a_config_file_are_left_as_they_are(generator: str, tmp_path: Path) -> None:
    key = {"id": "team", "sha256": "a" * 64, "tenant": "team"}
    tree = config({"generators": [{"name": "tiny", "uri": generator}], "access": {"keys": [key]}}, port=8123)
    plan = local._plan(options(written(tmp_path, tree), tmp_path, host="0.0.0.0"))
    assert plan.key is None
    assert plan.address == ("0.0.0.0", 8123)
    assert plan.url == "http://127.0.0.1:8123"
    assert [known.id for known in plan.service.access.keys] == ["team"]


def test_options_that_a_config_file_settles_are_refused(generator: str, tmp_path: Path) -> None:
    file = written(tmp_path, config({"generators": [{"name": "tiny", "uri": generator}]}))
    with pytest.raises(RecipeError, match="--datasets, --name and --gate are for one generator"):
        local._plan(options(file, tmp_path, datasets="served"))


def test_what_is_no_generator_is_told_before_ray_starts(tmp_path: Path) -> None:
    service = Service.model_validate({"generators": [{"name": "a", "uri": str(tmp_path)}]})
    with pytest.raises(ArtefactError, match="make demo"):
        local._require_generators(service)


def test_ray_is_told_of_as_many_processors_as_all_parts_together_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    served: dict[str, Any] = {"generators": [{"name": "a", "uri": "x"}], "replicas": {"most": 2, "cpus": 3}}
    assert local._processors(Service.model_validate(served)) == 7
    served["datasets"] = {"store": "x", "jobs_at_once": 1}
    assert local._processors(Service.model_validate(served)) == 12
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert local._processors(Service.model_validate(served)) == 64
