"""Parquet files of images: every row comes out once, whatever it and its file hold."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scanloom.attributes import AttributeSchema
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import RecipeError, ScanError, StoreError
from scanloom.recipe import CategoryAttribute, Decode, LabelsAttribute, NumberAttribute, ParquetSource
from scanloom.scans import image_parquet
from scanloom.scans.decode import file_image
from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.image import ScanImage
from scanloom.scans.image_parquet import list_files, names, read_files
from scanloom.scans.isolation import Fence
from scanloom.scans.scan import Context, Scan, SourceFile
from scanloom.store import Store
from tests.fault_proxy import Fault, FaultProxy
from tests.made_dicom import KEY, file, radiograph

SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", values=("F", "M")),
        NumberAttribute(name="age", unit="years", minimum=0, maximum=90, cap=90),
        LabelsAttribute(name="findings", values=("Effusion", "Mass"), separator=";", none="normal"),
    )
)
PATIENT = AttributeSchema(declarations=(CategoryAttribute(name="sex", values=("F", "M")),))
PSEUDONYMS = Pseudonyms(KEY.encode())


def context(schema: AttributeSchema = SCHEMA) -> Context:
    return Context(schema, PSEUDONYMS, Decode(), seed=0, size_px=32)


def image(seed: int, form: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(radiograph(8, (32, 32), seed)).save(sink, form)
    return sink.getvalue()


def columns(rows: int, **given: Any) -> dict[str, Any]:
    made = {
        "image": [image(i) for i in range(rows)],
        "patient": [f"p{i}" for i in range(rows)],
        "sex": ["F"] * rows,
        "age": [50] * rows,
        "findings": [["Mass"]] * rows,
    }
    return made | given


def source(
    tmp_path: Path, table: Mapping[str, Any] | pa.Table, name: str = "a.parquet", **options: Any
) -> ParquetSource:
    made = table if isinstance(table, pa.Table) else pa.table(dict(table))
    (tmp_path / "data").mkdir(exist_ok=True)
    pq.write_table(made, tmp_path / "data" / name, **options)
    return ParquetSource(uri=f"{tmp_path}/data")


def found(source: ParquetSource, schema: AttributeSchema = SCHEMA, at: int = 0) -> list[Any]:
    """Scan or refusal code of each row of one file; rows must be numbered without a gap."""
    chosen = list_files(source, schema)[at : at + 1]
    assert chosen[0].alone
    results = list(read_files(source, chosen, context(schema)))
    assert [member for member, _, _ in results] == list(range(len(results)))
    return [result.code if isinstance(result, ScanError) else result for _, _, result in results]


def attributes(result: object) -> dict[str, Any]:
    assert isinstance(result, Scan)
    return dict(result.subject.attributes)


# --- images ---------------------------------------------------------------------------------------------------


def test_images_of_every_form_are_read_from_bytes_or_from_hugging_faces_struct(tmp_path: Path) -> None:
    forms = [image(0), image(1, "TIFF"), image(2, "JPEG")]
    plain = found(source(tmp_path, columns(3, image=forms)))
    structs = [{"bytes": data, "path": f"{i}.x"} for i, data in enumerate(forms)]
    nested = found(source(tmp_path, columns(3, image=structs)))
    for i in range(2):
        np.testing.assert_array_equal(plain[i].image.pixels, radiograph(8, (32, 32), i))
    assert [s.subject for s in plain] == [s.subject for s in nested]
    large = pa.table(columns(3, image=pa.array(forms, pa.large_binary())))
    assert [s.subject.id for s in found(source(tmp_path, large))] == [s.subject.id for s in plain]


def test_a_dicom_file_gives_its_pixels_and_the_columns_all_that_is_known(tmp_path: Path) -> None:
    pixels = radiograph(12)
    many = np.stack([radiograph(12, seed=i) for i in range(3)])
    stack = file(many[0], NumberOfFrames=3, PixelData=many.tobytes(), SOPClassUID="1.2.840.10008.5.1.4.1.1.7.3")
    refused = file(BurnedInAnnotation="YES")
    table = columns(3, image=[file(pixels, PatientSex="M"), stack, refused])
    files = list_files(chosen := source(tmp_path, table), SCHEMA)
    results = list(read_files(chosen, files, context()))
    assert [(member, frame) for member, frame, _ in results] == [(0, None), (1, 0), (1, 1), (1, 2), (2, None)]
    single, first, second, third, burned = [result for _, _, result in results]
    assert attributes(single) == {"sex": "F", "age": 50.0, "findings": ("Mass",)}
    assert isinstance(single, Scan)
    assert single.subject.patient == PSEUDONYMS.of("patient", "p0")
    assert single.image.pixels.shape == pixels.shape
    assert len({frame.subject.id for frame in (first, second, third) if isinstance(frame, Scan)}) == 3
    assert isinstance(burned, ScanError)
    assert burned.code == "burned-in-text"


def test_an_image_keeps_its_id_when_its_row_moves_and_two_equal_images_share_it(tmp_path: Path) -> None:
    before = found(source(tmp_path, columns(3)))
    after = found(source(tmp_path, pa.table(columns(3)).take([2, 0, 0]), "another-name.parquet"), at=1)
    assert [s.subject.id for s in after] == [before[i].subject.id for i in (2, 0, 0)]
    assert len({s.subject.id for s in before}) == 3


# --- attributes -----------------------------------------------------------------------------------------------


def test_cells_of_every_type_read_as_text_and_null_is_unknown(tmp_path: Path) -> None:
    table = columns(
        5,
        sex=pa.array(["F", None, " M ", "x", "F"]).dictionary_encode(),
        age=[63.0, None, float("nan"), 41.5, 90.0],
        findings=[["Effusion", "Mass"], None, [], ["Hernia"], [None, "Mass"]],
        patient=[1.0, 2.0, 3.0, 4.0, None],
    )
    *results, nobody = found(source(tmp_path, table))
    assert [attributes(result) for result in results] == [
        {"sex": "F", "age": 63.0, "findings": ("Effusion", "Mass")},
        {"sex": None, "age": None, "findings": None},
        {"sex": "M", "age": None, "findings": ()},
        {"sex": None, "age": 41.5, "findings": None},
    ]
    assert results[0].subject.patient == PSEUDONYMS.of("patient", "1")
    assert nobody == "no-patient-id"


def test_class_labels_of_hugging_face_read_by_their_names(tmp_path: Path) -> None:
    table = pa.table(columns(3, sex=[1, 0, -1], findings=[[0, 1], [], [2]]))
    label = {"names": ["M", "F"], "_type": "ClassLabel"}
    several = {"feature": {"names": ["Effusion", "Mass", "Hernia"], "_type": "ClassLabel"}, "_type": "List"}
    features = {"info": {"features": {"sex": label, "findings": several, "age": {"dtype": "int64", "_type": "Value"}}}}
    results = found(source(tmp_path, table.replace_schema_metadata({"huggingface": json.dumps(features)})))
    assert [attributes(r)["sex"] for r in results] == ["F", "M", None]
    assert [attributes(r)["findings"] for r in results] == [("Effusion", "Mass"), (), None]
    damaged = table.replace_schema_metadata({"huggingface": '{"info": {"features": {"sex": [[]]}}}'})
    assert [attributes(r)["sex"] for r in found(source(tmp_path, damaged))] == [None] * 3


def test_no_attribute_can_be_the_patient(tmp_path: Path) -> None:
    number = NumberAttribute(name="number", source="patient", unit="1", minimum=0, maximum=1e9)
    with pytest.raises(RecipeError, match="names the patient, so it is not kept"):
        list_files(source(tmp_path, columns(1, patient=[7])), AttributeSchema(declarations=(number,)))


def test_rows_of_one_study_are_told_by_a_column(tmp_path: Path) -> None:
    chosen = source(tmp_path, columns(3, patient=["p", "p", "q"], visit=[1, 1, 1]))
    a, b, c = [s.subject.study for s in found(chosen.model_copy(update={"study_column": "visit"}))]
    assert a == b != c
    assert len({s.subject.study for s in found(chosen)}) == 3


# --- what is wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        ({"image": ["text"]}, "column 'image' holds no image bytes"),
        ({"image": [{"path": "a.png"}]}, "column 'image' holds no image bytes"),
        ({"sex": [{"code": "F"}]}, "column 'sex' is nested or binary"),
        ({"sex": [b"F"]}, "column 'sex' is nested or binary"),
        ({"findings": [[["Mass"]]]}, "column 'findings' is nested or binary"),
        ({"patient": [["p"]]}, "column 'patient' is nested or binary"),
        ({"age": pa.array([0], pa.timestamp("s"))}, "column 'age' is nested or binary"),
    ],
)
def test_a_column_that_says_no_text_is_an_error_before_anything_is_read(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        list_files(source(tmp_path, columns(1, **given)), SCHEMA)


def test_a_missing_column_names_the_nearest_and_an_empty_prefix_is_one_clear_error(tmp_path: Path) -> None:
    table = columns(1)
    table["pation"] = table.pop("patient")
    with pytest.raises(RecipeError, match="no column 'patient'; did you mean 'pation'"):
        list_files(source(tmp_path, table), SCHEMA)
    with pytest.raises(RecipeError, match=r"no objects under this prefix; check prepare\.source\.uri"):
        list_files(ParquetSource(uri=f"{tmp_path}/missing"), SCHEMA)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(RecipeError, match="none of the objects is a readable Parquet file"):
        list_files(ParquetSource(uri=f"{tmp_path}/other"), SCHEMA)


def test_rows_without_a_usable_image_are_refused_each_with_its_code(tmp_path: Path) -> None:
    images = [image(0), None, b"", b"a letter", image(1)[:200]]
    for cells in (images, [None if i is None else {"bytes": i, "path": None} for i in images]):
        results = found(source(tmp_path, columns(5, image=cells)))
        assert isinstance(results[0], Scan)
        assert results[1:] == ["empty-file", "empty-file", "not-an-image-file", "truncated"]


def test_files_unlike_the_first_and_objects_that_are_none_are_refused(tmp_path: Path) -> None:
    chosen = source(tmp_path, columns(2))
    source(tmp_path, columns(0), "b.parquet")
    source(tmp_path, columns(2, patient=[["a"], ["b"]]), "c.parquet")
    folder = tmp_path / "data"
    (folder / "d.md").write_text("# about the data")
    (folder / "e.parquet").write_bytes(b"")
    whole = (folder / "a.parquet").read_bytes()
    (folder / "f.parquet").write_bytes(whole[: len(whole) // 2])
    results = [found(chosen, at=i) for i in range(6)]
    assert [isinstance(scan, Scan) for scan in results[0]] == [True, True]
    assert results[1] == ["parquet-columns"]  # an empty list of images has no type
    assert results[2:] == [["parquet-columns"], ["not-parquet"], ["empty-file"], ["broken-parquet"]]
    empty = pa.table(columns(2)).slice(0, 0)
    assert found(source(tmp_path, empty, "g.parquet"), at=6) == ["no-rows"]


def test_damage_at_rest_ends_the_file_where_it_is_and_keeps_the_rows_before(tmp_path: Path) -> None:
    images = [image(i) for i in range(12)]
    table = columns(12, image=images)
    chosen = source(tmp_path, table, row_group_size=3, write_page_checksum=True, compression="none")
    path = tmp_path / "data" / "a.parquet"
    whole = bytearray(path.read_bytes())
    whole[whole.index(images[7]) + 300] ^= 1
    path.write_bytes(bytes(whole))
    results = found(chosen)
    assert results[-1] == "broken-parquet"
    # The group of rows 6 to 8 is damaged.
    assert [isinstance(scan, Scan) for scan in results[:-1]] == [True] * 6


def test_a_file_damaged_anywhere_never_ends_in_anything_but_rows_and_refusals(tmp_path: Path) -> None:
    chosen = source(tmp_path, columns(6), row_group_size=2)
    path = tmp_path / "data" / "a.parquet"
    whole = path.read_bytes()
    file_ = list_files(chosen, SCHEMA)[0]
    random = np.random.default_rng(0)
    ends = set()
    for _ in range(150):
        damaged = bytearray(whole)
        # Half of the damage goes where the structure of the file is told.
        low = len(whole) - 2000 if random.random() < 0.5 else 0
        for place in random.integers(low, len(whole), 3):
            damaged[place] = random.integers(256)
        path.write_bytes(bytes(damaged))
        results = list(read_files(chosen, [file_], context()))
        assert 1 <= len(results) <= 7
        ends |= {result.code for _, _, result in results if isinstance(result, ScanError)}
    assert {"broken-parquet", "not-parquet"} & ends


# --- the store ------------------------------------------------------------------------------------------------


def test_a_store_that_fails_is_no_damage_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = [np.random.default_rng(i).bytes(400_000) for i in range(8)]
    chosen = source(tmp_path, columns(8, image=noise), row_group_size=2)
    files = list_files(chosen, SCHEMA)
    read = Store.read_range

    def fail(store: Store, key: str, offset: int, length: int) -> bytes:
        if 1_500_000 < offset < 2_000_000:
            raise StoreError("gone for a while", retryable=True)
        return read(store, key, offset, length)

    monkeypatch.setattr(Store, "read_range", fail)
    with pytest.raises(StoreError, match="gone for a while") as caught:
        list(read_files(chosen, files, context()))
    assert caught.value.retryable


def deadly(data: bytes, rules: Decode) -> Iterator[tuple[int | None, ScanImage]]:
    """A codec that dies of the image of seed 1."""
    if data == image(1):
        os._exit(1)
    yield None, file_image(data, rules)


def dead(source: ParquetSource, file: SourceFile, schema: AttributeSchema) -> Iterator[None]:
    """An Arrow that dies of its file."""
    os._exit(1)
    yield


def test_behind_the_fence_an_image_or_a_file_that_kills_its_reader_is_refused_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = source(tmp_path, columns(3))
    files = list_files(chosen, SCHEMA)
    wanted = found(chosen)
    with Fence() as fence:
        fenced = replace(context(), fence=fence)
        scans = [scan for _, _, scan in read_files(chosen, files, fenced)]
        assert [scan.subject for scan in scans if isinstance(scan, Scan)] == [scan.subject for scan in wanted]
        monkeypatch.setattr(image_parquet, "_images", deadly)
        codes = [scan.code if isinstance(scan, ScanError) else "" for _, _, scan in read_files(chosen, files, fenced)]
        assert codes == ["", "reader-died", ""]
        monkeypatch.setattr(image_parquet, "_rows", dead)
        ((member, _, refused),) = read_files(chosen, files, fenced)
        assert member == 0
        assert isinstance(refused, ScanError)
        assert refused.code == "reader-died"


def test_rows_are_streamed_whatever_the_size_of_the_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_parquet, "BATCH_BYTES", 2 << 20)
    noise = [np.random.default_rng(i).bytes(256 << 10) for i in range(160)]
    chosen = source(tmp_path, columns(160, image=noise), use_dictionary=False, write_batch_size=1)
    files = list_files(chosen, SCHEMA)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_files(chosen, files, context())]
    assert len(held) == 160
    # All of it is 40 MiB.
    assert max(held) < 10 << 20


@pytest.mark.s3
def test_an_s3_that_breaks_requests_gives_the_same_scans(
    tmp_path: Path, store_uri: str, s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = [np.random.default_rng(i).bytes(100_000) for i in range(20)]
    images = [image(i) + noise[i] for i in range(20)]  # what follows a PNG's end is not looked at
    local = source(tmp_path, columns(20, image=images), row_group_size=4)
    Store(store_uri).write("a.parquet", (tmp_path / "data" / "a.parquet").read_bytes())
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        faults: list[Fault] = ["503", "reset", "truncate", "lost_ack"]
        for fault in faults:
            proxy.inject(fault, method="GET", path="parquet", times=3, share=0.3, at=1000)
        scans = found(ParquetSource(uri=store_uri))
        assert len(proxy.injected) >= 6
    assert [scan.subject for scan in scans] == [scan.subject for scan in found(local)]


def test_members_are_named_by_file_and_row(tmp_path: Path) -> None:
    chosen = source(tmp_path, columns(2))
    files = list_files(chosen, SCHEMA)
    assert names(chosen, files) == [f"{tmp_path}/data/a.parquet row {i}" for i in range(2)]
    (tmp_path / "data" / "a.parquet").write_text("gone")
    assert names(chosen, [SourceFile("a.parquet", 4)]) == [f"{tmp_path}/data/a.parquet"]
