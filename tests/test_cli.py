from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from scanloom.api_key import PATTERN
from scanloom.artefact import Artefact, FileEntry, Lineage, publish
from scanloom.cli import app
from scanloom.errors import RecipeError
from scanloom.overview import readable_bytes, statistic_rows
from scanloom.store import Store
from serve.access import Gatekeeper
from serve.config import Access

ROOT = Path(__file__).resolve().parents[1]


def _scanloom(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it, in a process of its own."""
    command = [sys.executable, "-c", "import sys; from scanloom.cli import main; sys.exit(main())", *arguments]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, env=env, timeout=120)


def _invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def artefact(tmp_path: Path) -> Artefact:
    store = Store(str(tmp_path / "corpus"))
    files = []
    for path in ("train/a.parquet", "train/b.parquet", "quarantine/c.parquet"):
        store.write(path, path.encode())
        files.append(FileEntry.of(store.digest(path)))
    return publish(
        store, kind="corpus", name="chests", recipe={"name": "demo"}, files=files,
        inputs=[Lineage(role="source", kind="scans", uri="s3://b/scans", digest="ab" * 32)],
        statistics={"scans": {"train": 80, "holdout": 9}, "cells": [{"sex": "F", "count": 1}] * 40},
    )  # fmt: skip


# --- key ------------------------------------------------------------------------------------------------------


def test_a_made_key_is_shown_once_and_its_entry_added_to_a_file_lets_it_in(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    keys = []
    for options in (
        ["--tenant", "clinic-a"],
        ["--tenant", "clinic-b", "--id", "lab", "--scope", "admin", "--days", "9"],
    ):
        result = _invoke("key", *options)
        assert result.exit_code == 0
        (key,) = re.findall(PATTERN, result.stderr)
        assert key not in result.stdout
        keys.append(key)
        with file.open("a") as stream:
            stream.write(result.stdout)
    keeper = Gatekeeper(Access(keys_file=str(file)))
    callers = [asyncio.run(keeper.admit(f"Bearer {key}")) for key in keys]
    assert [(caller.tenant, *sorted(caller.scopes)) for caller in callers] == [
        ("clinic-a", "datasets", "generate"),
        ("clinic-b", "admin"),
    ]
    assert callers[1].who == "lab"
    assert "expires" in yaml.safe_load(file.read_text())[1]


@pytest.mark.parametrize(
    "options",
    [["--tenant", "../x"], ["--tenant", "a", "--id", "b c"], ["--tenant", ""], ["--tenant", "a", "--scope", "root"]],
)
def test_a_key_for_what_is_no_name_or_no_scope_is_refused(options: list[str]) -> None:
    assert isinstance(_invoke("key", *options).exception, RecipeError)


# --- show -----------------------------------------------------------------------------------------------------


def test_show_tells_a_person_what_it_is_where_from_and_what_it_holds(artefact: Artefact) -> None:
    result = _invoke("show", artefact.uri)
    assert result.exit_code == 0
    for told in (
        "corpus chests", artefact.digest, artefact.uri, artefact.manifest.code_version, "s3://b/scans", "abababababab",
        "quarantine/", "train 80, holdout 9", "40 entries; --json prints them",
    ):  # fmt: skip
        assert told in result.stdout


def test_show_json_is_the_manifest_with_its_digest(artefact: Artefact) -> None:
    shown = json.loads(_invoke("show", artefact.uri, "--json").stdout)
    assert (shown.pop("uri"), shown.pop("digest")) == (artefact.uri, artefact.digest)
    assert shown == artefact.manifest.model_dump(mode="json")


def test_verify_passes_an_intact_artefact_and_names_what_is_not(artefact: Artefact) -> None:
    good = _invoke("show", artefact.uri, "--verify")
    assert (good.exit_code, "3 of 3 files are as the manifest says" in good.stdout) == (0, True)
    artefact.store.write("stray", b"")
    assert _invoke("show", artefact.uri, "--verify").exit_code == 0
    artefact.store.delete(["train/a.parquet"])
    artefact.store.write("train/b.parquet", b"other")
    bad = _invoke("show", artefact.uri, "--verify")
    assert bad.exit_code == 1
    assert "1 of 3 files" in bad.stdout
    for fault, path in (("missing", "train/a.parquet"), ("changed", "train/b.parquet"), ("extra", "stray")):
        assert any(fault in line and f"{artefact.uri}/{path}" in line for line in bad.stdout.splitlines())
    as_json = _invoke("show", artefact.uri, "--verify", "--json")
    assert as_json.exit_code == 1
    assert [p["fault"] for p in json.loads(as_json.stdout)["problems"]] == ["missing", "changed", "extra"]


def test_statistics_are_readable_whatever_their_shape() -> None:
    statistics = {
        "rows": 3, "rate": 1 / 3, "ok": True, "none": None, "empty": {}, "deep": {"a": {"b": [1, 2], "c": {"d": [{}]}}},
        "named": [{"name": "sex", "kind": "category", "values": ["F", "M"], "aliases": {}}], "long": list(range(99)),
    }  # fmt: skip
    assert dict(statistic_rows("", statistics)) == {
        "rows": "3", "rate": "0.333333", "ok": "yes", "none": "-", "empty": "-", "deep.a.b": "1, 2",
        "deep.a.c.d": "1 entries; --json prints them", "named.sex": "kind category; values F, M",
        "long": "99 entries; --json prints them",
    }  # fmt: skip


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (10**9 * 5 // 4, "1.25 GB")])
def test_sizes_are_decimal_and_short(count: int, text: str) -> None:
    assert readable_bytes(count) == text


# --- a new user's mistakes ------------------------------------------------------------------------------------


def _one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1] == line
    return line


def test_show_of_nothing_is_one_line(tmp_path: Path) -> None:
    assert "there is no artefact here" in _one_line(_scanloom("show", str(tmp_path)))


@pytest.mark.s3
def test_show_with_wrong_credentials_or_bucket_is_one_line(store_uri: str) -> None:
    assert "refused the credentials" in _one_line(_scanloom("show", store_uri, AWS_SECRET_ACCESS_KEY="wrong"))
    assert "there is no bucket" in _one_line(_scanloom("show", "s3://nobody-made-it/x"))


@pytest.mark.parametrize("job", ["inspect", "prepare", "encode", "finetune", "probe", "generate"])
def test_a_typo_in_a_recipe_is_told_before_anything_starts(tmp_path: Path, job: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("nam: x\n")
    error = _invoke(job, str(recipe)).exception
    assert isinstance(error, RecipeError)
    assert "unknown key 'nam'; did you mean 'name'?" in str(error)


def test_a_wrong_override_is_one_line() -> None:
    line = _one_line(_scanloom("generate", "jobs/recipes/demo.yaml", "--set", "generate.imags=5"))
    assert "did you mean 'images'?" in line


@pytest.mark.parametrize("arguments", [("prepare",), ("show",), ("prepar",), ("show", "x", "--jsn")])
def test_a_wrong_command_line_is_explained_without_a_traceback(arguments: tuple[str, ...]) -> None:
    result = _invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert "Traceback" not in result.stderr


# --- jobs -----------------------------------------------------------------------------------------------------


def _checkout_with(job: str, tmp_path: Path) -> Path:
    """A folder that looks like a checkout whose job tells how it was started."""
    (tmp_path / "jobs").mkdir()
    for name in ("__init__.py", "cluster.py"):
        (tmp_path / "jobs" / name).write_text("")
    (tmp_path / "jobs" / f"{job}.py").write_text("import sys; print(sys.argv[1:]); sys.exit(7)")
    return tmp_path


def test_a_job_gets_its_recipe_overrides_and_own_options_and_returns_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _checkout_with("prepare", tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"name": "r", "store": "x", "attributes": [_age()]}))
    code = (
        f"import sys, scanloom.cli as c; from pathlib import Path; c._jobs_folder = lambda: Path({str(root)!r}); "
        "sys.exit(c.main())"
    )
    command = [sys.executable, "-c", code, "prepare", "r.yaml", "--set", "seed=5", "--locate", "0:3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (7, "['r.yaml', '--set=seed=5', '--locate', '0:3']")


def test_inspect_hands_its_options_to_the_survey(tmp_path: Path) -> None:
    root = _checkout_with("survey", tmp_path)
    code = (
        f"import sys, scanloom.cli as c; from pathlib import Path; c._jobs_folder = lambda: Path({str(root)!r}); "
        "sys.exit(c.main())"
    )
    options = ["--sheet", "s.png", "--limit", "5", "--decode"]
    command = [sys.executable, "-c", code, "inspect", "s3://b/x", *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    told = "['s3://b/x', '--sheet=s.png', '--limit=5', '--examples=24', '--decode']"
    assert (result.returncode, result.stdout.strip()) == (7, told)


def _age() -> dict[str, object]:
    return {"name": "age", "kind": "number", "unit": "years", "minimum": 0, "maximum": 90}


def test_jobs_are_found_from_any_folder(tmp_path: Path) -> None:
    result = _scanloom("demo", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "--store-only" in result.stdout


# --- doctor and regenerate ------------------------------------------------------------------------------------


@pytest.mark.s3
def test_doctor_tries_a_store_and_fails_where_it_cannot_be_used(store_uri: str) -> None:
    good = _invoke("doctor", store_uri)
    assert good.exit_code == 0
    assert "can be read and written" in good.stdout
    for told in ("scanloom", "python", "torch", "GPUs"):
        assert told in good.stdout
    bad = _invoke("doctor", "s3://nobody-made-it")
    assert bad.exit_code == 1
    assert "there is no bucket" in bad.stdout


@pytest.mark.parametrize(("difference", "code", "verdict"), [(0, 0, "equal to the stored one"), (2, 1, "up to 2")])
def test_regenerate_writes_the_image_and_says_whether_it_equals_the_stored_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: int, code: int, verdict: str
) -> None:
    from scanloom.sampling import regeneration
    from scanloom.shards.writer import png_pixels

    made = np.full((4, 6), 250, np.uint8)
    asked = []

    def regenerate(*arguments: str | None) -> regeneration.Regenerated:
        asked.append(arguments)
        origin = {"device": "cpu", "threads": 1 + difference}
        stored = (made + difference).astype(np.uint8)
        return regeneration.Regenerated(made, stored, [origin], {"device": "cpu", "threads": 1})

    monkeypatch.setattr(regeneration, "regenerate", regenerate)
    out = tmp_path / "new" / "x.png"
    result = _invoke("regenerate", "s3://b/dataset", "0123", "--out", str(out))
    assert (result.exit_code, verdict in result.stdout) == (code, True)
    assert ("it was made with threads 3; here it is threads 1" in result.stdout) == bool(difference)
    assert asked == [("s3://b/dataset", "0123", None)]
    assert np.array_equal(png_pixels(out.read_bytes()), made)


def test_version_names_the_code() -> None:
    assert _invoke("--version").stdout.startswith("scanloom 0.")
