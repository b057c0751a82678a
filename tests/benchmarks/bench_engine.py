"""Images per second of the engine, beside loops and scripts written by hand; writes docs/engine-speed.md.

Programs of a comparison take turns in one run, and what counts is the median over the turns of their ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.measured_page import machine, write_section

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "engine-speed.md"
SLOTS, STEPS = 32, (20, 4, 1)
LOOP_IMAGES = 64
JOB_IMAGES, JOB_SHARD, JOB_STEPS = 320, 64, 20
MIXED_IMAGES, MIXED_SLOTS, FEWEST, MOST = 384, 16, 4, 50
SCRIPT_IMAGES, SCRIPT_SHARD, SCRIPT_PX = 64, 16, 128
LEAST_LOOP, LEAST_JOB, LEAST_SCRIPT, LEAST_MIXED = 0.95, 0.95, 1.5, 1.5
Rates = Mapping[str, float]
"""Images per second, by what was measured in one run of a program."""


# --- (a) the bare loop, (c) static batches: one process, one thread, the base generator -------------------------


def loop(_: Path, rounds: int) -> tuple[str, list[str]]:
    """(a): the engine beside a hand-written loop over whole batches of the same number of rows."""
    bare, engine = _Base(SLOTS), _Base(SLOTS)
    runs = in_turns(
        rounds,
        scanloom=lambda: {str(steps): engine.by_engine([steps] * LOOP_IMAGES, 2.0) for steps in STEPS},
        bare=lambda: {str(steps): bare.by_bare_loop(LOOP_IMAGES, 2.0, steps) for steps in STEPS},
    )
    difference = _difference(engine.images, bare.images)
    text = (
        f"The base generator, 64x64, {SLOTS} slots, guidance 2, DPM-Solver++, one thread; {LOOP_IMAGES} images, "
        f"decoded, nothing written. Images per second of the process's CPU time. The images of the two "
        f"differ by {difference:.1e} of full range at most.\n\n{_table(runs, 'bare', 'a bare loop over batches')}\n"
    )
    ratio = _ratio(runs, "bare", "20")
    return text, [f"loop: {ratio:.3f} of the bare loop at 20 steps, asked {LEAST_LOOP}"] * (ratio < LEAST_LOOP)


def job(folder: Path, rounds: int) -> tuple[str, list[str]]:
    """(a) again: the whole job, one engine and one writer, beside the bare loop that writes nothing."""
    store = folder / "store"
    shutil.copytree(resources.files("scanloom.base") / "generator", store / "generator")  # type: ignore[arg-type]
    bare = _Base(SLOTS, clock=time.monotonic)
    case = str(JOB_STEPS)
    runs = in_turns(
        rounds,
        scanloom=lambda: {case: _job_rate(store)},
        bare=lambda: {case: bare.by_bare_loop(LOOP_IMAGES, 2.0, JOB_STEPS)},
    )
    ratio = _ratio(runs, "bare", case)
    text = (
        f"The same generator and settings as a job: `jobs.generate` under Ray Data, one engine of one thread and one "
        f"writer on the other core; {JOB_IMAGES} images in shards of {JOB_SHARD}, PNG in Parquet and DICOM in tar, "
        f"checked, uploaded and committed to a local folder. Images per second of wall clock from the first shard's "
        f"commit to the last one's, so without the start of Ray; the bare loop, which writes nothing, has a core too."
        f"\n\n{_table(runs, 'bare', 'a bare loop over batches')}\n"
    )
    return text, [f"job: {ratio:.3f} of the bare loop, asked {LEAST_JOB}"] * (ratio < LEAST_JOB)


def _job_rate(store: Path) -> float:
    """Images per second between the first and the last commit of a job."""
    from scanloom.store import Store

    section = {"images": JOB_IMAGES, "images_per_shard": JOB_SHARD, "slots": SLOTS, "steps": JOB_STEPS}
    name = f"dataset-{uuid.uuid4().hex[:8]}"
    # No other attributes count than those of the generator, but a recipe declares some.
    attributes = [{"kind": "category", "name": "sex", "values": ["F", "M"]}]
    recipe = store / "recipe.json"
    told = {"name": "bench", "store": str(store), "attributes": attributes, "generate": section | {"dataset": name}}
    recipe.write_text(json.dumps(told), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.generate", str(recipe)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    commits = sorted(found.modified for found in Store(str(store / name)).list("commits"))
    shutil.rmtree(store / name)
    return (len(commits) - 1) * JOB_SHARD / (commits[-1] - commits[0])


def mixed(_: Path, rounds: int) -> tuple[str, list[str]]:
    """(c): images of 4 to 50 steps, each leaving its slot when it is done, beside batches that wait for the longest."""
    counts = np.random.default_rng(0).integers(FEWEST, MOST, MIXED_IMAGES, endpoint=True).tolist()
    static, engine = _Base(MIXED_SLOTS, "ddim"), _Base(MIXED_SLOTS, "ddim")
    case = f"{FEWEST} to {MOST}"
    runs = in_turns(
        rounds, scanloom=lambda: {case: engine.by_engine(counts, 1.0)}, static=lambda: {case: static.by_static(counts)}
    )
    difference = _difference(engine.images, static.images)
    ratio = _ratio(runs, "static", case)
    text = (
        f"The base generator, 64x64, {MIXED_SLOTS} slots, no guidance, DDIM, one thread; {MIXED_IMAGES} images of "
        f"{FEWEST} to {MOST} steps each, evenly spread, in the order in which they come. Images per second of the "
        f"process's CPU time. The images of the two differ by {difference:.1e} of full range at most.\n\n"
        f"{_table(runs, 'static', 'batches that wait for their longest image')}\n"
    )
    return text, [f"mixed: {ratio:.2f} of static batches, asked {LEAST_MIXED}"] * (ratio < LEAST_MIXED)


class _Base:
    """The base generator, and the images that a program made with it last, by index."""

    def __init__(self, slots: int, solver: Any = "dpmpp-2m", clock: Callable[[], float] = time.process_time) -> None:

        from scanloom.heap import keep_freed_memory
        from scanloom.models.generator import load_generator
        from scanloom.sampling.production import fix_arithmetic

        # As in the job's and the service's processes; both programs of a comparison run in this one.
        fix_arithmetic(1)
        keep_freed_memory()
        self._generator = load_generator("embedded://base")
        self._slots, self._solver, self._clock = slots, solver, clock
        self.images = np.zeros(0)

    def by_engine(self, steps: Sequence[int], scale: float) -> float:
        from scanloom.sampling.engine import Engine, ImageRequest

        engine = Engine(self._generator, self._slots, self._solver)
        asked = (ImageRequest(n, 5, self._told(n), count, scale) for n, count in enumerate(steps))
        started = self._clock()
        made = {finished.request.index: finished.image[0] for finished in engine.run(asked)}
        rate = len(steps) / (self._clock() - started)
        self.images = np.stack([made[n] for n in range(len(steps))])
        return rate

    def by_bare_loop(self, images: int, scale: float, steps: int) -> float:
        from tests.benchmarks.engine_peers import bare_loop

        told, null = self._conditions(images)
        return self._timed(
            images, lambda noise: bare_loop(*self._networks, noise, told, null, scale, steps, self._slots)
        )  # fmt: skip

    def by_static(self, steps: Sequence[int]) -> float:
        from tests.benchmarks.engine_peers import static_batches

        told, _ = self._conditions(len(steps))
        return self._timed(len(steps), lambda noise: static_batches(*self._networks, noise, told, steps, self._slots))

    def _timed(self, images: int, program: Callable[[Any], Any]) -> float:
        import torch

        from scanloom.sampling.noise import gaussian_noise

        started = self._clock()
        noise = np.stack([gaussian_noise(5, n, self._generator.latent_shape) for n in range(images)])
        made = list(program(torch.from_numpy(noise)))
        rate = images / (self._clock() - started)
        self.images = np.concatenate(made)
        return rate

    def _conditions(self, images: int) -> tuple[Any, Any]:
        return self._generator.condition([self._told(n) for n in range(images)]), self._generator.null_condition(1)

    @property
    def _networks(self) -> tuple[Any, Any, dict[str, Any]]:
        return self._generator._network, self._generator._vae, dict(self._generator.schedule.settings)

    @staticmethod
    def _told(number: int) -> dict[str, Any]:
        return {"age": 25.0 + number % 60, "sex": "FM"[number % 2], "view": "PA"}


# --- (b) the plain script: everything written, two cores ---------------------------------------------------------


def script(folder: Path, rounds: int) -> tuple[str, list[str]]:
    """(b): engines and a writer as processes beside a pipeline that writes every image by itself."""
    uri = _publish_small_sd(folder)
    runs = in_turns(rounds, scanloom=lambda: _chain(uri, folder), script=lambda: _script(uri, folder))
    ratio = _ratio(runs, "script", "20")
    text = (
        f"A Stable Diffusion 2.1 of a tenth of its widths, {SCRIPT_PX}x{SCRIPT_PX}, guidance 2, DPM-Solver++, "
        f"{SCRIPT_IMAGES} images of as many prompts, on two cores; wall clock from loaded networks to the last file. "
        f"scanloom: two engines of one thread and a writer, as processes; shards of {SCRIPT_SHARD} images in Parquet "
        f"and DICOM, committed. The script: diffusers' pipeline with as many images a batch and both cores, and for "
        f"each image a pydicom data set and a PNG in files of their own.\n\n"
        f"{_table(runs, 'script', 'a plain script')}\n"
    )
    return text, [f"script: {ratio:.2f} of the plain script at 20 steps, asked {LEAST_SCRIPT}"] * (ratio < LEAST_SCRIPT)


def _publish_small_sd(folder: Path) -> str:
    from scanloom.artefact import FileEntry, publish
    from scanloom.models.autoencoder import load_autoencoder
    from scanloom.models.card import GeneratorCard, conditioning
    from scanloom.models.family import initial_denoiser, save_generator, schedule_of
    from scanloom.recipe_denoiser import StableDiffusion
    from scanloom.store import Store
    from tests.benchmarks.training_sd import save_stable_diffusion
    from tests.tiny_generator import ENVELOPE, SCHEMA, STATISTICS

    base, made, uri = folder / "base", folder / "made", str(folder / "generator")
    save_stable_diffusion(base)
    config = StableDiffusion(family="sd", weights=str(base))
    card = GeneratorCard(
        **conditioning(config), name="bench", attributes=SCHEMA, envelope=ENVELOPE, spacing_mm=0.7, trained_steps=0,
        latent_shape=(4, SCRIPT_PX // 8, SCRIPT_PX // 8), image_shape=(1, SCRIPT_PX, SCRIPT_PX),
    )  # fmt: skip
    denoiser = initial_denoiser(config, card, 0, base)
    save_generator(made, card, denoiser, load_autoencoder(base / "vae"), schedule_of(config, "v_prediction"), base)
    files = [FileEntry.of(stored) for stored in Store(uri).put_folder(made)]
    told = STATISTICS | {"size_px": SCRIPT_PX}
    publish(Store(uri), kind="generator", name="bench", recipe={}, inputs=[], files=files, statistics=told)
    return uri


def _plan(uri: str, steps: int) -> Any:
    """The plan's spec; random weights make what no check of quality would let pass."""
    from scanloom.artefact import open_artefact
    from scanloom.recipe_generate import Generate, Quality
    from scanloom.sampling.plan import specify

    generator = open_artefact(uri, "generator")
    anything = Quality(least_contrast=0.0, most_white=1.0, most_black=1.0)
    section = Generate(
        images=SCRIPT_IMAGES, steps=steps, slots=2 * SCRIPT_SHARD, images_per_shard=SCRIPT_SHARD, quality=anything
    )
    return specify(section, "bench", generator.digest, generator.manifest.statistics)


