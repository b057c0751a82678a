"""Shards of a dataset: the same integers in Parquet and DICOM, and any image again from its row."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydicom import dcmread

from scanloom.artefact import Artefact, FileEntry, lineage, publish
from scanloom.attributes import AttributeSchema, Value
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import Dicom, Generate
from scanloom.sampling.dataset import describe_instance, rows_from_bytes, rows_to_bytes, shard_parts, write_shard
from scanloom.sampling.plan import Plan, PlanSpec, compile_plan, specify
from scanloom.sampling.production import ShardEngine, quantise, regenerate
from scanloom.shards.commit import ShardCommit, begin
from scanloom.shards.reader import rows as read_rows
from scanloom.shards.schemas import dataset_schema
from scanloom.shards.writer import png_pixels
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
def test_parquet_and_dicom_hold_the_same_pixels_and_say_where(bits: int) -> None:
    plan = plan_of("a" * 64, bits_stored=bits)
    pixels = random_pixels(plan.spec, 4)
    parts = {part.role: part for part in shard_parts(plan.spec, 0, plan.rows(0), pixels)}
    table = pq.read_table(io.BytesIO(parts["images"].content()))
    assert table.schema.equals(dataset_schema(SCHEMA), check_metadata=False)
    for row, image in zip(table.to_pylist(), pixels, strict=True):
        start = row["dicom_offset"]
        file = dcmread(io.BytesIO(parts["dicom"].content()[start : start + row["dicom_length"]]))
        np.testing.assert_array_equal(png_pixels(row["image"]["bytes"]), image)
        np.testing.assert_array_equal(file.pixel_array, image)
        assert row["sop_instance_uid"] == file.SOPInstanceUID
        assert row["dicom_shard"].startswith("dicom/shard-000000-")
        assert (row["width"], row["height"], row["bits_stored"]) == (10, 6, bits)


def test_a_dataset_without_dicom_has_no_tar_and_no_offsets() -> None:
    plan = plan_of("a" * 64, dicom=Dicom(enabled=False))
    [part] = shard_parts(plan.spec, 0, plan.rows(0), random_pixels(plan.spec, 4))
    table = pq.read_table(io.BytesIO(part.content()))
    assert table["dicom_shard"].null_count == table["dicom_offset"].null_count == 4


def test_the_same_shard_has_the_same_bytes() -> None:
    plan = plan_of("a" * 64)
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
        pixels, stored = regenerate(dataset.uri, image_id)
        np.testing.assert_array_equal(pixels, stored)
        [row] = [row for row in read_rows(dataset, "images") if row["id"] == image_id]
        np.testing.assert_array_equal(stored, png_pixels(row["image"]["bytes"]))


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
