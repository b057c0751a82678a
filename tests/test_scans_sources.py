"""Sources: every file of every unit comes out, whatever state its archive or it itself is in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError
from scanloom.recipe import (
    CategoryAttribute,
    Decode,
    DicomSource,
    LabelsAttribute,
    NumberAttribute,
    PhantomSource,
    Source,
)
from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.isolation import Fence
from scanloom.scans.phantoms import phantom
from scanloom.scans.quarantine import CODES
from scanloom.scans.scan import Context, Scan
from scanloom.scans.sources import files_per_unit, list_files, locate, read_unit
from scanloom.scans.units import Unit, cut
from tests.made_dicom import KEY, file, tar

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", source="PatientSex", values=("F", "M")),
        NumberAttribute(name="age", source="PatientAge", unit="years", minimum=0, maximum=90, cap=90),
        CategoryAttribute(name="view", source="ViewPosition", values=("PA", "AP")),
        LabelsAttribute(name="findings", source="ImageComments", values=("Effusion", "Mass")),
    )
)
CONTEXT = Context(SCHEMA, Pseudonyms(KEY.encode()), Decode(), seed=3, size_px=32)


def units_of(source: Source) -> list[Unit]:
    return cut(list_files(source, SCHEMA), files_per_unit(source), 0)


def found(source: Source, unit: Unit, context: Context = CONTEXT) -> list[Scan | str]:
    """Scans and refusal codes in order; members must run from 0 without a gap."""
    results = list(read_unit(source, unit, context))
    assert sorted({member for member, _, _ in results}) == list(range(1 + results[-1][0]))
    return [result.code if isinstance(result, ScanError) else result for _, _, result in results]


def codes(results: Iterable[Scan | str]) -> list[str]:
    return [result if isinstance(result, str) else "scan" for result in results]


# --- DICOM objects and archives of them -----------------------------------------------------------------------


def test_loose_objects_share_a_unit_and_archives_have_their_own(tmp_path: Path) -> None:
    for name in ("MRN-2.tar", "MRN-10.tar.gz"):
        (tmp_path / name).write_bytes(tar({"MRN-1.dcm": file()}, "w:gz" if name.endswith("gz") else "w"))
    for name in ("MRN-3/a.dcm", "MRN-3/b", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"notes" if "notes" in name else file())
    source = DicomSource(uri=str(tmp_path), files_per_unit=2)
    units = units_of(source)
    assert [unit.name for unit in units] == ["object-000000", "object-000001", "files-000002", "files-000003"]
    assert [codes(found(source, unit)) for unit in units] == [["scan"], ["scan"], ["scan"] * 2, ["not-dicom"]]
    assert locate(source, units[1], 0).endswith("MRN-2.tar MRN-1.dcm")
    assert locate(source, units[2], 1).endswith("MRN-3/b")
    with pytest.raises(IndexError):
        locate(source, units[2], 2)


def test_every_frame_of_an_object_is_a_scan_of_its_own(tmp_path: Path) -> None:
    pixels = np.arange(3 * 32 * 24, dtype=np.uint16).reshape(3, 32, 24)
    (tmp_path / "cine").write_bytes(file(pixels.reshape(96, 24), Rows=32, NumberOfFrames=3, bits_stored=16))
    (tmp_path / "still").write_bytes(file())
    source = DicomSource(uri=str(tmp_path))
    (unit,) = units_of(source)
    results = list(read_unit(source, unit, CONTEXT))
    assert [(member, frame) for member, frame, _ in results] == [(0, 0), (0, 1), (0, 2), (1, None)]
    subjects = [scan.subject for _, _, scan in results if isinstance(scan, Scan)]
    assert len({subject.id for subject in subjects}) == 4
    assert len({subject.patient for subject in subjects}) == 1
    assert subjects[0].actions == subjects[1].actions


def test_behind_the_fence_the_same_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"1": file(), "2": b"letter", "3": file()[:-9]}))
    source = DicomSource(uri=str(tmp_path))
    (unit,) = units_of(source)
    plain = found(source, unit)
    with Fence() as fence:
        fenced = found(source, unit, Context(SCHEMA, CONTEXT.pseudonyms, Decode(repair=False), 3, 32, fence))
    assert codes(fenced) == ["scan", "not-dicom", "truncated"]
    assert isinstance(plain[0], Scan)
    assert isinstance(fenced[0], Scan)
    assert plain[0].subject == fenced[0].subject
    np.testing.assert_array_equal(plain[0].image.pixels, fenced[0].image.pixels)


def test_the_seven_bad_files_of_the_real_shards_have_their_own_codes(nih_dicom: Path) -> None:
    source = DicomSource(uri=str(nih_dicom))
    results = codes(found(source, units_of(source)[7]))
    assert len(results) == 65
    # The duplicate is one only beside the first unit; alone it is a scan.
    bad = ["truncated", "not-dicom", "empty-file", "no-pixels", "not-an-image", "burned-in-text", "scan"]
    assert results == ["scan"] * 58 + bad


def test_an_empty_prefix_is_one_clear_error(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RecipeError, match=r"no objects under this prefix.*prepare\.source\.uri"):
            list_files(DicomSource(uri=str(place)), SCHEMA)


# --- phantoms -------------------------------------------------------------------------------------------------


def test_phantoms_are_drawn_once_each_with_their_patients() -> None:
    source = PhantomSource(scans=25, scans_per_unit=12)
    units = units_of(source)
    assert [unit.files[0].key for unit in units] == ["0-12", "12-24", "24-25"]
    scans = [scan for unit in units for scan in found(source, unit)]
    assert all(isinstance(scan, Scan) for scan in scans)
    known: list[Any] = [scan.subject for scan in scans if isinstance(scan, Scan)]
    assert len({subject.id for subject in known}) == 25
    assert len({subject.patient for subject in known}) == len({phantom(3, i, 16).patient for i in range(25)})
    drawn = phantom(3, 13, 32)
    assert known[13].attributes["age"] == drawn.age_years
    assert locate(source, units[1], 1) == "phantom 13"


def test_phantoms_refuse_an_attribute_they_do_not_have() -> None:
    schema = AttributeSchema(declarations=(CategoryAttribute(name="viewposition", values=("PA",)),))
    with pytest.raises(RecipeError, match="phantoms have no 'viewposition'; did you mean"):
        list_files(PhantomSource(), schema)


# --- the list of codes ----------------------------------------------------------------------------------------


def test_the_documented_codes_are_the_codes() -> None:
    text = (ROOT / "docs" / "quarantine.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]+) \| [^|]+ \|$", text, flags=re.MULTILINE))
    assert documented == dict(CODES)


def test_every_code_is_raised_somewhere_and_none_is_raised_that_is_not_listed() -> None:
    raised = set()
    for path in (ROOT / "platform" / "scanloom").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("reject", "ScanError") and node.args:
                raised |= {n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)}
    assert raised >= set(CODES)
    assert {code for code in raised if "-" in str(code)} <= set(CODES)
