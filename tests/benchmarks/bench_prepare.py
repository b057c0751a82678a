"""Scans per second from tar shards in S3 to a corpus in S3, beside a plain program; writes docs/throughput.md.

The plain program is what one writes in an afternoon: one process, pydicom.dcmread, apply_voi_lut, Pillow's resize,
pyarrow's Parquet writer. It renames nobody, looks for no text and quarantines nothing. Ratios are of scans per
CPU-second, taken in turns in one run; scaling and memory are of the job itself, on Ray.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import yaml
from PIL import Image
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from scipy.ndimage import gaussian_filter

from jobs.cluster import connected
from jobs.prepare import stage
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.recipe import parse_recipe
from scanloom.scans.corpus_plan import claim, plan_curation
from scanloom.scans.curate import stage_unit
from scanloom.scans.deidentify import KEY_VARIABLE
from scanloom.scans.phantoms import phantom
from scanloom.store import Store
from tests.made_dicom import LOSSLESS, dataset, tar, written

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "throughput.md"
SIZE_PX, BITS, DISTINCT = 256, 12, 24
LEAST = {"explicit": 1.5, "rle": 1.2, "jpeg-ls": 1.2, "jpeg-2000": 1.0}
NAMES = {"explicit": "native", "rle": "RLE", "jpeg-ls": "JPEG-LS", "jpeg-2000": "JPEG 2000"}
SHARDS = {"explicit": 30, "rle": 30, "jpeg-ls": 24, "jpeg-2000": 20}
"""Tars of the archive that one and two workers read: about half a minute of work for one."""
PER_SHARD = {"explicit": 200, "rle": 200, "jpeg-ls": 150, "jpeg-2000": 50}
"""Scans; a shard is about 100 MB where nothing is coded, and a second or two of work for one core."""
LEAST_SCALING, MOST_GROWTH = 1.8, 1.15
MEMORY = Path("/dev/shm")
"""Where archives lie whose reading is to wait for no disk, nor for what of it is still cached."""
ATTRIBUTES = [
    {"name": "sex", "kind": "category", "source": "PatientSex", "values": ["F", "M"]},
    {"name": "age", "source": "PatientAge", "kind": "number", "unit": "years", "minimum": 0, "maximum": 90, "cap": 90},
    {"name": "view", "kind": "category", "source": "ViewPosition", "values": ["PA", "AP"]},
]


# --- the scans ------------------------------------------------------------------------------------------------


def fill(store: Store, syntax: str, shards: int, per_shard: int, side_px: int = 512) -> None:
    """Tar shards of chest phantoms with 12 bits and a detector's grain, which is what makes coding hard.

    Pixels repeat after 24 scans, identities do not.
    """
    bodies = [_body(number, syntax, side_px) for number in range(DISTINCT)]
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        store.write(f"{shard:05d}.tar", tar([(f"{n}.dcm", _scan(bodies[n % DISTINCT], n)) for n in numbers]))


def _body(number: int, syntax: str, side_px: int) -> pydicom.FileDataset:
    # Phantoms have eight bits: their steps and their own grain, sixteen times as large, would be no scan's.
    smooth = gaussian_filter(phantom(0, number, side_px).pixels.astype(np.float64), 1) * (4000 / 255)
    grain = np.random.default_rng(number).normal(20, 12, smooth.shape)
    pixels = np.clip(smooth + grain, 0, 4095).astype(np.uint16)
    made = dataset(pixels, bits_stored=BITS, WindowCenter=2048, WindowWidth=3600, PixelSpacing=[0.3, 0.3])
    return pydicom.dcmread(io.BytesIO(written(made, LOSSLESS[syntax])))


def _scan(body: pydicom.FileDataset, number: int) -> bytes:
    body.PatientID, body.PatientSex = f"P{number % 997}", "FM"[number % 2]
    body.PatientAge = f"{20 + number % 60:03d}Y"
    body.SOPInstanceUID = body.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.{number}"
    sink = io.BytesIO()
    body.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


# --- the two programs -----------------------------------------------------------------------------------------


def plain(source: Store, sink: Store) -> int:
    """Every scan of every tar, resized, with its header's sex, age and view, into one Parquet file a tar."""
    count = 0
    for found in source.list():
        with source.filesystem.open_input_stream(source.path(found.key)) as stream:
            rows = list(_plain_rows(io.BytesIO(stream.read())))
        with sink.filesystem.open_output_stream(sink.path(found.key)) as out:
            pq.write_table(pa.Table.from_pylist(rows), out)
        count += len(rows)
    return count


