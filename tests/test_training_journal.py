"""The journal keeps what was reported, once, also where a run goes on from a checkpoint."""

from __future__ import annotations

import io
import json
import math
import socket
import struct
from pathlib import Path

import pytest
from PIL import Image
from ray.util.metrics import Gauge
from tensorboardX.proto.event_pb2 import Event

from scanloom.training.journal import EVENTS, GAUGES, HISTORY, Journal, read_history, read_samples


def _png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (6, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def _events(folder: Path) -> list[Event]:
    """The events of a file in TensorBoard's format: length, its checksum, the event, its checksum."""
    raw, events, at = (folder / EVENTS).read_bytes(), [], 0
    while at < len(raw):
        (length,) = struct.unpack_from("<Q", raw, at)
        events.append(Event.FromString(raw[at + 12 : at + 12 + length]))
        at += 12 + length + 4
    return events


def _curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(e.step, v.simple_value) for e in _events(folder) for v in e.summary.value if v.tag == tag]


def _report(step: int) -> dict[str, object]:
    return {"step": step, "loss": 1.0 / step, "held_out_by_timestep": [0.5, None, float(step)], "note": "not a number"}


def test_reports_are_read_back_as_written_without_what_is_no_number(tmp_path: Path) -> None:
    journal = Journal(tmp_path, run="r")
    for step in (1, 2):
        journal.write(_report(step) | {"files": [{"path": "x"}], "done": True})
    rows = read_history(tmp_path)
    assert [set(row) for row in rows] == [{"step", "loss", "held_out_by_timestep", "time"}] * 2
    assert [row["loss"] for row in rows] == [1.0, 0.5]
    assert rows[1]["held_out_by_timestep"] == [0.5, None, 2.0]
    assert rows[0]["time"] <= rows[1]["time"]


def test_tensorboard_gets_the_same_numbers_and_pictures(tmp_path: Path) -> None:
    journal = Journal(tmp_path, run="r")
    for step in (1, 2, 4):
        journal.write(_report(step))
    journal.picture(4, _png(9))
    assert _curve(tmp_path, "loss") == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert _curve(tmp_path, "held_out_by_timestep/t666-999") == [(1, 1.0), (2, 2.0), (4, 4.0)]
    assert _curve(tmp_path, "held_out_by_timestep/t333-665") == []
    (image,) = [v.image for e in _events(tmp_path) for v in e.summary.value if v.tag == "samples"]
    assert (image.width, image.height, image.encoded_image_string) == (6, 4, _png(9))


def test_a_resumed_run_has_every_step_once_though_some_were_trained_twice(tmp_path: Path) -> None:
    first = Journal(tmp_path / "first", run="r")
    for step in (1, 2):
        first.write(_report(step))
        first.picture(step, _png(step))
    first.save(tmp_path / "checkpoint")
    first.write(_report(3))
    again = Journal(tmp_path / "second", run="r", saved=tmp_path / "checkpoint", step=2)
    for step in (3, 4):
        again.write(_report(step) | {"loss": 10.0 + step})
    expected = [(1, 1.0), (2, 0.5), (3, 13.0), (4, 14.0)]
    assert [(row["step"], row["loss"]) for row in read_history(tmp_path / "second")] == expected
    assert _curve(tmp_path / "second", "loss") == expected
    assert read_samples(tmp_path / "second") == {1: _png(1), 2: _png(2)}


def test_a_run_that_goes_on_before_the_last_saved_report_drops_what_came_after(tmp_path: Path) -> None:
    first = Journal(tmp_path / "first", run="r")
    for step in (1, 2, 3):
        first.write(_report(step))
        first.picture(step, _png(step))
    first.save(tmp_path / "checkpoint")
    Journal(tmp_path / "second", run="r", saved=tmp_path / "checkpoint", step=2)
    assert [row["step"] for row in read_history(tmp_path / "second")] == [1, 2]
    assert list(read_samples(tmp_path / "second")) == [1, 2]


def test_resuming_a_resumed_run_changes_no_past_report(tmp_path: Path) -> None:
    Journal(tmp_path / "0", run="r").write(_report(1))
    for number in range(3):
        journal = Journal(tmp_path / f"{number + 1}", run="r", saved=tmp_path / f"{number}", step=9)
        journal.close()
    assert (tmp_path / "3" / HISTORY).read_bytes() == (tmp_path / "0" / HISTORY).read_bytes()
    assert (tmp_path / "3" / EVENTS).read_bytes() == (tmp_path / "0" / EVENTS).read_bytes()


def test_a_number_that_is_not_finite_stays_readable_as_json_and_has_no_event(tmp_path: Path) -> None:
    Journal(tmp_path, run="r").write({"step": 1, "loss": math.nan, "held_out_by_timestep": [math.inf, 1.0]})
    (row,) = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert (row["loss"], row["held_out_by_timestep"]) == (None, [None, 1.0])
    assert _curve(tmp_path, "loss") == []


def test_a_checkpoint_holds_no_events_which_are_rebuilt(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a", run="r")
    journal.write(_report(1))
    journal.save(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").rglob("*")) == [HISTORY, "samples"]


def test_samples_come_in_the_order_of_their_steps_past_a_million(tmp_path: Path) -> None:
    journal = Journal(tmp_path, run="r")
    for step in (2_000_000, 500, 30_000):
        journal.picture(step, _png(1))
    assert list(read_samples(tmp_path)) == [500, 30_000, 2_000_000]


def test_nothing_names_the_machine_that_trained(tmp_path: Path) -> None:
    journal = Journal(tmp_path, run="r")
    journal.write(_report(1))
    assert all(socket.gethostname() not in path.name for path in tmp_path.rglob("*"))
    assert socket.gethostname().encode() not in (tmp_path / EVENTS).read_bytes()


def test_gauges_have_names_that_prometheus_takes_and_the_tag_of_the_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path, run="generator-abc")
    journal.write(_report(1))
    gauges: dict[str, Gauge] = journal._gauges
    assert set(gauges) == set(GAUGES)
    for name, gauge in gauges.items():
        assert gauge.info["name"] == f"scanloom_training_{name}"
        assert gauge.info["default_tags"] == {"run": "generator-abc"}
        # Ray drops a metric whose name it does not take, with a line in a log.
        assert gauge._metric is not None


def test_a_value_of_an_evaluation_is_exported_until_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[tuple[str, float]] = []
    monkeypatch.setattr(Gauge, "set", lambda gauge, value: exported.append((gauge.info["name"], value)))
    journal = Journal(tmp_path, run="r")
    journal.write({"step": 1, "held_out_loss": 0.5})
    exported.clear()
    journal.write({"step": 2, "held_out_loss": None})
    assert sorted(exported) == [("scanloom_training_held_out_loss", 0.5), ("scanloom_training_step", 2)]
