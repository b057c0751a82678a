"""Preparing a corpus: every file accounted for, nobody to be found in it, the same corpus whatever dies."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import yaml
from PIL import Image, ImageDraw, ImageFont

from jobs import prepare
from scanloom import artefact
from scanloom.artefact import Artefact, open_artefact, verify
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import ArtefactError, RecipeError, ScanloomError, StoreError
from scanloom.recipe import Recipe, load_recipe, parse_recipe
from scanloom.scans import dicom_objects
from scanloom.scans.corpus_plan import STAGING, CurationPlan, claim, plan_curation
from scanloom.scans.curate import (
    clean,
    curated_unit,
    duplicates,
    finished_statistics,
    settle_unit,
    stage_unit,
    staged,
    too_few_left,
)
from scanloom.scans.deidentify import KEY_VARIABLE
from scanloom.scans.phantoms import phantom
from scanloom.scans.tally import SPLITS
from scanloom.shards.commit import committed
from scanloom.shards.reader import read_parquet, rows
from scanloom.shards.writer import png_pixels
from scanloom.store import Store
from tests.fault_proxy import Fault, FaultProxy
from tests.made_dicom import CANARY, KEY, UID_ROOT, file, radiograph, tar
from tests.processes import kill, named

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "jobs" / "recipes" / "nih-cxr.yaml"


@pytest.fixture(autouse=True)
def pseudonym_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


# --- a small archive with everything in it --------------------------------------------------------------------


def scan(number: int, patient: int, **elements: Any) -> bytes:
    uids = {"SOPInstanceUID": f"{UID_ROOT}1.{number}", "StudyInstanceUID": f"{UID_ROOT}2.{patient}"}
    identity = {"PatientID": f"MRN-{patient:08d}", "PatientAge": f"{20 + patient % 70:03d}Y"}
    return file(radiograph(8, (32, 32), number), **(uids | identity | elements))


def fill(folder: Path) -> dict[str, int]:
    """Five units: 27 files, 20 scans of 16 patients; how many files each code should refuse."""
    folder.mkdir(parents=True, exist_ok=True)
    scans = [scan(i, i * 4 // 5) for i in range(20)]
    again = scan(2, 99, PatientID="MRN-99999999")
    units = {
        "a.tar": tar([(f"MRN-{i}.dcm", scans[i]) for i in range(8)]),
        "b.tar.gz": tar([("x", scans[2]), *((f"{i}", scans[i]) for i in range(8, 14)), ("y", scans[9])], "w:gz"),
        "c.tar": tar([("z", again), *((f"{i}", scans[i]) for i in range(14, 20))]),
        "d.tar": tar([("letter", b"a letter"), ("lost", scan(77, 7, PatientID=None)), ("cut", scans[0][:900])]).rstrip(
            b"\0"
        ),
        "notes.txt": b"notes",
    }
    for name, data in units.items():
        (folder / name).write_bytes(data)
    return {"duplicate": 3, "not-dicom": 2} | dict.fromkeys(("broken-archive", "no-patient-id", "truncated"), 1)


def recipe(store: str, source: str, **prepare_keys: Any) -> Recipe:
    tree = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    # The waves of these tiny scans stand in rows like glyphs.
    section = {"source": {"kind": "dicom", "uri": source}, "size_px": 32, "max_rejected_share": 0.5}
    section["burned_in_text"] = "flag"
    return parse_recipe(tree | {"store": store, "prepare": section | prepare_keys}, "test")


def arguments(store: object, source: object, *more: str) -> list[str]:
    keys = {"store": store, "prepare.source.uri": source, "prepare.size_px": 32, "prepare.max_rejected_share": 0.5}
    overrides = [f"{key}={value}" for key, value in keys.items()] + list(more)
    return [str(RECIPE), *(part for override in overrides for part in ("--set", override))]


def curate(plan: CurationPlan, order: list[int] | None = None) -> dict[str, Any]:
    """What the job does, without Ray: the units in this order."""
    claim(plan)
    for index in order if order is not None else range(len(plan.units)):
        stage(plan, index)
    shards = staged(plan.curation)
    losers = duplicates(shards)
    for unit, shard in shards.items():
        settle_unit({"staged": shard.model_dump_json(), "losers": losers.get(unit, [])}, plan.curation)
    return contents(plan)


def stage(plan: CurationPlan, place: int) -> None:
    """Stage one of the plan's units as the job does."""
    unit = plan.units[place]
    row = {"unit": unit.model_dump_json(), "taken_over": plan.taken_over_json(unit.index)}
    stage_unit(row, plan.curation)


def contents(plan: CurationPlan) -> dict[str, Any]:
    """Every committed file with its hash, and the corpus's statistics."""
    commits = committed(plan.curation.store, plan.curation.plan)
    files = {f.path: f.sha256 for commit in commits.values() for f in commit.files.values()}
    return {"files": files, "statistics": finished_statistics(commits.values(), plan.curation)}


