"""Shards of a dataset: the same integers in Parquet and DICOM, and any image again from its row."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydicom import dcmread

from scanloom.artefact import Artefact, FileEntry, lineage, publish
from scanloom.attributes import AttributeSchema, Value
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import Dicom, Generate
from scanloom.sampling.dataset import (
    describe_instance,
    rows_from_bytes,
    rows_to_bytes,
    shard_parts,
    stored_row,
    write_shard,
)
from scanloom.sampling.plan import Plan, PlanSpec, cell_counts, compile_plan, specify
from scanloom.sampling.production import ShardEngine, quantise
from scanloom.sampling.regeneration import regenerate
from scanloom.shards.commit import ShardCommit, begin, part_key
from scanloom.shards.reader import read_parquet
from scanloom.shards.reader import rows as read_rows
from scanloom.shards.schemas import dataset_schema
from scanloom.shards.writer import image_pixels
from scanloom.store import Store
from tests.tiny_generator import SCHEMA, STATISTICS, publish_generator


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return publish_generator(str(tmp_path_factory.mktemp("generator")))


def plan_of(digest: str, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"images": 6, "images_per_shard": 4, "slots": 4, "steps": 2}
    return compile_plan(specify(Generate(**settings | changes), "tiny", digest, STATISTICS))


def random_pixels(spec: PlanSpec, images: int) -> np.ndarray[Any, Any]:
    dtype = np.uint8 if spec.bits_stored == 8 else np.uint16
    return np.random.default_rng(0).integers(0, 2**spec.bits_stored, (images, 6, 10)).astype(dtype)


def made(generator: Artefact, plan: Plan, shard: int) -> dict[str, Any]:
    engine = ShardEngine(plan.spec, generator.uri, "cpu", 1)
    return engine({"shard": shard, "rows": rows_to_bytes(plan.rows(shard))})


def dataset_at(store: Store, generator: Artefact, plan: Plan) -> Artefact:
    begin(store, "dataset", plan.digest)
    engine = ShardEngine(plan.spec, generator.uri, "cpu", 1)
    files: list[FileEntry] = []
    environments = []
    for shard in range(plan.shards):
        pixels = engine({"shard": shard, "rows": rows_to_bytes(plan.rows(shard))})
        environments.append(pixels["environment"])
        row = write_shard(pixels, plan.spec, store)
        files += ShardCommit.model_validate_json(row["commit"]).files.values()
    statistics = {"spec": plan.spec.model_dump(mode="json"), "environments": environments[:1]}
    return publish(
        store,
        kind="dataset",
        name="d",
        recipe={},
        inputs=[lineage("generator", generator)],
        files=files,
        statistics=statistics,
    )


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize(
    "image_format, syntax", [("png", "native"), ("jpeg-xl", "rle"), ("raw", "jpeg-ls"), ("jpeg-xl", "htj2k")]
)
def test_parquet_and_dicom_hold_the_same_pixels_and_say_where(bits: int, image_format: str, syntax: str) -> None:
    plan = plan_of("a" * 64, bits_stored=bits, image_format=image_format, dicom={"transfer_syntax": syntax})
    pixels = random_pixels(plan.spec, 4)
    parts = {part.role: part for part in shard_parts(plan.spec, 0, plan.rows(0), pixels)}
    table = pq.read_table(io.BytesIO(parts["images"].content()))
    assert table.schema.equals(dataset_schema(SCHEMA), check_metadata=False)
    assert (b"huggingface" in (table.schema.metadata or {})) == (image_format == "png")
    for row, image in zip(table.to_pylist(), pixels, strict=True):
        start = row["dicom_offset"]
        file = dcmread(io.BytesIO(parts["dicom"].content()[start : start + row["dicom_length"]]))
        np.testing.assert_array_equal(image_pixels(row), image)
        np.testing.assert_array_equal(file.pixel_array, image)
        assert row["attempt"] == 0
        assert row["sop_instance_uid"] == file.SOPInstanceUID
        assert row["dicom_shard"].startswith("dicom/shard-000000-")
        assert (row["width"], row["height"], row["bits_stored"]) == (10, 6, bits)


def test_every_row_says_what_ordered_it_where_a_plan_does() -> None:
    plan = plan_of("a" * 64, order="request-7", webdataset=True)
    parts = {part.role: part for part in shard_parts(plan.spec, 0, plan.rows(0), random_pixels(plan.spec, 4))}
    table = pq.read_table(io.BytesIO(parts["images"].content()))
    assert table.schema.names == [*dataset_schema(SCHEMA).names, "order"]
    assert table["order"].to_pylist() == ["request-7"] * 4
    labels = [json.loads(sample["json"]) for sample in webdataset_samples(parts["webdataset"].content())]
    assert [label["order"] for label in labels] == ["request-7"] * 4


def test_a_dataset_without_dicom_has_no_tar_and_no_offsets() -> None:
    plan = plan_of("a" * 64, dicom=Dicom(enabled=False))
    [part] = shard_parts(plan.spec, 0, plan.rows(0), random_pixels(plan.spec, 4))
    table = pq.read_table(io.BytesIO(part.content()))
    assert table["dicom_shard"].null_count == table["dicom_offset"].null_count == 4


@pytest.mark.parametrize("layout", ["flat", "study"])
def test_members_of_a_dicom_tar_are_named_by_uid_alone_or_below_patient_study_and_series(layout: str) -> None:
    plan = plan_of("a" * 64, dicom={"layout": layout})
    [part] = [p for p in shard_parts(plan.spec, 0, plan.rows(0), random_pixels(plan.spec, 4)) if p.role == "dicom"]
    with tarfile.open(fileobj=io.BytesIO(part.content())) as tar:
        for member in tar:
            opened = tar.extractfile(member)
            assert opened is not None
            file = dcmread(opened)
            above = f"{file.PatientID}/{file.StudyInstanceUID}/{file.SeriesInstanceUID}/" if layout == "study" else ""
            assert member.name == f"{above}{file.SOPInstanceUID}.dcm"


@pytest.mark.parametrize("image_format, suffix", [("png", "png"), ("jpeg-xl", "jxl"), ("raw", "npy")])
def test_a_webdataset_tar_pairs_each_image_with_its_labels(image_format: str, suffix: str) -> None:
    plan = plan_of("a" * 64, bits_stored=12, image_format=image_format, webdataset=True)
    pixels = random_pixels(plan.spec, 4)
    parts = {part.role: part for part in shard_parts(plan.spec, 0, plan.rows(0), pixels)}
    assert part_key(0, parts["webdataset"]).startswith("webdataset/shard-000000-")
    samples = webdataset_samples(parts["webdataset"].content())
    planned = plan.rows(0).to_pylist()
    assert [sample["__key__"] for sample in samples] == [row["id"] for row in planned]
    for sample, row, image in zip(samples, planned, pixels, strict=True):
        assert set(sample) == {"__key__", suffix, "json"}
        np.testing.assert_array_equal(WEB_DECODERS[suffix](sample[suffix]), image)
        label = json.loads(sample["json"])
        assert label["synthetic"] is True
        assert (label["plan"], label["width"], label["height"]) == (plan.digest, 10, 6)
        assert {name: label[name] for name in SCHEMA.names} == {name: row[name] for name in SCHEMA.names}


WEB_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "png": imagecodecs.png_decode,
    "jxl": imagecodecs.jpegxl_decode,
    "npy": lambda data: np.load(io.BytesIO(data)),
}


def webdataset_samples(tar_file: bytes) -> list[dict[str, Any]]:
    """As WebDataset's tariterators.group_by_keys has it: key and suffix part at the first dot of the last name."""
    samples: list[dict[str, Any]] = []
    with tarfile.open(fileobj=io.BytesIO(tar_file)) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not samples or samples[-1]["__key__"] != key:
                samples.append({"__key__": key})
            opened = tar.extractfile(member)
            assert opened is not None
            assert suffix not in samples[-1]
            samples[-1][suffix] = opened.read()
    return samples