def _plain_rows(stream: io.BytesIO) -> Iterator[dict[str, Any]]:
    with tarfile.open(fileobj=stream, mode="r|") as members:
        for member in members:
            scan = pydicom.dcmread(io.BytesIO(members.extractfile(member).read()))
            shown = apply_voi_lut(apply_modality_lut(scan.pixel_array, scan), scan)
            low, high = shown.min(), shown.max()
            unit = ((shown - low) / (high - low) * 65535).astype(np.float32)
            small = Image.fromarray(unit).resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)
            pixels = np.clip(np.asarray(small), 0, 65535).astype(np.uint16).tobytes()
            yield {"image": pixels, "sex": scan.PatientSex, "age": scan.PatientAge, "view": scan.ViewPosition}


def prepared(source: Store, sink: Store, *, text: str = "ignore") -> int:
    """The same by scanloom in this one process: all of `scanloom prepare` but Ray."""
    plan = plan_curation(parse_recipe(recipe(source, sink, burned_in_text=text), "bench"))
    claim(plan)
    rows = [{"unit": unit.model_dump_json(), "taken_over": None} for unit in plan.units]
    return sum(stage_unit(row, plan.curation)["scans"] for row in rows)


def recipe(source: Store, sink: Store, **prepare: Any) -> dict[str, Any]:
    section = {"source": {"kind": "dicom", "uri": source.uri}, "size_px": SIZE_PX, **prepare}
    return {"name": "bench", "store": sink.uri, "attributes": ATTRIBUTES, "prepare": section}


# --- measuring ------------------------------------------------------------------------------------------------


def per_cpu_second(program: Callable[[Store, Store], int], source: Store, sink: Store) -> float:
    """Scans per CPU-second of this process, all its threads counted."""
    if sink.is_local:
        Path(sink.uri).mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    return program(source, sink) / (time.process_time() - started)


def rates(root: Store, syntax: str, rounds: int) -> tuple[list[float], list[float]]:
    """Median rates of the plain program, scanloom without and with the search for text; the two median ratios."""
    source = root.at(f"few-{syntax}")
    fill(source, syntax, 4, PER_SHARD[syntax])
    programs = (plain, prepared, partial(prepared, text="quarantine"))
    turns = [
        [per_cpu_second(run, source, root.at(f"out-{syntax}-{turn}-{i}")) for i, run in enumerate(programs)]
        for turn in range(rounds + 1)
    ][1:]  # the first turn also loads the codecs
    print(syntax, *(f"{rate:.0f}/s" for turn in turns for rate in turn), file=sys.stderr)  # noqa: T201
    medians = [statistics.median(column) for column in zip(*turns, strict=True)]
    return medians, [statistics.median(turn[i] / turn[0] for turn in turns) for i in (1, 2)]