def scans_of(corpus: Artefact) -> dict[str, tuple[Any, ...]]:
    """Split, place and pixels by id, over all splits; no id twice."""
    found: dict[str, tuple[Any, ...]] = {}
    for split in SPLITS:
        for row in rows(corpus, split):
            assert row["id"] not in found
            pixels = png_pixels(row["image"]["bytes"]).tobytes()
            found[row["id"]] = (split, row["unit"], row["member"], row["patient"], pixels)
    return found


def quarantined(corpus: Artefact) -> list[tuple[Any, ...]]:
    return [(r["unit"], r["member"], r["code"]) for r in rows(corpus, "quarantine")]


def require_apart(corpus: Artefact) -> None:
    splits: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in rows(corpus, split, ["patient"]):
            splits.setdefault(row["patient"], set()).add(split)
    assert splits
    assert all(len(found) == 1 for found in splits.values())


# --- the library without Ray ----------------------------------------------------------------------------------


def test_every_file_is_in_the_corpus_or_the_quarantine_once(tmp_path: Path) -> None:
    expected = fill(tmp_path / "in")
    plan = plan_curation(recipe(str(tmp_path / "out"), str(tmp_path / "in")))
    made = curate(plan)["statistics"]
    assert made["rows"] == 20
    assert made["quarantined"] == expected
    commits = committed(plan.curation.store, plan.curation.plan)
    places = [
        (row["unit"], row["member"])
        for commit in commits.values()
        for entry in commit.files.values()
        for row in read_parquet(plan.curation.store, entry).to_pylist()
    ]
    assert sorted(places) == [(0, m) for m in range(8)] + [(1, m) for m in range(8)] + [(2, m) for m in range(7)] + [
        (3, m) for m in range(4)
    ] + [(4, 0)]


def test_files_whose_names_are_not_utf8_are_read_like_others(tmp_path: Path) -> None:
    """As older systems have left them in many archives."""
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / os.fsdecode(b"M\xfcller-%d.dcm" % number)).write_bytes(scan(number, number))
    asked = recipe(str(tmp_path / "out"), str(tmp_path / "in"), burned_in_text="ignore")
    assert curate(plan_curation(asked))["statistics"]["rows"] == 6
    publish(plan_curation(asked))
    assert plan_curation(asked).version == 1


