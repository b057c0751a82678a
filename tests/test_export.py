"""A dataset exported into folders and into a PACS: everything once, interrupted or not, with the pixels it had."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from typer.testing import CliRunner

from scanloom.artefact import Artefact, publish
from scanloom.cli import app
from scanloom.dicom.checks import dciodvfy, violations
from scanloom.dicom.stow import Stow
from scanloom.errors import ArtefactError, StoreError
from scanloom.recipe import Generate
from scanloom.sampling.dataset import rows_to_bytes, write_shard
from scanloom.sampling.export import journal_uri, to_pacs, to_store
from scanloom.sampling.plan import compile_plan, specify
from scanloom.scans.pacs import Pacs
from scanloom.shards.commit import ShardCommit
from scanloom.shards.reader import rows as read_rows
from scanloom.shards.writer import image_pixels
from scanloom.store import Store
from tests.dicomweb_server import DicomWebServer
from tests.orthanc import orthanc
from tests.tiny_generator import STATISTICS


def made(uri: str, **changes: Any) -> Artefact:
    """Ten images of noise in three shards."""
    settings: dict[str, Any] = {"images": 10, "images_per_shard": 4, "slots": 4, "steps": 2, "bits_stored": 12}
    plan = compile_plan(specify(Generate(**settings | changes), "tiny", "a" * 64, STATISTICS))
    store = Store(uri)
    files = []
    for shard in range(plan.shards):
        rows = plan.rows(shard)
        pixels = np.random.default_rng(shard).integers(0, 4096, (len(rows), 24, 20)).astype(np.uint16)
        told = {"shard": shard, "rows": rows_to_bytes(rows), "pixels": pixels.tobytes(), "height": 24, "width": 20}
        row = write_shard(told | {"engine_s": 0.0, "environment": {}}, plan.spec, store)
        files += list(ShardCommit.model_validate_json(row["commit"]).files.values())
    statistics = {"spec": plan.spec.model_dump(mode="json"), "rows": 10}
    return publish(store, kind="dataset", name="d", recipe={}, inputs=[], files=files, statistics=statistics)


def pixels_of(dataset: Artefact) -> dict[str, np.ndarray[Any, Any]]:
    return {row["sop_instance_uid"]: image_pixels(row) for row in read_rows(dataset, "images")}


def require_equal(files: Mapping[str, bytes], dataset: Artefact) -> None:
    """These files, by UID, are the dataset's images."""
    wanted = pixels_of(dataset)
    assert files.keys() == wanted.keys()
    for uid, data in files.items():
        file = dcmread(io.BytesIO(data))
        assert file.SOPInstanceUID == uid
        assert violations(file) == []
        np.testing.assert_array_equal(file.pixel_array, wanted[uid])


def nothing(_: int) -> None:
    pass


@pytest.fixture
def dataset(tmp_path: Path) -> Artefact:
    return made(str(tmp_path / "dataset"))


@pytest.fixture
def server() -> Iterator[DicomWebServer]:
    with DicomWebServer([]) as running:
        yield running


def stow(server: DicomWebServer) -> Stow:
    return Stow(server.url, first_wait_s=0.001, attempts=3)


# --- folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["flat", "study"])
@pytest.mark.parametrize("stored", [True, False])
def test_a_folder_gets_every_image_once_under_its_uids(layout: Any, stored: bool, tmp_path: Path) -> None:
    dataset = made(str(tmp_path / "dataset"), dicom={"enabled": stored, "transfer_syntax": "htj2k"})
    target = Store(str(tmp_path / "out"))
    advanced: list[int] = []
    told = to_store(dataset, target, layout, 3, advanced.append)
    assert (told.stored, told.before, sum(advanced)) == (10, 0, 10)
    files = {}
    for found in target.list():
        data = target.read(found.key)
        file = dcmread(io.BytesIO(data))
        above = f"{file.PatientID}/{file.StudyInstanceUID}/{file.SeriesInstanceUID}/" if layout == "study" else ""
        assert found.key == f"{above}{file.SOPInstanceUID}.dcm"
        files[str(file.SOPInstanceUID)] = data
    require_equal(files, dataset)
    assert dciodvfy(next(iter(files.values()))).errors == ()


def test_a_folder_is_completed_not_written_again(dataset: Artefact, tmp_path: Path) -> None:
    target = Store(str(tmp_path / "out"))
    to_store(dataset, target, "study", 2, nothing)
    keys = [found.key for found in target.list()]
    before = {key: target.read(key) for key in keys}
    target.delete(keys[:3])
    target.write(keys[3], b"cut")
    untouched = {key: Path(target.path(key)).stat().st_mtime_ns for key in keys[4:]}
    told = to_store(dataset, target, "study", 2, nothing)
    assert (told.stored, told.before) == (4, 6)
    assert {key: target.read(key) for key in keys} == before
    assert {key: Path(target.path(key)).stat().st_mtime_ns for key in keys[4:]} == untouched


@pytest.mark.s3
def test_a_bucket_serves_as_a_folder(dataset: Artefact, store_uri: str) -> None:
    target = Store(store_uri)
    assert to_store(dataset, target, "flat", 4, nothing).stored == 10
    require_equal({f.key.removesuffix(".dcm"): target.read(f.key) for f in target.list()}, dataset)


