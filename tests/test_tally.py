"""What commits add up to: once a shard, per cell, whatever the order and the thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scanloom.artefact import FileEntry
from scanloom.recipe import Generate
from scanloom.sampling.plan import PlanSpec, cell_counts, compile_plan, specify
from scanloom.sampling.tally import Tally, planned
from scanloom.shards.commit import ShardCommit
from tests.tiny_generator import STATISTICS


@pytest.fixture(scope="module")
def spec() -> PlanSpec:
    return specify(Generate(images=22, images_per_shard=8), "tiny", "0" * 64, STATISTICS)


def _commit(spec: PlanSpec, shard: int, **statistics: Any) -> ShardCommit:
    rows = compile_plan(spec).rows(shard)
    files = {
        role: FileEntry(path=f"{role}/shard-{shard:06d}", bytes=10 + shard, sha256=f"{shard:064d}")
        for role in ("images", "dicom")
    }
    figures = {"cells": cell_counts(rows), "engine_s": 2.0, "environment": {"device": "cpu"}}
    return ShardCommit(shard=shard, plan=spec.digest, rows=len(rows), files=files, statistics=figures | statistics)


def test_every_shard_counts_once(spec: PlanSpec) -> None:
    tally = Tally(spec)
    assert [tally.add(_commit(spec, shard)) for shard in (2, 0, 2)] == [6, 8, 0]
    assert tally.missing == [1]
    assert (tally.images, tally.engine_s) == (14, 4.0)
    assert [planned(spec, shard) for shard in range(3)] == [8, 8, 6]


def test_files_are_those_of_the_commits(spec: PlanSpec) -> None:
    tally = Tally(spec)
    commits = [_commit(spec, shard) for shard in range(3)]
    for commit in commits:
        tally.add(commit)
    assert list(tally.files()) == [file for commit in commits for file in commit.files.values()]
    assert tally.keys() == {file.path for file in tally.files()}


def test_cells_add_up_to_what_was_ordered(spec: PlanSpec) -> None:
    tally, plan = Tally(spec), compile_plan(spec)
    lost = cell_counts(plan.rows(1).slice(0, 1))
    tally.add(_commit(spec, 0))
    made = cell_counts(plan.rows(1).slice(1))
    tally.add(_commit(spec, 1, cells=made, rejected=lost, infeasible=lost, rejects={"blank": 8, "infeasible": 1}))
    tally.add(_commit(spec, 2, rejects={"blank": 1}))
    cells = tally.cells()
    assert all(cell["requested"] == cell["made"] + cell["infeasible"] for cell in cells)
    assert sum(cell["infeasible"] for cell in cells) == sum(cell["rejected"] for cell in cells) == 1
    statistics = tally.statistics()
    assert statistics["rejects"] == {"blank": 9, "infeasible": 1}
    assert statistics["infeasible"] == 1
    assert statistics["environments"] == [{"device": "cpu"}]


def test_threads_lose_no_shard() -> None:
    many = specify(Generate(images=600, images_per_shard=2), "tiny", "0" * 64, STATISTICS)
    tally, commits = Tally(many), [_empty(many, shard) for shard in range(300)]
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(tally.add, commits * 3)) == 600
    assert tally.missing == []
    assert tally.images == 600


def _empty(spec: PlanSpec, shard: int) -> ShardCommit:
    statistics = {"cells": {}, "engine_s": 0.0, "environment": {"device": f"cpu {shard % 3}"}}
    return ShardCommit(shard=shard, plan=spec.digest, rows=2, files={}, statistics=statistics)
