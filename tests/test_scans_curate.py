"""Curation without Ray: every file accounted for, the same corpus whatever dies, versions of a source that grows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont

from jobs import prepare
from scanloom.artefact import open_artefact, verify
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import ArtefactError, RecipeError, ScanloomError, StoreError
from scanloom.recipe import parse_recipe
from scanloom.scans import dicom_objects
from scanloom.scans.corpus_plan import STAGING, CurationPlan, claim, plan_curation
from scanloom.scans.curate import (
    clean,
    curated_unit,
    duplicates,
    settle_unit,
    staged,
    too_few_left,
)
from scanloom.scans.deidentify import KEY_VARIABLE
from scanloom.scans.phantoms import phantom
from scanloom.shards.commit import committed
from scanloom.shards.reader import read_parquet
from scanloom.store import Store
from tests.fault_proxy import Fault, FaultProxy
from tests.made_dicom import KEY, file, tar
from tests.small_archive import by_id, contents, curate, fill, publish, recipe, scan, stage


@pytest.fixture(autouse=True)
def pseudonym_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


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
