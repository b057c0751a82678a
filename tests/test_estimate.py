"""What an order comes to is measured, computed and said to be so, or not known; and nothing is started for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scanloom.artefact import FileEntry, open_artefact, publish
from scanloom.errors import ArtefactError, RecipeError
from scanloom.estimate import Estimate, estimate, report
from scanloom.recipe import Recipe, parse_recipe
from scanloom.sampling.plan import specify
from scanloom.store import Store

ROOT = Path(__file__).resolve().parents[1]
COHORT = {"kind": "marginals", "marginals": {"sex": {"F": 1, "M": 3}, "view": {"PA": 2, "AP": 1}}}


def recipe(store: Path, **generate: Any) -> Recipe:
    section = {"images": 7200, "cohort": COHORT, "engines": 2, "cost_per_hour": 1.5} | generate
    sex = {"name": "sex", "kind": "category", "values": ["F", "M"]}
    return parse_recipe({"name": "r", "store": str(store), "attributes": [sex], "generate": section}, "r")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    base = open_artefact("embedded://base").manifest
    publish(
        Store(str(tmp_path / "generator")), kind="generator", name="base", recipe={}, inputs=[], files=[],
        statistics=base.statistics,
    )  # fmt: skip
    return tmp_path


def made_before(store: Path, folder: str = "dataset", device: str = "cpu", **generate: Any) -> str:
    """URI of a dataset of 10 images, 1000 bytes each, that an engine made at 4 images a second."""
    section = recipe(store, **generate).generate
    assert section is not None
    generator = open_artefact(str(store / "generator")).manifest
    spec = specify(section, generator.name, generator.digest, generator.statistics)
    target = Store(str(store / folder))
    target.write("images/a.parquet", bytes(10_000))
    publish(
        target, kind="dataset", name=folder, recipe={}, inputs=[],
        files=[FileEntry.of(target.digest("images/a.parquet"))],
        statistics={
            "spec": spec.model_dump(mode="json"), "rows": 10, "images_per_engine_s": 4.0,
            "environments": [{"device": device, "threads": 1}],
        },
    )  # fmt: skip
    return target.uri


def text(found: Estimate) -> str:
    return "\n".join("|".join(row) for _, _, rows in report(found) for row in rows)


def test_the_cells_are_what_the_plan_makes(store: Path) -> None:
    found = estimate(recipe(store))
    assert [(c.table, c.attributes, c.images) for c in found.cells] == [
        (0, {"sex": "F"}, 1800), (0, {"sex": "M"}, 5400), (1, {"view": "PA"}, 4800), (1, {"view": "AP"}, 2400),
    ]  # fmt: skip
    assert sum(cell.scans for cell in found.cells if cell.table == 0) == 5458
    assert found.shards == 113
    assert "sex=M|5400|2695|" in text(found)


def test_what_nobody_has_measured_is_said_and_not_guessed(store: Path) -> None:
    found = estimate(recipe(store))
    assert (found.images_per_engine_s, found.engine_hours, found.hours, found.cost) == (None, None, None, None)
    assert "time|unknown|nobody has measured" in text(found)
    # 64 x 64 pixels of a byte, in Parquet and in DICOM.
    assert found.storage_bytes == 64 * 64 * 2 * 7200
    assert found.storage_from.startswith("computed: 2 copies")


@pytest.mark.parametrize(
    "change, copies", [({"dicom": {"enabled": False}}, 1), ({"webdataset": True}, 3), ({"bits_stored": 12}, 4)]
)
def test_computed_storage_follows_what_is_written(store: Path, change: dict[str, Any], copies: int) -> None:
    assert estimate(recipe(store, **change)).storage_bytes == 64 * 64 * copies * 7200


def test_a_given_rate_gives_time_and_cost(store: Path) -> None:
    found = estimate(recipe(store), rate=2.0)
    assert (found.engine_hours, found.hours, found.cost) == (1.0, 0.5, 1.5)
    assert found.rate_from == "given by --rate"
    assert estimate(recipe(store, cost_per_hour=None), rate=2.0).cost is None
    assert "cost|unknown|generate.cost_per_hour is not set" in text(estimate(recipe(store, cost_per_hour=None), rate=2))


def test_rate_and_size_are_those_of_the_dataset_that_was_made_before(store: Path) -> None:
    uri = made_before(store, images=10)
    found = estimate(recipe(store))
    assert found.images_per_engine_s == 4.0
    assert found.engine_hours == 0.5
    assert found.rate_from == f"measured when {uri} was made, on cpu with 1 threads"
    assert found.storage_bytes == 1000 * 7200
    assert found.storage_from == f"measured: 1 kB an image in {uri}"


def test_another_dataset_is_named_by_like(store: Path) -> None:
    uri = made_before(store, "small", images=10)
    assert estimate(recipe(store)).images_per_engine_s is None
    assert estimate(recipe(store), like=uri).images_per_engine_s == 4.0
    with pytest.raises(ArtefactError, match="no artefact"):
        estimate(recipe(store), like=str(store / "none"))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"steps": 4}, "steps"),
        ({"guidance_scale": 1.0}, "guidance"),
        ({"precision": "bf16", "slots": 64}, "precision, slots"),
        ({"gpus_per_engine": 1}, "device"),
        ({"cpus_per_engine": 4}, "cpus_per_engine"),
    ],
)
def test_a_rate_of_other_settings_is_not_used_and_its_difference_told(
    store: Path, change: dict[str, Any], told: str
) -> None:
    made_before(store, images=10)
    found = estimate(recipe(store, **change))
    assert found.images_per_engine_s is None
    assert f"which differs in {told}; --rate sets it" in found.rate_from
    assert found.storage_from.startswith("measured")


@pytest.mark.parametrize("change", [{"image_format": "raw"}, {"bits_stored": 12}, {"dicom": {"enabled": False}}])
def test_a_size_of_other_files_is_not_used(store: Path, change: dict[str, Any]) -> None:
    made_before(store, images=10)
    assert estimate(recipe(store, **change)).storage_from.startswith("computed")


def test_long_cohorts_are_cut_on_the_terminal_and_whole_as_data(store: Path) -> None:
    found = estimate(recipe(store, cohort={"kind": "as-corpus"}))
    assert len(found.cells) == 400
    shown = text(found)
    assert "340 more; --json prints them" in shown
    assert len(shown.splitlines()) < 80
    assert sum(cell.images for cell in found.cells) == 7200


def test_what_a_person_should_know_is_told(store: Path) -> None:
    never = {"kind": "cells", "cells": [{"findings": "Effusion+Nodule+Pneumothorax+Consolidation", "share": 1}]}
    found = estimate(recipe(store, cohort=never))
    assert "about 7200 of 7200 images are of combinations that none" in text(found)
    assert "findings=Effusion+Nodule+Pneumothorax+Consolidation|7200|0|100%" in text(found)


def test_a_recipe_without_an_order_is_refused(store: Path) -> None:
    with pytest.raises(RecipeError, match="no section 'generate'"):
        estimate(recipe(store).model_copy(update={"generate": None}))


TOLD_AT_EXIT = """
import atexit, sys
atexit.register(lambda: print([name for name in ("ray", "torch") if name in sys.modules], file=sys.stderr))
from scanloom.cli import main
sys.exit(main())
"""


def scanloom_plan(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (store / "r.yaml").write_text(json.dumps(recipe(store).model_dump(mode="json", exclude_unset=True)))
    command = [sys.executable, "-c", TOLD_AT_EXIT, "plan", str(store / "r.yaml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=120)


def test_the_command_prints_tables_or_json_and_loads_neither_ray_nor_torch(store: Path) -> None:
    before = sorted(store.rglob("*"))
    shown = scanloom_plan(store, "--rate", "2", "--set", "generate.images=3600")
    assert shown.returncode == 0, shown.stderr
    assert "sex=F" in shown.stdout
    assert "0.25 h" in shown.stdout
    assert shown.stderr.strip().endswith("[]")
    as_json = scanloom_plan(store, "--json")
    assert Estimate.model_validate_json(as_json.stdout) == estimate(recipe(store))
    assert sorted(path for path in store.rglob("*") if path.name != "r.yaml") == before


def test_the_command_refuses_in_one_line(store: Path) -> None:
    outside = "generate.cohort={kind: cells, cells: [{sex: F, age: 90}]}"
    refused = scanloom_plan(store, "--set", outside)
    assert refused.returncode == 2
    (line, loaded) = refused.stderr.strip().splitlines()
    assert line.startswith("error: generate.cohort: age=90 ")
    assert "trained on 20 to 89" in line
    assert loaded == "[]"


@pytest.mark.s3
def test_a_recipe_and_a_generator_that_lie_elsewhere_are_planned_alike(store: Path, store_uri: str) -> None:
    elsewhere = recipe(Path("/nowhere"), generator=str(store / "generator"), order="request-1")
    place = Store(store_uri)
    place.write("orders/recipe.yaml", json.dumps(elsewhere.model_dump(mode="json", exclude_unset=True)).encode())
    command = [sys.executable, "-c", TOLD_AT_EXIT, "plan", place.uri_of("orders/recipe.yaml"), "--json"]
    planned = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=120)
    assert planned.returncode == 0, planned.stderr
    found = Estimate.model_validate_json(planned.stdout)
    assert found == estimate(elsewhere)
    assert found.plan != estimate(recipe(store)).plan
