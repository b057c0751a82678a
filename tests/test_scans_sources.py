"""Sources: every file of every unit comes out once, whatever state its archive, its table or it itself is in."""

from __future__ import annotations

import ast
import io
import re
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError
from scanloom.recipe import (
    CategoryAttribute,
    DicomTarSource,
    ImageFolderSource,
    LabelsAttribute,
    NumberAttribute,
    PhantomSource,
    Source,
)
from scanloom.scans import archive
from scanloom.scans.archive import read_archive
from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.phantoms import phantom
from scanloom.scans.quarantine import CODES
from scanloom.scans.sources import Context, Scan, Unit, list_units, locate, read_unit
from scanloom.store import Store
from tests.made_dicom import KEY, file, radiograph, tar

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", source="PatientSex", values=("F", "M")),
        NumberAttribute(name="age", source="PatientAge", unit="years", minimum=0, maximum=90, cap=90),
        CategoryAttribute(name="view", source="ViewPosition", values=("PA", "AP")),
        LabelsAttribute(name="findings", source="ImageComments", values=("Effusion", "Mass")),
    )
)
CONTEXT = Context(SCHEMA, Pseudonyms(KEY.encode()), seed=3, size_px=32)


def found(source: Source, unit: Unit) -> list[Scan | str]:
    """Scans and refusal codes in order; ordinals must run from 0 without a gap."""
    results = list(read_unit(source, unit, CONTEXT))
    assert [ordinal for ordinal, _ in results] == list(range(len(results)))
    return [result.code if isinstance(result, ScanError) else result for _, result in results]


def codes(results: Iterable[Scan | str]) -> list[str]:
    return [result if isinstance(result, str) else "scan" for result in results]


# --- archives -------------------------------------------------------------------------------------------------


def members(store: Store, key: str) -> list[bytes | str]:
    size = next(o.bytes for o in store.list() if o.key == key)
    results = list(read_archive(store, key, size))
    assert [ordinal for ordinal, _ in results] == list(range(len(results)))
    return [content.code if isinstance(content, ScanError) else content for _, content in results]


FILES = [(f"{i}.dcm", bytes([65 + i]) * (700 + i)) for i in range(4)]
CONTENTS = [data for _, data in FILES]


def kept(data: bytes, tmp_path: Path, name: str = "a.tar") -> list[bytes | str]:
    (tmp_path / name).write_bytes(data)
    return members(Store(str(tmp_path)), name)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_whole_archive_gives_its_files_in_order(tmp_path: Path, mode: str) -> None:
    assert kept(tar(FILES, mode), tmp_path) == CONTENTS


def test_an_archive_cut_anywhere_ends_with_one_refusal_and_keeps_what_came_before(tmp_path: Path) -> None:
    whole = tar(FILES)
    # Each file takes a header block and two blocks of content.
    for blocks in range(12):
        for extra in (0, 100):
            results = kept(whole[: blocks * 512 + extra], tmp_path)
            complete = [c for i, c in enumerate(CONTENTS) if blocks * 512 + extra >= i * 1536 + 512 + len(c)]
            assert results == [*complete, "broken-archive"], (blocks, extra)


def test_a_damaged_header_in_the_middle_is_no_silent_end(tmp_path: Path) -> None:
    damaged = bytearray(tar(FILES))
    damaged[1536 + 20] ^= 0xFF
    assert kept(bytes(damaged), tmp_path) == [CONTENTS[0], "broken-archive"]


