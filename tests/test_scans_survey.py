"""A survey counts what is there, adds up however the source is cut, and tells nothing of anybody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scanloom.attributes import AttributeSchema
from scanloom.errors import ScanError
from scanloom.recipe import (
    CategoryAttribute,
    Decode,
    DicomSource,
    FixedWindow,
    LabelsAttribute,
    NumberAttribute,
    PhantomSource,
    load_recipe,
)
from scanloom.scans import survey as survey_module
from scanloom.scans.recognise import recognise
from scanloom.scans.sources import files_per_unit, list_files, read_unit
from scanloom.scans.starter_recipe import starter_recipe
from scanloom.scans.survey import PICTURE_PX, Example, Look, Survey, band, drawn, merged, pictures, survey_unit
from scanloom.scans.survey_report import remarks, report, tables
from scanloom.scans.units import Unit, cut
from scanloom.store import Store
from tests.dicomweb_server import DicomWebServer
from tests.made_dicom import KEY, UID_ROOT, file, radiograph, tar
from tests.test_scans_recognise import _png

SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", source="PatientSex", values=("F", "M")),
        NumberAttribute(name="age", source="PatientAge", unit="years", minimum=0, maximum=90, cap=90),
        CategoryAttribute(name="view", source="ViewPosition", values=("PA", "AP")),
        LabelsAttribute(name="findings", source="ImageComments", values=("Effusion", "Mass")),
    )
)


def _look(folder: Path, **given: Any) -> Look:
    return Look(DicomSource(uri=str(folder)), SCHEMA, Decode(), KEY.encode(), **given)


def _units(look: Look, files_in_unit: int | None = None) -> list[Unit]:
    return cut(list_files(look.source, look.schema), files_in_unit or files_per_unit(look.source), 0)


def _survey(look: Look, files_in_unit: int | None = None) -> Survey:
    return merged((survey_unit(unit, look) for unit in _units(look, files_in_unit)), look.examples)


def _report(look: Look) -> dict[str, Any]:
    return report(_survey(look), look, (), len(list_files(look.source, look.schema)))


def _fill(folder: Path, count: int = 12) -> None:
    """One scan a patient, every third of them a man, every second with an effusion; and what is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        content = file(
            radiograph(8, (32, 32), number),
            PatientID=f"P{number}",
            PatientSex="M" if number % 3 == 0 else "F",
            PatientAge=f"{min(95, 20 + 5 * number):03d}Y",
            ImageComments="Effusion" if number % 2 else "No Finding",
        )
        (folder / f"scan{number:02d}").write_bytes(content)
    (folder / "letter").write_bytes(b"a letter")
    (folder / "nobody").write_bytes(file(PatientID=None))


# --- what is counted ------------------------------------------------------------------------------------------


def test_a_survey_counts_what_is_there(tmp_path: Path) -> None:
    _fill(tmp_path)
    found = _report(_look(tmp_path))
    assert (found["kind"], found["scans"]) == ("dicom", 12)
    assert found["objects"]["listed"] == found["objects"]["looked_at"] == 14
    assert found["patients"] == {"count": 12, "exact": True}
    assert found["headers"]["modality"] == {"CR": 13}
    assert found["headers"]["rows x columns"] == {"32 x 32": 12, "48 x 40": 1}
    assert found["pixel_size"] == {"smallest": (32, 32), "largest": (48, 40)}
    assert found["quarantine"] == {"no-patient-id": 1, "not-dicom": 1}
    sex, age, view, findings = found["attributes"]
    assert sex["values"] == {"F": 8, "M": None}
    assert (age["low"], age["high"]) == (40, 55)
    assert view["values"] == {"PA": 12}
    assert findings["values"] == {"Effusion": 6, "none": 6}


def test_files_in_an_archive_count_like_loose_ones(tmp_path: Path) -> None:
    _fill(tmp_path / "loose")
    (tmp_path / "packed").mkdir()
    members = {path.name: path.read_bytes() for path in sorted((tmp_path / "loose").iterdir())}
    (tmp_path / "packed" / "a.tar").write_bytes(tar(members))
    loose, packed = _report(_look(tmp_path / "loose")), _report(_look(tmp_path / "packed"))
    assert packed["objects"] | {"listed": 0, "bytes": 0} == loose["objects"] | {"listed": 0, "bytes": 0}
    assert {**packed, "objects": None} == {**loose, "objects": None}


@pytest.mark.parametrize("files_in_unit", [1, 5, 100])
def test_the_sum_is_the_same_however_the_source_is_cut_and_in_any_order(tmp_path: Path, files_in_unit: int) -> None:
    _fill(tmp_path)
    look = _look(tmp_path)
    parts = [survey_unit(unit, look) for unit in _units(look, files_in_unit)]
    told = [report(merged(order, look.examples), look, (), 14) for order in (parts, parts[::-1], parts[3:] + parts[:3])]
    assert told[0] == told[1] == told[2] == _report(look)


