"""Plans: the digest is all that determines pixels and files, and the rows follow from it."""

from __future__ import annotations

import hashlib
import pickle
import time
from itertools import product
from typing import Any

import pytest

from scanloom.attributes import AttributeSchema, Envelope, Range
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import (
    AsCorpusCohort,
    CategoryAttribute,
    CellsCohort,
    Cohort,
    Dicom,
    Generate,
    MarginalsCohort,
    NumberAttribute,
    Quality,
)
from scanloom.sampling.plan import Plan, PlanSpec, achieved, cell_counts, compile_plan, image_ids, specify
from tests.tiny_generator import STATISTICS

COHORT = MarginalsCohort(marginals={"sex": {"F": 1, "M": 3}, "age": {"uniform": [30, 60]}})


def spec(**changes: Any) -> PlanSpec:
    settings: dict[str, Any] = {"images": 20, "images_per_shard": 8, "cohort": COHORT, "slots": 4}
    return specify(Generate(**settings | changes), "tiny", changes.pop("generator", "g" * 64), STATISTICS)


def test_same_recipe_same_digest_rows_and_ids() -> None:
    first, second = compile_plan(spec()), compile_plan(spec())
    assert first.digest == second.digest
    assert first.table.equals(second.table)


def test_a_changed_copy_of_a_plan_has_a_digest_of_its_own() -> None:
    first = spec()
    known = first.digest
    assert first.model_copy(update={"seed": 1}).digest == spec(seed=1).digest != known
    assert first.model_copy().digest == known


@pytest.mark.parametrize(
    "change",
    [
        {"images": 21},
        {"seed": 1},
        {"solver": "ddim"},
        {"steps": 19},
        {"guidance_scale": 1.5},
        {"slots": 6},
        {"images_per_shard": 4},
        {"bits_stored": 12},
        {"dataset": "other"},
        {"cohort": MarginalsCohort(marginals={"sex": {"F": 1, "M": 2}})},
        {"dicom": Dicom(enabled=False)},
        {"dicom": Dicom(pixel_spacing_mm=0.2)},
        {"dicom": Dicom(content_date="20260101")},
        {"order": "r-1"},
    ],
    ids=str,
)
def test_whatever_changes_pixels_or_files_changes_the_digest(change: dict[str, Any]) -> None:
    assert spec(**change).digest != spec().digest


def test_another_generator_changes_the_digest() -> None:
    section = Generate(images=4)
    assert (
        specify(section, "tiny", "a" * 64, STATISTICS).digest != specify(section, "tiny", "b" * 64, STATISTICS).digest
    )


@pytest.mark.parametrize("change", [{"engines": 3}, {"writers": 2}, {"cpus_per_engine": 4}, {"gpus_per_engine": 1}])
def test_how_many_work_on_it_leaves_the_digest(change: dict[str, Any]) -> None:
    assert spec(**change).digest == spec().digest


def test_a_plan_survives_the_manifest() -> None:
    assert PlanSpec.model_validate_json(spec().model_dump_json()) == spec()
    assert PlanSpec.model_validate_json(spec().model_dump_json()).digest == spec().digest


def test_shards_hold_every_row_once_in_order() -> None:
    plan = compile_plan(spec())
    assert plan.shards == 3
    assert [len(plan.rows(shard)) for shard in range(3)] == [8, 8, 4]
    indices = [row["index"] for shard in range(3) for row in plan.rows(shard).to_pylist()]
    assert indices == list(range(20))


def test_ids_are_distinct_hex_and_tell_plan_and_index() -> None:
    plan = compile_plan(spec())
    ids = plan.table["id"].to_pylist()
    assert len(set(ids)) == 20
    assert all(len(i) == 16 and int(i[8:], 16) == n and i[:8] == plan.digest[:8] for n, i in enumerate(ids))