def test_a_compressed_archive_that_is_cut_or_flipped_ends_with_one_refusal(tmp_path: Path) -> None:
    noise = [(f"{i}", np.random.default_rng(i).bytes(900)) for i in range(4)]
    whole = tar(noise, "w:gz")
    cut = kept(whole[: len(whole) // 2], tmp_path)
    assert cut[-1] == "broken-archive"
    assert cut[:-1] == [data for _, data in noise][: len(cut) - 1]
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    assert kept(bytes(flipped), tmp_path) == [*(data for _, data in noise), "broken-archive"]


@pytest.mark.parametrize("data", [b"", b"not a tar" * 200, b"\x1f\x8b not gzip"])
def test_what_is_no_archive_at_all_gives_one_refusal(tmp_path: Path, data: bytes) -> None:
    assert kept(data, tmp_path) == ["broken-archive"]


def test_links_are_refused_and_folders_are_no_files(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as made:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            made.addfile(entry)
    assert kept(sink.getvalue(), tmp_path) == ["archive-link", "archive-link"]


def test_a_member_over_the_limit_is_refused_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 701)
    assert kept(tar(FILES), tmp_path) == [*CONTENTS[:2], "too-large", "too-large"]


def test_an_archive_is_streamed_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar([(f"{i}", bytes(8 << 20)) for i in range(12)]))
    size = (tmp_path / "a.tar").stat().st_size
    tracemalloc.start()
    try:
        count = sum(len(c) for _, c in read_archive(Store(str(tmp_path)), "a.tar", size) if isinstance(c, bytes))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 12 * (8 << 20)
    assert peak < size / 2


# --- DICOM in tar shards --------------------------------------------------------------------------------------


def test_units_are_the_objects_by_key_and_say_no_name(tmp_path: Path) -> None:
    for name in ("MRN-2.tar", "MRN-10.tar.gz", "notes.txt"):
        (tmp_path / name).write_bytes(tar({"MRN-1.dcm": file()}, "w:gz" if name.endswith("gz") else "w"))
    source = DicomTarSource(uri=str(tmp_path))
    units = list_units(source, SCHEMA)
    assert [unit.name for unit in units] == ["tar-000000", "tar-000001", "tar-000002"]
    assert [codes(found(source, unit)) for unit in units] == [["scan"], ["scan"], ["not-an-archive"]]
    assert locate(source, units[1], 0).endswith("MRN-2.tar MRN-1.dcm")
    assert locate(source, units[2], 0).endswith("notes.txt")


def test_the_seven_bad_files_of_the_real_shards_have_their_own_codes(nih_dicom: Path) -> None:
    source = DicomTarSource(uri=str(nih_dicom))
    unit = list_units(source, SCHEMA)[7]
    results = codes(found(source, unit))
    assert len(results) == 65
    # The duplicate is one only beside the first unit; alone it is a scan.
    bad = ["truncated", "not-dicom", "empty-file", "no-pixels", "not-an-image", "burned-in-text", "scan"]
    assert results == ["scan"] * 58 + bad


def test_an_empty_prefix_is_one_clear_error(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RecipeError, match=r"no \.tar or \.tar\.gz .*prepare\.source\.uri"):
            list_units(DicomTarSource(uri=str(place)), SCHEMA)


# --- image folder ---------------------------------------------------------------------------------------------

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)


def png(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(radiograph(8, (64, 64), seed)).save(sink, "PNG")
    return sink.getvalue()


def nih_folder(tmp_path: Path, table: str, images: Iterable[str], header: str = NIH_HEADER) -> ImageFolderSource:
    for seed, name in enumerate(images):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(seed))
    (tmp_path / "labels.csv").write_text(header + table, encoding="utf-8-sig")
    return ImageFolderSource(
        uri=str(tmp_path), table=str(tmp_path / "labels.csv"), preset="nih-cxr14", files_per_unit=2
    )


def test_nihs_table_is_read_with_its_odd_columns_and_a_recipe_for_dicom(tmp_path: Path) -> None:
    table = (
        "1_000.png,Mass|Hernia,0,1,058,F,AP,2000,1000,0.2,0.1,\n"
        "1_001.png,No Finding,1,1,059Y,F,PA,2000,1000,,,\n"
        "9_000.png,Effusion,0,9,77,M,PA,1,1,1,1,\n"
    )
    source = nih_folder(tmp_path, table, ["images/1_000.png", "images/1_001.png"])
    (unit,) = list_units(source, SCHEMA)
    first, second = found(source, unit)
    assert isinstance(first, Scan)
    assert isinstance(second, Scan)
    assert dict(first.subject.attributes) == {"sex": "F", "age": 58.0, "view": "AP", "findings": ("Mass",)}
    assert dict(second.subject.attributes) == {"sex": "F", "age": 59.0, "view": "PA", "findings": ()}
    # 2000 x 0.2 mm are 400 mm over 64 pixels, 1000 x 0.1 mm are 100 mm: NIH stretched the original to a square.
    assert first.image.spacing_mm == (100 / 64, 400 / 64)
    assert second.image.spacing_mm is None
    assert first.subject.patient == second.subject.patient
    assert first.subject.study != second.subject.study
    np.testing.assert_array_equal(first.image.pixels, radiograph(8, (64, 64), 0))