def _chain(uri: str, folder: Path) -> Rates:
    from scanloom.sampling.dataset import write_shard
    from scanloom.store import Store

    spawn = multiprocessing.get_context("spawn")
    made, ready = spawn.Queue(), spawn.Barrier(3)
    engines = [spawn.Process(target=_engine_process, args=(uri, number, made, ready)) for number in range(2)]
    for engine in engines:
        engine.start()
    rates = {}
    for steps in STEPS:
        spec = _plan(uri, steps)
        with tempfile.TemporaryDirectory(dir=folder) as to:
            ready.wait()
            started = time.monotonic()
            for _ in range(spec.shards):
                assert write_shard(made.get(), spec, Store(to))["rows"] == SCRIPT_SHARD
            rates[str(steps)] = SCRIPT_IMAGES / (time.monotonic() - started)
    for engine in engines:
        engine.join()
    return rates


def _engine_process(uri: str, number: int, made: Any, ready: Any) -> None:
    from scanloom.sampling.dataset import EngineActor

    for steps in STEPS:
        spec = _plan(uri, steps)
        actor = EngineActor(spec, uri, "cpu", 1)
        _ = actor._engine
        ready.wait()
        for shard in range(number, spec.shards, 2):
            made.put(actor({"shard": shard}))


def _script(uri: str, folder: Path) -> Rates:
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=_script_process, args=(uri, str(folder), answers))
    process.start()
    rates: Rates = answers.get()
    process.join()
    return rates


