"""Real beside synthetic: the figures come from the pictures, and the sheet shows what was generated."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from scanloom.artefact import Artefact, publish
from scanloom.audit.contact_sheet import Tile
from scanloom.audit.side_by_side import compare, separation, sheet_rows
from scanloom.errors import RecipeError
from scanloom.scans.phantoms import Phantom, phantom
from scanloom.shards.commit import ShardPart, begin, commit_shard
from scanloom.shards.schemas import dataset_schema
from scanloom.shards.writer import parquet_bytes, png_bytes
from scanloom.store import Store
from tests.phantom_corpus import PLAN, SCHEMA, publish_corpus


def _phantoms(count: int = 160) -> list[Phantom]:
    return [phantom(5, index, 64) for index in range(count)]


def _tile(scan: Phantom) -> Tile:
    return Tile(scan.pixels, scan.attributes, scan.bits_stored)


def _publish_dataset(uri: str, scans: list[Phantom]) -> Artefact:
    """A dataset as jobs.generate lays it out, its pictures phantoms."""
    store = Store(uri)
    begin(store, "dataset", PLAN)
    rows = [
        {"id": f"{s.index:016x}", "index": s.index, "image": {"bytes": png_bytes(s.pixels), "path": f"{s.index}.png"}}
        | {"width": s.pixels.shape[1], "height": s.pixels.shape[0], "bits_stored": s.bits_stored, **s.attributes}
        for s in scans
    ]
    data = parquet_bytes(pa.Table.from_pylist(rows, dataset_schema(SCHEMA)))
    commit = commit_shard(store, PLAN, 0, [ShardPart("images", "images", "parquet", data, len(rows))], len(rows), {})
    files = list(commit.files.values())
    return publish(store, kind="dataset", name="demo", recipe={}, inputs=[], files=files, statistics={})


def test_phantoms_separate_by_their_hearts_and_other_findings_are_left_out() -> None:
    scans = _phantoms()
    found = separation([_tile(scan) for scan in scans])
    assert found.with_finding == sum(scan.findings == ("Cardiomegaly",) for scan in scans)
    assert found.without == sum(scan.findings == () for scan in scans)
    assert found.auc >= 0.97
    assert found.mean_with > 0.54 > 0.50 > found.mean_without


def test_labels_that_say_nothing_about_the_pictures_separate_nothing() -> None:
    scans = _phantoms(240)
    labels = np.random.Generator(np.random.Philox(key=2)).random(len(scans)) < 0.5
    findings = [("Cardiomegaly",) if label else () for label in labels]
    shuffled = [Tile(s.pixels, {**s.attributes, "findings": f}) for s, f in zip(scans, findings, strict=True)]
    assert 0.38 < separation(shuffled).auc < 0.62


def test_pictures_that_cannot_be_measured_are_counted_and_in_no_other_figure() -> None:
    tiles = [_tile(scan) for scan in _phantoms(40)]
    noise = np.random.Generator(np.random.Philox(key=3)).integers(0, 256, (64, 64), dtype=np.uint8)
    clean, spoilt = separation(tiles), separation([*tiles, Tile(noise, {"findings": ()})])
    assert (clean.unmeasured, spoilt.unmeasured) == (0, 1)
    assert (clean.auc, clean.without) == (spoilt.auc, spoilt.without)


def test_no_pictures_of_a_kind_leave_the_separation_unknown() -> None:
    found = separation([_tile(scan) for scan in _phantoms(40) if not scan.findings])
    assert found.with_finding == 0
    assert math.isnan(found.auc)
    assert "AUC" not in str(found)
    assert "nan" not in str(found)


def test_a_sheet_has_a_row_per_generated_cell_with_pictures_of_that_cell_on_both_sides() -> None:
    real = [_tile(scan) for scan in _phantoms()]
    synthetic = [tile for tile in real if tile.attributes["findings"] in ((), ("Cardiomegaly",), ("Effusion",))]
    rows = sheet_rows(real, synthetic)
    assert [row.cell for row in rows] == ["No finding", "Cardiomegaly", "Effusion"]
    for row in rows:
        wanted = () if row.cell == "No finding" else (row.cell,)
        assert {tile.attributes["findings"] for tile in (*row.real, *row.synthetic)} == {wanted}
    kinds = {(tile.attributes["sex"], tile.attributes["view"]) for tile in rows[0].real}
    assert len(kinds) == len(rows[0].real) == 4


def test_an_unknown_finding_counts_as_neither_group() -> None:
    tiles = [Tile(scan.pixels, {**scan.attributes, "findings": None}) for scan in _phantoms(20)]
    found = separation(tiles)
    assert (found.with_finding, found.without) == (0, 0)
    assert sheet_rows(tiles, tiles) == []


def test_comparing_artefacts_reads_their_pictures_and_draws_the_sheet(tmp_path: Path) -> None:
    scans = _phantoms(72)
    corpus = publish_corpus(str(tmp_path / "corpus"))
    comparison = compare(corpus, _publish_dataset(str(tmp_path / "dataset"), scans), "a title")
    assert comparison.synthetic == separation([_tile(scan) for scan in scans])
    assert comparison.figures["synthetic"]["without"] == comparison.synthetic.without
    assert Image.open(io.BytesIO(comparison.contact_sheet)).size[0] > 8 * 128


def test_a_corpus_without_findings_cannot_be_compared_and_says_so(tmp_path: Path) -> None:
    corpus = publish_corpus(str(tmp_path / "corpus"))
    statistics = dict(corpus.manifest.statistics)
    statistics["schema"] = {"declarations": [d for d in statistics["schema"]["declarations"] if d["name"] == "sex"]}
    bare = Artefact(corpus.store, corpus.manifest.model_copy(update={"statistics": statistics}))
    with pytest.raises(RecipeError, match="findings"):
        compare(bare, bare, "a title")