def test_the_header_of_an_object_is_counted_once_whichever_of_its_frames_are_kept(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    frames = np.arange(4 * 32 * 24, dtype=np.uint16).reshape(4, 32, 24)
    frames[0] = 7  # a blank one
    cine = file(frames.reshape(128, 24), Rows=32, NumberOfFrames=4, bits_stored=16)
    (tmp_path / "in" / "a.tar").write_bytes(tar([("cine", cine), *((f"{i}", scan(i, i)) for i in range(6))]))
    asked = recipe(str(tmp_path / "out"), str(tmp_path / "in"), burned_in_text="ignore")
    made = curate(plan_curation(asked))["statistics"]
    assert made["rows"] == 9
    assert made["quarantined"] == {"blank-image": 1}
    assert made["deidentification"]["(0010,0010) PatientName"] == {"removed": 7}


def test_a_staged_shard_that_was_damaged_is_not_written_again_without_its_duplicates(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    plan = plan_curation(recipe(str(tmp_path / "out"), str(tmp_path / "in"), burned_in_text="ignore"))
    claim(plan)
    for index in range(3):
        stage(plan, index)
    shard = staged(plan.curation)[2]
    damaged = tmp_path / "out" / "corpus" / shard.files["train"].path
    pixels = pq.read_metadata(damaged).row_group(0).column(3)
    assert pixels.path_in_schema == "image.bytes"
    data = bytearray(damaged.read_bytes())
    data[pixels.data_page_offset + pixels.total_compressed_size - 50] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        settle_unit({"staged": shard.model_dump_json(), "losers": ["0"]}, plan.curation)


def test_whichever_unit_is_read_first_the_first_by_number_keeps_the_scan(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    results = []
    for number, order in enumerate([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]]):
        plan = plan_curation(recipe(str(tmp_path / f"out{number}"), str(tmp_path / "in")))
        results.append(curate(plan, order))
        losers = duplicates(staged(plan.curation))
        assert losers == {1: ["0", "7"], 2: ["0"]}
    assert results[0] == results[1] == results[2]


def test_work_that_is_done_twice_or_resumed_anywhere_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    whole = curate(plan_curation(recipe(str(tmp_path / "whole"), str(tmp_path / "in"))))
    plan = plan_curation(recipe(str(tmp_path / "torn"), str(tmp_path / "in")))
    for unit in (1, 1, 3):
        stage(plan, unit)
    # A driver that died after the last unit was staged, and settled one shard.
    with curated_unit(plan.units[0], plan.curation):
        pass
    for index in range(5):
        stage(plan, index)
    shards = staged(plan.curation)
    for _ in range(2):
        settle_unit({"staged": shards[2].model_dump_json(), "losers": duplicates(shards)[2]}, plan.curation)
    assert curate(plan) == whole
    clean(plan.curation)
    assert contents(plan) == whole
    assert plan.curation.store.list(STAGING) == []
    kept = {o.key for o in plan.curation.store.list()} - {f"commits/shard-{i:06d}.json" for i in range(5)}
    assert {key for key in kept if not key.startswith("units/")} - {"plan.json"} == set(whole["files"])


def test_the_plan_knows_what_is_read_and_how_but_not_where_or_with_how_many(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    where = str(tmp_path / "out"), str(tmp_path / "in")
    plan = plan_curation(recipe(*where)).curation.plan
    moved = recipe(str(tmp_path / "elsewhere"), str(tmp_path / "copy"), workers=1, max_rejected_share=1.0)
    assert plan_curation(moved).curation.plan == plan
    assert plan_curation(recipe(*where, size_px=64)).curation.plan != plan
    assert plan_curation(recipe(*where, resize="crop")).curation.plan != plan
    split = {"train": 0.5, "validation": 0.25, "holdout": 0.25}
    assert plan_curation(recipe(*where, split=split)).curation.plan != plan
    (tmp_path / "copy" / "e.tar").write_bytes(tar({"one": scan(50, 50)}))
    assert plan_curation(moved).curation.plan != plan


def test_another_key_is_another_plan_and_a_worker_with_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "in")
    plan = plan_curation(recipe(str(tmp_path / "out"), str(tmp_path / "in")))
    monkeypatch.setenv(KEY_VARIABLE, KEY[::-1])
    assert plan_curation(recipe(str(tmp_path / "out"), str(tmp_path / "in"))).curation.plan != plan.curation.plan
    with pytest.raises(RecipeError, match="not the one the run was planned with"):
        stage(plan, 0)


def test_the_holdout_stays_when_more_patients_come(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    before = plan_curation(recipe(str(tmp_path / "a"), str(tmp_path / "in"), split=HALVES))
    (tmp_path / "in" / "e.tar").write_bytes(tar({f"{i}": scan(100 + i, 100 + i) for i in range(9)}))
    after = plan_curation(recipe(str(tmp_path / "b"), str(tmp_path / "in"), split=HALVES))
    held = [patients_of(plan, "holdout") for plan in (before, after)]
    assert held[0]
    assert held[0] <= held[1]
    assert not held[0] & patients_of(after, "train")


HALVES = {"train": 0.5, "validation": 0.0, "holdout": 0.5}


def patients_of(plan: CurationPlan, split: str) -> set[str]:
    found: set[str] = set()
    for unit in plan.units:
        with curated_unit(unit, plan.curation) as (tables, _):
            if split in tables:
                found.update(pq.read_table(tables[split], columns=["patient"])["patient"].to_pylist())
    return found


def test_a_corpus_without_a_training_patient_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar({"one": scan(1, 1)}))
    none = {"train": 0.0, "validation": 0.5, "holdout": 0.5}
    with pytest.raises(ScanloomError, match="none of the 1 scans is of a patient in the train split"):
        curate(plan_curation(recipe(str(tmp_path / "out"), str(tmp_path / "in"), split=none)))


@pytest.mark.parametrize("share, stops", [(0.0, True), (0.28, True), (0.3, False), (1.0, False)])
def test_the_share_of_refused_files_decides_whether_the_run_stops(tmp_path: Path, share: float, stops: bool) -> None:
    """Eight of 28 files are refused: 0.286."""
    fill(tmp_path / "in")
    plan = plan_curation(recipe(str(tmp_path / "out"), str(tmp_path / "in")))
    curate(plan)
    shards = staged(plan.curation)
    message = too_few_left(shards, duplicates(shards), share)
    assert (message is not None) == stops
    if message:
        assert message.startswith("8 of 28 scans were refused")
        assert "duplicate 3" in message


def test_a_source_of_which_nothing_is_left_is_refused_whatever_share_may_be(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"a letter")
    plan = plan_curation(recipe(str(tmp_path / "out"), str(tmp_path / "in"), max_rejected_share=1.0))
    claim(plan)
    stage(plan, 0)
    message = too_few_left(staged(plan.curation), {}, 1.0)
    assert message is not None
    assert message.startswith("1 of 1 scans were refused, none is left: not-dicom 1;")


def test_a_recipe_that_would_tell_the_oldest_apart_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    tree = recipe(str(tmp_path / "out"), str(tmp_path / "in")).model_dump(mode="json")
    age = {"name": "age", "source": "PatientAge", "kind": "number", "unit": "years", "minimum": 0, "maximum": 120}
    with pytest.raises(RecipeError, match=r"ages over 89 .* set its cap to 90"):
        plan_curation(parse_recipe(tree | {"attributes": [age]}, "test"))
    assert plan_curation(parse_recipe(tree | {"attributes": [age | {"cap": 90}]}, "test")).units


def test_a_store_inside_the_source_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(RecipeError, match=r"lies inside prepare\.source\.uri"):
        plan_curation(recipe(str(tmp_path / "out"), str(tmp_path)))


@pytest.mark.parametrize("rule, kept, counted", [(None, 1, 0), ("flag", 2, 1), ("ignore", 2, None)])
def test_a_scan_with_a_name_in_its_pixels_is_kept_out_unless_the_recipe_keeps_it(
    tmp_path: Path, rule: str | None, kept: int, counted: int | None
) -> None:
    clean_scan = phantom(0, 1, 256).pixels
    picture = Image.fromarray(clean_scan)
    ImageDraw.Draw(picture).text((60, 120), "DOE^JANE 1950-09-15", fill=255, font=ImageFont.load_default(16))
    (tmp_path / "in").mkdir()
    for number, pixels in enumerate((clean_scan, np.asarray(picture))):
        (tmp_path / "in" / f"{number}").write_bytes(file(pixels, PatientID=f"MRN-{number}"))
    wanted = {} if rule is None else {"burned_in_text": rule}
    every = {"train": 1.0, "validation": 0.0, "holdout": 0.0}
    tree = recipe(str(tmp_path / "out"), str(tmp_path / "in"), split=every).model_dump(mode="json")
    tree["prepare"].pop("burned_in_text")
    made = curate(plan_curation(parse_recipe(tree | {"prepare": tree["prepare"] | wanted}, "test")))["statistics"]
    assert made["rows"] == kept
    assert made["with_text"] == (counted or 0)
    assert made["quarantined"] == ({"text-seen": 1} if rule is None else {})


# --- a source that grows --------------------------------------------------------------------------------------


def publish(plan: CurationPlan) -> None:
    """Finish a curated corpus as the job does."""
    commits = committed(plan.curation.store, plan.curation.plan)
    files = [file for commit in commits.values() for file in commit.files.values()]
    artefact.publish(
        plan.curation.store, kind="corpus", name="test", recipe={}, inputs=plan.lineage, files=files, statistics={}
    )
    clean(plan.curation)


def by_id(plan: CurationPlan) -> dict[str, tuple[Any, ...]]:
    """Split, patient and pixels of each scan by its id, wherever it stood in the source."""
    corpus = open_artefact(plan.curation.corpus)
    return {scan: (found[0], *found[3:]) for scan, found in scans_of(corpus).items()}


@pytest.mark.s3
def test_a_grown_source_makes_a_version_that_reads_only_what_is_new(
    tmp_path: Path, s3: EmbeddedS3, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "in")
    source = Store(f"{store_uri}/in")
    source.put_folder(tmp_path / "in")
    asked = recipe(f"{store_uri}/out", source.uri)
    first = plan_curation(asked)
    curate(first)
    publish(first)
    new = {"a0.tar": [50, 51, 3], "zz.tar": [52]}
    for name, numbers in new.items():
        source.write(name, tar({f"{i}": scan(i, i) for i in numbers}))
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        second = plan_curation(asked)
        made = curate(second)
        publish(second)
        read = {path.rpartition("/in/")[2] for _, path in proxy.requests if "/in/" in path}
    assert second.version == 2
    assert second.curation.corpus == f"{store_uri}/out/corpus-v2"
    assert read == set(new)
    assert [unit.index for unit in second.units] == [0, 1, 2, 3, 4, 5, 6]
    assert made["statistics"]["rows"] == 23
    assert made["statistics"]["quarantined"]["duplicate"] == 4
    monkeypatch.undo()
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert list(verify(open_artefact(second.curation.corpus))) == []
    # As one that reads everything at once, but for which of two equal instances is the first.
    whole = plan_curation(recipe(f"{store_uri}/whole", source.uri))
    curate(whole)
    publish(whole)
    assert by_id(second) == by_id(whole)
    assert plan_curation(asked).version == 2
    assert [entry.role for entry in open_artefact(second.curation.corpus).manifest.inputs] == ["source", "grown-from"]


def test_patients_who_leave_the_source_are_not_in_its_next_version(tmp_path: Path) -> None:
    """And what was a duplicate of theirs is a scan."""
    fill(tmp_path / "in")
    asked = recipe(str(tmp_path / "out"), str(tmp_path / "in"))
    first = plan_curation(asked)
    curate(first)
    publish(first)
    (tmp_path / "in" / "a.tar").unlink()
    second = plan_curation(asked)
    made = curate(second)
    publish(second)
    assert second.version == 2
    # Scans 0 to 7 were in it; scan 2 stands in b.tar.gz and, under another patient, in c.tar.
    assert made["statistics"]["rows"] == 13
    whole = plan_curation(recipe(str(tmp_path / "whole"), str(tmp_path / "in")))
    curate(whole)
    publish(whole)
    assert by_id(second) == by_id(whole)


def test_a_file_that_is_mended_is_read_again(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    asked = recipe(str(tmp_path / "out"), str(tmp_path / "in"))
    first = plan_curation(asked)
    curate(first)
    publish(first)
    (tmp_path / "in" / "notes.txt").write_bytes(scan(60, 60))
    second = plan_curation(asked)
    assert curate(second)["statistics"]["rows"] == 21
    assert set(second.taken_over) == {0, 1, 2, 3}


def test_the_manifest_holds_the_recipe_of_its_own_version(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    asked = recipe(str(tmp_path / "out"), str(tmp_path / "in"), burned_in_text="ignore")
    for version in (1, 2):
        (tmp_path / "in" / f"{version}.tar").write_bytes(tar({"one": scan(50 + version, 50)}))
        plan = plan_curation(asked)
        curate(plan)
        made = prepare._publish(plan, asked)
        assert parse_recipe(made.manifest.recipe, "manifest").uri("corpus") == made.uri
        assert made.manifest.statistics["version"] == version


def test_a_version_that_has_none_before_it_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    asked = recipe(str(tmp_path / "out"), str(tmp_path / "in")).model_copy(update={"corpus_version": 3})
    with pytest.raises(RecipeError, match="corpus-v2 holds no corpus by the same rules"):
        plan_curation(asked)


def test_a_store_error_of_a_worker_names_no_file_of_the_source(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    (tmp_path / "in" / "MRN-77-doe.tar").write_bytes(tar({"1": scan(1, 1)}))
    plan = plan_curation(recipe(str(tmp_path / "out"), str(tmp_path / "in")))
    claim(plan)
    (tmp_path / "in" / "MRN-77-doe.tar").unlink()
    with pytest.raises(StoreError) as error:
        stage(plan, 0)
    assert "MRN" not in str(error.value)
    assert "unit 0, see --locate" in str(error.value)


def test_files_that_come_while_an_unfinished_run_is_away_wait_for_the_next_version(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    whole = curate(plan_curation(recipe(str(tmp_path / "whole"), str(tmp_path / "in"))))
    asked = recipe(str(tmp_path / "out"), str(tmp_path / "in"))
    begun = plan_curation(asked)
    claim(begun)
    stage(begun, 2)
    (tmp_path / "in" / "a0.tar").write_bytes(tar({"one": scan(50, 50)}))
    resumed = plan_curation(asked)
    assert (resumed.version, resumed.later) == (1, 1)
    assert curate(resumed) == whole
    publish(resumed)
    assert plan_curation(asked).version == 2


def test_an_unfinished_run_whose_unread_files_are_gone_says_so(tmp_path: Path) -> None:
    fill(tmp_path / "in")
    asked = recipe(str(tmp_path / "out"), str(tmp_path / "in"))
    begun = plan_curation(asked)
    claim(begun)
    stage(begun, 0)
    (tmp_path / "in" / "a.tar").unlink()
    assert [unit.index for unit in plan_curation(asked).units] == [1, 2, 3, 4]
    (tmp_path / "in" / "b.tar.gz").unlink()
    with pytest.raises(ArtefactError, match="1 files of the source vanished or changed"):
        plan_curation(asked)


def test_a_version_takes_nothing_over_from_one_that_was_finished_after_it_was_begun(tmp_path: Path) -> None:
    """Its duplicates may be duplicates of scans that have left the source."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar({f"{i}": scan(i, i) for i in range(10)}))
    (tmp_path / "in" / "b.tar").write_bytes(tar({f"{i}": scan(i, i) for i in range(9, 15)}))
    asked = recipe(str(tmp_path / "out"), str(tmp_path / "in"))
    first = plan_curation(asked)
    claim(first)
    for unit in (0, 1):
        stage(first, unit)
    (tmp_path / "in" / "a.tar").write_bytes(tar({f"{i}": scan(i, i) for i in range(9)}))
    later = asked.model_copy(update={"corpus_version": 2})
    claim(plan_curation(later))
    assert plan_curation(later).taken_over == {}
    curate(first)
    publish(first)
    second = plan_curation(later)
    assert (second.version, second.taken_over, second.curation.grown_from) == (2, {}, "")
    assert curate(second)["statistics"]["rows"] == 15


def test_a_unit_whose_first_attempt_died_is_read_behind_the_fence_to_the_same_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "in")
    whole = curate(plan_curation(recipe(str(tmp_path / "whole"), str(tmp_path / "in"))))
    plan = plan_curation(recipe(str(tmp_path / "out"), str(tmp_path / "in")))
    for index in range(5):
        plan.curation.store.at(STAGING).write(f"attempts/unit-{index:06d}", b"")
    monkeypatch.setattr(dicom_objects, "read_instance", None)  # nothing can be read on this side of the fence
    assert curate(plan) == whole


# --- S3 that fails --------------------------------------------------------------------------------------------


def curated_through(proxy: FaultProxy, uri: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        return curate(plan_curation(recipe(f"{uri}/disturbed", f"{uri}/in")))


@pytest.mark.s3
def test_refusals_resets_and_cut_bodies_change_nothing(
    tmp_path: Path, s3: EmbeddedS3, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "in")
    Store(store_uri).put_folder(tmp_path / "in", "in")
    undisturbed = curate(plan_curation(recipe(f"{store_uri}/whole", f"{store_uri}/in")))
    with FaultProxy(s3.endpoint, seed=5) as proxy:
        for fault in FAULTS:
            proxy.inject(fault, times=8, share=0.12, at=700)
        assert curated_through(proxy, store_uri, monkeypatch) == undisturbed
        assert len(proxy.injected) > 10
        assert set(proxy.injected) == set(FAULTS)


FAULTS: tuple[Fault, ...] = ("503", "reset", "truncate", "lost_ack")


@pytest.mark.s3
@pytest.mark.slow
def test_bodies_that_stall_are_read_again(
    tmp_path: Path, s3: EmbeddedS3, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "in")
    Store(store_uri).put_folder(tmp_path / "in", "in")
    undisturbed = curate(plan_curation(recipe(f"{store_uri}/whole", f"{store_uri}/in")))
    with FaultProxy(s3.endpoint) as proxy:
        proxy.inject("stall", method="GET", path="/in/a.tar", at=900)
        proxy.inject("stall", method="GET", path="/in/notes", at=2)
        assert curated_through(proxy, store_uri, monkeypatch) == undisturbed
        assert proxy.injected == ["stall", "stall"]


# --- the job --------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_local_run_makes_an_artefact_and_a_second_one_leaves_it(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = fill(tmp_path / "in")
    args = arguments(tmp_path / "out", tmp_path / "in")
    assert prepare.main(args) == 0
    shown = capsys.readouterr().out
    assert all(code in shown for code in expected)
    corpus = open_artefact(str(tmp_path / "out" / "corpus"), "corpus")
    assert list(verify(corpus)) == []
    assert len(scans_of(corpus)) == corpus.manifest.statistics["rows"] == 20
    assert Counter(code for *_, code in quarantined(corpus)) == expected
    require_apart(corpus)
    assert corpus.manifest.statistics["size_px"] == 32
    assert corpus.manifest.statistics["deidentification"]["(0010,0010) PatientName"] == {"removed": 23}
    before = (tmp_path / "out" / "corpus" / "manifest.json").read_bytes()
    assert prepare.main(args) == 0
    assert "was finished before" in capsys.readouterr().out
    assert (tmp_path / "out" / "corpus" / "manifest.json").read_bytes() == before
    assert prepare.main([*args, "--set", "prepare.size_px=64"]) == 2
    assert "of another plan" in one_line(capsys)
    assert prepare.main([*args, "--locate", "0:3"]) == 0
    assert "MRN-3.dcm" in capsys.readouterr().out


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failed job says."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.ray
def test_too_many_refusals_stop_with_the_table_and_a_higher_limit_goes_on(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = fill(tmp_path / "in")
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in", "prepare.max_rejected_share=0.1")) == 2
    said = capsys.readouterr()
    assert all(code in said.out for code in expected)
    assert "error: 8 of 28 scans were refused" in said.err
    with pytest.raises(ArtefactError, match="unfinished"):
        open_artefact(str(tmp_path / "out" / "corpus"))
    # What was read is not read again: the archives may be gone by now, their names and sizes stay.
    for archive in (tmp_path / "in").iterdir():
        archive.write_bytes(bytes(archive.stat().st_size))
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in")) == 0
    assert open_artefact(str(tmp_path / "out" / "corpus")).manifest.statistics["rows"] == 20


def test_mistakes_of_a_new_user_are_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "in")
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "empty")) == 2
    assert "no objects under this prefix" in one_line(capsys)
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in", "prepare.resise=crop")) == 2
    assert "did you mean 'resize'" in one_line(capsys)
    monkeypatch.delenv(KEY_VARIABLE)
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in")) == 2
    assert "secrets.token_hex" in one_line(capsys)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.ray
@pytest.mark.s3
def test_the_corpus_is_the_same_in_s3_and_in_a_folder(ray_cluster: None, tmp_path: Path, store_uri: str) -> None:
    fill(tmp_path / "in")
    Store(store_uri).put_folder(tmp_path / "in", "in")
    assert prepare.main(arguments(tmp_path / "out", tmp_path / "in")) == 0
    assert prepare.main(arguments(f"{store_uri}/out", f"{store_uri}/in")) == 0
    local, remote = open_artefact(str(tmp_path / "out" / "corpus")), open_artefact(f"{store_uri}/out/corpus")
    assert local.digest == remote.digest
    assert list(verify(remote)) == []
    assert scans_of(local) == scans_of(remote)


# --- kill -9 --------------------------------------------------------------------------------------------------


def start(args: list[str], **environment: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, KEY_VARIABLE: KEY, "RAY_AUTH_MODE": "disabled", **environment}
    command = [sys.executable, "-m", "jobs.prepare", *args]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.ray
def test_a_driver_killed_between_two_units_is_resumed_to_the_same_corpus(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    fill(tmp_path / "in")
    # Enough work that units are still missing when the first is seen.
    for number in range(12):
        members = {f"{i}": scan(1000 * (number + 1) + i, 200 + i) for i in range(60)}
        (tmp_path / "in" / f"m{number:02d}.tar").write_bytes(tar(members))
    args = arguments(tmp_path / "killed", tmp_path / "in", "prepare.workers=1", "prepare.size_px=256")
    driver = start(args, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    try:
        shards = tmp_path / "killed" / "corpus" / STAGING / "commits"
        await_objects(shards, 1, driver)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    with pytest.raises(ArtefactError, match=r"unfinished|no artefact"):
        open_artefact(str(tmp_path / "killed" / "corpus"))
    assert 0 < len(list(shards.iterdir())) < 17
    assert prepare.main(args) == 0
    whole = arguments(tmp_path / "whole", tmp_path / "in", "prepare.size_px=256")
    assert prepare.main(whole) == 0
    killed = open_artefact(str(tmp_path / "killed" / "corpus"))
    undisturbed = open_artefact(str(tmp_path / "whole" / "corpus"))
    assert scans_of(killed) == scans_of(undisturbed)
    assert quarantined(killed) == quarantined(undisturbed)
    assert killed.digest == undisturbed.digest
    assert [problem for problem in verify(killed) if problem.fault != "extra"] == []


@pytest.fixture(scope="module")
def undisturbed(nih_dicom: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """The corpus of the real DICOM shards, made by a driver that nobody disturbs."""
    store = tmp_path_factory.mktemp("undisturbed")
    finish(start(arguments(store, nih_dicom)))
    return open_artefact(str(store / "corpus"))


def finish(driver: subprocess.Popen[bytes]) -> None:
    _, said = driver.communicate(timeout=300)
    assert driver.returncode == 0, said.decode()


def await_objects(folder: Path, count: int, driver: subprocess.Popen[bytes]) -> None:
    """Wait until the folder holds so many objects."""
    while len(list(folder.glob("*.json"))) < count:
        assert driver.poll() is None, driver.stderr.read().decode() if driver.stderr else ""
        time.sleep(0.005)


def same(store: Path, undisturbed: Artefact) -> bool:
    corpus = open_artefact(str(store / "corpus"))
    assert list(verify(corpus)) == []
    return corpus.digest == undisturbed.digest and scans_of(corpus) == scans_of(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(3))
def test_drivers_killed_while_they_stage_and_while_they_commit_leave_the_same_corpus(
    trial: int, nih_dicom: Path, tmp_path: Path, undisturbed: Artefact
) -> None:
    """Each driver has a Ray of its own, whose processes die with it."""
    chance = random.Random(trial)
    moments = [(tmp_path / "corpus" / STAGING / "commits", chance.randint(1, 7))]
    moments.append((tmp_path / "corpus" / "commits", chance.randint(1, 6)))
    for folder, count in moments:
        driver = start(arguments(tmp_path, nih_dicom))
        await_objects(folder, count, driver)
        driver.kill()
        driver.communicate()
        with pytest.raises(ArtefactError, match="unfinished"):
            open_artefact(str(tmp_path / "corpus"))
    finish(start(arguments(tmp_path, nih_dicom)))
    assert same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2], ids=["actors", "tasks"])
def test_workers_killed_while_they_read_cost_nothing(
    nih_dicom: Path, tmp_path: Path, undisturbed: Artefact, workers: int
) -> None:
    """One worker has so many units that it is an actor."""
    driver = start(arguments(tmp_path, nih_dicom, f"prepare.workers={workers}"))
    killed = 0
    while driver.poll() is None and killed < 3:
        working = named(driver.pid, "stage_unit", "UnitWorker")
        killed += sum(kill(process) for process in working[:1])
        time.sleep(1.0 if working else 0.05)
    finish(driver)
    assert killed == 3
    assert same(tmp_path, undisturbed)


# --- real scans -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nih_corpus(ray_cluster: None, nih_dicom: Path, bucket: str) -> Artefact:
    """The corpus of the real DICOM shards, made by the job in S3."""
    store = f"s3://{bucket}/nih-{os.getpid()}"
    assert prepare.main(arguments(store, nih_dicom, "prepare.size_px=64")) == 0
    return open_artefact(f"{store}/corpus", "corpus")


@pytest.mark.ray
@pytest.mark.s3
def test_every_real_scan_and_each_bad_file_is_accounted_for(nih_corpus: Artefact) -> None:
    assert len(scans_of(nih_corpus)) == 758
    assert sorted(quarantined(nih_corpus)) == [
        (7, 58, "truncated"),
        (7, 59, "not-dicom"),
        (7, 60, "empty-file"),
        (7, 61, "no-pixels"),
        (7, 62, "not-an-image"),
        (7, 63, "burned-in-text"),
        (7, 64, "duplicate"),
    ]
    require_apart(nih_corpus)
    statistics = nih_corpus.manifest.statistics
    assert sum(statistics["patients"].values()) == 519
    assert statistics["bits_stored"] == {"8": 253, "16": 505}
    assert statistics["envelope"]["values"]["sex"].keys() == {"F", "M"}


@pytest.mark.ray
@pytest.mark.s3
def test_no_byte_of_any_object_names_a_real_patient(nih_corpus: Artefact, nih_dicom: Path) -> None:
    """Also under the compression: Parquet pages are searched as stored and as read."""
    needles = identifiers(nih_dicom)
    store = nih_corpus.store
    objects = store.list()
    assert {o.key.split("/")[0] for o in objects} >= {"train", "quarantine", "commits", "manifest.json"}
    for found in objects:
        for haystack in haystacks(nih_corpus, found.key):
            assert not [needle for needle in needles if needle in haystack], found.key


def identifiers(folder: Path) -> list[bytes]:
    """The canaries, and what is common to all original UIDs, patient numbers and file names."""
    names, uids = set(), set()
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                names.add(member.name.removesuffix(".dcm"))
                head = archive.extractfile(member).read(1200)  # type: ignore[union-attr]
                uids |= set(re.findall(rb"1\.2\.826\.[0-9.]+", head))
    numbers = {name for name in names if re.fullmatch(r"\d{8}_\d{3}", name)}
    assert len(numbers) == 758
    assert len(uids) > 2000
    assert all(uid.startswith(UID_ROOT.encode()) for uid in uids)
    return [CANARY.encode(), b"MRN-", UID_ROOT.encode(), *(name.encode() for name in sorted(numbers))]


def haystacks(corpus: Artefact, key: str) -> Iterator[bytes]:
    yield corpus.store.read(key)
    entries = {entry.path: entry for entry in corpus.manifest.files}
    if key in entries:
        table = read_parquet(corpus.store, entries[key])
        yield (
            b"\n".join(image["bytes"] for image in table["image"].to_pylist()) if "image" in table.column_names else b""
        )
        rest = [name for name in table.column_names if name != "image"]
        yield repr(table.select(rest).to_pylist()).encode()


def test_the_search_would_find_an_identifier_that_was_left(nih_dicom: Path) -> None:
    """A test of the test: in a source file every kind of needle is found."""
    with tarfile.open(nih_dicom / "scans-00003.tar") as archive:
        member = archive.next()
        assert member is not None
        data = archive.extractfile(member).read()  # type: ignore[union-attr]
    hay = member.name.encode() + data
    assert pydicom.dcmread(__import__("io").BytesIO(data)).PatientID.encode() in hay
    assert sum(needle in hay for needle in identifiers(nih_dicom)) == 4


def test_the_shipped_recipe_takes_png_with_their_table_too(nih_png: Path, tmp_path: Path) -> None:
    source = {"kind": "image-folder", "preset": "nih-cxr14", "uri": f"{nih_png}/images"}
    text = yaml.safe_dump(source | {"table": f"{nih_png}/labels.csv", "files_per_unit": 100}, default_flow_style=True)
    overrides = [f"store={tmp_path}", f"prepare.source={text.strip()}", "prepare.size_px=64"]
    plan = plan_curation(load_recipe(RECIPE, overrides))
    assert len(plan.units) == 8
    with curated_unit(plan.units[0], plan.curation) as (tables, _):
        assert sum(pq.read_metadata(tables[split]).num_rows for split in SPLITS if split in tables) == 100
        assert set(tables) <= {*SPLITS}