def _script_process(uri: str, folder: str, answers: Any) -> None:
    from scanloom.models.card import read_card
    from scanloom.models.prompts import prompt
    from scanloom.sampling.plan import compile_plan
    from tests.benchmarks.engine_peers import open_pipeline, plain_script

    generator = Path(uri)
    card = read_card(generator)
    rates = {}
    for steps in STEPS:
        spec = _plan(uri, steps)
        rows = [spec.attributes.from_row(row) for row in compile_plan(spec).table.to_pylist()]
        prompts = [prompt(card.attributes, row, card.prompt) for row in rows]
        pipeline = open_pipeline(generator)
        with tempfile.TemporaryDirectory(dir=folder) as to:
            started = time.monotonic()
            plain_script(pipeline, Path(to), prompts, steps, SCRIPT_SHARD)
            rates[str(steps)] = SCRIPT_IMAGES / (time.monotonic() - started)
    answers.put(rates)


# --- the page ---------------------------------------------------------------------------------------------------


def gpu(_: Path, __: int) -> tuple[str, list[str]]:
    """A model of Stable Diffusion 2.1's size on one GPU beside diffusers' pipeline."""
    from tests.benchmarks.engine_gpu import page

    return page()


def in_turns(rounds: int, **programs: Callable[[], Rates]) -> dict[str, list[Rates]]:
    """Every program once a round, in the other order in every second round, since the first finds a rested machine."""
    runs: dict[str, list[Rates]] = {name: [] for name in programs}
    for turn in range(rounds):
        for name in list(programs)[:: -1 if turn % 2 else 1]:
            runs[name].append(programs[name]())
            said = ", ".join(f"{case}: {rate:.2f}" for case, rate in runs[name][-1].items())
            print(f"round {turn + 1}: {name}, images/s by steps: {said}", file=sys.stderr)  # noqa: T201
    return runs


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


