"""What lies at a URI is recognised by its content, and a recipe's source by its words."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scanloom.errors import RecipeError
from scanloom.recipe import DicomSource, DicomWebSource, ImageFolderSource, NiftiSource, ParquetSource, PhantomSource
from scanloom.scans.recognise import content_kind, recognise
from tests.made_dicom import file, tar

GENERIC = "Name,Patient ID,Gender,Age,Birth Date,Tags,Width\n"


def _png() -> bytes:
    sink = io.BytesIO()
    Image.effect_noise((40, 30), 50).save(sink, "PNG")
    return sink.getvalue()


def _images(folder: Path, count: int = 20) -> list[str]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"scan-{number:03d}.png" for number in range(count)]
    for name in names:
        (folder / "images" / name).write_bytes(_png())
    return names


def _generic_rows(names: list[str]) -> str:
    rows = [
        f"{name},P{n},{'FM'[n % 2]},{30 + n},19{50 + n}-01-02,{'cyst;scar' if n % 3 else 'normal'},{512 + n % 9}\n"
        for n, name in enumerate(names)
    ]
    return GENERIC + "".join(rows)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (file()[:512], "dicom"),
        (file()[132:644], "dicom"),
        (tar({"a": b"x"})[:512], "archive"),
        (tar({"a": b"x"}, "w:gz")[:512], "archive"),
        (_png()[:512], "image"),
        (b"\xff\xd8\xff\xe0" + bytes(508), "image"),
        (b"II*\0" + bytes(508), "image"),
        (b"PAR1" + bytes(508), "parquet"),
        ((348).to_bytes(4, "little") + bytes(340) + b"n+1\0" + bytes(164), "nifti"),
        (b"name,patient\n", ""),
        (b"", ""),
    ],
)
def test_a_file_is_known_by_its_first_bytes(head: bytes, kind: str) -> None:
    assert content_kind(head) == kind


def test_dicom_is_known_whatever_the_files_are_called(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"IM{number}").write_bytes(file())
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "list.csv").write_text("a,b\n")
    found = recognise(str(tmp_path))
    assert found.source == DicomSource(uri=str(tmp_path))
    assert {"sex", "age", "view", "body_part", "modality", "findings"} <= set(found.schema.names)


def test_archives_are_taken_for_archives_of_dicom(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"x": file()}))
    assert recognise(str(tmp_path)).source == DicomSource(uri=str(tmp_path))


def test_the_tables_of_nih_and_chexpert_are_known_by_their_columns(tmp_path: Path) -> None:
    names = _images(tmp_path / "nih")
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    rows = "".join(f"{name},Mass,0,{n},50,F,PA\n" for n, name in enumerate(names))
    (tmp_path / "nih" / "entries.csv").write_text(header + rows)
    nih = recognise(str(tmp_path / "nih"))
    table = str(tmp_path / "nih" / "entries.csv")
    assert nih.source == ImageFolderSource(uri=str(tmp_path / "nih"), table=table, preset="nih-cxr14")
    assert nih.schema.names == ("sex", "age", "view", "findings")
    _images(tmp_path / "chex")
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema\n"
    (tmp_path / "chex" / "train.csv").write_text(header + "x/images/scan-001.png,Female,68,Frontal,AP,,1.0\n")
    chexpert = recognise(str(tmp_path / "chex"))
    assert isinstance(chexpert.source, ImageFolderSource)
    assert chexpert.source.preset == "chexpert"
    assert chexpert.schema["findings"].model_dump()["values"] == ("Edema",)


def test_of_any_other_table_the_columns_that_look_like_attributes_are_declared(tmp_path: Path) -> None:
    names = _images(tmp_path)
    (tmp_path / "empty.csv").write_text("a,b\n")
    (tmp_path / "t.csv").write_text(_generic_rows(names))
    found = recognise(str(tmp_path))
    assert found.source == ImageFolderSource(
        uri=str(tmp_path), table=str(tmp_path / "t.csv"), file_column="Name", patient_column="Patient ID"
    )
    assert found.schema.names == ("sex", "age", "tags")
    tags = found.schema["tags"].model_dump()
    assert (tags["values"], tags["separator"], tags["none"]) == (("cyst", "scar"), ";", "normal")
    assert found.schema["age"].source == "Age"
    kinds = {column.name: column.kind for column in found.columns}
    assert kinds == {
        "Name": "other", "Patient ID": "other", "Gender": "category", "Age": "number", "Birth Date": "other",
        "Tags": "labels", "Width": "number",
    }  # fmt: skip
    assert found.remarks == ()


def test_a_table_that_names_no_patients_is_said_to_be_so(tmp_path: Path) -> None:
    names = _images(tmp_path)
    (tmp_path / "t.csv").write_text("file,side\n" + "".join(f"{name},left\n" for name in names))
    found = recognise(str(tmp_path))
    assert isinstance(found.source, ImageFolderSource)
    assert (found.source.file_column, found.source.patient_column) == ("file", "file")
    assert "no column of the table seems to name the patient" in found.remarks[0]


def test_sexes_are_declared_as_dicom_spells_them(tmp_path: Path) -> None:
    names = _images(tmp_path)
    rows = "".join(f"{name},p{n},{('Female', 'male')[n % 2]}\n" for n, name in enumerate(names))
    (tmp_path / "t.csv").write_text("file,patient,Sex\n" + rows)
    sex = recognise(str(tmp_path)).schema["sex"].model_dump()
    assert (sex["values"], sex["aliases"]) == (("F", "M"), {"Female": "F", "male": "M"})


def test_a_column_whose_name_a_corpus_uses_itself_gets_another(tmp_path: Path) -> None:
    names = _images(tmp_path)
    rows = "".join(f"{name},p{n},{'ab'[n % 2]},{'cd'[n % 2]}\n" for n, name in enumerate(names))
    (tmp_path / "t.csv").write_text("file,patient,Window,2nd look\n" + rows)
    assert recognise(str(tmp_path)).schema.names == ("window_value", "column_2nd_look")


def test_parquet_is_read_for_its_columns_and_class_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    count = 20
    features = Features(
        {"picture": {"bytes": Value("binary"), "path": Value("string")}, "patient": Value("string"),
         "label": ClassLabel(names=["well", "ill"])}
    )  # fmt: skip
    data = {
        "picture": [{"bytes": _png(), "path": f"{n}.png"} for n in range(count)],
        "patient": [f"p{n}" for n in range(count)],
        "label": [n % 2 for n in range(count)],
    }
    Dataset.from_dict(data, features=features).to_parquet(str(tmp_path / "a.parquet"))
    found = recognise(str(tmp_path))
    assert found.source == ParquetSource(uri=str(tmp_path), image_column="picture", patient_column="patient")
    assert found.schema["label"].model_dump()["values"] == ("ill", "well")


def test_parquet_without_images_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"patient": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match="no column with the bytes of images"):
        recognise(str(tmp_path))


def test_volumes_are_known_though_they_are_packed(tmp_path: Path) -> None:
    import nibabel

    volume = nibabel.Nifti1Image(np.zeros((4, 4, 3), np.int16), np.eye(4)).to_bytes()  # type: ignore[no-untyped-call]
    assert content_kind(gzip.compress(volume)[:512]) == content_kind(volume[:512]) == "nifti"
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(volume))
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(volume))
    (tmp_path / "t.csv").write_text("file,subject,group\n" + "a.nii.gz,s1,x\nb.nii.gz,s2,y\n")
    found = recognise(str(tmp_path))
    assert found.source == NiftiSource(
        uri=str(tmp_path), table=str(tmp_path / "t.csv"), file_column="file", patient_column="subject"
    )


def test_a_url_is_a_pacs() -> None:
    assert recognise("https://pacs.example/dicom-web").source == DicomWebSource(uri="https://pacs.example/dicom-web")


def test_a_recipe_names_its_source_itself(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nstore: x\nseed: 5\nattributes: [{name: sex, kind: category, values: [F, M]}]\n"
        "prepare: {source: {kind: phantoms}, decode: {colour: luminance}}\n"
    )
    found = recognise(str(recipe), ["prepare.source.scans=9"])
    assert (found.source, found.schema.names) == (PhantomSource(scans=9), ("sex",))
    assert (found.decode.colour, found.seed) == ("luminance", 5)


def test_a_recipes_relative_paths_mean_the_same_to_every_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        "name: r\nstore: x\nattributes: [{name: sex, kind: category, values: [F, M]}]\n"
        "prepare: {source: {kind: image-folder, uri: images, table: t.csv}}\n"
    )
    source = recognise("r.yaml").source
    assert isinstance(source, ImageFolderSource)
    assert (source.uri, source.table) == (str(tmp_path / "images"), str(tmp_path / "t.csv"))


def test_mistakes_are_told_in_a_line_that_names_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no objects under this prefix; check"):
        recognise(str(tmp_path / "nothing"))
    (tmp_path / "letter").write_text("a letter")
    with pytest.raises(RecipeError, match="it is a file; give its folder"):
        recognise(str(tmp_path / "letter"))
    with pytest.raises(RecipeError, match="holds none of what is read: DICOM objects"):
        recognise(str(tmp_path))
    with pytest.raises(RecipeError, match="--set changes a recipe"):
        recognise(str(tmp_path), ["seed=1"])
    _images(tmp_path)
    with pytest.raises(RecipeError, match=r"no \.csv file says of whom") as caught:
        recognise(str(tmp_path))
    assert "scan-0" not in str(caught.value)
    (tmp_path / "t.csv").write_text("file,patient\nother.png,1\n")
    with pytest.raises(RecipeError, match=r"no column of 1 \.csv files names the images"):
        recognise(str(tmp_path))
