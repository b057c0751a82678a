"""What writing a dataset costs beside a bare upload of the same bytes; writes docs/writer-speed.md.

Two processes write shards as two Ray Data writers would, `write_shard` and nothing beside it: JPEG XL in Parquet and
native DICOM in tar. The bare upload sends the bytes of those very objects with the same client, as many at a time.
Both are taken in turns in one run; medians count.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from pydicom import dcmwrite
from scipy.ndimage import gaussian_filter, zoom

from scanloom.dicom.synthetic import InstanceDescription, build
from scanloom.dicom.template import render
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.recipe import Generate
from scanloom.sampling.dataset import rows_to_bytes, shard_parts, write_shard
from scanloom.sampling.plan import Plan, compile_plan, specify
from scanloom.scans.phantoms import phantom
from scanloom.shards.commit import ShardPart
from scanloom.shards.writer import image_bytes
from scanloom.store import Store
from tests.tiny_generator import STATISTICS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "writer-speed.md"
SIZE_PX, PER_SHARD, DISTINCT = 512, 64, 8
WRITERS = 2
START_S = 60.0
LEAST_OF_UPLOAD, LEAST_LOCAL, LEAST_TEMPLATE = 0.8, 400.0, 10.0
GRAIN = 8.0
"""Deviation of the noise in levels of 65,536; JPEG XL then takes about half of the bytes of the pixels."""


def pictures(count: int) -> np.ndarray[Any, Any]:
    """[count, 512, 512] uint16 chest phantoms with grain, each of its own."""
    rng = np.random.default_rng(0)
    scans = [phantom(1, n, 128, bits_stored=12).pixels.astype(float) * 15.0 for n in range(DISTINCT)]
    drawn = [zoom(gaussian_filter(scan, 2.0), 4, order=1) for scan in scans]
    grain = rng.normal(0.0, GRAIN, (DISTINCT, SIZE_PX, SIZE_PX))
    made = np.empty((count, SIZE_PX, SIZE_PX), np.uint16)
    for n in range(count):
        noise = np.roll(grain[n % DISTINCT], 7 * n, axis=1)
        made[n] = np.clip(drawn[(n * 5) % DISTINCT] + 600 + noise, 0, 65535)
    return made


def plan_of(shards: int) -> Plan:
    section = Generate(
        images=shards * PER_SHARD, images_per_shard=PER_SHARD, bits_stored=16, image_format="jpeg-xl", dataset="bench"
    )
    return compile_plan(specify(section, "bench", "a" * 64, STATISTICS))


# --- what each process does -----------------------------------------------------------------------------------

_PROCESS: dict[str, Any] = {}


def prepare(shards: int, writers: Any) -> None:
    """Once a process, before the clock runs: pixels of a shard, and the bytes that come of it."""
    plan = plan_of(shards)
    pixels = pictures(PER_SHARD)
    parts = list(shard_parts(plan.spec, 0, plan.rows(0), pixels))
    _PROCESS.update(plan=plan, pixels=pixels.tobytes(), parts=parts, writers=writers)


def ready(_: int) -> int:
    """The number of this process, once all writers are there: none takes two of these calls."""
    _PROCESS["writers"].wait(START_S)
    return os.getpid()


def written(job: tuple[str, int]) -> int:
    """Write one shard into a store as a writer does; the bytes that it uploaded."""
    uri, shard = job
    plan: Plan = _PROCESS["plan"]
    made = {"shard": shard, "rows": rows_to_bytes(plan.rows(shard)), "pixels": _PROCESS["pixels"]}
    told = {"height": SIZE_PX, "width": SIZE_PX, "engine_s": 0.0, "environment": {}}
    write_shard(made | told, plan.spec, Store(uri))
    return sum(part.size for part in _PROCESS["parts"])


def uploaded(job: tuple[str, int]) -> int:
    """Upload the bytes of one shard, its objects at once, and nothing else."""
    uri, shard = job
    parts: list[ShardPart] = _PROCESS["parts"]
    store = Store(uri)
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda part: store.write(f"{part.role}/{shard}", part.content()), parts))
    return sum(part.size for part in parts)


def rate(
    pool: ProcessPoolExecutor, work: Callable[[tuple[str, int]], int], uri: str, shards: int
) -> tuple[float, float]:
    """Images and megabytes a second."""
    place = f"{uri}/{uuid.uuid4().hex[:8]}"
    started = time.perf_counter()
    data = sum(pool.map(work, [(place, shard) for shard in range(shards)]))
    seconds = time.perf_counter() - started
    store = Store(place)
    store.delete([found.key for found in store.list()])
    return shards * PER_SHARD / seconds, data / seconds / 1e6


def in_turns(
    pool: ProcessPoolExecutor, uri: str, shards: int, rounds: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    writes, uploads = [], []
    for turn in range(rounds):
        order = ((written, writes), (uploaded, uploads))
        for work, results in order if turn % 2 else reversed(order):
            results.append(rate(pool, work, uri, shards))
    return writes, uploads


# --- one image, one thread ------------------------------------------------------------------------------------


def cost(work: Callable[[Any], bytes], images: np.ndarray[Any, Any], seconds: float = 0.4) -> tuple[float, float]:
    """CPU milliseconds and bytes of one image."""
    size = len(work(images[0]))
    started, count = time.process_time(), 0
    while time.process_time() - started < seconds:
        size += len(work(images[count % len(images)]))
        count += 1
    return 1e3 * (time.process_time() - started) / count, size / (count + 1)


def by_pydicom(pixels: Any, told: InstanceDescription) -> bytes:
    file = io.BytesIO()
    dcmwrite(file, build(pixels, told), enforce_file_format=True)
    return file.getvalue()


def jpeg_xl(effort: int) -> Callable[[Any], bytes]:
    return lambda p: bytes(imagecodecs.jpegxl_encode(p, lossless=True, effort=effort, numthreads=1))


def costs(images: np.ndarray[Any, Any]) -> dict[str, tuple[float, float]]:
    told = InstanceDescription("0", "bench", "ab" * 32, "chest", "cd" * 32, 16, 0.143, "20000101", view="PA")
    ways: dict[str, Callable[[Any], bytes]] = {
        "PNG, zlib's defaults": lambda p: bytes(imagecodecs.png_encode(p)),
        "`png`": lambda p: image_bytes(p, "png"),
        "`jpeg-xl` (effort 1)": lambda p: image_bytes(p, "jpeg-xl"),
        "JPEG XL, effort 2": jpeg_xl(2),
        "JPEG XL, effort 3": jpeg_xl(3),
        "`raw`": lambda p: image_bytes(p, "raw"),
        "DICOM, pydicom's writer": lambda p: by_pydicom(p, told),
        "DICOM `native`": lambda p: render(p, told),
        "DICOM `rle`": lambda p: render(p, replace(told, transfer_syntax="rle")),
        "DICOM `jpeg-ls`": lambda p: render(p, replace(told, transfer_syntax="jpeg-ls")),
        "DICOM `htj2k`": lambda p: render(p, replace(told, transfer_syntax="htj2k")),
    }
    return {name: cost(work, images) for name, work in ways.items()}


def stages(shards: int) -> dict[str, float]:
    """CPU milliseconds an image of what a writer does before it uploads, one after the other in one thread."""
    plan = plan_of(1)
    pixels, rows = pictures(PER_SHARD), plan.rows(0)
    spent: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        spent.setdefault(name, []).append(1e3 * (time.process_time() - started) / PER_SHARD)
        return result

    raw = plan.spec.model_copy(update={"image_format": "raw"})
    native = plan.spec.model_copy(update={"dicom": plan.spec.dicom.model_copy(update={"enabled": False})})
    for _ in range(shards):
        timed("JPEG XL", lambda: [image_bytes(p, "jpeg-xl") for p in pixels])
        parts = timed("all of it", lambda: list(shard_parts(plan.spec, 0, rows, pixels)))
        timed("with raw images", lambda: list(shard_parts(raw, 0, rows, pixels)))
        timed("without DICOM", lambda: list(shard_parts(native, 0, rows, pixels)))
        fresh = [replace(part) for part in parts]
        timed("SHA-256", lambda fresh=fresh: [part.sha256 for part in fresh])
    return {name: statistics.median(values) for name, values in spent.items()}


# --- the page -------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shards", type=int, default=8)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, EmbeddedS3(Path(folder) / "s3") as s3:
        os.environ.update(s3.environment)
        s3.create_bucket("bench")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(WRITERS, context, prepare, (given.shards, context.Barrier(WRITERS))) as pool:
            assert len(set(pool.map(ready, range(WRITERS)))) == WRITERS
            rate(pool, written, "s3://bench/warm", 2)
            to_s3 = in_turns(pool, "s3://bench/rounds", given.shards, given.rounds)
            to_disk = in_turns(pool, f"{folder}/local", given.shards, given.rounds)
    ratio = statistics.median(w[0] / u[0] for w, u in zip(*to_s3, strict=True))
    local = statistics.median(w[0] for w in to_disk[0])
    for name, (writes, uploads) in (("S3", to_s3), ("disk", to_disk)):
        for what, rates in (("writer", writes), ("bare", uploads)):
            print(name, what, " ".join(f"{images:.0f}" for images, _ in rates))  # noqa: T201
    print(f"ratio {ratio:.3f}, local {local:.0f} images/s")  # noqa: T201
    of_image = costs(pictures(16))
    template = of_image["DICOM, pydicom's writer"][0] / of_image["DICOM `native`"][0]
    page = report(load, to_s3, to_disk, of_image, stages(3))
    PAGE.write_text(page)
    print(page)  # noqa: T201
    return 0 if ratio >= LEAST_OF_UPLOAD and local >= LEAST_LOCAL and template >= LEAST_TEMPLATE else 1


def report(
    load: float, to_s3: Any, to_disk: Any, of_image: dict[str, tuple[float, float]], spent: dict[str, float]
) -> str:
    lines = [
        "# What writing a dataset costs",
        "",
        "Measured by `tests/benchmarks/bench_writer.py` on 2 cores; rates are that machine's, ratios are what counts.",
        "512x512 images of 16 bits with grain, 64 a shard. Two processes write as two Ray Data writers do: JPEG XL in",
        "Parquet and native DICOM in tar. The bare upload sends the same bytes with the same client, as many objects",
        "at a time; the S3 server (SeaweedFS) runs on the same two cores. Medians of rounds in turns",
        f"({len(to_s3[0])}); other programs gave the machine a load average of {load:.1f} before.",
        "",
        "| into | writer, images/s | bare, images/s | MB/s of the bare one | writer to bare |",
        "|---|---|---|---|---|",
    ]
    for name, (writes, uploads) in (("S3 on this machine", to_s3), ("a local folder", to_disk)):
        ratio = statistics.median(w[0] / u[0] for w, u in zip(writes, uploads, strict=True))
        write, bare = (statistics.median(r[0] for r in rates) for rates in (writes, uploads))
        speed = statistics.median(r[1] for r in uploads)
        lines.append(f"| {name} | {write:.0f} | {bare:.0f} | {speed:.0f} | {ratio:.2f} |")
    lines += ["", "One image in one thread, CPU time:", "", "| what | ms | images/s | bytes |", "|---|---|---|---|"]
    lines += [f"| {name} | {ms:.2f} | {1e3 / ms:,.0f} | {size:,.0f} |" for name, (ms, size) in of_image.items()]
    whole, png, jxl = spent["all of it"], of_image["PNG, zlib's defaults"], of_image["`jpeg-xl` (effort 1)"]
    faster = of_image["DICOM, pydicom's writer"][0] / of_image["DICOM `native`"][0]
    lines += [
        "",
        f"JPEG XL takes {jxl[0] / png[0]:.3f} of the time of PNG with zlib's defaults and {jxl[1] / png[1]:.2f} of its",
        f"bytes; the DICOM template is {faster:.0f} times as fast as pydicom's writer.",
        "",
        "Where the CPU time of a writer goes before anything is uploaded, ms an image:",
        "",
        "| stage | ms | share |",
        "|---|---|---|",
    ]
    dicom = whole - spent["without DICOM"]
    rest = whole - spent["JPEG XL"] - dicom
    table = {
        "JPEG XL": spent["JPEG XL"],
        "DICOM: template, tar, SHA-256 of the tar (its name is in the Parquet)": dicom,
        "rows, Parquet": rest,
    }
    lines += [f"| {name} | {ms:.2f} | {ms / whole:.0%} |" for name, ms in table.items()]
    lines += [f"| all | {whole:.2f} | |", f"| of all objects: SHA-256 | {spent['SHA-256']:.2f} | |", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