def test_a_damaged_shard_is_not_exported(dataset: Artefact, tmp_path: Path) -> None:
    [shard, *_] = dataset.files("dicom")
    data = bytearray(dataset.store.read(shard.path))
    data[3000] ^= 1
    dataset.store.write(shard.path, bytes(data))
    target = Store(str(tmp_path / "out"))
    with pytest.raises(ArtefactError, match="changed since it was written"):
        to_store(dataset, target, "flat", 2, nothing)
    assert target.list() == []


# --- a PACS ---------------------------------------------------------------------------------------------------


def test_a_pacs_gets_every_image_once(dataset: Artefact, server: DicomWebServer) -> None:
    advanced: list[int] = []
    journal = Store(journal_uri(dataset, server.url))
    told = to_pacs(dataset, stow(server), journal, 3, advanced.append)
    assert (told.stored, told.before, told.failed, sum(advanced)) == (10, 0, (), 10)
    require_equal(server.files, dataset)
    again = to_pacs(dataset, stow(server), journal, 3, advanced.append)
    assert (again.stored, again.before) == (0, 10)
    assert sum(len(uids) for uids in server.arrivals) == 10


def test_an_export_that_broke_off_goes_on_where_it_was(dataset: Artefact, server: DicomWebServer) -> None:
    journal = Store(journal_uri(dataset, server.url))
    first = True

    def break_after_the_first_shard(_: int) -> None:
        nonlocal first
        if first:
            server.inject("503", "/studies", times=3)
        first = False

    with pytest.raises(StoreError, match="run it again"):
        to_pacs(dataset, stow(server), journal, 1, break_after_the_first_shard)
    assert len(server.files) == 4
    told = to_pacs(dataset, stow(server), journal, 1, nothing)
    assert (told.stored, told.before) == (6, 4)
    assert sum(len(uids) for uids in server.arrivals) == 10
    require_equal(server.files, dataset)


def test_what_a_pacs_refused_is_told_and_sent_again_next_time(dataset: Artefact, server: DicomWebServer) -> None:
    journal = Store(journal_uri(dataset, server.url))
    uids = list(pixels_of(dataset))
    server.refusals = {uids[2]: [0x0110], uids[7]: [0xC000]}
    server.warnings = {uids[0]: 0xB000}
    told = to_pacs(dataset, stow(server), journal, 2, nothing)
    assert (told.stored, told.before) == (8, 0)
    assert {o.uid: o.reason for o in told.failed} == {
        uids[2]: "processing failed (0110)",
        uids[7]: "cannot be understood (C000)",
    }
    assert [o.uid for o in told.warned] == [uids[0]]
    again = to_pacs(dataset, stow(server), journal, 2, nothing)
    assert (again.stored, again.before, again.failed) == (2, 8, ())
    require_equal(server.files, dataset)


def test_another_pacs_or_another_dataset_has_another_journal(dataset: Artefact, tmp_path: Path) -> None:
    other = made(str(tmp_path / "other"), seed=1)
    journals = {journal_uri(d, root) for d in (dataset, other) for root in ("http://a/dicom-web", "http://b/dicom-web")}
    assert len(journals) == 4
    assert journal_uri(dataset, "http://a/dicom-web/") in journals


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command_exports_to_a_folder_and_to_a_pacs(
    dataset: Artefact, server: DicomWebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CliRunner()
    done = run.invoke(app, ["export", dataset.uri, "--to", str(tmp_path / "out"), "--layout", "flat"])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "out").glob("*.dcm"))) == 10
    monkeypatch.setenv("SCANLOOM_DICOMWEB_AUTHORIZATION", "Bearer abc")
    uid = next(iter(pixels_of(dataset)))
    server.refusals = {uid: [0x0110]}
    journal = str(tmp_path / "journal")
    told = run.invoke(app, ["export", dataset.uri, "--to", server.url, "--rate", "10000", "--journal", journal])
    assert told.exit_code == 1
    assert uid in told.output
    assert "processing failed" in told.output
    assert {headers.get("Authorization") for _, headers in server.requests} == {"Bearer abc"}
    again = run.invoke(app, ["export", dataset.uri, "--to", server.url, "--journal", journal])
    assert again.exit_code == 0, again.output
    require_equal(server.files, dataset)


# --- Orthanc --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sop_class, syntax", [("DX", "native"), ("CT", "jpeg-ls"), ("MR", "htj2k"), ("DX", "rle")])
def test_orthanc_takes_an_export_and_gives_equal_pixels_back(sop_class: str, syntax: str, tmp_path: Path) -> None:
    dataset = made(str(tmp_path / "dataset"), dicom={"sop_class": sop_class, "transfer_syntax": syntax})
    with orthanc(tmp_path) as root:
        told = to_pacs(dataset, Stow(root), Store(str(tmp_path / "journal")), 3, nothing)
        assert (told.stored, told.failed, told.warned) == (10, (), ())
        pacs = Pacs(root)
        files = {}
        for found in pacs.series({"Modality": sop_class}):
            study, series = (found[tag]["Value"][0] for tag in ("0020000D", "0020000E"))
            for uid in pacs.instances(study, series):
                files[uid] = pacs.instance(study, series, uid)
    require_equal(files, dataset)
