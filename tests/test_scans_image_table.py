"""Image folder and table: every file comes out once, whatever state the table or the file is in."""

from __future__ import annotations

import io
import os
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError, StoreError
from scanloom.recipe import CategoryAttribute, Decode, ImageFolderSource, LabelsAttribute, NumberAttribute
from scanloom.scans import image_table
from scanloom.scans.decode import file_image
from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.image import ScanImage
from scanloom.scans.image_table import list_files, names, read_files
from scanloom.scans.isolation import Fence
from scanloom.scans.scan import Context, Scan
from scanloom.store import Store
from tests.made_dicom import KEY, radiograph

SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", source="PatientSex", values=("F", "M")),
        NumberAttribute(name="age", source="PatientAge", unit="years", minimum=0, maximum=90, cap=90),
        CategoryAttribute(name="view", source="ViewPosition", values=("PA", "AP", "LATERAL")),
        LabelsAttribute(name="findings", source="ImageComments", values=("Effusion", "Edema")),
    )
)
SEX = AttributeSchema(declarations=(CategoryAttribute(name="sex", source="gender", values=("F", "M")),))
HEADER = "file,patient,gender\n"
NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)
CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices\n"
)


def context(schema: AttributeSchema = SCHEMA) -> Context:
    return Context(schema, Pseudonyms(KEY.encode()), Decode(), seed=0, size_px=32)


def found(source: ImageFolderSource, schema: AttributeSchema = SCHEMA) -> dict[str, Any]:
    """Scan or refusal code of each file, by its name below the prefix."""
    files = list_files(source, schema)
    results = list(read_files(source, files, context(schema)))
    assert [(member, frame) for member, frame, _ in results] == [(i, None) for i in range(len(files))]
    assert names(source, files) == [Store(source.uri).uri_of(file.key) for file in files]
    return {
        file.key: result.code if isinstance(result, ScanError) else result
        for file, (_, _, result) in zip(files, results, strict=True)
    }


def attributes(result: object) -> dict[str, Any]:
    assert isinstance(result, Scan)
    return dict(result.subject.attributes)


