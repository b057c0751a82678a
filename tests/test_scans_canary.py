"""Nothing of a header leaves: every attribute that may name a patient holds a canary, and none is found anywhere."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import tarfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom import uid
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.tag import Tag

from jobs import prepare
from scanloom.artefact import Artefact, open_artefact
from scanloom.errors import ScanError
from scanloom.recipe import Decode
from scanloom.scans.corpus_plan import CurationPlan
from scanloom.scans.decode import frames, read_instance
from scanloom.scans.deidentify import KEY_VARIABLE
from scanloom.scans.dicom_objects import dicom_scans
from scanloom.scans.tally import SPLITS
from scanloom.shards.reader import rows
from scanloom.shards.writer import parquet_bytes, png_bytes, png_pixels
from scanloom.store import Store
from tests.made_canaries import (
    ALLOWED,
    DATE,
    IDEOGRAMS,
    REAL,
    SHORT,
    STEM,
    UIDS,
    WHOLE,
    canaries_below,
    canaries_in,
    canaries_of_object,
    canaries_of_table,
    canary,
    full_of_canaries,
    table_e_1_1,
    whole_file,
)
from tests.made_dicom import KEY, dataset, radiograph, tar
from tests.made_mutants import replaced
from tests.watched_reading import CONTEXT

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "jobs" / "recipes" / "nih-cxr.yaml"
SIDE = 64
CLASSES = (
    (uid.CTImageStorage, "CT"),
    (uid.DigitalXRayImageStorageForPresentation, "DX"),
    (uid.MRImageStorage, "MR"),
)


@pytest.fixture(autouse=True)
def pseudonym_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


# --- what is planted ------------------------------------------------------------------------------------------


def planted() -> list[bytes]:
    """A CT, a DX and an MR object."""
    return [
        full_of_canaries(radiograph(12, (SIDE, SIDE), seed), sop_class, modality, seed + 1)
        for seed, (sop_class, modality) in enumerate(CLASSES)
    ]


# Whatever is read to decode an image or to say of whom it is: any of it may be wrong, and then hold anything.
READ = (
    *("SpecificCharacterSet", "SOPClassUID", "Modality", "PatientAge", "PatientSex", "ViewPosition", "PixelSpacing"),
    *("BurnedInAnnotation", "RecognizableVisualFeatures", "PresentationIntentType", "SamplesPerPixel"),
    *("PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns", "BitsAllocated"),
    *("BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "WindowCenter"),
    *("WindowWidth", "VOILUTFunction", "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("VOILUTSequence", "ImagerPixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "PatientOrientation"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelData", "PatientID", "StudyDate"),
    *("PatientBirthDate", "SOPInstanceUID", "StudyInstanceUID", "ExtendedOffsetTable", "WindowCenterWidthExplanation"),
)


def misused(number: int, keyword: str, vr: str) -> bytes:
    """An object with a canary where a number, a term or a sequence is read."""
    made = dataset(radiograph(8, (32, 32), number))
    made.SOPInstanceUID, made.StudyInstanceUID = uid.UID(f"{UIDS}9.{number}"), uid.UID(f"{UIDS}8.{number}")
    made.SpecificCharacterSet = "ISO_IR 192"
    made.PatientName = canary(0x00100010, "PN")
    text = f"{STEM}{number:08X} {DATE} "
    return replaced(whole_file(made), Tag(keyword), vr.encode(), text.encode())


def refused() -> dict[str, bytes]:
    """Files that fail in every part of the way, each with canaries in it."""
    whole = planted()[0]
    found = {
        "letter": f"Dear {STEM}00000001, born {DATE}".encode() * 20,
        "cut": whole[: len(whole) - 3000],
        "cut-header": whole[:700],
        "empty": b"",
        "bad-sequence": whole.replace(b"\xfe\xff\xdd\xe0", b"\xfe\xff\xdd\xe1"),
        "trailing": whole + STEM.encode() * 40,
        "syntax": whole.replace(b"1.2.840.10008.1.2.1\0", f"1.2.{STEM}.8.1.2.1".encode()[:19] + b"\0", 1),
        "report": whole_file(_report()),
        "private-syntax": _with_syntax(whole, f"{UIDS}7"),
        "codestream": _with_syntax(whole, uid.JPEG2000Lossless),
    }
    for number, keyword in enumerate(READ):
        for vr in ("LO", "UT", "UN"):
            found[f"{keyword}-{vr}"] = misused(1000 + number, keyword, vr)
    return found


def _report() -> pydicom.FileDataset:
    made = dataset(radiograph(8), SOPClassUID=uid.BasicTextSRStorage, PixelData=None)
    made.ContentSequence = [pydicom.Dataset()]
    made.ContentSequence[0].TextValue = canary(0x0040A160, "UT")
    return made


def _with_syntax(data: bytes, syntax: str) -> bytes:
    made = pydicom.dcmread(io.BytesIO(data))
    made.file_meta.TransferSyntaxUID = uid.UID(syntax)
    sink = DicomBytesIO()
    made.file_meta.PrivateInformation = STEM.encode()
    write_file_meta_info(sink, made.file_meta, enforce_standard=False)
    at = data.index(b"\x08\x00\x05\x00")
    return (STEM.encode() * 16)[:128] + b"DICM" + sink.getvalue() + data[at:]


def fill(folder: Path) -> int:
    """Archives and loose objects named with canaries, of scans and of files that are refused; how many files."""
    folder.mkdir(parents=True)
    scans, bad = planted(), refused()
    named = [(f"{STEM}/{canary(0x00100010, 'SH', i)}-{IDEOGRAMS}.dcm", data) for i, data in enumerate(scans)]
    (folder / f"{STEM}-one.tar").write_bytes(tar(named[:1]))
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as made:
        made.comment = f"{STEM} {DATE}".encode()
        info = zipfile.ZipInfo(named[1][0])
        info.comment, info.extra = STEM.encode(), b"\x99\x99\x08\0" + STEM.encode()
        made.writestr(info, named[1][1])
    (folder / f"{STEM}-two.zip").write_bytes(sink.getvalue())
    (folder / STEM).mkdir()
    (folder / f"{STEM}/{IDEOGRAMS}.dcm").write_bytes(named[2][1])
    (folder / f"{STEM}-bad.tgz").write_bytes(tar([(f"{STEM}-{name}", data) for name, data in bad.items()], "w:gz"))
    (folder / f"{STEM}-cut.tar").write_bytes(tar([(f"{STEM}-lost.dcm", scans[0])])[:5000])
    (folder / f"{STEM}-note.txt").write_bytes(f"{STEM} {UIDS}".encode())
    return len(scans) + len(bad) + 2


def arguments(store: Path, source: Path, *more: str) -> list[str]:
    keys = {"store": store, "prepare.source.uri": source, "prepare.size_px": SIDE, "prepare.max_rejected_share": 0.999}
    keys |= {"prepare.split.train": 1.0, "prepare.split.validation": 0.0, "prepare.split.holdout": 0.0}
    overrides = [*(f"{key}={value}" for key, value in keys.items()), *more]
    return [str(RECIPE), *(part for override in overrides for part in ("--set", override))]


def said(captured: Sequence[str], source: Path) -> list[Any]:
    """Canaries in what was said; the source's own URI may be said, and holds none."""
    assert not canaries_in(str(source))
    return [found for text in captured for found in canaries_in(text)]