def test_a_multi_frame_object_counts_its_frames_and_duplicates_are_found(tmp_path: Path) -> None:
    frames = np.concatenate([radiograph(8, (32, 32), n) for n in range(5)])
    content = file(frames, NumberOfFrames=5, Rows=32)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    found = _report(_look(tmp_path))
    assert (found["scans"], found["patients"]["count"]) == (10, 1)
    assert found["quarantine"] == {"duplicate": 1}
    assert found["headers"]["frames of a file"] == {"2 to 99": 2}


def test_decoding_finds_what_no_header_tells(tmp_path: Path) -> None:
    _fill(tmp_path)
    (tmp_path / "blank").write_bytes(file(np.zeros((32, 32), np.uint8)))
    headers, pixels = _report(_look(tmp_path)), _report(_look(tmp_path, pixels=True))
    assert (headers["scans"], pixels["scans"]) == (13, 12)
    assert pixels["quarantine"] == {"blank-image": 1, **headers["quarantine"]}
    assert (headers["pixels_decoded"], pixels["pixels_decoded"]) == (False, True)


@pytest.mark.parametrize("pixels", [False, True])
def test_a_limit_holds_inside_archives(tmp_path: Path, pixels: bool) -> None:
    (tmp_path / "a.tar").write_bytes(tar({f"{n}": file(PatientID=f"P{n}") for n in range(9)}))
    assert _report(_look(tmp_path, most_files=4, pixels=pixels))["scans"] == 4


def test_what_the_schema_does_not_name_is_counted_as_withheld(tmp_path: Path) -> None:
    for number in range(6):
        content = file(PatientID=f"P{number}", ViewPosition="ODDVIEW", ImageComments="Zebra")
        (tmp_path / f"{number}").write_bytes(content)
    (tmp_path / "one").write_bytes(file(PatientID="P9", ViewPosition="HERS", PatientSex=None))
    _, _, view, findings = _report(_look(tmp_path))["attributes"]
    # A code string that six patients have may be shown; hers may not, and comments never.
    assert view["withheld"] == {"scans": 7, "texts": 2, "shown": {"ODDVIEW": 6}}
    assert findings["withheld"] == {"scans": 6, "texts": 1, "shown": {}}
    assert _report(_look(tmp_path))["attributes"][0]["missing"] == 1


def test_other_texts_are_bounded_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "MOST_TEXTS", 4)
    for number in range(9):
        content = file(radiograph(8, (32 + number, 32)), PatientID=f"P{number}", ViewPosition=f"V{number}")
        (tmp_path / f"{number}").write_bytes(content)
    for files_in_unit in (1, 100):
        found = _survey(_look(tmp_path), files_in_unit)
        assert len(found.terms["rows x columns"]) <= 5
        assert sum(found.terms["rows x columns"].values()) == 9
        assert len(found.withheld["view"]) <= 5


def test_the_joint_table_has_every_scan_once_a_finding(tmp_path: Path) -> None:
    _fill(tmp_path, 40)
    found = _report(_look(tmp_path))
    assert found["joint"]["of"] == ["findings", "sex", "age"]
    # Of 26 patients beyond the cap four are men without a finding.
    old = {(cell["findings"], cell["sex"]): cell["scans"] for cell in found["joint"]["cells"] if cell["age"] == "90+"}
    assert old == {("Effusion", "F"): 8, ("Effusion", "M"): 5, ("none", "F"): 9, ("none", "M"): None}
    assert {cell["scans"] for cell in found["joint"]["cells"] if cell["age"] == "20-29"} == {None}
    (table,) = [table for table in tables(found) if table.title == "scans by findings x sex x age"]
    assert table.columns == ("findings", "sex", *(f"{n}-{n + 9}" for n in range(20, 90, 10)), "90+")
    assert table.rows[0][:2] == ["Effusion", "F"]


def test_a_group_that_nobody_is_of_stands_in_the_joint_table_too(tmp_path: Path) -> None:
    for number, (sex, finding) in enumerate([("F", "Mass"), ("M", "Effusion")]):
        (tmp_path / f"{number}").write_bytes(file(PatientID=f"P{number}", PatientSex=sex, ImageComments=finding))
    (table,) = [table for table in tables(_report(_look(tmp_path))) if table.title.startswith("scans by")]
    groups = [("Effusion", "F", "-"), ("Effusion", "M", "few"), ("Mass", "F", "few"), ("Mass", "M", "-")]
    assert [tuple(row) for row in table.rows] == groups