def png(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(radiograph(8, (64, 64), seed)).save(sink, "PNG")
    return sink.getvalue()


def folder(
    tmp_path: Path, images: Iterable[str], table: str | bytes, preset: str = "generic", **columns: str
) -> ImageFolderSource:
    """A source whose images lie below images/ and whose table lies beside that folder."""
    for seed, name in enumerate(images):
        place = tmp_path / "images" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(seed))
    (tmp_path / "table.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    given: dict[str, Any] = {"uri": f"{tmp_path}/images", "table": f"{tmp_path}/table.csv", "preset": preset}
    return ImageFolderSource.model_validate(given | columns)


# --- NIH ChestX-ray14 -----------------------------------------------------------------------------------------


def test_nihs_table_is_read_with_its_odd_columns_and_a_recipe_for_dicom(tmp_path: Path) -> None:
    table = (
        "\ufeff" + NIH_HEADER + "1_000.png,Edema|Hernia,0,1,058,F,AP,2000,1000,0.2,0.1,\n"
        "1_001.png,No Finding,1,1,059Y,F,PA,2000,1000,,,\n"
        "9_000.png,Effusion,0,9,77,M,PA,1,1,1,1,\n"
    )
    results = found(folder(tmp_path, ["a/1_000.png", "b/1_001.png"], table, "nih-cxr14"))
    first, second = results["a/1_000.png"], results["b/1_001.png"]
    assert attributes(first) == {"sex": "F", "age": 58.0, "view": "AP", "findings": ("Edema",)}
    assert attributes(second) == {"sex": "F", "age": 59.0, "view": "PA", "findings": ()}
    # 2000 x 0.2 mm are 400 mm over 64 pixels, 1000 x 0.1 mm are 100 mm: NIH stretched the original to a square.
    assert first.image.geometry.spacing_mm == (100 / 64, 400 / 64)
    assert second.image.geometry.spacing_mm is None
    assert first.subject.patient == second.subject.patient
    assert first.subject.study != second.subject.study
    np.testing.assert_array_equal(first.image.pixels, radiograph(8, (64, 64), 0))


def test_the_later_nih_table_says_sex_instead_of_gender(tmp_path: Path) -> None:
    table = NIH_HEADER.replace("Gender", "Sex") + "a.png,Edema,0,1,58,M,AP,1,1,1,1,\n"
    results = found(folder(tmp_path, ["a.png"], table, "nih-cxr14"))
    assert attributes(results["a.png"])["sex"] == "M"


def test_files_that_the_table_or_the_folder_lets_down_are_refused_each_with_its_code(tmp_path: Path) -> None:
    table = NIH_HEADER + (
        "a.png,Edema,0,1,58,F,AP,1,1,1,1,\n"
        "b.png,Edema,0,1,58,F,AP,1,1,1,1,\n"
        "b.png,Edema,0,2,58,F,AP,1,1,1,1,\n"
        "d.png,Edema,0,,58,F,AP,1,1,1,1,\n"
        "e.png,Edema,0,1,old,F,AP,1,1,1,1,\n"
        "f.png,Edema,0,1,-4,F,AP,1,1,1,1,\n"
        "g.txt,Edema,0,1,58,F,AP,1,1,1,1,\n"
        "a.png,Edema,0,1,58,F,AP,1,1,1,1,\n"
    )
    source = folder(tmp_path, [f"{letter}.png" for letter in "abcdef"], table, "nih-cxr14")
    (tmp_path / "images" / "g.txt").write_text("a letter")
    results = found(source)
    assert isinstance(results.pop("a.png"), Scan)
    assert results == {
        "b.png": "ambiguous-table-row",
        "c.png": "no-table-row",
        "d.png": "no-patient-id",
        "e.png": "attribute-not-a-number",
        "f.png": "attribute-out-of-range",
        "g.txt": "not-an-image-file",
    }


def test_the_real_png_are_all_scans(nih_png: Path) -> None:
    source = ImageFolderSource(uri=f"{nih_png}/images", table=f"{nih_png}/labels.csv", preset="nih-cxr14")
    files = list_files(source, SCHEMA)
    assert len(files) == 758
    scans = [result for _, _, result in read_files(source, files[:200], context()) if isinstance(result, Scan)]
    assert len(scans) == 200
    assert {scan.subject.attributes["view"] for scan in scans} == {"PA", "AP"}
    assert all(0.3 < min(scan.image.geometry.spacing_mm or (0,)) < 3 for scan in scans)


def deadly(content: bytes, rules: Decode) -> Iterator[ScanImage]:
    """A codec that dies of the image of seed 1."""
    if content == png(1):
        os._exit(1)
    yield file_image(content, rules)


def test_behind_the_fence_an_image_that_kills_its_reader_is_refused_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path, ["a.png", "b.png", "c.png"], HEADER + "a.png,p,F\nb.png,p,F\nc.png,p,F\n")
    files, wanted = list_files(source, SEX), found(source, SEX)
    with Fence() as fence:
        fenced = replace(context(SEX), fence=fence)
        for member, _, scan in read_files(source, files, fenced):
            assert isinstance(scan, Scan)
            np.testing.assert_array_equal(scan.image.pixels, wanted[files[member].key].image.pixels)
        monkeypatch.setattr(image_table, "_one_image", deadly)
        codes = [scan.code if isinstance(scan, ScanError) else "" for _, _, scan in read_files(source, files, fenced)]
    assert codes == ["", "reader-died", ""]


# --- CheXpert -------------------------------------------------------------------------------------------------


def chexpert_row(path: str, marks: Sequence[str], start: str = "Female,68,Frontal,AP") -> str:
    return f"{path},{start},{','.join(marks)}\n"