# --- the run --------------------------------------------------------------------------------------------------


def one_after_the_other(
    what: str, rows: Sequence[Mapping[str, Any]], work: Callable[..., dict[str, int]], plan: CurationPlan
) -> None:
    """What the job distributes, in this process; every object is searched after every unit, the staged ones too."""
    for row in rows:
        work(row, curation=plan.curation)
        assert canaries_below(plan.curation.store) == {}


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "connected", contextlib.nullcontext)
    monkeypatch.setattr(prepare, "_distribute", one_after_the_other)


@pytest.mark.usefixtures("without_ray")
def test_no_canary_is_in_an_object_a_log_or_on_the_screen(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    files = fill(tmp_path / "in")
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert prepare.main(arguments(tmp_path / "out", tmp_path / "in")) == 0
    spoken = capfd.readouterr()
    logged = [f"{record.getMessage()} {record.__dict__}" for record in caplog.records]
    warned = [str(warning.message) for warning in caught]
    assert said([spoken.out, spoken.err, *logged, *warned], tmp_path / "in") == []
    assert canaries_below(Store(str(tmp_path / "out"))) == {}
    require_all_there(open_artefact(str(tmp_path / "out" / "corpus"), "corpus"), files)


def require_all_there(corpus: Artefact, files: int) -> None:
    """The three objects are in the corpus, as they would be without canaries; the others are refused in many ways."""
    scans = {row["id"]: row for split in SPLITS for row in rows(corpus, split)}
    refusals = [row["code"] for row in rows(corpus, "quarantine")]
    statistics = corpus.manifest.statistics
    assert len(scans) + len(refusals) >= files
    assert len(set(refusals)) >= 10
    clean = [frame for seed in range(3) for frame in _shown(seed)]
    found = [png_pixels(row["image"]["bytes"]) for row in scans.values()]
    for pixels in clean:
        assert any(np.array_equal(pixels, other) for other in found)
    assert statistics["deidentification"][named("PatientName")].keys() == {"removed"}


def named(keyword: str) -> str:
    """How the report on de-identification names an attribute."""
    tag = Tag(keyword)
    return f"({tag.group:04X},{tag.element:04X}) {keyword}"


def _shown(seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """The object's pixels as they are shown where the bits beside the stored ones are empty."""
    sop_class, modality = CLASSES[seed]
    made = dataset(radiograph(12, (SIDE, SIDE), seed), bits_stored=12, SOPClassUID=sop_class, Modality=modality)
    for image in frames(read_instance(whole_file(made), Decode()), Decode()):
        assert not isinstance(image, ScanError)
        yield image.pixels


@pytest.mark.ray
def test_no_canary_is_in_an_object_or_a_log_of_the_whole_job(
    ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    files = fill(tmp_path / "in")
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in")) == 0
    spoken = capfd.readouterr()
    assert said([spoken.out, spoken.err], tmp_path / "in") == []
    assert canaries_below(Store(str(tmp_path / "out"))) == {}
    require_all_there(open_artefact(str(tmp_path / "out" / "corpus"), "corpus"), files)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[attr-defined]
    read = [path for path in logs.rglob("*") if path.is_file() and path.stat().st_size]
    assert any(path.name.startswith("worker-") for path in read)
    assert {path.name: found for path in read if (found := canaries_in(path.read_bytes()))} == {}


def test_no_canary_is_in_what_an_error_says() -> None:
    """Neither in its text nor in its traceback, as whoever catches it may log it."""
    raised = 0
    for name, data in refused().items():
        for _, result in dicom_scans(data, CONTEXT):
            if isinstance(result, ScanError):
                shown = "".join(traceback.format_exception(result)) + repr(result) + str(result)
                assert canaries_in(shown) == [], name
                raised += 1
    assert raised >= 40


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("keyword", ["PatientSex", "ViewPosition", "ImageComments"])
def test_a_canary_in_an_attribute_that_the_schema_names_is_withheld(keyword: str, tmp_path: Path) -> None:
    made = dataset(radiograph(8, (SIDE, SIDE)))
    setattr(made, keyword, f"{STEM}7")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_bytes(whole_file(made))
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in")) == 0
    assert canaries_below(Store(str(tmp_path / "out"))) == {}
    corpus = open_artefact(str(tmp_path / "out" / "corpus"), "corpus")
    assert corpus.manifest.statistics["deidentification"][named(keyword)] == {"withheld": 1}
    (row,) = rows(corpus, "train")
    declared = {"PatientSex": "sex", "ViewPosition": "view", "ImageComments": "findings"}
    assert row[declared[keyword]] in (None, [])


# --- the search itself ----------------------------------------------------------------------------------------


def test_the_planted_files_hold_every_attribute_of_the_table_and_much_beside() -> None:
    listed = {tag for tag, _ in table_e_1_1()} - ALLOWED
    assert len(listed) > 640
    for data in planted():
        made = pydicom.dcmread(io.BytesIO(data))
        present = {int(tag) for tag in [*made.keys(), *made.file_meta.keys()]}
        assert listed - present == set()
        depths = [element.tag for element in made.iterall() if element.VR == "SQ"]
        assert len(depths) > 150
        assert len({tag.group for tag in made.keys() if tag.is_private}) == 4  # noqa: SIM118 - a Dataset iterates values
        assert {0x60003000, 0x60023000, 0x601E3000, 0x50003000, 0xFFFCFFFC} <= present
        assert len(canaries_in(data)) > 4000
        assert canaries_in(data[:128])
        assert canaries_in(np.frombuffer(made.PixelData, np.uint16).__rshift__(12).astype(np.uint8).tobytes()) == []


def test_the_search_finds_a_canary_however_it_is_written() -> None:
    text = f"{STEM}00100010"
    for leaked in (
        text.encode(),
        text.lower().encode(),
        text.encode("utf-16"),
        text.encode().hex().encode(),
        *(base64.b64encode(bytes(shift) + text.encode()) for shift in range(3)),
        json.dumps({"name": IDEOGRAMS}).encode(),
        f"{UIDS}1.2".encode(),
        b"18871103",
        b"1887-11-03",
        str(REAL).encode(),
    ):
        assert canaries_in(b"before" + leaked + b"after"), leaked
    assert canaries_in(b"PHI, 1887 or 73519") == []


def test_the_search_finds_a_canary_in_the_cells_and_pixels_of_parquet(tmp_path: Path) -> None:
    note = PngImagePlugin.PngInfo()
    note.add_text("comment", STEM, zip=True)
    sink = io.BytesIO()
    Image.fromarray(radiograph(8)).save(sink, "PNG", pnginfo=note)
    pixels = np.resize(np.frombuffer(STEM.encode(), np.uint8), (8, 8)).copy()
    for leaked in (
        f"{STEM}1",
        REAL,
        WHOLE,
        SHORT,
        sink.getvalue(),
        png_bytes(pixels),
        [STEM],
        {"bytes": STEM.encode()},
    ):
        table = pa.table({"column": [leaked] * 3})
        assert canaries_of_table(table), leaked
        data = parquet_bytes(table)
        assert canaries_of_object(data)
        (tmp_path / "object.parquet").write_bytes(data)
        assert canaries_below(Store(str(tmp_path))).keys() == {"object.parquet"}
    assert canaries_of_table(pa.table({f"{STEM}1": [1]}))
    assert canaries_of_object(parquet_bytes(pa.table({"column": [1, 2.5], "text": ["sex", None]}))) == []
    (tmp_path / "object.parquet").unlink()
    (tmp_path / STEM).write_bytes(b"")
    assert canaries_below(Store(str(tmp_path))).keys() == {STEM}


@pytest.mark.usefixtures("without_ray")
def test_a_leak_in_the_run_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: a reason that quotes the file stops the run above."""
    monkeypatch.setattr("scanloom.scans.dicom_objects._read", lambda content, context: iter([(None, leaking(content))]))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar({"a": planted()[0]}))
    with pytest.raises(AssertionError, match="quarantine"):
        prepare.main(arguments(tmp_path / "out", tmp_path / "in"))


def leaking(content: bytes) -> ScanError:
    return ScanError("not-dicom", "", f"not DICOM: {content[:20]!r}")


def test_an_archive_of_the_source_holds_canaries_in_its_names(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    with tarfile.open(tmp_path / "in" / f"{STEM}-one.tar") as made:
        assert all(canaries_in(name) for name in made.getnames())
    assert canaries_in((tmp_path / "in" / f"{STEM}-two.zip").read_bytes()[-30:])
    assert len(canaries_below(Store(str(tmp_path / "in")))) == 6