@pytest.mark.parametrize(
    ("years", "cap", "text"), [(0.5, 90, "0-9"), (39.99, 90, "30-39"), (90, 90, "90+"), (95, None, "90-99")]
)
def test_ages_fall_into_decades(years: float, cap: float | None, text: str) -> None:
    assert band(years, cap) == text


def test_a_source_that_has_to_be_read_is_surveyed_too() -> None:
    schema = AttributeSchema(declarations=(CategoryAttribute(name="sex", source="PatientSex", values=("F", "M")),))
    look = Look(PhantomSource(scans=20), schema, Decode(), KEY.encode())
    found = _report(look)
    assert (found["scans"], found["pixels_decoded"], found["quarantine"]) == (20, True, {})


@pytest.mark.s3
def test_a_bucket_is_surveyed_like_a_folder(tmp_path: Path, store_uri: str) -> None:
    _fill(tmp_path)
    (tmp_path / "large").write_bytes(file(radiograph(8, (800, 800)), PatientID="P50"))
    (tmp_path / "a.tar").write_bytes(tar({"x": file(PatientID="P51")}))
    Store(store_uri).put_folder(tmp_path)
    looks = [_look(tmp_path), replace(_look(tmp_path), source=recognise(store_uri).source)]
    folder, bucket = map(_report, looks)
    assert folder == bucket
    assert folder["scans"] == 14


