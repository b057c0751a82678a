"""The generate job on a local Ray and the embedded S3: a dataset as its readers find it, once, whatever happens."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset
import pytest
from pydicom import dcmread
from pydicom.filebase import DicomBytesIO

from jobs.generate import generate
from scanloom.artefact import Artefact, open_artefact
from scanloom.console import root_cause
from scanloom.dicom.checks import dciodvfy, violations
from scanloom.errors import ArtefactError, RecipeError, StoreError
from scanloom.progress import Progress
from scanloom.recipe import Recipe
from scanloom.sampling.regeneration import regenerate
from scanloom.shards.reader import read_file, rows
from scanloom.shards.writer import image_pixels, png_pixels
from scanloom.store import Store
from tests.free_engine import PickyEngine, publish_free_generator, stamp
from tests.processes import kill, named
from tests.tiny_generator import ATTRIBUTES, publish_generator

pytestmark = [pytest.mark.ray, pytest.mark.s3]
IMAGES, PER_SHARD = 22, 8


def recipe_for(store_uri: str, **changes: Any) -> Recipe:
    section = {"images": IMAGES, "images_per_shard": PER_SHARD, "slots": 4, "steps": 2, "bits_stored": 12}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "store": store_uri,
            "attributes": [a.model_dump() for a in ATTRIBUTES],
            "generate": section | changes,
        }
    )


@pytest.fixture(scope="module")
def module_store(bucket: str) -> str:
    return f"s3://{bucket}/generate-{os.getpid()}"


@pytest.fixture(scope="module")
def dataset(ray_cluster: None, module_store: str) -> Artefact:
    publish_generator(f"{module_store}/generator")
    generate(recipe_for(module_store))
    return open_artefact(f"{module_store}/dataset", "dataset")


@pytest.fixture(scope="module")
def local(dataset: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    dataset.fetch(folder)
    return folder


def test_a_dataset_holds_every_planned_image_once(dataset: Artefact) -> None:
    indices = sorted(row["index"] for row in rows(dataset, "images", ["index"]))
    assert indices == list(range(IMAGES))
    assert dataset.manifest.statistics["rows"] == IMAGES
    assert sum(cell["made"] for cell in dataset.manifest.statistics["cells"]) == IMAGES
    assert all(cell["made"] == cell["requested"] for cell in dataset.manifest.statistics["cells"])
    assert dataset.manifest.statistics["gate"] == "ungated"
    assert [(entry.role, entry.kind) for entry in dataset.manifest.inputs] == [("generator", "generator")]


def test_pandas_opens_the_parquet_shards(dataset: Artefact, local: Path) -> None:
    frame = pd.read_parquet(local / "images")
    assert len(frame) == IMAGES
    assert frame["id"].is_unique
    assert frame["sop_instance_uid"].is_unique
    assert set(frame["generator"]) == {dataset.manifest.inputs[0].digest}


def test_duckdb_queries_the_parquet_shards(local: Path) -> None:
    query = f"select sex, count(*) from read_parquet('{local}/images/*.parquet') group by sex order by sex"
    with duckdb.connect() as connection:
        found = connection.execute(query).fetchall()
    assert dict(found) == {"F": 11, "M": 11}


def test_duckdb_asks_the_bucket_itself_and_reads_only_the_columns_asked_for(dataset: Artefact) -> None:
    images = pyarrow.dataset.dataset(dataset.store.path("images"), filesystem=dataset.store.filesystem)
    who = "sex = 'M' and age between 82 and 86 and list_contains(findings, 'Cardiomegaly')"
    with duckdb.connect() as connection:
        connection.register("images", images)
        found = connection.execute(f"select count(*) from images where {who}").fetchone()
    expected = [
        row
        for row in rows(dataset, "images", ["sex", "age", "findings"])
        if row["sex"] == "M" and 82 <= row["age"] <= 86 and "Cardiomegaly" in row["findings"]
    ]
    assert found == (len(expected),)
    assert expected


def test_datasets_decodes_the_images(local: Path, tmp_path: Path) -> None:
    import datasets

    files = [str(path) for path in sorted((local / "images").glob("*.parquet"))]
    opened = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert len(opened) == IMAGES
    raw = pd.read_parquet(local / "images").set_index("id")["image"]
    for row in opened:
        np.testing.assert_array_equal(np.asarray(row["image"]), png_pixels(raw[row["id"]]["bytes"]))


def test_a_range_request_fetches_the_dicom_file_of_a_row_with_the_same_pixels(dataset: Artefact) -> None:
    for row in rows(dataset, "images"):
        data = dataset.store.read_range(row["dicom_shard"], row["dicom_offset"], row["dicom_length"])
        file = dcmread(DicomBytesIO(data))
        assert file.SOPInstanceUID == row["sop_instance_uid"]
        np.testing.assert_array_equal(file.pixel_array, png_pixels(row["image"]["bytes"]))


def test_every_dicom_file_passes_dciodvfy_and_our_own_rules(dataset: Artefact) -> None:
    for row in rows(dataset, "images", ["dicom_shard", "dicom_offset", "dicom_length"]):
        data = dataset.store.read_range(row["dicom_shard"], row["dicom_offset"], row["dicom_length"])
        assert dciodvfy(data).errors == ()
        assert violations(dcmread(DicomBytesIO(data))) == []


def test_any_image_comes_again_from_its_row(dataset: Artefact) -> None:
    wanted = [row["id"] for row in rows(dataset, "images", ["id"])][::9]
    for image_id in wanted:
        assert regenerate(dataset.uri, image_id).difference == 0


def test_every_file_is_what_the_manifest_says(dataset: Artefact) -> None:
    for entry in dataset.manifest.files:
        read_file(dataset.store, entry)


def test_a_finished_dataset_is_left_alone(
    dataset: Artefact, module_store: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = {(o.key, o.modified) for o in dataset.store.list()}
    with caplog.at_level("INFO", logger="scanloom"):
        generate(recipe_for(module_store))
    assert "finished before" in caplog.text
    assert {(o.key, o.modified) for o in dataset.store.list()} == before
    assert dataset.digest[:12] in capsys.readouterr().out


def test_the_same_recipe_elsewhere_gives_the_same_dataset(dataset: Artefact, ray_cluster: None, tmp_path: Path) -> None:
    publish_generator(str(tmp_path / "generator"))
    # What an attempt leaves that died between its upload and its commit.
    lost = f"{dataset.manifest.files[0].path.split('-')[0]}-000000-0123456789ab.parquet"
    Store(str(tmp_path / "dataset")).write(lost, b"")
    generate(recipe_for(str(tmp_path), writers=1))
    again = open_artefact(str(tmp_path / "dataset"), "dataset")
    assert again.manifest.statistics["plan"] == dataset.manifest.statistics["plan"]
    # Paths hold hashes: ids, UIDs and pixels are equal, byte for byte.
    assert again.manifest.files == dataset.manifest.files
    assert again.digest == dataset.digest
    assert not again.store.exists(lost)


def test_a_dataset_that_only_lacks_its_manifest_is_not_called_finished_before(
    dataset: Artefact, ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish_generator(str(tmp_path / "generator"))
    place = Store(str(tmp_path / "dataset"))
    for found in dataset.store.list():
        if found.key != "manifest.json":
            place.write(found.key, dataset.store.read(found.key))
    with caplog.at_level("INFO", logger="scanloom"):
        generate(recipe_for(str(tmp_path)))
    assert "finished before" not in caplog.text
    assert open_artefact(place.uri, "dataset").digest == dataset.digest


def test_a_damaged_commit_of_an_earlier_run_is_named(dataset: Artefact, ray_cluster: None, tmp_path: Path) -> None:
    publish_generator(str(tmp_path / "generator"))
    place = Store(str(tmp_path / "dataset"))
    for found in dataset.store.list():
        if found.key != "manifest.json":
            place.write(found.key, dataset.store.read(found.key))
    place.write("commits/shard-000001.json", b"{}")
    with pytest.raises(ArtefactError, match=r"shard-000001\.json: is no shard commit"):
        generate(recipe_for(str(tmp_path)))
    assert not place.exists("manifest.json")


def test_a_dataset_says_what_was_rejected_and_what_no_attempt_could_fill(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_free_generator(str(tmp_path / "generator"), 16)
    generate(recipe_for(str(tmp_path), cost_per_hour=3.6), PickyEngine)
    made = open_artefact(str(tmp_path / "dataset"), "dataset")
    statistics = made.manifest.statistics
    assert (statistics["rows"], statistics["infeasible"]) == (IMAGES - 2, 2)
    assert statistics["rejects"] == {"blank": 4, "infeasible": 2, "saturated": 5}
    assert all(cell["requested"] == cell["made"] + cell["infeasible"] for cell in statistics["cells"])
    assert sum(cell["rejected"] for cell in statistics["cells"]) == 9
    images = list(rows(made, "images"))
    assert sorted(row["index"] for row in images) == [i for i in range(IMAGES) if i not in PickyEngine.INFEASIBLE]
    assert all(stamp(image_pixels(row)) == row["index"] for row in images)
    assert sum(row["attempt"] for row in images) == 5
    assert len(list(rows(made, "rejects"))) == 11
    assert "2 of 22 images are infeasible" in capsys.readouterr().out
    told = Progress.model_validate_json(made.store.read("progress.json"))
    assert (told.state, told.images_done, told.images_made) == ("finished", IMAGES, IMAGES - 2)
    assert told.cost == pytest.approx(told.engine_s / 1000)


def test_another_plan_does_not_enter_the_folder(dataset: Artefact, module_store: str) -> None:
    before = [o.key for o in dataset.store.list()]
    with pytest.raises(ArtefactError, match="another plan"):
        generate(recipe_for(module_store, seed=1))
    assert [o.key for o in dataset.store.list()] == before


def test_a_cohort_outside_the_envelope_starts_nothing(dataset: Artefact, module_store: str) -> None:
    cohort = {"kind": "cells", "cells": [{"age": 95, "share": 1}]}
    with pytest.raises(ArtefactError, match="trained on 21 to 88"):
        generate(recipe_for(module_store, dataset="too-old", cohort=cohort))
    assert Store(f"{module_store}/too-old").list() == []


def test_a_missing_generator_is_named(ray_cluster: None, store_uri: str) -> None:
    with pytest.raises(ArtefactError, match="generator"):
        generate(recipe_for(store_uri))


def test_a_missing_bucket_is_named(ray_cluster: None) -> None:
    with pytest.raises(StoreError, match="no-such-bucket"):
        generate(recipe_for("s3://no-such-bucket/x"))


def test_more_engines_than_the_machine_holds_are_refused(dataset: Artefact, module_store: str) -> None:
    with pytest.raises(RecipeError, match=r"generate\.engines"):
        generate(recipe_for(module_store, dataset="crowded", engines=64))


def test_a_damaged_generator_is_one_clear_error(ray_cluster: None, store_uri: str) -> None:
    generator = publish_generator(f"{store_uri}/generator")
    path = next(f.path for f in generator.manifest.files if f.path.startswith("unet/") and "safetensors" in f.path)
    data = bytearray(generator.store.read(path))
    data[-1] ^= 1
    generator.store.write(path, bytes(data))
    with pytest.raises(Exception) as caught:
        generate(recipe_for(store_uri))
    cause = root_cause(caught.value)
    assert isinstance(cause, ArtefactError)
    assert path in str(cause)


def test_killed_ray_workers_lose_and_repeat_nothing(dataset: Artefact, store_uri: str) -> None:
    publish_generator(f"{store_uri}/generator")
    with _Killer(store_uri) as kills:
        generate(recipe_for(store_uri))
    assert "EngineActor" in kills
    again = open_artefact(f"{store_uri}/dataset", "dataset")
    assert again.digest == dataset.digest


class _Killer:
    """Kills an engine as soon as there is one, another after the first commit, and a writer after the second."""

    def __init__(self, store_uri: str) -> None:
        self._commits = Store(f"{store_uri}/dataset/commits")
        self._over = Event()
        self.kills: list[str] = []
        self._thread = Thread(target=self._run)

    def __enter__(self) -> list[str]:
        self._thread.start()
        return self.kills

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        self._wait(lambda: bool(named(os.getpid(), "EngineActor")))
        self._kill("EngineActor")
        for commits, name in ((1, "EngineActor"), (2, "write_shard")):
            self._wait(partial(self._committed, commits))
            self._kill(name)

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self._over.wait(0.01):
            pass

    def _committed(self, shards: int) -> bool:
        return len(self._commits.list()) >= shards

    def _kill(self, name: str) -> None:
        self.kills += [name for process in named(os.getpid(), name) if kill(process)]