def scaling(root: Store, syntax: str, rounds: int) -> tuple[float, float, float, float]:
    """Seconds of one worker; two workers to one, with their start and without; two processes without Ray to one.

    Archives are longer than can be measured here, and the start is the same for all. The last is what the machine
    itself gives. All are medians over turns.
    """
    source, begin, few = (root.at(f"{name}-{syntax}") for name in ("in", "begin", "few"))
    for store, shards, per_shard in (
        (source, SHARDS[syntax], PER_SHARD[syntax]),
        (begin, 2, 1),
        (few, 4, PER_SHARD[syntax]),
    ):
        fill(store, syntax, shards, per_shard)
    turns = []
    for turn in range(rounds):
        sink = root.at(f"scaled-{syntax}-{turn}")
        (start_1, one), (start_2, two) = (_staging(begin, source, sink.at(f"{workers}"), workers) for workers in (1, 2))
        limit = _two_processes(few, sink)
        seconds = " ".join(f"{s:.1f}" for s in (start_1, one, start_2, two))
        print(syntax, seconds, f"s, limit {limit:.2f}", file=sys.stderr)  # noqa: T201
        turns.append((start_1 + one, (start_1 + one) / (start_2 + two), one / two, limit))
    alone, whole, begun, limit = (statistics.median(column) for column in zip(*turns, strict=True))
    return alone, whole, begun, limit


def _staging(begin: Store, source: Store, sink: Store, workers: int) -> tuple[float, float]:
    """Seconds of the start of a new Ray's workers, by which they read one scan each, and of reading the source.

    Of the job that is its first step, all but writing the corpus's manifest.
    """
    seconds = []
    with connected():
        for tree in (begin, source):
            made = recipe(tree, sink.at(f"{len(seconds)}"), workers=workers, burned_in_text="quarantine")
            plan = plan_curation(parse_recipe(made, "bench"))
            claim(plan)
            started = time.monotonic()
            stage(plan)
            seconds.append(time.monotonic() - started)
    return seconds[0], seconds[1]


def _two_processes(source: Store, sink: Store) -> float:
    """How many times as much two processes do at once as one does alone."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        seconds = []
        for turn, together in enumerate((2, 1, 2)):  # the first starts both
            sinks = [sink.at(f"limit-{turn}-{i}") for i in range(together)]
            started = time.monotonic()
            list(pool.map(partial(prepared, text="quarantine"), [source] * together, sinks))
            seconds.append(time.monotonic() - started)
    return 2 * seconds[1] / seconds[2]


def peak_memory(source: Store, sink: Store) -> int:
    """Peak of the memory that the driver and its workers have to themselves while a whole job runs, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe(source, sink)))
        with (Path(folder) / "said").open("wb") as said:
            job = psutil.Popen([sys.executable, "-m", "jobs.prepare", str(file)], cwd=ROOT, stdout=said, stderr=said)
            peak = 0
            while job.poll() is None:
                peak = max(peak, _own_memory(job))
                with suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
                    job.wait(0.2)
        if job.returncode:
            raise SystemExit((Path(folder) / "said").read_text())
    return peak


def _own_memory(job: psutil.Process) -> int:
    total = 0
    with suppress(psutil.Error):
        for process in [job, *job.children(recursive=True)]:
            with suppress(psutil.Error):
                if process == job or process.name().startswith("ray::"):
                    total += process.memory_full_info().uss
    return total


# --- the report -----------------------------------------------------------------------------------------------

