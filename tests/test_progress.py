"""The progress object: rate, time left, cost, and that no failure of its store ends a job."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from scanloom.artefact import FileEntry, publish, verify
from scanloom.cli import app
from scanloom.errors import StoreError
from scanloom.overview import cohort_report, unfinished
from scanloom.progress import STALE_S, Meter, Progress, Reporter, progress_of_unfinished
from scanloom.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "dataset"))


def _read(store: Store) -> Progress:
    return Progress.model_validate_json(store.read("progress.json"))


def _shown(content: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(content)
    return capture.get()


def test_the_rate_counts_what_this_run_did_and_tells_the_time_left() -> None:
    meter = Meter("plan", 1000, None, done=400, clock=100.0)
    meter.count(500, 500, {}, 1.0)
    told = meter.read(clock=110.0)
    assert (told.images_done, told.images_per_s, told.eta_s) == (500, 10.0, 50.0)


def test_the_rate_forgets_what_was_long_ago() -> None:
    meter = Meter("plan", 10_000, None, clock=0.0)
    for second in range(10, 1000, 10):
        meter.count(second if second <= 500 else 500 + 5 * (second - 500), 0, {}, 0.0)
        told = meter.read(clock=float(second))
    assert told.images_per_s == pytest.approx(5.0)


def test_without_a_rate_there_is_no_time_left() -> None:
    assert Meter("plan", 10, None, clock=0.0).read(clock=5.0).eta_s is None


def test_cost_is_that_of_the_engines_work() -> None:
    meter = Meter("plan", 10, 3.6)
    assert meter.read().cost == 0.0
    meter.count(5, 4, {"blank": 2, "infeasible": 1}, 500.0)
    assert meter.read().cost == pytest.approx(0.5)
    assert meter.figures == {"rejects": 2, "cost": pytest.approx(0.5)}
    assert Meter("plan", 10, None).read().cost is None


def test_the_object_says_running_and_then_how_it_ended(store: Store) -> None:
    meter = Meter("plan", 10, None)
    with Reporter(store, meter, every_s=0.01):
        while not store.exists("progress.json"):
            pass
        assert _read(store).state == "running"
        meter.count(10, 9, {"infeasible": 1}, 2.0)
    told = _read(store)
    assert (told.state, told.images_done, told.images_made, told.rejects) == ("finished", 10, 9, {"infeasible": 1})


def test_a_job_that_ends_early_says_so(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), Reporter(store, Meter("plan", 10, None)):
        raise KeyboardInterrupt
    assert _read(store).state == "failed"


def test_a_store_that_takes_no_report_ends_no_job(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Store, key: str, data: bytes) -> None:
        raise StoreError("the bucket is full")

    monkeypatch.setattr(Store, "write", refuse)
    with caplog.at_level(logging.WARNING), Reporter(store, Meter("plan", 10, None), every_s=0.001) as reporter:
        while not caplog.records:
            pass
    assert [record.getMessage() for record in caplog.records] == ["no progress object: the bucket is full"]
    assert reporter is not None


def test_show_tells_how_far_an_unfinished_dataset_is(store: Store) -> None:
    meter = Meter("plan", 1000, 2.0, clock=0.0)
    meter.count(250, 249, {"blank": 3, "infeasible": 1}, 1800.0)
    store.write("progress.json", meter.read(clock=10.0).model_dump_json().encode())
    said = CliRunner().invoke(app, ["show", store.uri])
    assert said.exit_code == 0
    for expected in ("250 of 1000", "25", "30 s", "blank 3, infeasible 1", "1.00"):
        assert expected in said.stdout
    as_json = CliRunner().invoke(app, ["show", store.uri, "--json"])
    assert json.loads(as_json.stdout)["images_total"] == 1000


def test_a_killed_job_shows_no_sign_of_life() -> None:
    told = Meter("plan", 10, None).read()
    assert "running" in _shown(unfinished("s3://b/d", told))
    old = told.model_copy(update={"updated": "2026-01-01T00:00:00+00:00"})
    assert old.age_s > STALE_S
    assert "no sign of life" in _shown(unfinished("s3://b/d", old))


def test_a_finished_artefact_has_no_progress_and_the_object_is_no_stray_file(store: Store) -> None:
    with Reporter(store, Meter("plan", 10, None)):
        pass
    assert progress_of_unfinished(store.uri) is not None
    store.write("images/a", b"")
    empty = FileEntry(
        path="images/a", bytes=0, sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )
    made = publish(store, kind="dataset", name="d", recipe={}, inputs=[], files=[empty], statistics={})
    assert progress_of_unfinished(store.uri) is None
    assert list(verify(made)) == []


def test_a_report_names_the_cells_that_could_not_be_filled_and_counts_what_is_missing() -> None:
    def cell(age: int, made: int, infeasible: int) -> dict[str, object]:
        wanted = {"sex": "F", "age": {"low": age, "high": age}}
        return {
            "table": 0, "attributes": wanted, "requested": 10, "made": made, "rejected": 3, "infeasible": infeasible
        }  # fmt: skip

    few = {"cells": [cell(20, 10, 0), cell(30, 6, 4)], "infeasible": 4, "rows": 16}
    table, line = (_shown(part) for part in cohort_report(few))
    assert "sex=F, age=30" in table
    assert "4 of 20 images are infeasible" in line
    many = {"cells": [cell(age, 10, age == 77) for age in range(100)], "infeasible": 1, "rows": 999}
    shown = _shown(cohort_report(many)[0]).splitlines()
    assert "age=77" in next(text for text in shown if "age=" in text)
    assert sum("age=" in text for text in shown) == 40
    assert len(cohort_report(few | {"infeasible": 0})) == 1


def test_every_field_is_documented() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "generate.md").read_text(encoding="utf-8")
    told = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert told == list(Progress.model_fields)
