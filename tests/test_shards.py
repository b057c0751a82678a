from __future__ import annotations

import io
import json
import os
import random
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from scanloom.artefact import FileEntry, publish
from scanloom.attributes import AttributeSchema
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import ArtefactError, StoreError
from scanloom.recipe import CategoryAttribute, LabelsAttribute, NumberAttribute
from scanloom.shards.commit import ShardPart, begin, clean_orphans, commit_shard, committed, orphans, part_key
from scanloom.shards.reader import parquet_paths, read_file, read_parquet, rows
from scanloom.shards.schemas import QUARANTINE_SCHEMA, corpus_schema, dataset_schema, latents_schema
from scanloom.shards.writer import (
    SUFFIXES,
    image_bytes,
    image_pixels,
    parquet_bytes,
    png_bytes,
    png_pixels,
    tar_bytes,
)
from scanloom.store import Store
from tests.fault_proxy import FaultProxy

PLAN, OTHER_PLAN = "a" * 64, "b" * 64
SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", values=("F", "M")),
        NumberAttribute(name="age", unit="years", minimum=0, maximum=120),
        LabelsAttribute(name="findings", values=("cardiomegaly", "effusion")),
    )
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "artefact"))


def _part(data: bytes, role: str = "train", rows: int = 1) -> ShardPart:
    return ShardPart(role, role, "parquet", data, rows)