def marks(**given: str) -> list[str]:
    """The 14 cells: blank but for those given by name without blanks."""
    header = [name.replace(" ", "") for name in CHEXPERT_HEADER.strip().split(",")[5:]]
    assert set(given) <= set(header)
    return [given.get(name, "") for name in header]


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small/train/", "train/", ""])
def test_chexperts_images_are_found_wherever_its_folders_are_cut(tmp_path: Path, prefix: str) -> None:
    paths = [f"patient0000{p}/study{s}/view1_frontal.jpg" for p, s in ((1, 1), (2, 1), (2, 2))]
    rows = [chexpert_row(f"CheXpert-v1.0-small/train/{path}", marks(NoFinding="1.0")) for path in paths]
    source = folder(tmp_path, [prefix + path for path in paths], CHEXPERT_HEADER + "".join(rows), "chexpert")
    subjects = [result.subject for result in found(source).values()]
    assert len({subject.id for subject in subjects}) == len({subject.study for subject in subjects}) == 3
    assert subjects[0].patient != subjects[1].patient == subjects[2].patient
    # The same image keeps its id when the folder is laid out in another way.
    assert subjects[0].id == Pseudonyms(KEY.encode()).of("instance", paths[0])


def test_chexperts_row_reads_as_dicom_would_say_it(tmp_path: Path) -> None:
    rows = {
        "p1": ("Male,40,Frontal,PA", marks(Edema="1.0", PleuralEffusion="1.0", Fracture="1.0")),
        "p2": ("Female,90,Lateral,", marks(NoFinding="1.0")),
        "p3": ("Unknown,0,Frontal,AP", marks()),
        "p4": ("Female,5,Lateral,LL", marks(Edema="0.0", Cardiomegaly="yes", PleuralEffusion="1.0")),
        "p5": ("Female,5,Frontal,AP", marks(Edema="perhaps")),
    }
    names_ = [f"patient{p}/study1/view1_x.jpg" for p in rows]
    table = "".join(chexpert_row(n, cells, start) for n, (start, cells) in zip(names_, rows.values(), strict=True))
    results = [attributes(r) for r in found(folder(tmp_path, names_, CHEXPERT_HEADER + table, "chexpert")).values()]
    assert results == [
        {"sex": "M", "age": 40.0, "view": "PA", "findings": ("Effusion", "Edema")},
        {"sex": "F", "age": 90.0, "view": "LATERAL", "findings": ()},
        {"sex": None, "age": 0.0, "view": "AP", "findings": None},
        {"sex": "F", "age": 5.0, "view": None, "findings": ("Effusion",)},
        {"sex": "F", "age": 5.0, "view": "AP", "findings": None},
    ]


@pytest.mark.parametrize(
    "uncertain, edema, both",
    [("absent", (), ("Effusion",)), ("present", ("Edema",), ("Effusion", "Edema")), ("unknown", None, None)],
)
def test_an_uncertain_finding_counts_as_the_recipe_says(tmp_path: Path, uncertain: str, edema: Any, both: Any) -> None:
    rows = [marks(Edema="-1.0"), marks(Edema="-1", PleuralEffusion="1"), marks(Fracture="-1.0", PleuralEffusion="1.0")]
    paths = [f"patient{i}/study1/view1_frontal.jpg" for i in range(3)]
    table = CHEXPERT_HEADER + "".join(chexpert_row(path, row) for path, row in zip(paths, rows, strict=True))
    results = found(folder(tmp_path, paths, table, "chexpert", uncertain=uncertain)).values()
    # What the schema does not declare may stay uncertain.
    assert [attributes(result)["findings"] for result in results] == [edema, both, ("Effusion",)]


def test_a_label_that_chexpert_does_not_have_is_an_error_and_not_always_absent(tmp_path: Path) -> None:
    source = folder(tmp_path, ["a.jpg"], CHEXPERT_HEADER, "chexpert")

    def schema(*values: str) -> AttributeSchema:
        return AttributeSchema(declarations=(LabelsAttribute(name="findings", values=values),))

    with pytest.raises(RecipeError, match="CheXpert has no finding 'Mass'"):
        list_files(source, schema("Edema", "Mass"))
    with pytest.raises(RecipeError, match="no finding 'Cardiomegly'; did you mean 'Cardiomegaly'"):
        list_files(source, schema("Cardiomegly"))
    list_files(source, schema("Pleural Effusion", "lung_opacity", "Support Devices", "LungLesion"))
    single = CategoryAttribute(name="edema", source="Edema", values=("yes", "no"), aliases={"1.0": "yes", "0.0": "no"})
    list_files(source, AttributeSchema(declarations=(single,)))
    with pytest.raises(RecipeError, match="need kind: labels"):
        list_files(source, AttributeSchema(declarations=(CategoryAttribute(name="findings", values=("Edema",)),)))


