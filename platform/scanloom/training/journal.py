"""The numbers of a run as it goes: JSON lines and TensorBoard events in a folder, gauges for the cluster's metrics.

    history.jsonl           one report a line, in the order of the steps
    samples/step-000500.png the sample grid of a step
    events.out.tfevents.*   the same for TensorBoard, rebuilt from the two where a run goes on

The folder becomes `training/` of the generator artefact.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from ray.util.metrics import Gauge
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from scanloom.training.probes import bucket_names

HISTORY, SAMPLES, EVENTS = "history.jsonl", "samples", "events.out.tfevents.scanloom"
GAUGES = {
    "step": "Optimizer steps made",
    "loss": "Training loss, mean of the window",
    "learning_rate": "Learning rate",
    "images_per_s": "Images trained on per second, all workers",
    "data_wait_share": "Share of the window's time spent waiting for data",
    "mfu": "Model FLOP utilisation, share of the device's peak",
    "memory_gb": "Most memory held by a worker, 1e9 bytes",
    "held_out_loss": "Loss on held-out latents of the averaged weights",
    "copy_rate": "Share of samples nearer to training than to held-out latents; 0.5 without memorisation",
}
Row = dict[str, Any]


class Journal:
    """Writes the reports of one run; on worker 0 only."""

    def __init__(self, folder: Path, *, run: str, saved: Path | None = None, step: int = 0) -> None:
        """Begin in an empty `folder`, or go on at `step` from what `save` left in `saved`: later reports are dropped.

        `run` is the tag of the gauges.
        """
        self.folder = folder
        (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_history(saved) if row["step"] <= step] if saved is not None else []
        self._lines = (folder / HISTORY).open("w", encoding="utf-8")
        self._events = RecordWriter(str(folder / EVENTS))
        self._events.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
        self._gauges = {
            name: Gauge(f"scanloom_training_{name}", text, tag_keys=("run",)).set_default_tags({"run": run})
            for name, text in GAUGES.items()
        }
        self._latest: dict[str, float] = {}
        times = {row["step"]: row["time"] for row in rows}
        for row in rows:
            self._append(row)
        for at, png in read_samples(saved).items() if saved is not None else ():
            if at <= step:
                self._put(at, png, times.get(at, 0.0))

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one report: numbers by name, `step` among them, and `held_out_by_timestep`, a list of numbers.

        What is neither is left out; a number that is not finite is written as null.
        """
        row = {name: _plain(value) for name, value in metrics.items() if _is_number(value) or _is_list(value)}
        self._append(row | {"time": round(time.time(), 3)})
        # All of them every time: a value that is not set again is exported once, and a scrape may miss it.
        self._latest |= {name: value for name, value in row.items() if name in self._gauges and value is not None}
        for name, value in self._latest.items():
            self._gauges[name].set(value)

    def picture(self, step: int, png: bytes) -> None:
        """Keep the sample grid of a step."""
        self._put(step, png, time.time())

    def save(self, folder: Path) -> None:
        """Copy what a run needs to go on into a checkpoint's folder."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(EVENTS), dirs_exist_ok=True)

    def close(self) -> None:
        """Release the files."""
        self._lines.close()
        self._events.close()

    def _append(self, row: Row) -> None:
        self._lines.write(json.dumps(row, allow_nan=False) + "\n")
        self._lines.flush()
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(row)]
        self._event(row["step"], row["time"], values)

    def _put(self, step: int, png: bytes, written: float) -> None:
        path = self.folder / SAMPLES / f"step-{step:06d}.png"
        path.write_bytes(png)
        with Image.open(path) as image:
            width, height = image.size
        picture = Summary.Image(height=height, width=width, colorspace=1, encoded_image_string=png)
        self._event(step, written, [Summary.Value(tag="samples", image=picture)])

    def _event(self, step: int, written: float, values: list[Summary.Value]) -> None:
        event = Event(wall_time=written, step=step, summary=Summary(value=values))
        self._events.write(event.SerializeToString())
        self._events.flush()


def read_history(folder: Path) -> list[Row]:
    """The reports of a journal's folder, in the order of their steps."""
    return [json.loads(line) for line in (folder / HISTORY).read_text(encoding="utf-8").splitlines()]


def read_samples(folder: Path) -> dict[int, bytes]:
    """The sample grids of a journal's folder as PNG, by step and in their order."""
    paths = {int(found[1]): path for path in (folder / SAMPLES).glob("*.png") if (found := _STEP.search(path.name))}
    return {step: paths[step].read_bytes() for step in sorted(paths)}


_STEP = re.compile(r"step-(\d+)\.png")


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if name in ("step", "time") or value is None:
            continue
        if isinstance(value, list):
            known = zip(bucket_names(len(value)), value, strict=True)
            yield from ((f"{name}/{bucket}", v) for bucket, v in known if v is not None)
        else:
            yield name, value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(v is None or _is_number(v) for v in value)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if value is None or not math.isfinite(value) else value