def test_made_images_are_counted_by_cell_against_the_order() -> None:
    plan = compile_plan(spec())
    counts = [cell_counts(plan.rows(shard)) for shard in range(3)]
    rows = achieved(plan.spec, counts)
    assert [(r["attributes"], r["requested"], r["made"]) for r in rows if r["table"] == 0] == [
        ({"sex": "F"}, 5, 5),
        ({"sex": "M"}, 15, 15),
    ]
    short = achieved(plan.spec, counts[:2])
    assert sum(r["made"] for r in short if r["table"] == 0) == 16


def test_spacing_is_the_recipes_then_the_generators_then_one() -> None:
    def spacing(section: Generate, statistics: dict[str, Any]) -> float:
        return specify(section, "tiny", "g" * 64, statistics).spacing_mm

    own = Generate(images=1, dicom=Dicom(pixel_spacing_mm=0.2))
    assert spacing(own, STATISTICS) == 0.2
    assert spacing(Generate(images=1), STATISTICS) == 0.7
    assert spacing(Generate(images=1), STATISTICS | {"spacing_mm": None}) == 1.0


def two_hundred_cells() -> CellsCohort:
    ages = [[22 + 5 * step // 2, 24 + 5 * step // 2] for step in range(25)]
    findings = ("none", "Cardiomegaly", "Effusion", "Cardiomegaly+Effusion")
    return CellsCohort(
        cells=tuple(
            {"sex": sex, "age": age, "findings": finding, "share": 1 + number % 7}
            for number, (sex, age, finding) in enumerate(product("FM", ages, findings))
        )
    )


def test_a_million_rows_of_two_hundred_cells_are_not_planned_one_by_one() -> None:
    started = time.process_time()
    plan = compile_plan(spec(images=1_000_000, images_per_shard=64, cohort=two_hundred_cells()))
    last = plan.rows(plan.shards - 1)
    planned = time.process_time()
    assert len([{"index": row} for row in range(1_000_000)]) == 1_000_000
    assert planned - started < 10 * (time.process_time() - planned)
    assert len(plan.spec.cohort.tables[0]) == 200
    assert last["index"].to_pylist()[-1] == 999_999
    assert len(pickle.dumps(plan)) < 10_000_000


def test_the_rows_of_a_shard_are_those_of_the_whole() -> None:
    plan = compile_plan(spec(images=1000, images_per_shard=37, cohort=two_hundred_cells()))
    whole = plan.table
    assert all(plan.rows(shard).equals(whole.slice(shard * 37, 37)) for shard in range(plan.shards))
    again: Plan = pickle.loads(pickle.dumps(plan))
    assert again.table.equals(whole)


@pytest.mark.parametrize("start, stop", [(0, 0), (5, 9), (255, 258), (2**32 - 2, 2**32)])
def test_ids_of_a_range_are_those_of_each_image(start: int, stop: int) -> None:
    plan = spec()
    assert image_ids(plan.digest, start, stop).to_pylist() == [plan.image_id(index) for index in range(start, stop)]


# What these recipes gave before cohorts had more kinds; datasets that are out there were made of it.
PINNED = {
    "cells": (
        CellsCohort(
            cells=(
                {"sex": "F", "age": [30, 39], "findings": ["Effusion", "Cardiomegaly"], "share": 0.3},
                {"sex": "M", "age": [30.2, 30.8], "findings": [], "share": 0.7},
                {"view": "PA", "share": 0.1},
            )
        ),
        "f124a99d65a8e80b",
    ),
    "marginals": (
        MarginalsCohort(
            marginals={
                "sex": {"F": 0.3, "M": 0.7},
                "age": {"uniform": [30, 70]},
                "findings": {"none": 2, "Cardiomegaly+Effusion": 1, "unknown": 1},
            }
        ),
        "b0505cc61db37a27",
    ),
    "as-corpus": (AsCorpusCohort(), "33b2318baabec1af"),
}


@pytest.mark.parametrize("cohort, digest", PINNED.values(), ids=PINNED.keys())
def test_a_recipe_gives_the_same_rows_for_ever(cohort: Cohort, digest: str) -> None:
    rows = compile_plan(spec(images=1000, seed=7, cohort=cohort)).table.drop_columns(["index", "id"])
    assert hashlib.sha256(repr(rows.to_pydict()).encode()).hexdigest()[:16] == digest


def test_where_the_probe_lies_leaves_the_digest_and_which_it_is_does_not() -> None:
    def probed(uri: str | None, digest: str | None) -> str:
        section = Generate(images=4, cohort=COHORT, quality=Quality(probe=uri))
        return specify(section, "tiny", "g" * 64, STATISTICS, digest).digest

    assert probed("s3://here/probe", "a" * 64) == probed("s3://there/probe", "a" * 64)
    assert len({probed(None, None), probed("p", "a" * 64), probed("p", "b" * 64)}) == 3


def test_where_the_generator_lies_leaves_the_digest() -> None:
    elsewhere = Generate(images=20, images_per_shard=8, cohort=COHORT, slots=4, generator="s3://elsewhere/generator")
    assert specify(elsewhere, "tiny", "g" * 64, STATISTICS).digest == spec().digest


def test_plans_of_before_there_were_orders_keep_their_digests() -> None:
    # As the code had it that made datasets which are out there.
    assert spec().digest == "912fbc7d7c830caa0b70edca0446964af593e0734a2efdddf750c410b501e3f9"


def test_what_a_person_should_know_of_an_order_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    never = CellsCohort(cells=({"sex": "F", "age": 85}, {"sex": "M", "age": 85}))
    with caplog.at_level("WARNING", logger="scanloom"):
        spec(cohort=never)
    (record,) = caplog.records
    told = "about 10 of 20 images are of combinations that none of the corpus's 40 scans has, such as sex=F, age=85"
    assert record.getMessage() == f"generate.cohort: {told}"


def test_guidance_with_a_single_slot_is_refused_before_any_work() -> None:
    with pytest.raises(RecipeError, match=r"generate\.slots"):
        spec(slots=1)
    assert spec(slots=1, guidance_scale=1.0).slots == 1


def test_a_generator_without_an_envelope_is_refused() -> None:
    statistics = {key: value for key, value in STATISTICS.items() if key != "envelope"}
    with pytest.raises(ArtefactError, match="envelope"):
        specify(Generate(images=1), "tiny", "g" * 64, statistics)


def test_a_shard_too_large_to_pass_from_engine_to_writer_is_refused() -> None:
    statistics = STATISTICS | {"size_px": 1024}
    assert specify(Generate(images=1, images_per_shard=1024), "tiny", "g" * 64, statistics).images_per_shard == 1024
    with pytest.raises(RecipeError, match="512 of these images at most"):
        specify(Generate(images=1, images_per_shard=1024, bits_stored=12), "tiny", "g" * 64, statistics)


@pytest.mark.parametrize("date", ["20001399", "20010229", "00010101"])
def test_a_content_date_that_no_calendar_has_is_refused(date: str) -> None:
    with pytest.raises(ValueError, match="content_date"):
        Dicom(content_date=date)


def test_what_dicom_cannot_hold_is_refused_before_any_image() -> None:
    schema = AttributeSchema(
        declarations=(
            NumberAttribute(name="age", unit="years", minimum=0, maximum=5000),
            CategoryAttribute(name="view", values=("PA", "A\tP")),
        )
    )
    envelope = Envelope(scans=2, values={"view": {"PA": 1, "A\tP": 1}}, ranges={"age": Range(low=0, high=5000)})
    statistics = STATISTICS | {
        "schema": schema.model_dump(mode="json"), "envelope": envelope.model_dump(mode="json"),
        "cells": [{"age": [0, 5000], "view": "PA", "count": 2}],
    }  # fmt: skip
    for cell, told in (({"age": [900, 1000]}, "age=1000"), ({"view": "A\tP"}, "control characters")):
        cohort = CellsCohort(cells=({"view": "PA"}, cell))
        with pytest.raises(RecipeError, match=told):
            specify(Generate(images=2, cohort=cohort), "tiny", "g" * 64, statistics)
        without = Generate(images=2, cohort=cohort, dicom=Dicom(enabled=False))
        assert specify(without, "tiny", "g" * 64, statistics).images == 2