def shard_with_rejects(plan: Plan) -> dict[str, Any]:
    """Shard 0 of four images: the second needed three attempts, none of eight made the third."""
    rejects: list[dict[str, Any]] = [
        {"index": 1, "attempt": 0, "reason": "blank", "figures": {"contrast": 0.004, "least": 0.02}},
        {"index": 1, "attempt": 1, "reason": "saturated", "figures": {"white": 0.4}},
        *({"index": 2, "attempt": a, "reason": "blank", "figures": {"contrast": 0.0}} for a in range(8)),
        {"index": 2, "attempt": 8, "reason": "infeasible", "figures": {}},
    ]
    pixels = random_pixels(plan.spec, 3)
    return {
        "shard": 0, "rows": rows_to_bytes(plan.rows(0)), "pixels": pixels.tobytes(), "height": 6, "width": 10,
        "engine_s": 1.0, "environment": {}, "attempts": [0, 2, 0], "rejects": rejects,
    }  # fmt: skip


def test_a_shard_tells_of_every_attempt_and_leaves_out_what_none_could_make(tmp_path: Path) -> None:
    plan, store = plan_of("a" * 64), Store(str(tmp_path))
    commit = ShardCommit.model_validate_json(write_shard(shard_with_rejects(plan), plan.spec, store)["commit"])
    assert commit.rows == 3
    table = read_parquet(store, commit.files["images"])
    assert table["index"].to_pylist() == [0, 1, 3]
    assert table["attempt"].to_pylist() == [0, 2, 0]
    assert table.schema.field("attempt").type == pa.int16()
    for row, image in zip(table.to_pylist(), random_pixels(plan.spec, 3), strict=True):
        np.testing.assert_array_equal(image_pixels(row), image)
    rejects = read_parquet(store, commit.files["rejects"]).to_pylist()
    assert commit.files["rejects"].path.startswith("rejects/shard-000000-")
    assert [(r["id"], r["attempt"], r["reason"]) for r in rejects[:2]] == [
        (plan.spec.image_id(1), 0, "blank"),
        (plan.spec.image_id(1), 1, "saturated"),
    ]
    assert dict(rejects[0]["figures"]) == {"contrast": 0.004, "least": 0.02}
    assert rejects[-1]["reason"] == "infeasible"
    told, cells = commit.statistics, plan.rows(0)["cell#0"].to_pylist()
    assert told["rejects"] == {"blank": 9, "infeasible": 1, "saturated": 1}
    assert told["attempts"] == {"0": 2, "2": 1}
    assert told["cells"] == cell_counts(plan.rows(0).take([0, 1, 3]))
    assert told["infeasible"]["0"] == {str(cells[2]): 1}
    assert sum(told["rejected"]["0"].values()) == 10


