"""The job that prepares a corpus: artefacts, mistakes, kill -9, and real scans of which nothing may be found in it."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pydicom
import pytest
import yaml

from jobs import prepare
from scanloom.artefact import Artefact, open_artefact, verify
from scanloom.errors import ArtefactError
from scanloom.recipe import load_recipe
from scanloom.scans.corpus_plan import STAGING, plan_curation
from scanloom.scans.curate import (
    curated_unit,
)
from scanloom.scans.deidentify import KEY_VARIABLE
from scanloom.scans.tally import SPLITS
from scanloom.shards.reader import read_parquet
from scanloom.store import Store
from tests.made_dicom import CANARY, KEY, UID_ROOT, tar
from tests.processes import kill, named
from tests.small_archive import RECIPE, arguments, fill, quarantined, require_apart, scan, scans_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def pseudonym_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


# --- the job --------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_local_run_makes_an_artefact_and_a_second_one_leaves_it(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = fill(tmp_path / "in")
    args = arguments(tmp_path / "out", tmp_path / "in")
    assert prepare.main(args) == 0
    shown = capsys.readouterr().out
    assert all(code in shown for code in expected)
    corpus = open_artefact(str(tmp_path / "out" / "corpus"), "corpus")
    assert list(verify(corpus)) == []
    assert len(scans_of(corpus)) == corpus.manifest.statistics["rows"] == 20
    assert Counter(code for *_, code in quarantined(corpus)) == expected
    require_apart(corpus)
    assert corpus.manifest.statistics["size_px"] == 32
    assert corpus.manifest.statistics["deidentification"]["(0010,0010) PatientName"] == {"removed": 23}
    before = (tmp_path / "out" / "corpus" / "manifest.json").read_bytes()
    assert prepare.main(args) == 0
    assert "was finished before" in capsys.readouterr().out
    assert (tmp_path / "out" / "corpus" / "manifest.json").read_bytes() == before
    assert prepare.main([*args, "--set", "prepare.size_px=64"]) == 2
    assert "of another plan" in one_line(capsys)
    assert prepare.main([*args, "--locate", "0:3"]) == 0
    assert "MRN-3.dcm" in capsys.readouterr().out


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failed job says."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.ray
def test_too_many_refusals_stop_with_the_table_and_a_higher_limit_goes_on(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = fill(tmp_path / "in")
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in", "prepare.max_rejected_share=0.1")) == 2
    said = capsys.readouterr()
    assert all(code in said.out for code in expected)
    assert "error: 8 of 28 scans were refused" in said.err
    with pytest.raises(ArtefactError, match="unfinished"):
        open_artefact(str(tmp_path / "out" / "corpus"))
    # What was read is not read again: the archives may be gone by now, their names and sizes stay.
    for archive in (tmp_path / "in").iterdir():
        archive.write_bytes(bytes(archive.stat().st_size))
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in")) == 0
    assert open_artefact(str(tmp_path / "out" / "corpus")).manifest.statistics["rows"] == 20


def test_mistakes_of_a_new_user_are_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "in")
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "empty")) == 2
    assert "no objects under this prefix" in one_line(capsys)
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in", "prepare.resise=crop")) == 2
    assert "did you mean 'resize'" in one_line(capsys)
    monkeypatch.delenv(KEY_VARIABLE)
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in")) == 2
    assert "secrets.token_hex" in one_line(capsys)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.ray
@pytest.mark.s3
def test_the_corpus_is_the_same_in_s3_and_in_a_folder(ray_cluster: None, tmp_path: Path, store_uri: str) -> None:
    fill(tmp_path / "in")
    Store(store_uri).put_folder(tmp_path / "in", "in")
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in")) == 0
    assert prepare.main(arguments(f"{store_uri}/out", f"{store_uri}/in")) == 0
    local, remote = open_artefact(str(tmp_path / "out" / "corpus")), open_artefact(f"{store_uri}/out/corpus")
    assert local.digest == remote.digest
    assert list(verify(remote)) == []
    assert scans_of(local) == scans_of(remote)


# --- kill -9 --------------------------------------------------------------------------------------------------


def start(args: list[str], **environment: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, KEY_VARIABLE: KEY, "RAY_AUTH_MODE": "disabled", **environment}
    command = [sys.executable, "-m", "jobs.prepare", *args]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_killed_between_two_units_is_resumed_to_the_same_corpus(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    fill(tmp_path / "in")
    # Enough work that units are still missing when the first is seen.
    for number in range(12):
        members = {f"{i}": scan(1000 * (number + 1) + i, 200 + i) for i in range(60)}
        (tmp_path / "in" / f"m{number:02d}.tar").write_bytes(tar(members))
    args = arguments(tmp_path / "killed", tmp_path / "in", "prepare.workers=1", "prepare.size_px=256")
    driver = start(args, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    try:
        shards = tmp_path / "killed" / "corpus" / STAGING / "commits"
        await_objects(shards, 1, driver)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    with pytest.raises(ArtefactError, match=r"unfinished|no artefact"):
        open_artefact(str(tmp_path / "killed" / "corpus"))
    assert 0 < len(list(shards.iterdir())) < 17
    assert prepare.main(args) == 0
    whole = arguments(tmp_path / "whole", tmp_path / "in", "prepare.size_px=256")
    assert prepare.main(whole) == 0
    killed = open_artefact(str(tmp_path / "killed" / "corpus"))
    undisturbed = open_artefact(str(tmp_path / "whole" / "corpus"))
    assert scans_of(killed) == scans_of(undisturbed)
    assert quarantined(killed) == quarantined(undisturbed)
    assert killed.digest == undisturbed.digest
    assert [problem for problem in verify(killed) if problem.fault != "extra"] == []


@pytest.fixture(scope="module")
def undisturbed(nih_dicom: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """The corpus of the real DICOM shards, made by a driver that nobody disturbs."""
    store = tmp_path_factory.mktemp("undisturbed")
    finish(start(arguments(store, nih_dicom)))
    return open_artefact(str(store / "corpus"))


def finish(driver: subprocess.Popen[bytes]) -> None:
    _, said = driver.communicate(timeout=300)
    assert driver.returncode == 0, said.decode()


def await_objects(folder: Path, count: int, driver: subprocess.Popen[bytes]) -> None:
    """Wait until the folder holds so many objects."""
    while len(list(folder.glob("*.json"))) < count:
        assert driver.poll() is None, driver.stderr.read().decode() if driver.stderr else ""
        time.sleep(0.005)


def same(store: Path, undisturbed: Artefact) -> bool:
    corpus = open_artefact(str(store / "corpus"))
    assert list(verify(corpus)) == []
    return corpus.digest == undisturbed.digest and scans_of(corpus) == scans_of(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(3))
def test_drivers_killed_while_they_stage_and_while_they_commit_leave_the_same_corpus(
    trial: int, nih_dicom: Path, tmp_path: Path, undisturbed: Artefact
) -> None:
    """Each driver has a Ray of its own, whose processes die with it."""
    chance = random.Random(trial)
    moments = [(tmp_path / "corpus" / STAGING / "commits", chance.randint(1, 7))]
    moments.append((tmp_path / "corpus" / "commits", chance.randint(1, 6)))
    for folder, count in moments:
        driver = start(arguments(tmp_path, nih_dicom))
        await_objects(folder, count, driver)
        driver.kill()
        driver.communicate()
        with pytest.raises(ArtefactError, match="unfinished"):
            open_artefact(str(tmp_path / "corpus"))
    finish(start(arguments(tmp_path, nih_dicom)))
    assert same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_killed_while_they_read_cost_nothing(
    nih_dicom: Path, tmp_path: Path, undisturbed: Artefact, workers: int
) -> None:
    driver = start(arguments(tmp_path, nih_dicom, f"prepare.workers={workers}"))
    killed = 0
    while driver.poll() is None and killed < 3:
        working = named(driver.pid, "stage_unit")
        killed += sum(kill(process) for process in working[:1])
        time.sleep(1.0 if working else 0.05)
    finish(driver)
    assert killed == 3
    assert same(tmp_path, undisturbed)


# --- real scans -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nih_corpus(ray_cluster: None, nih_dicom: Path, bucket: str) -> Artefact:
    """The corpus of the real DICOM shards, made by the job in S3."""
    store = f"s3://{bucket}/nih-{os.getpid()}"
    assert prepare.main(arguments(store, nih_dicom, "prepare.size_px=64")) == 0
    return open_artefact(f"{store}/corpus", "corpus")


@pytest.mark.ray
@pytest.mark.s3
def test_every_real_scan_and_each_bad_file_is_accounted_for(nih_corpus: Artefact) -> None:
    assert len(scans_of(nih_corpus)) == 758
    assert sorted(quarantined(nih_corpus)) == [
        (7, 58, "truncated"),
        (7, 59, "not-dicom"),
        (7, 60, "empty-file"),
        (7, 61, "no-pixels"),
        (7, 62, "not-an-image"),
        (7, 63, "burned-in-text"),
        (7, 64, "duplicate"),
    ]
    require_apart(nih_corpus)
    statistics = nih_corpus.manifest.statistics
    assert sum(statistics["patients"].values()) == 519
    assert statistics["bits_stored"] == {"8": 253, "16": 505}
    assert statistics["envelope"]["values"]["sex"].keys() == {"F", "M"}


@pytest.mark.ray
@pytest.mark.s3
def test_no_byte_of_any_object_names_a_real_patient(nih_corpus: Artefact, nih_dicom: Path) -> None:
    """Also under the compression: Parquet pages are searched as stored and as read."""
    needles = identifiers(nih_dicom)
    store = nih_corpus.store
    objects = store.list()
    assert {o.key.split("/")[0] for o in objects} >= {"train", "quarantine", "commits", "manifest.json"}
    for found in objects:
        for haystack in haystacks(nih_corpus, found.key):
            assert not [needle for needle in needles if needle in haystack], found.key


def identifiers(folder: Path) -> list[bytes]:
    """The canaries, and what is common to all original UIDs, patient numbers and file names."""
    names, uids = set(), set()
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                names.add(member.name.removesuffix(".dcm"))
                head = archive.extractfile(member).read(1200)  # type: ignore[union-attr]
                uids |= set(re.findall(rb"1\.2\.826\.[0-9.]+", head))
    numbers = {name for name in names if re.fullmatch(r"\d{8}_\d{3}", name)}
    assert len(numbers) == 758
    assert len(uids) > 2000
    assert all(uid.startswith(UID_ROOT.encode()) for uid in uids)
    return [CANARY.encode(), b"MRN-", UID_ROOT.encode(), *(name.encode() for name in sorted(numbers))]


def haystacks(corpus: Artefact, key: str) -> Iterator[bytes]:
    yield corpus.store.read(key)
    entries = {entry.path: entry for entry in corpus.manifest.files}
    if key in entries:
        table = read_parquet(corpus.store, entries[key])
        yield (
            b"\n".join(image["bytes"] for image in table["image"].to_pylist()) if "image" in table.column_names else b""
        )
        rest = [name for name in table.column_names if name != "image"]
        yield repr(table.select(rest).to_pylist()).encode()


def test_the_search_would_find_an_identifier_that_was_left(nih_dicom: Path) -> None:
    """A test of the test: in a source file every kind of needle is found."""
    with tarfile.open(nih_dicom / "scans-00003.tar") as archive:
        member = archive.next()
        assert member is not None
        data = archive.extractfile(member).read()  # type: ignore[union-attr]
    hay = member.name.encode() + data
    assert pydicom.dcmread(__import__("io").BytesIO(data)).PatientID.encode() in hay
    assert sum(needle in hay for needle in identifiers(nih_dicom)) == 4


def test_the_shipped_recipe_takes_png_with_their_table_too(nih_png: Path, tmp_path: Path) -> None:
    source = {"kind": "image-folder", "preset": "nih-cxr14", "uri": f"{nih_png}/images"}
    text = yaml.safe_dump(source | {"table": f"{nih_png}/labels.csv", "files_per_unit": 100}, default_flow_style=True)
    overrides = [f"store={tmp_path}", f"prepare.source={text.strip()}", "prepare.size_px=64"]
    plan = plan_curation(load_recipe(RECIPE, overrides))
    assert len(plan.units) == 8
    with curated_unit(plan.units[0], plan.curation) as (tables, _):
        assert sum(pq.read_metadata(tables[split]).num_rows for split in SPLITS if split in tables) == 100
        assert set(tables) <= {*SPLITS}