def test_a_chexpert_path_without_a_patient_is_refused(tmp_path: Path) -> None:
    table = CHEXPERT_HEADER + chexpert_row("images/a/view1_frontal.jpg", marks())
    assert found(folder(tmp_path, ["images/a/view1_frontal.jpg"], table, "chexpert")) == {
        "images/a/view1_frontal.jpg": "no-patient-id"
    }


# --- any table ------------------------------------------------------------------------------------------------


def test_a_generic_table_needs_its_columns_and_names_the_nearest(tmp_path: Path) -> None:
    source = folder(tmp_path, ["a.png"], "path,patient,gender\na.png,p,F\n")
    with pytest.raises(RecipeError, match=r"no column 'file'"):
        list_files(source, SEX)
    right = source.model_copy(update={"file_column": "path"})
    near = AttributeSchema(declarations=(CategoryAttribute(name="sex", source="gendr", values=("F",)),))
    with pytest.raises(RecipeError, match=r"no column 'gendr'; did you mean 'gender'"):
        list_files(right, near)
    with pytest.raises(RecipeError, match=r"no column 'visit'"):
        list_files(right.model_copy(update={"study_column": "visit"}), SEX)
    assert attributes(found(right, SEX)["a.png"]) == {"sex": "F"}


@pytest.mark.parametrize("preset, header", [("generic", "file,patient\n"), ("chexpert", CHEXPERT_HEADER)])
@pytest.mark.parametrize("name", ["file", "patient", "Path"])
def test_no_attribute_can_be_the_name_of_a_file_or_a_patient(
    tmp_path: Path, preset: str, header: str, name: str
) -> None:
    number = NumberAttribute(name="number", source=name, unit="1", minimum=0, maximum=1e9)
    with pytest.raises(RecipeError, match=r"is not kept|no column"):
        list_files(folder(tmp_path, ["a.png"], header, preset), AttributeSchema(declarations=(number,)))


def test_a_study_column_joins_images_into_studies_and_without_one_each_is_its_own(tmp_path: Path) -> None:
    table = "file,patient,visit,gender\na.png,p,1,F\nb.png,p,1,F\nc.png,p,2,F\nd.png,q,1,F\n"
    source = folder(tmp_path, ["a.png", "b.png", "c.png", "d.png"], table)
    alone = [result.subject.study for result in found(source, SEX).values()]
    assert len(set(alone)) == 4
    a, b, c, d = [
        result.subject.study for result in found(source.model_copy(update={"study_column": "visit"}), SEX).values()
    ]
    # Another patient's visit of the same number is another study.
    assert a == b
    assert len({a, c, d}) == 3


def test_a_row_that_names_a_file_in_two_folders_is_for_neither(tmp_path: Path) -> None:
    table = "file,patient,gender\na.png,p,F\nx/b.png,q,F\nb.png,r,F\n"
    source = folder(tmp_path, ["x/a.png", "y/a.png", "x/b.png", "y/b.png"], table)
    results = found(source, SEX)
    assert results["x/a.png"] == results["y/a.png"] == "ambiguous-table-row"
    assert results["x/b.png"].subject.patient != results["y/b.png"].subject.patient