def test_a_shard_of_which_nothing_could_be_made_is_committed_without_rows(tmp_path: Path) -> None:
    plan, store = plan_of("a" * 64, webdataset=True), Store(str(tmp_path))
    nothing = shard_with_rejects(plan) | {"pixels": b"", "height": 0, "width": 0, "attempts": []}
    nothing["rejects"] = [{"index": i, "attempt": 0, "reason": "infeasible", "figures": {}} for i in range(4)]
    commit = ShardCommit.model_validate_json(write_shard(nothing, plan.spec, store)["commit"])
    assert (commit.rows, set(commit.files)) == (0, {"images", "rejects"})
    assert read_parquet(store, commit.files["images"]).schema.equals(dataset_schema(SCHEMA))


def test_an_image_that_no_attempt_could_make_is_told_by_name(tmp_path: Path) -> None:
    plan, store = plan_of("a" * 64, images=4), Store(str(tmp_path))
    row = write_shard(shard_with_rejects(plan), plan.spec, store)
    files = list(ShardCommit.model_validate_json(row["commit"]).files.values())
    dataset = publish(store, kind="dataset", name="d", recipe={}, inputs=[], files=files, statistics={})
    assert stored_row(dataset, plan.spec, plan.spec.image_id(3))["index"] == 3
    with pytest.raises(RecipeError, match="no attempt passed, or its cell was given up"):
        stored_row(dataset, plan.spec, plan.spec.image_id(2))


def test_the_same_shard_has_the_same_bytes() -> None:
    plan = plan_of("a" * 64, image_format="jpeg-xl", webdataset=True, dicom={"transfer_syntax": "htj2k"})
    pixels = random_pixels(plan.spec, 4)
    first, second = (shard_parts(plan.spec, 0, plan.rows(0), pixels) for _ in range(2))
    assert [part.sha256 for part in first] == [part.sha256 for part in second]