def _ratios(runs: Mapping[str, list[Rates]], peer: str, case: str) -> list[float]:
    return [ours[case] / theirs[case] for ours, theirs in zip(runs["scanloom"], runs[peer], strict=True)]


def _ratio(runs: Mapping[str, list[Rates]], peer: str, case: str) -> float:
    return statistics.median(_ratios(runs, peer, case))


def _table(runs: Mapping[str, list[Rates]], peer: str, title: str) -> str:
    lines = [f"| steps | scanloom, images/s | {title}, images/s | scanloom to it | by round |", "|---|---|---|---|---|"]
    for case in runs[peer][0]:
        rates = [statistics.median(run[case] for run in runs[name]) for name in ("scanloom", peer)]
        by_round = ", ".join(f"{ratio:.2f}" for ratio in _ratios(runs, peer, case))
        lines.append(f"| {case} | {rates[0]:.2f} | {rates[1]:.2f} | {_ratio(runs, peer, case):.2f} | {by_round} |")
    return "\n".join(lines)


HEAD = """# How fast the engine is

Measured by `tests/benchmarks/bench_engine.py`. Ratios are what to compare: rates are each machine's. The programs
of a table take turns, and a ratio is the median of those of the rounds. The peers are written by hand in
`tests/benchmarks/engine_peers.py`.
"""
PARTS: dict[str, tuple[str, Callable[[Path, int], tuple[str, list[str]]]]] = {
    "loop": ("Beside a bare loop", loop),
    "job": ("The whole job beside a bare loop", job),
    "script": ("Beside a plain script", script),
    "mixed": ("Mixed step counts", mixed),
    "gpu": ("One GPU", gpu),
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure and to write")
    asked = options.parse_args()
    missed = []
    for part in asked.parts:
        title, measure = PARTS[part]
        with tempfile.TemporaryDirectory(prefix="scanloom-bench-") as folder:
            text, short = measure(Path(folder), asked.rounds)
        how = "" if part == "gpu" else f", {asked.rounds} rounds"
        section = f"## {title}\n\nOn {machine()}{how}.\n\n{text}"
        write_section(PAGE, HEAD, [name for name, _ in PARTS.values()], title, section)
        print(section)  # noqa: T201
        missed += short
    print(*missed, sep="\n")  # noqa: T201
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
