"""The demo as a newcomer meets it: its store can be served again, its failures say what to do, it runs to the end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scanloom.artefact import open_artefact
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.recipe import load_recipe
from scanloom.store import Store

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "jobs" / "recipes" / "demo.yaml"
SMALL = (
    "finetune.workers=1", "generate.engines=1", "finetune.steps=4", "finetune.warmup_steps=1",
    "finetune.log_every_steps=2", "generate.images=32", "generate.images_per_shard=16", "generate.steps=2",
    "generate.slots=8", "audit.copies.steps=4", "audit.copies.planted_scans=8", "audit.membership.scans=8",
    "audit.utility=null",
)  # fmt: skip


def _command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.demo", "--folder", str(folder), *arguments]


def _plain_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SCANLOOM_", "RAY_"))}
    return kept | {"PYTHONPATH": str(ROOT / "platform")} | more


def _run(folder: Path, *arguments: str, timeout_s: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(folder, *arguments), cwd=ROOT, env=_plain_environment(**more), capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip


def _environment_file(folder: Path) -> dict[str, str]:
    words = (shlex.split(line) for line in (folder / "env").read_text().splitlines())
    return dict(assignment.split("=", 1) for export, assignment in words if export == "export")


def test_the_store_of_an_earlier_run_is_served_until_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedS3(tmp_path / "s3") as s3:
        s3.create_bucket("scanloom-demo")
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        Store("s3://scanloom-demo/run").write("note", b"still here")
    server = subprocess.Popen(
        _command(tmp_path, "--store-only", "--set", "prepare.source.uri=s3://elsewhere/scans"),
        cwd=ROOT,
        env=_plain_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        assert "source" in server.stdout.readline()
        for name, value in _environment_file(tmp_path).items():
            monkeypatch.setenv(name, value)
        assert Store("s3://scanloom-demo/run").read("note") == b"still here"
        Store("s3://elsewhere/scans").require_bucket()
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.wait()
    assert (tmp_path / "env").stat().st_mode & 0o077 == 0


def test_a_job_that_fails_ends_the_demo_with_its_exit_code_and_what_to_do(tmp_path: Path) -> None:
    # A pseudonym key that is too short: the first job refuses it before it starts anything.
    done = _run(tmp_path, "--scans", "4", SCANLOOM_PSEUDONYM_KEY="short")
    assert done.returncode == 2
    assert "SCANLOOM_PSEUDONYM_KEY" in done.stderr
    assert "prepare ended with exit code 2; run the demo again" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_override_that_leaves_no_place_for_the_scans_is_one_line(tmp_path: Path) -> None:
    done = _run(tmp_path, "--set", "prepare.source={kind: phantoms}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "kind dicom" in done.stderr


@pytest.mark.parametrize("key", ["store", "prepare.source.uri"])
def test_a_place_that_the_demos_server_cannot_hold_is_one_line_before_anything_starts(tmp_path: Path, key: str) -> None:
    done = _run(tmp_path, "--set", f"{key}={tmp_path}/local")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "s3://BUCKET/FOLDER" in done.stderr
    assert not (tmp_path / "s3").exists()


def test_a_typo_in_an_override_names_the_nearest_key_before_anything_starts(tmp_path: Path) -> None:
    done = _run(tmp_path, "--set", "generate.imags=4")
    assert done.returncode == 2
    assert "did you mean 'images'" in done.stderr
    assert not (tmp_path / "s3").exists()


def test_the_recipe_sets_normal_and_enlarged_hearts_apart_by_nothing_but_the_finding() -> None:
    recipe = load_recipe(RECIPE)
    assert recipe.generate is not None
    assert recipe.generate.cohort.kind == "cells"
    cells = [dict(cell) for cell in recipe.generate.cohort.cells]
    shares = {f: sum(c["share"] for c in cells if c["findings"] == list(f)) for f in ((), ("Cardiomegaly",))}
    assert min(shares.values()) * recipe.generate.images >= 100 * sum(cell["share"] for cell in cells)
    others = {f: [{**c, "findings": None} for c in cells if c["findings"] == list(f)] for f in shares}
    assert others[()] == others[("Cardiomegaly",)]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_demo_runs_from_phantoms_to_contact_sheet_and_a_second_run_makes_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [word for override in SMALL for word in ("--set", override)]
    first = _run(tmp_path, "--scans", "72", *overrides, timeout_s=1500)
    assert first.returncode == 0, first.stderr[-4000:]
    figures = json.loads((tmp_path / "contact-sheet.json").read_text())
    assert figures["real"]["auc"] > 0.95
    assert Image.open(tmp_path / "contact-sheet.png").size[0] > 800
    before = (tmp_path / "contact-sheet.png").read_bytes()
    assert "the audit says: copies: " in first.stdout
    assert "Does it contain anybody's scan?" in (tmp_path / "report.html").read_text()
    with EmbeddedS3(tmp_path / "s3") as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        found = {
            kind: open_artefact(f"s3://scanloom-demo/run/{kind}").digest
            for kind in ("corpus", "autoencoder", "latents", "generator", "dataset", "dataset-audit")
        }
        assert open_artefact("s3://scanloom-demo/run/dataset").manifest.statistics["rows"] == 32
        assert open_artefact("s3://scanloom-demo/run/corpus").manifest.statistics["quarantined"] != {}
    for digest, uri in zip(found.values(), found, strict=True):
        assert f"scanloom show s3://scanloom-demo/run/{uri}" in first.stdout
        assert len(digest) == 64
    second = _run(tmp_path, "--scans", "72", *overrides, timeout_s=600)
    assert second.returncode == 0, second.stderr[-4000:]
    assert (tmp_path / "contact-sheet.png").read_bytes() == before