@pytest.mark.parametrize("names", [SCHEMA.names, ("gender", "years", "projection", "findings")])
def test_dicom_says_what_was_asked_for_by_name_or_by_keyword(names: tuple[str, ...]) -> None:
    schema = SCHEMA.model_dump()
    for declaration, name in zip(schema["declarations"], names, strict=True):
        declaration["name"] = name
    spec = plan_of("a" * 64).spec.model_copy(update={"attributes": AttributeSchema.model_validate(schema)})
    asked: dict[str, Value] = dict(zip(names, ("F", 63.0, "PA", ("Effusion",)), strict=True))
    told = describe_instance(spec, "0" * 16, asked)
    assert (told.sex, told.age_years, told.view, told.findings) == ("F", 63.0, "PA", ("Effusion",))
    nothing = describe_instance(spec, "0" * 16, dict.fromkeys(names))
    assert (nothing.sex, nothing.age_years, nothing.view, nothing.findings) == (None, None, None, None)


def test_an_age_in_months_is_not_told_as_one_in_years() -> None:
    declarations = [d.model_copy(update={"unit": "months"} if d.name == "age" else {}) for d in SCHEMA.declarations]
    schema = AttributeSchema(declarations=tuple(declarations))
    spec = plan_of("a" * 64).spec.model_copy(update={"attributes": schema})
    assert describe_instance(spec, "0" * 16, dict.fromkeys(SCHEMA.names) | {"age": 18.0}).age_years is None


@pytest.mark.parametrize("bits, top", [(8, 255), (12, 4095), (16, 65535)])
def test_quantising_uses_the_full_range_and_rounds_to_nearest(bits: int, top: int) -> None:
    levels = np.array([[[0.0, 1.0, 0.5, 0.25 / top, 0.75 / top, 1.5, -1.0]]], dtype=np.float32)
    assert quantise(levels, bits).tolist() == [[0, top, round(np.float32(0.5) * top), 0, 1, top, 0]]


def test_pixels_of_a_shard_do_not_depend_on_the_shard_made_before(generator: Artefact) -> None:
    plan = plan_of(generator.digest)
    engine = ShardEngine(plan.spec, generator.uri, "cpu", 1)
    engine({"shard": 0, "rows": rows_to_bytes(plan.rows(0))})
    second = engine({"shard": 1, "rows": rows_to_bytes(plan.rows(1))})
    assert second["pixels"] == made(generator, plan, 1)["pixels"]


def test_images_of_different_attributes_and_noise_differ(generator: Artefact) -> None:
    plan = plan_of(generator.digest)
    shard = made(generator, plan, 0)
    pixels = np.frombuffer(shard["pixels"], np.uint8).reshape(4, -1)
    assert len({row.tobytes() for row in pixels}) == 4
    assert pixels.std() > 1.0


def test_an_engine_for_another_generator_is_refused(generator: Artefact) -> None:
    with pytest.raises(ArtefactError, match="the plan is for"):
        made(generator, plan_of("f" * 64), 0)


def test_any_image_is_made_again_from_its_row_alone(generator: Artefact, tmp_path: Path) -> None:
    plan = plan_of(generator.digest)
    dataset = dataset_at(Store(str(tmp_path)), generator, plan)
    for image_id in (plan.spec.image_id(5), plan.spec.image_id(2)):
        again = regenerate(dataset.uri, image_id)
        assert (again.difference, again.told) == (0, None)
        [row] = [row for row in read_rows(dataset, "images") if row["id"] == image_id]
        np.testing.assert_array_equal(again.stored, image_pixels(row))


@pytest.mark.parametrize("image_id", ["nonsense", "00000000ffffffff", "", "0" * 16])
def test_an_id_that_is_not_in_the_dataset_is_refused_with_the_range_of_ids(
    generator: Artefact, tmp_path: Path, image_id: str
) -> None:
    plan = plan_of(generator.digest, images=2)
    dataset = dataset_at(Store(str(tmp_path)), generator, plan)
    with pytest.raises(RecipeError, match=plan.spec.image_id(1)):
        regenerate(dataset.uri, image_id)


def test_rows_travel_unchanged() -> None:
    rows = plan_of("a" * 64).rows(1)
    assert rows_from_bytes(rows_to_bytes(rows)).equals(rows)
    assert isinstance(rows, pa.Table)