def _images(count: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    sides = ((np.uint8, 256), (np.uint16, 65536))
    return [rng.integers(0, sides[i % 2][1], (24, 32)).astype(sides[i % 2][0]) for i in range(count)]


def _dataset(count: int) -> pa.Table:
    schema = dataset_schema(SCHEMA)
    empty = dict.fromkeys(schema.names)
    rows = [
        {"id": f"{i:016x}", "index": i, "image": {"bytes": png_bytes(pixels), "path": f"{i}.png"}}
        for i, pixels in enumerate(_images(count))
    ]
    attributes = {"sex": "F", "age": 50.0, "findings": ["effusion"]}
    return pa.Table.from_pylist([{**empty, **attributes, **row} for row in rows], schema=schema)


# --- commits --------------------------------------------------------------------------------------------------


def test_a_committed_shard_is_found_with_its_files(store: Store) -> None:
    begin(store, "corpus", PLAN)
    parts = [_part(b"train"), _part(b"quarantine", "quarantine", 2)]
    commit = commit_shard(store, PLAN, 7, parts, 1, {"seconds": 2.5})
    assert committed(store, PLAN) == {7: commit}
    assert {role: store.read(entry.path) for role, entry in commit.files.items()} == {
        "train": b"train",
        "quarantine": b"quarantine",
    }
    assert commit.files["train"].path == part_key(7, parts[0]) == f"train/shard-000007-{parts[0].sha256[:12]}.parquet"


def test_the_loser_of_a_race_adopts_the_winner(store: Store) -> None:
    first = commit_shard(store, PLAN, 0, [_part(b"winner")], 1, {})
    assert commit_shard(store, PLAN, 0, [_part(b"loser")], 1, {}) == first
    assert committed(store, PLAN) == {0: first}


def test_a_folder_of_another_plan_is_refused(store: Store) -> None:
    begin(store, "dataset", PLAN)
    begin(store, "dataset", PLAN)
    with pytest.raises(ArtefactError, match=r"holds the dataset of another plan.*choose another folder"):
        begin(store, "dataset", OTHER_PLAN)


def test_a_folder_of_another_artefact_is_refused(store: Store) -> None:
    publish(store, kind="generator", name="g", recipe={}, inputs=[], files=[], statistics={})
    with pytest.raises(ArtefactError, match="holds the generator 'g' already"):
        begin(store, "dataset", PLAN)
    assert not store.exists("plan.json")


def test_a_commit_of_another_plan_is_refused_by_reader_and_rival(store: Store) -> None:
    commit_shard(store, PLAN, 0, [_part(b"x")], 1, {})
    with pytest.raises(ArtefactError, match="belongs to another plan"):
        committed(store, OTHER_PLAN)
    with pytest.raises(ArtefactError, match="belongs to another plan"):
        commit_shard(store, OTHER_PLAN, 0, [_part(b"y")], 1, {})


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"shard": 0'])
def test_a_damaged_commit_or_plan_is_named(store: Store, text: bytes) -> None:
    store.write("commits/shard-000000.json", text)
    with pytest.raises(ArtefactError, match=r"commits/shard-000000\.json: is no shard commit"):
        committed(store, PLAN)
    store.write("plan.json", text)
    with pytest.raises(ArtefactError, match=r"plan\.json: is no scanloom plan"):
        begin(store, "dataset", PLAN)


def test_only_old_data_that_no_commit_names_is_an_orphan(store: Store) -> None:
    begin(store, "corpus", PLAN)
    commit = commit_shard(store, PLAN, 0, [_part(b"kept")], 1, {})
    lost = part_key(0, _part(b"a lost attempt"))
    store.write(lost, b"a lost attempt")
    store.write("contact-sheet.png", b"not a shard")
    assert orphans(store, grace_s=3600) == []
    assert clean_orphans(store, grace_s=-60) == [lost]
    assert {o.key for o in store.list("train")} == {commit.files["train"].path}
    assert store.exists("contact-sheet.png")


def test_what_a_killed_writer_left_half_written_is_cleaned_an_hour_later(store: Store) -> None:
    begin(store, "corpus", PLAN)
    for name, age_s in (("train/.scanloom-dead", 4000), ("train/.scanloom-alive", 10)):
        store.write(name, b"half")
        os.utime(store.path(name), (time.time() - age_s,) * 2)
    assert clean_orphans(store, grace_s=0) == ["train/.scanloom-dead"]
    assert [o.key for o in store.remnants()] == ["train/.scanloom-alive"]


def _attempts(store: Store, shards: int) -> Iterator[int]:
    def attempt(number: int) -> int:
        shard = number % shards
        data = b"shard %d by attempt %d" % (shard, number)  # rivals differ, as scores do across GPUs
        commit_shard(store, PLAN, shard, [_part(data)], 1, {"attempt": number})
        return shard

    order = list(range(2 * shards))
    random.Random(1).shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(attempt, order)


@pytest.mark.s3
def test_two_rivals_per_shard_on_a_failing_network_commit_exactly_once(
    s3: EmbeddedS3, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = 24
    with FaultProxy(s3.endpoint) as proxy:
        proxy.inject("lost_ack", method="PUT", times=-1, share=0.10)
        proxy.inject("reset", times=-1, share=0.05)
        proxy.inject("503", times=-1, share=0.05)
        proxy.inject("truncate", method="GET", times=-1, share=0.1, at=20)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert sorted(_attempts(Store(store_uri), shards)) == sorted(2 * list(range(shards)))
        seen_through_faults = committed(Store(store_uri), PLAN)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    store = Store(store_uri)
    commits = committed(store, PLAN)
    assert commits == seen_through_faults
    assert sorted(commits) == list(range(shards))
    for shard, commit in commits.items():
        winner = commit.statistics["attempt"]
        assert read_file(store, commit.files["train"]) == b"shard %d by attempt %d" % (shard, winner)
        assert winner % shards == shard
    assert {"lost_ack", "reset", "503", "truncate"} == set(proxy.injected)
    assert len(proxy.injected) > 20


# --- tar and images -------------------------------------------------------------------------------------------


@given(st.dictionaries(st.from_regex(r"[a-z0-9/]{1,90}x", fullmatch=True), st.binary(max_size=1200), max_size=4))
@settings(max_examples=25, deadline=None)
def test_tar_offsets_fetch_exactly_each_member(members: dict[str, bytes]) -> None:
    data, places = tar_bytes(list(members.items()))
    assert tar_bytes([(name, (content[:7], memoryview(content)[7:])) for name, content in members.items()])[0] == data
    assert by_tarfile(members) == data
    assert [data[offset : offset + length] for offset, length in places] == list(members.values())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [entry.mtime for entry in tar] == [0] * len(members)
        assert [tar.extractfile(entry).read() for entry in tar.getmembers()] == list(members.values())  # type: ignore[union-attr]


def by_tarfile(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return sink.getvalue()


def test_a_tar_name_too_long_for_its_header_is_refused() -> None:
    with pytest.raises(ValueError, match="name is too long"):
        tar_bytes([("x" * 300, b"")])


@given(arrays.arrays(st.sampled_from([np.uint8, np.uint16]), st.tuples(st.integers(1, 40), st.integers(1, 40))))
@settings(max_examples=50, deadline=None)
def test_png_is_lossless_in_8_and_16_bit(pixels: np.ndarray[Any, Any]) -> None:
    back = png_pixels(png_bytes(pixels))
    assert back.dtype == pixels.dtype
    assert np.array_equal(back, pixels)


@pytest.mark.parametrize("pixels", [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.float32)])
def test_pixels_that_png_cannot_hold_are_refused(pixels: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match="expected 2-D uint8 or uint16"):
        png_bytes(pixels)


@given(
    arrays.arrays(st.sampled_from([np.uint8, np.uint16]), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    st.sampled_from(["png", "jpeg-xl", "raw"]),
)
@settings(max_examples=60, deadline=None)
def test_every_image_format_is_lossless_and_read_by_its_name(pixels: np.ndarray[Any, Any], image_format: Any) -> None:
    data = image_bytes(pixels, image_format)
    assert image_bytes(np.asfortranarray(pixels), image_format) == data
    back = image_pixels(image_row(pixels, data, image_format))
    assert back.dtype == pixels.dtype
    assert np.array_equal(back, pixels)


def image_row(pixels: np.ndarray[Any, Any], data: bytes, image_format: Any) -> dict[str, Any]:
    place = {"width": pixels.shape[1], "height": pixels.shape[0], "bits_stored": 8 * pixels.itemsize}
    return {"image": {"bytes": data, "path": f"an-id.{SUFFIXES[image_format]}"}, **place}


@pytest.mark.parametrize("image_format", ["png", "jpeg-xl", "raw"])
def test_an_image_that_is_not_what_its_row_says_is_refused(image_format: Any) -> None:
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    row = image_row(pixels, image_bytes(pixels, image_format), image_format)
    for wrong in ({"width": 5}, {"bits_stored": 8}, {"image": row["image"] | {"bytes": b"JFIF?"}}):
        with pytest.raises(ArtefactError, match="an image column holds"):
            image_pixels(row | wrong)
    with pytest.raises(ArtefactError, match="this code reads png, jxl, raw"):
        image_pixels(row | {"image": row["image"] | {"path": "an-id.webp"}})


def test_images_lie_in_parquet_as_they_are_and_the_rest_compressed() -> None:
    table = _dataset(20)
    metadata = pq.read_metadata(io.BytesIO(parquet_bytes(table, stored=("image.bytes",))))
    group = metadata.row_group(0)
    codecs = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
    assert {name for name, codec in codecs.items() if codec != "ZSTD"} == {"image.bytes"}
    assert pq.read_table(io.BytesIO(parquet_bytes(table, stored=("image.bytes",)))).equals(table)


def test_bytes_that_are_no_png_are_refused() -> None:
    with pytest.raises(ArtefactError, match="no PNG"):
        png_pixels(b"JFIF?")


# --- parquet --------------------------------------------------------------------------------------------------


def test_a_parquet_shard_is_deterministic_and_reads_back(store: Store) -> None:
    table = _dataset(20)
    data = parquet_bytes(table)
    assert parquet_bytes(_dataset(20)) == data
    store.write("d/x.parquet", data)
    entry = FileEntry.of(store.digest("d/x.parquet"))
    assert read_parquet(store, entry).equals(table)
    assert read_parquet(store, entry, ["index", "findings"]).equals(table.select(["index", "findings"]))


def test_large_shards_are_cut_into_row_groups_for_random_access() -> None:
    table = pa.table({"image": [bytes([i]) * (1 << 20) for i in range(12)]})
    file = pq.ParquetFile(io.BytesIO(parquet_bytes(table)))
    assert file.num_row_groups == 4
    assert parquet_bytes(table.slice(0, 0))


@pytest.mark.parametrize("columns", [None, ["image"]])
def test_one_flipped_byte_in_a_shard_is_found(store: Store, columns: list[str] | None) -> None:
    data = parquet_bytes(_dataset(20))
    store.write("x.parquet", data)
    entry = FileEntry.of(store.digest("x.parquet"))
    place = data.index(_dataset(1)["image"][0].as_py()["bytes"][60:80])
    store.write("x.parquet", data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(ArtefactError, match=r"x\.parquet: (changed|is a damaged)"):
        read_parquet(store, entry, columns)


@pytest.mark.s3
@pytest.mark.parametrize("columns", [None, ["index"]])
def test_a_missing_shard_is_a_store_error(store_uri: str, tmp_path: Path, columns: list[str] | None) -> None:
    entry = FileEntry(path="gone.parquet", bytes=1, sha256="0" * 64)
    for store in (Store(store_uri), Store(str(tmp_path))):
        with pytest.raises(StoreError, match=r"gone\.parquet: no such"):
            read_parquet(store, entry, columns)


def test_rows_come_in_shard_order_from_one_folder(store: Store) -> None:
    entries = []
    for shard, ids in ((1, ["c", "d"]), (0, ["a", "b"])):
        part = _part(parquet_bytes(pa.table({"id": ids})))
        store.write(part_key(shard, part), part.content())
        entries.append(FileEntry.of(store.digest(part_key(shard, part))))
    other = FileEntry(path="holdout/shard-000000-000000000000.parquet", bytes=0, sha256="")
    artefact = publish(store, kind="corpus", name="n", recipe={}, inputs=[], files=[*entries, other], statistics={})
    assert [row["id"] for row in rows(artefact, "train")] == ["a", "b", "c", "d"]
    paths = parquet_paths(artefact, "train")
    assert pq.read_table(paths, filesystem=store.filesystem).column("id").to_pylist() == ["a", "b", "c", "d"]


# --- schemas --------------------------------------------------------------------------------------------------


def test_other_people_s_readers_open_a_dataset_and_decode_its_images(tmp_path: Path) -> None:
    file = tmp_path / "shard.parquet"
    file.write_bytes(parquet_bytes(_dataset(4)))
    loaded = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert all(np.array_equal(np.asarray(row["image"]), pixels) for row, pixels in zip(loaded, _images(4), strict=True))
    assert list(pd.read_parquet(file)["findings"][0]) == ["effusion"]
    found = duckdb.sql(f"select count(*), min(image.path) from '{file}' where list_contains(findings, 'effusion')")
    assert found is not None
    assert found.fetchall() == [(4, "0.png")]


def test_images_that_pil_cannot_open_are_left_to_others_as_bytes(tmp_path: Path) -> None:
    pixels = _images(1)[0]
    row = {"id": "0", "index": 0} | image_row(pixels, image_bytes(pixels, "jpeg-xl"), "jpeg-xl")
    file = tmp_path / "shard.parquet"
    file.write_bytes(parquet_bytes(pa.Table.from_pylist([row], dataset_schema(SCHEMA, "jpeg-xl"))))
    loaded = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded[0]["image"] == row["image"]
    np.testing.assert_array_equal(image_pixels(loaded[0]), pixels)


def test_every_schema_survives_parquet() -> None:
    schemas = [corpus_schema(SCHEMA), latents_schema(SCHEMA, (4, 8, 8)), dataset_schema(SCHEMA), QUARANTINE_SCHEMA]
    for schema in schemas:
        back = pq.read_schema(io.BytesIO(parquet_bytes(schema.empty_table())))
        assert back.equals(schema)
        assert (back.metadata or {}).get(b"huggingface") == (schema.metadata or {}).get(b"huggingface")
        assert {*SCHEMA.names} <= {*schema.names} or schema is QUARANTINE_SCHEMA


def test_latents_keep_half_precision_and_shape() -> None:
    schema = latents_schema(SCHEMA, (2, 3, 4))
    mean = np.arange(24, dtype=np.float16) / 7
    row = {**dict.fromkeys(schema.names), "id": "x", "mean": list(mean), "logvar": list(mean)}
    back = pq.read_table(io.BytesIO(parquet_bytes(pa.Table.from_pylist([row], schema=schema))))
    assert back.column("mean").type == pa.list_(pa.float16(), 24)
    assert np.array_equal(np.asarray(back.column("mean").combine_chunks().flatten()), mean)


def test_the_quarantine_has_no_column_for_a_file_name() -> None:
    assert QUARANTINE_SCHEMA.names == ["unit", "unit_name", "member", "frame", "code", "tag", "reason"]
    assert json.loads(dataset_schema(SCHEMA).metadata[b"huggingface"])["info"]["features"] == {
        "image": {"_type": "Image"}
    }
