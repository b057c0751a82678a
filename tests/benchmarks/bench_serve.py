"""The service beside plain ones under the same load, and beside its bare engine; writes docs/serving-speed.md.

Each service runs by itself, in processes of its own; the load comes from one more process. Ratios are medians over the
rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

from tests.benchmarks.measured_page import machine, write_section
from tests.benchmarks.open_load import FEWEST, MOST, Outcome, Target, arrivals, closed_loop, open_loop, step_counts
from tests.benchmarks.serve_peers import GENERATOR, RAY_WAIT_S, WAIT_S
from tests.processes import descendants, kill
from tests.running_service import RunningService, config, free_port, plain_environment, written

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "serving-speed.md"
SLOTS = ROWS = 16
FEWER_ROWS = 8
"""Of a call, where an image that is alone should not wait for so many idle rows."""
LOADS = (0.5, 0.8, 1.2)
"""Of what the bare engine makes."""
COMPARED = 0.8
"""The load at which peers are compared, and that may be measured alone."""
WARM = 0.2
"""Share of a run's time whose requests are not counted."""
SATURATION_SEED = 3
"""Of the step counts that the bare engine and a saturated service are asked for: an engine that starts with all its
slots at once makes more images at some times than at others, until they have drifted apart."""
STARTS_S = 120.0
MORE_THROUGHPUT, LESS_P95, LEAST_SATURATION, MOST_REFUSAL_S, LEAST_KEPT = 1.3, 0.6, 0.95, 0.1, 0.99


Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """Of scanloom's generator, which the peers have not."""

    precision: Precision = "fp32"
    compiled: bool = False

    @property
    def told(self) -> str:
        """For a title."""
        return (", with a compiled denoiser" if self.compiled else "") + (
            f", in {self.precision}" if self.precision != "fp32" else ""
        )

    @property
    def given(self) -> str:
        """For a sentence."""
        given = [f"`{name}: {value}`" for name, value in (("compiled", "true"), ("precision", self.precision))]
        kept = [text for text, has in zip(given, (self.compiled, self.precision != "fp32"), strict=True) if has]
        return f", {' and '.join(kept)}, which the peers have not" if kept else ""


@dataclass(frozen=True)
class Figures:
    """Of one service under one load."""

    images_per_s: float
    p50_s: float
    p95_s: float
    """Of the images made, from the moment at which they were to be asked for."""
    refused: float
    """Share of the requests."""
    refusal_p95_s: float
    kept: float
    """Share of the accepted requests that were answered with an image within their deadline."""
    failed: int
    """Neither an image nor a refusal."""


def figures(outcomes: Sequence[Outcome], seconds: float, deadline_s: float) -> Figures:
    counted = [each for each in outcomes if each.sent >= WARM * seconds]
    made = [each.latency_s for each in counted if each.status == 200]
    refusals = [each.latency_s for each in counted if each.status in (429, 503) and not each.dropped]
    accepted = len(made) + sum(each.dropped for each in counted)
    ended = sum(each.status == 200 and WARM * seconds <= each.ended < seconds for each in outcomes)
    return Figures(
        ended / ((1.0 - WARM) * seconds), _quantile(made, 0.5), _quantile(made, 0.95),
        len(refusals) / max(len(counted), 1),
        _quantile(refusals, 0.95), sum(latency <= deadline_s for latency in made) / max(accepted, 1),
        len(counted) - accepted - len(refusals),
    )  # fmt: skip


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else float("nan")


# --- who is measured --------------------------------------------------------------------------------------------


def bare_engine(rows: int, seconds: float, settings: Settings) -> float:
    """Images per second of an engine that is handed one request after the other, in this process."""
    import itertools

    from scanloom.sampling.engine import ImageRequest
    from scanloom.sampling.workbench import open_workbench
    from tests.benchmarks.open_load import ATTRIBUTES

    bench = open_workbench(GENERATOR, slots=SLOTS, rows=rows, **asdict(settings))
    bench.warm_up()
    asked = (
        ImageRequest(n, 1, ATTRIBUTES, steps)
        for n, steps in zip(itertools.count(), step_counts(SATURATION_SEED), strict=False)
    )
    started, made, counted = time.perf_counter(), 0, 0.0
    for _ in bench.engine.run(asked):
        now = time.perf_counter() - started
        if now >= seconds:
            break
        if now >= WARM * seconds:
            made, counted = made + 1, now
    return made / (counted - WARM * seconds)