@pytest.mark.parametrize(
    "table, message",
    [
        (b"", "no header line"),
        (b"\n\n", "no header line"),
        (b",,\n", "no header line"),
        (HEADER.encode() + b"a.png,M\xfcller,F\n", "not UTF-8"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (HEADER + 'a.png,"p,F\n', "line 2: unexpected end of data"),
        (HEADER + 'a.png,"p"x,F\n', "line 2"),
        (HEADER + "a.png,Doe, Jane,F\n", "line 2: more cells than the header has columns"),
        ("file,patient,gender,patient\na.png,p,F,q\n", "column 'patient' is there twice"),
        (HEADER + f'a.png,"{"p" * 200_000}",F\n', "line 2: field larger than field limit"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8"),
        ('{"a": 1}\n', "no column 'file'"),
    ],
)
def test_a_table_that_would_have_to_be_guessed_at_is_an_error_without_its_content(
    tmp_path: Path, table: str | bytes, message: str
) -> None:
    source = folder(tmp_path, ["a.png"], table)
    with pytest.raises(RecipeError, match=message) as caught:
        list_files(source, SEX)
    assert caught.value.__cause__ is None
    assert not {"Doe", "Jane", "Müller", "pp"} & set(str(caught.value).replace(",", " ").split())


def test_short_rows_blank_lines_and_spare_columns_cost_nothing(tmp_path: Path) -> None:
    table = "file,patient,gender,,note,note\n\na.png,p\nb.png,q,F,,,,,\nc.png\n d.png , q , F \n"
    results = found(folder(tmp_path, ["a.png", "b.png", "c.png", "d.png"], table), SEX)
    assert attributes(results["a.png"]) == {"sex": None}
    assert attributes(results["b.png"]) == attributes(results["d.png"]) == {"sex": "F"}
    assert results["c.png"] == "no-patient-id"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_tables_that_spreadsheets_write_are_read(tmp_path: Path, encoding: str) -> None:
    source = folder(tmp_path, ["ä.png"], "file,patient,gender\r\nä.png,p,M\r\n".encode(encoding))
    assert attributes(found(source, SEX)["ä.png"]) == {"sex": "M"}


def test_the_table_itself_is_no_image_and_an_empty_prefix_is_one_clear_error(tmp_path: Path) -> None:
    source = folder(tmp_path, ["a.png"], HEADER + "a.png,p,F\n")
    inside = source.model_copy(update={"uri": str(tmp_path), "table": f"{tmp_path}/./table.csv"})
    assert set(found(inside, SEX)) == {"images/a.png"}
    with pytest.raises(RecipeError, match=r"no objects under this prefix; check prepare\.source\.uri"):
        list_files(source.model_copy(update={"uri": f"{tmp_path}/missing"}), SEX)
    with pytest.raises(StoreError, match="no such file"):
        list_files(source.model_copy(update={"table": f"{tmp_path}/none.csv"}), SEX)
    with pytest.raises(RecipeError, match="names a bucket"):
        list_files(source.model_copy(update={"table": "s3://bucket"}), SEX)


def test_another_content_or_another_row_makes_another_file(tmp_path: Path) -> None:
    source = folder(tmp_path, ["a.png", "b.png"], HEADER + "a.png,p,F\nb.png,p,F\n")
    before = list_files(source, SEX)
    assert list_files(source, SEX) == before
    (tmp_path / "images" / "a.png").write_bytes(png(7))
    (tmp_path / "table.csv").write_text(HEADER + "a.png,p,F\nb.png,p,M\n")
    after = list_files(source, SEX)
    assert before[0].version != after[0].version
    assert before[1].version == after[1].version
    assert before[1].rows != after[1].rows


def test_equal_texts_of_a_large_table_are_held_once(tmp_path: Path) -> None:
    rows = "".join(f"{i:08d}_{j:03d}.png,{i},{'FM'[i % 2]},{20 + i % 60}\n" for i in range(20_000) for j in range(3))
    source = folder(tmp_path, ["00000000_000.png"], "file,patient,PatientSex,PatientAge\n" + rows)
    schema = AttributeSchema(declarations=SCHEMA.declarations[:2])
    tracemalloc.start()
    try:
        (file,) = list_files(source, schema)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert file.rows[0].texts == {"PatientSex": "F", "PatientAge": "20"}
    # With a mapping of its own for every row it takes more than 500.
    assert peak < 400 * 60_000