HEAD = """# How fast scans become a corpus

Measured by `tests/benchmarks/bench_prepare.py` on {machine}; rates are that machine's, ratios are what to compare.

The scans are 512x512 chest phantoms of 12 bits with a detector's grain, in tar shards in S3 (SeaweedFS on the same
machine), and become 256x256 images of 16 bits in Parquet in S3. The plain program is one process of pydicom.dcmread,
apply_voi_lut, Pillow's resize and pyarrow's writer: it renames nobody, hashes nothing, looks for no text, keeps no
geometry and quarantines nothing. "With text search" is the default, `prepare.burned_in_text: quarantine`; the column
before it leaves that search out, which the plain program does not do either.
"""
PARTS = {"rates": "One process", "scaling": "Two workers", "memory": "Memory"}
"""What can be measured by itself, and its heading."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure and to write")
    asked = options.parse_args()
    os.environ.setdefault(KEY_VARIABLE, "bench" * 8)
    text, missed, parts = HEAD.format(machine=_machine()), [], _written()
    with tempfile.TemporaryDirectory() as folder, EmbeddedS3(Path(folder)) as s3:
        os.environ.update(s3.environment)
        s3.create_bucket("bench")
        root = Store("s3://bench/run")
        for part, measure in (("rates", rates_table), ("scaling", scaling_table), ("memory", memory_table)):
            if part in asked.parts:
                parts[part], short = measure(root, asked.rounds)
                missed += short
                TABLE.write_text(
                    text + "".join(f"\n## {PARTS[name]}\n\n{parts[name]}" for name in PARTS if name in parts)
                )
    print(TABLE.read_text(), *missed, sep="\n")  # noqa: T201
    return 1 if missed else 0


def _written() -> dict[str, str]:
    """The tables that stand in the report, by part: what is not measured again stays."""
    pieces = re.split(r"^## (.+)\n\n", TABLE.read_text(), flags=re.MULTILINE)[1:]
    tables = dict(zip(pieces[::2], (table.strip() + "\n" for table in pieces[1::2]), strict=True))
    return {part: tables[heading] for part, heading in PARTS.items() if heading in tables}


def rates_table(root: Store, rounds: int) -> tuple[str, list[str]]:
    """The table of rates per CPU-second, and the ratios that are below what is asked."""
    lines = [
        "Scans per CPU-second of one process:\n",
        "| transfer syntax | plain program | scanloom | ratio | with text search | ratio |",
        "|---|---|---|---|---|---|",
    ]
    missed = []
    for syntax, least in LEAST.items():
        (peer, ours, searching), (ratio, with_text) = rates(root, syntax, rounds)
        name = NAMES[syntax]
        lines.append(f"| {name} | {peer:.0f} | {ours:.0f} | {ratio:.2f} | {searching:.0f} | {with_text:.2f} |")
        missed += [f"{syntax}: ratio {ratio:.2f}, asked {least}"] * (ratio < least)
    return "\n".join([*lines, ""]), missed


def scaling_table(root: Store, rounds: int) -> tuple[str, list[str]]:
    """How much faster two workers are than one; from memory, since a server would work on the same cores."""
    lines = [
        "Two workers to one on Ray, with text search, from and to a folder in memory; beside it what two processes do",
        "at once to what one of them does alone, without Ray: no more can be had of this machine's two cores. Medians",
        f"of {rounds} turns; a ratio above 2 is noise of the machine, and shows how much there is.\n",
        "| transfer syntax | scans | seconds of one worker | times as fast | without their start | two processes |",
        "|---|---|---|---|---|---|",
    ]
    missed = []
    for syntax in LEAST:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            alone, whole, begun, limit = scaling(Store(folder), syntax, rounds)
        scans = SHARDS[syntax] * PER_SHARD[syntax]
        lines.append(f"| {NAMES[syntax]} | {scans} | {alone:.0f} | {whole:.2f} | {begun:.2f} | {limit:.2f} |")
        missed += [f"{syntax}: two workers {begun:.2f}, asked {LEAST_SCALING}"] * (begun < LEAST_SCALING)
    return "\n".join([*lines, ""]), missed


def memory_table(root: Store, _: int) -> tuple[str, list[str]]:
    """Peak memory with 1,000 and with 20,000 scans in one tar."""
    peaks = []
    for scans in (1000, 20_000):
        fill(root.at(f"one-{scans}"), "explicit", 1, scans, side_px=128)
        peaks.append(peak_memory(root.at(f"one-{scans}"), root.at(f"one-{scans}-out")) / 1e6)
    text = (
        "Peak memory of driver and workers while one tar is read: "
        f"{peaks[0]:.0f} MB with 1,000 scans, {peaks[1]:.0f} MB with 20,000 ({peaks[1] / peaks[0]:.2f} times).\n"
    )
    return text, [f"memory grows {peaks[1] / peaks[0]:.2f} times"] * (peaks[1] > MOST_GROWTH * peaks[0])


def _machine() -> str:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": a CPU")
    return f"{os.cpu_count()} cores of {model.partition(':')[2].strip()}"


if __name__ == "__main__":
    sys.exit(main())