def test_a_pacs_is_surveyed_by_the_headers_of_its_instances() -> None:
    def series(number: int) -> dict[str, Any]:
        return {"StudyInstanceUID": f"{UID_ROOT}6.{number}", "SeriesInstanceUID": f"{UID_ROOT}7.{number}"}

    contents = [file(PatientID=f"P{n}", Modality="DX", **series(n // 2)) for n in range(6)]
    with DicomWebServer([*contents, file(PatientID="")]) as server:
        found = recognise(server.url)
        look = Look(found.source, found.schema, Decode(), KEY.encode(), most_files=5)
        told = _report(look)
        assert (told["scans"], told["headers"]["modality"]["DX"], told["pixels_decoded"]) == (6, 6, False)
        assert told["quarantine"] == {"no-patient-id": 1}
        (first, *_) = _survey(look).examples
        (picture,) = pictures(_units(look)[first.unit], [first], look)
        assert picture.pixels.shape == (PICTURE_PX, PICTURE_PX)


# --- examples -------------------------------------------------------------------------------------------------


def test_examples_are_of_different_patients_first_and_drawn_by_lot() -> None:
    scans = [Example(f"p{n % 7}", f"i{(n * 37) % 100:02d}", n // 10, n % 10, None) for n in range(100)]
    chosen = drawn(scans, 7)
    assert len({example.patient for example in chosen[:7]}) == 7
    assert len(chosen) == 14
    halves = drawn((*drawn(scans[::2], 7), *drawn(scans[1::2], 7)), 7)
    assert halves[:7] == drawn(scans[::-1], 7)[:7] == chosen[:7]
    assert len(drawn(scans[:1], 7)) == 1


def test_pictures_are_what_a_corpus_would_have(tmp_path: Path) -> None:
    _fill(tmp_path)
    (tmp_path / "t.tar").write_bytes(tar({"x": b"no", "y": file(PatientID="P77"), "z": file(PatientID="P78")}))
    frames = np.concatenate([radiograph(8, (32, 32), n) for n in range(5)])
    (tmp_path / "many").write_bytes(file(frames, NumberOfFrames=5, Rows=32, PatientID="P79"))
    look = _look(tmp_path)
    found = _survey(look)
    made = [
        picture
        for unit in _units(look)
        for picture in pictures(unit, [e for e in found.examples if e.unit == unit.index], look)
    ]
    assert len(made) == len(found.examples) == 15
    for picture in made:
        assert picture.pixels.shape == (PICTURE_PX, PICTURE_PX)
        assert set(picture.attributes) == set(SCHEMA.names)
    read = {
        (unit.index, member, frame): scan.subject.attributes
        for unit in _units(look)
        for member, frame, scan in read_unit(look.source, unit, look.context())
        if not isinstance(scan, ScanError)
    }
    assert {e[2:]: dict(p.attributes) for p in made for e in [p.example]} == {
        place: attributes for place, attributes in read.items() if place[2] in (None, 2)
    }


# --- who is in it is nobody's business ------------------------------------------------------------------------


def _told(look: Look, columns: Any = (), more: tuple[str, ...] = ()) -> str:
    """Everything that a person or a program gets to see, in lower case."""
    found = _survey(look)
    data = report(found, look, columns, 99)
    seen = [json.dumps(data), starter_recipe(found, look), *remarks(data, look), *more]
    seen += [str((table.title, table.columns, list(table.rows))) for table in tables(data)]
    return "\n".join(seen).lower()


def _canaries(number: int) -> dict[str, Any]:
    """Every text of a header that may name somebody, different for each patient but for the names of the house."""
    return {
        "PatientID": f"CANARYID{number}", "PatientName": f"Canary^Name{number}", "PatientBirthDate": "19510203",
        "StudyDate": "20110405", "StudyDescription": f"canary study {number}", "ImageComments": f"canary note {number}",
        "InstitutionName": "Canary House", "ReferringPhysicianName": "Canary^Doctor",
        "BodyPartExamined": f"CANARYBP{number}", "ViewPosition": f"CANARYVP{number}",
        "PatientSex": f"CANARY{number}", "ImageLaterality": f"CANARYL{number}",
        "Modality": f"CANARY{number}", "AccessionNumber": f"CANARYACC{number}",
        "PhotometricInterpretation": f"CANARY{number}" if number % 2 else "MONOCHROME2",
        "SOPClassUID": f"1.2.3.9999.{number}" if number % 3 else None,
    }  # fmt: skip


def _kinds(folder: Path) -> Iterator[Path]:
    loose, packed, images = (folder / name for name in ("loose", "packed", "images"))
    for place in (loose, packed, images):
        place.mkdir()
    contents = {f"CANARYFILE-{n}.dcm": file(**_canaries(n)) for n in range(12)}
    for name, content in contents.items():
        (loose / name).write_bytes(content)
    yield loose
    (packed / "CANARYFILE.tar").write_bytes(tar(contents))
    yield packed
    rows = [
        f"CANARYFILE-{n}.png,CANARYID{n},Canary Doctor,Canary House,1951-02-03,canary {n},CANARY{n % 4},{'FM'[n % 2]}\n"
        for n in range(12)
    ]
    header = "image,patient,referring,hospital,seen on,text,odd,sex\n"
    (images / "t.csv").write_text(header + "".join(rows))
    for number in range(12):
        (images / f"CANARYFILE-{number}.png").write_bytes(_png())
    yield images


@pytest.mark.parametrize("pixels", [False, True])
def test_nothing_told_of_a_source_names_anybody(tmp_path: Path, pixels: bool) -> None:
    for place in _kinds(tmp_path):
        found = recognise(str(place))
        look = Look(found.source, found.schema, found.decode, KEY.encode(), pixels=pixels)
        assert _survey(look).objects == 12
        told = _told(look, found.columns, found.remarks)
        for secret in ("canary", "doctor", "house", "1951", "2011", "9999"):
            assert secret not in told.replace(str(place).lower(), ""), (place.name, secret)


def test_a_key_of_the_survey_alone_makes_the_names_that_patients_are_counted_by(tmp_path: Path) -> None:
    _fill(tmp_path)
    one = _survey(_look(tmp_path))
    other = _survey(replace(_look(tmp_path), key=b"another key of 32 bytes or more!"))
    assert one.patients.count == other.patients.count
    assert not set(one.patients.smallest.tolist()) & set(other.patients.smallest.tolist())


# --- a recipe to begin with -----------------------------------------------------------------------------------


def _recipe(look: Look, folder: Path) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(starter_recipe(_survey(look), look))
    return load_recipe(path)


def test_the_recipe_names_what_was_found_and_loads(tmp_path: Path) -> None:
    _fill(tmp_path / "in")
    look = _look(tmp_path / "in")
    recipe = _recipe(look, tmp_path)
    assert recipe.prepare.source == look.source
    # Every scan is PA: that tells nothing apart.
    assert [attribute.name for attribute in recipe.attributes] == ["sex", "age", "findings"]
    assert recipe.attributes[2].values == ("Effusion",)
    assert recipe.prepare.size_px == 32
    assert recipe.prepare.max_rejected_share == 0.5


def test_a_source_that_is_mostly_refused_gets_a_recipe_that_runs(tmp_path: Path) -> None:
    _fill(tmp_path / "in", 2)
    assert _recipe(_look(tmp_path / "in"), tmp_path).prepare.max_rejected_share == pytest.approx(0.6)


def test_ct_gets_a_window_and_a_window_of_the_callers_stays(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(file(Modality="CT"))
    look = _look(tmp_path / "in")
    assert _recipe(look, tmp_path).prepare.decode.window == FixedWindow(center=40, width=400)
    lungs = Decode(window=FixedWindow(kind="fixed", center=-600, width=1500))
    assert _recipe(replace(look, decode=lungs), tmp_path).prepare.decode == lungs


def test_a_source_without_any_attribute_still_gets_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(
        file(PatientSex=None, PatientAge=None, PatientBirthDate=None, ViewPosition=None, ImageComments=None)
    )
    assert [attribute.name for attribute in _recipe(_look(tmp_path / "in"), tmp_path).attributes] == ["sex"]