@contextmanager
def scanloom(folder: Path, deadline_s: float, settings: Settings) -> Iterator[Target]:
    lenient = {"least_contrast": 0.0, "most_white": 1.0, "most_black": 1.0}
    served = {
        "generators": [{"name": "base", "uri": GENERATOR, "quality": lenient} | asdict(settings)],
        "replicas": {"slots": SLOTS, "rows": ROWS, "cpus": 1, "requests": 256},
    }
    with RunningService(folder, written(folder, config(served))) as service:
        headers = {"Authorization": f"Bearer {service.key}", "Accept": "image/png"}
        yield Target(f"{service.url}/v1/images", headers, deadline_s)


@contextmanager
def peer(kind: str, path: str, deadline_s: float) -> Iterator[Target]:
    port = free_port()
    target = Target(f"http://127.0.0.1:{port}{path}", {}, deadline_s)
    command = [sys.executable, str(ROOT / "tests/benchmarks/serve_peers.py"), kind, str(port), str(SLOTS)]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env=plain_environment(), stdout=log, stderr=log)
        try:
            _await_image(process, target, Path(log.name))
            yield target
        finally:
            below = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for left in below:
                kill(left)


def _await_image(process: subprocess.Popen[bytes], target: Target, log: Path) -> None:
    body = {"attributes": {}, "seed": 0, "steps": FEWEST}
    for _ in range(int(STARTS_S)):
        if process.poll() is not None:
            raise RuntimeError(f"{process.args}: ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            if httpx.post(target.url, json=body, timeout=60, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1.0)
    raise RuntimeError(f"{process.args}: not ready within {STARTS_S:g} s")


def services(folder: Path, deadline_s: float, settings: Settings) -> dict[str, Callable[[], Any]]:
    """By name, what starts them."""
    return {
        "scanloom": lambda: scanloom(folder, deadline_s, settings),
        "Ray Serve, @serve.batch": lambda: peer("ray", "/", deadline_s),
        "LitServe": lambda: peer("litserve", "/predict", deadline_s),
    }


# --- what is measured -------------------------------------------------------------------------------------------

Run = Mapping[str, Mapping[str, Figures]]
"""By service and by load: `50 %`, ..., `saturation`."""


def measure(
    target: Target, capacity: float, seconds: float, seed: int, loads: Sequence[float], saturation: bool
) -> dict[str, Figures]:
    """The loads, one after the other, sent by a process of their own."""
    with multiprocessing.get_context("spawn").Pool(1) as sender:
        found = {}
        for load in loads:
            times = arrivals(load * capacity, seconds, seed)
            outcomes = sender.apply(open_loop, (target, times, seed))
            found[f"{load:.0%}"] = figures(outcomes, seconds, target.deadline_s)
        if saturation:
            patient = Target(target.url, target.headers, 300.0)
            outcomes = sender.apply(closed_loop, (patient, 2 * SLOTS, seconds, SATURATION_SEED))
            found["saturation"] = figures(outcomes, seconds, 300.0)
    return found


def alone(rows: int, seconds: float, settings: Settings) -> float:
    """The bare engine, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rate: float = pool.apply(bare_engine, (rows, seconds, settings))
    return rate


@dataclass(frozen=True)
class Bare:
    """Images per second of the bare engine."""

    capacity: float
    """Before all else: what loads are shares of."""
    fewer_rows: float
    rounds: Sequence[float]
    """Of each round, right before and right after the service: this machine's rates change while it is measured."""


def measured(
    rounds: int, seconds: float, settings: Settings, loads: Sequence[float], saturation: bool
) -> tuple[list[Run], Bare, float]:
    """The runs, the bare engine, and the deadline of the requests."""
    capacity = alone(ROWS, seconds, settings)
    fewer_rows = alone(FEWER_ROWS, seconds, settings) if saturation else float("nan")
    # Twice what an image of the most steps takes in a full engine.
    deadline_s = round(2 * MOST * SLOTS / capacity / statistics.mean((FEWEST, MOST)), 1)
    _say(f"bare engine: {capacity:.2f} images/s, with fewer rows {fewer_rows:.2f}; deadline {deadline_s} s")
    runs, beside = [], list[float]()
    for turn in range(rounds):
        run: dict[str, dict[str, Figures]] = {}
        with tempfile.TemporaryDirectory(prefix="scanloom-bench-") as folder:
            found = services(Path(folder), deadline_s, settings)
            for name in list(found)[:: -1 if turn % 2 else 1]:
                compared = saturation and name == "scanloom"
                before = alone(ROWS, seconds, settings) if compared else 0.0
                with found[name]() as target:
                    run[name] = measure(target, capacity, seconds, turn + 1, loads, saturation)
                if compared:
                    beside.append((before + alone(ROWS, seconds, settings)) / 2)
                    _say(f"round {turn + 1}: bare engine beside it {beside[-1]:.2f} images/s")
                for load, told in run[name].items():
                    _say(f"round {turn + 1}: {name}, {load}: {told}")
        runs.append(run)
    return runs, Bare(capacity, fewer_rows, beside), deadline_s


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


# --- the page ---------------------------------------------------------------------------------------------------

HEAD = """# How fast the service is

Measured by `tests/benchmarks/bench_serve.py`. Ratios are what to compare: rates are each machine's. The peers are
written by hand in `tests/benchmarks/serve_peers.py`.
"""
LOAD_TITLE, ONE_LOAD_TITLE, ENGINE_TITLE = "Under load", f"At a load of {COMPARED:.0%}", "Beside the bare engine"
TITLES = [
    title + Settings(precision, compiled).told
    for precision in PRECISIONS
    for compiled in (False, True)
    for title in (LOAD_TITLE, ONE_LOAD_TITLE, ENGINE_TITLE)
]


def under_load(
    runs: Sequence[Run], seconds: float, capacity: float, deadline_s: float, settings: Settings, loads: Sequence[float]
) -> tuple[str, list[str]]:
    peers = [name for name in runs[0] if name != "scanloom"]
    gain = statistics.median(
        run["scanloom"][f"{COMPARED:.0%}"].images_per_s
        / max(run[name][f"{COMPARED:.0%}"].images_per_s for name in peers)
        for run in runs
    )
    delay = statistics.median(
        run["scanloom"][f"{COMPARED:.0%}"].p95_s / min(run[name][f"{COMPARED:.0%}"].p95_s for name in peers)
        for run in runs
    )
    most = f"{max(loads):.0%}"
    refusal_s = _median(runs, "scanloom", most, "refusal_p95_s")
    kept = min(run["scanloom"][f"{load:.0%}"].kept for run in runs for load in loads)
    text = (
        f"The base generator, 64x64, no guidance, DPM-Solver++; requests of one image each, of {FEWEST} to {MOST} "
        f"steps, evenly spread, at the times of a Poisson process, {seconds:g} s a load of which the first {WARM:.0%} "
        "are not counted. Loads are shares of what the bare engine makes by itself of the same mix on one thread "
        f"({capacity:.1f} images/s). Every service has one model on one thread, and the machine's other core for all "
        f"else, the sender of the requests included. scanloom: `scanloom serve`, {SLOTS} slots, {ROWS} rows a call"
        f"{settings.given}. "
        f"The peers: batches of up to {SLOTS} images, {WAIT_S:g} s of waiting for company (Ray Serve {RAY_WAIT_S:g} s: "
        "it makes up batches before the model is free, by ones where the wait is short), diffusers' scheduler, and "
        "as many steps as the longest image of the batch asks for; they refuse nothing. Latency counts from the "
        f"moment at which a request was to be sent. Every request states a deadline of {deadline_s:g} s, which the "
        f"peers do not look at.\n\n{_load_table(runs, loads)}\n\nAt {COMPARED:.0%}: {gain:.2f} times the "
        f"throughput of the better peer, and {delay:.2f} of the p95 of the better peer."
        f"{'' if refusal_s != refusal_s else f' At {most}: 95% of the refusals within {1000 * refusal_s:.0f} ms.'}\n"
    )
    failed = sum(told.failed for run in runs for told in run["scanloom"].values())
    missed = [
        *([f"throughput {gain:.2f} of the better peer at 80 %, asked {MORE_THROUGHPUT}"] * (gain < MORE_THROUGHPUT)),
        *([f"p95 {delay:.2f} of the better peer at 80 %, asked {LESS_P95}"] * (delay > LESS_P95)),
        *([f"refusals {refusal_s:.3f} s, asked {MOST_REFUSAL_S}"] * (refusal_s > MOST_REFUSAL_S)),
        *([f"kept deadlines {kept:.3f} of those accepted, asked {LEAST_KEPT}"] * (kept < LEAST_KEPT)),
        *([f"{failed} requests failed"] * (failed > 0)),
    ]
    return text, missed


def _load_table(runs: Sequence[Run], loads: Sequence[float]) -> str:
    lines = [
        "| load | service | images/s | p50, s | p95, s | refused | refused within, ms (p95) | accepted and in time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for load in loads:
        for name in runs[0]:
            rate, p50, p95, refused, within, kept = (
                _median(runs, name, f"{load:.0%}", figure)
                for figure in ("images_per_s", "p50_s", "p95_s", "refused", "refusal_p95_s", "kept")
            )
            soon = "" if within != within else f"{1000 * within:.0f}"
            lines.append(
                f"| {load:.0%} | {name} | {rate:.2f} | {p50:.2f} | {p95:.2f} | {refused:.1%} | {soon} | {kept:.1%} |"
            )
    return "\n".join(lines)


def beside_engine(runs: Sequence[Run], bare: Bare) -> tuple[str, list[str]]:
    shares = {
        name: [run[name]["saturation"].images_per_s / rate for run, rate in zip(runs, bare.rounds, strict=True)]
        for name in runs[0]
    }
    lines = "\n".join(
        f"| {name} | {_median(runs, name, 'saturation', 'images_per_s'):.2f} | {statistics.median(by_round):.2f} "
        f"| {', '.join(f'{share:.2f}' for share in by_round)} |"
        for name, by_round in shares.items()
    )
    share = statistics.median(shares["scanloom"])
    text = (
        f"{2 * SLOTS} clients, each of which asks again as soon as it is answered; the same mix. The bare engine runs "
        f"right before and right after the service in every round. With {FEWER_ROWS} rows a call, better for who is "
        f"alone, worse for all others, it makes {bare.fewer_rows:.2f} images/s.\n\n"
        "| | images/s | of the bare engine | by round |\n|---|---|---|---|\n"
        f"| bare engine, {ROWS} rows a call | {statistics.median(bare.rounds):.2f} | 1 | |\n{lines}\n"
    )
    return text, [f"saturation {share:.3f} of the bare engine, asked {LEAST_SATURATION}"] * (share < LEAST_SATURATION)


def _median(runs: Sequence[Run], name: str, load: str, figure: str) -> float:
    return statistics.median(getattr(run[name][load], figure) for run in runs)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--seconds", type=float, default=60.0, help="of each load")
    options.add_argument(
        "--parts", nargs="+", choices=("loads", "one-load", "saturation"), default=["loads", "saturation"],
        help=f"one-load is that of {COMPARED:.0%} alone".replace("%", "%%"),
    )  # fmt: skip
    options.add_argument("--compiled", action="store_true", help="of scanloom and the bare engine, the denoiser")
    options.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of scanloom and the bare engine")
    options.add_argument("--dry", action="store_true", help="print the page's sections and leave the page as it is")
    asked = options.parse_args()
    settings = Settings(asked.precision, asked.compiled)
    loads = LOADS if "loads" in asked.parts else (COMPARED,) if "one-load" in asked.parts else ()
    runs, bare, deadline_s = measured(asked.rounds, asked.seconds, settings, loads, "saturation" in asked.parts)
    found = {}
    if loads:
        title = LOAD_TITLE if loads == LOADS else ONE_LOAD_TITLE
        found[title] = under_load(runs, asked.seconds, bare.capacity, deadline_s, settings, loads)
    if "saturation" in asked.parts:
        found[ENGINE_TITLE] = beside_engine(runs, bare)
    missed = []
    for title, (text, short) in found.items():
        section = f"## {title}{settings.told}\n\nOn {machine()}, {asked.rounds} rounds.\n\n{text}"
        if not asked.dry:
            write_section(PAGE, HEAD, TITLES, title + settings.told, section)
        print(section)  # noqa: T201
        missed += short
    print(*missed, sep="\n")  # noqa: T201
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