def test_the_later_nih_table_says_sex_instead_of_gender(tmp_path: Path) -> None:
    source = nih_folder(tmp_path, "a.png,Mass,0,1,58,M,AP,1,1,1,1,\n", ["a.png"], NIH_HEADER.replace("Gender", "Sex"))
    (scan,) = found(source, list_units(source, SCHEMA)[0])
    assert isinstance(scan, Scan)
    assert scan.subject.attributes["sex"] == "M"


def test_files_that_the_table_or_the_folder_lets_down_are_refused_each_with_its_code(tmp_path: Path) -> None:
    table = (
        "a.png,Mass,0,1,58,F,AP,1,1,1,1,\n"
        "b.png,Mass,0,1,58,F,AP,1,1,1,1,\n"
        "b.png,Mass,0,2,58,F,AP,1,1,1,1,\n"
        "d.png,Mass,0,,58,F,AP,1,1,1,1,\n"
        "e.png,Mass,0,1,old,F,AP,1,1,1,1,\n"
        "f.png,Mass,0,1,-4,F,AP,1,1,1,1,\n"
        "a.png,Mass,0,1,58,F,AP,1,1,1,1,\n"
    )
    source = nih_folder(tmp_path, table, [f"{letter}.png" for letter in "abcdef"])
    (tmp_path / "g.txt").write_text("a letter")
    units = list_units(source, SCHEMA)
    assert [unit.name for unit in units] == ["images-000000", "images-000001", "images-000002", "images-000003"]
    assert [code for unit in units for code in codes(found(source, unit))] == [
        "scan",
        "ambiguous-table-row",
        "no-table-row",
        "no-patient-id",
        "attribute-not-a-number",
        "attribute-out-of-range",
        "not-an-image-file",
    ]
    assert locate(source, units[1], 0) == str(tmp_path / "c.png")


def test_a_generic_table_needs_its_columns_and_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(0))
    (tmp_path / "t.csv").write_text("path,patient,gender\na.png,p,F\n")

    def source(**columns: str) -> ImageFolderSource:
        return ImageFolderSource(uri=str(tmp_path / "images"), table=str(tmp_path / "t.csv"), **columns)  # type: ignore[arg-type]

    schema = AttributeSchema(declarations=(CategoryAttribute(name="sex", source="gendr", values=("F",)),))
    with pytest.raises(RecipeError, match=r"no column 'file'"):
        list_units(source(), schema)
    with pytest.raises(RecipeError, match=r"no column 'gendr'; did you mean 'gender'"):
        list_units(source(file_column="path"), schema)
    good = AttributeSchema(declarations=(CategoryAttribute(name="sex", source="gender", values=("F",)),))
    (unit,) = list_units(source(file_column="path"), good)
    ((_, scan),) = read_unit(source(), unit, Context(good, CONTEXT.pseudonyms, 0, 8))
    assert isinstance(scan, Scan)


def test_the_real_png_are_all_scans(nih_png: Path) -> None:
    source = ImageFolderSource(
        uri=str(nih_png / "images"), table=str(nih_png / "labels.csv"), preset="nih-cxr14", files_per_unit=379
    )
    units = list_units(source, SCHEMA)
    assert [len(unit.files) for unit in units] == [379, 379]
    results = found(source, units[0])
    scans = [result for result in results if isinstance(result, Scan)]
    assert len(scans) == 379
    assert {scan.subject.attributes["view"] for scan in scans} == {"PA", "AP"}
    assert all(scan.image.spacing_mm and 0.3 < min(scan.image.spacing_mm) < 3 for scan in scans)


# --- phantoms -------------------------------------------------------------------------------------------------


def test_phantoms_are_drawn_once_each_with_their_patients() -> None:
    source = PhantomSource(scans=25, scans_per_unit=12)
    units = list_units(source, SCHEMA)
    assert [(unit.first, unit.count) for unit in units] == [(0, 12), (12, 12), (24, 1)]
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
        list_units(PhantomSource(), schema)


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
