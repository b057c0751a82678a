"""What a privacy gate costs generation: images per second with and without one, over small and large corpora.

And by how much it changes a likeness that it holds scans in float16.

The arms take turns in one run, and what counts is the median over the turns of their ratios.

python -m tests.benchmarks.bench_gate [--images 64] [--rounds 3]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from scanloom.artefact import open_artefact
from scanloom.base import URI
from scanloom.models.copy_encoder import KEPT_VIEWS, CopyEncoder
from scanloom.models.gate_card import blank_card
from scanloom.models.generator import load_generator
from scanloom.models.privacy_gate import PrivacyGate
from scanloom.recipe import Generate
from scanloom.recipe_gate import Gate
from scanloom.sampling.engine import Engine
from scanloom.sampling.plan import Plan, compile_plan, specify
from scanloom.sampling.production import judges_of, produce

SCANS = (500, 50_000)
STEPS, SLOTS = 20, 32
MOST = 0.05
CALLS = 20


def tell(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def gate_of(scans: int) -> PrivacyGate:
    """A gate of the default size with an index of so many scans. It lets everything through: looking costs the same."""
    settings = Gate()
    card = blank_card("bench", settings.size_px, settings.channels, settings.width, 0, scans)
    views = np.random.default_rng(0).standard_normal((KEPT_VIEWS, scans, settings.width), dtype=np.float32)
    return PrivacyGate(card, "", CopyEncoder(settings.channels, settings.width), views.astype(np.float16))


def rounding(likeness: float, scans: int = 20_000) -> float:
    """By how much float16 changes, at most, the likeness of an image that is so much like a scan."""
    settings, random = Gate(), torch.Generator().manual_seed(0)
    exact_RD, aside_RD = torch.randn(2, scans, settings.width, generator=random, dtype=torch.float64)
    exact_RD = functional.normalize(exact_RD, dim=1)
    aside_RD = functional.normalize(aside_RD - (aside_RD * exact_RD).sum(1, keepdim=True) * exact_RD, dim=1)
    image_RD = likeness * exact_RD + math.sqrt(1.0 - likeness**2) * aside_RD
    card = blank_card("bench", settings.size_px, settings.channels, settings.width, 0, scans)
    views = exact_RD[None].to(torch.float16).numpy()
    stored_DR = PrivacyGate(card, "", CopyEncoder(settings.channels, settings.width), views)._index_DR
    return float(((image_RD * stored_DR.T).sum(1) - likeness).abs().max())


def plan_of(images: int) -> Plan:
    base = open_artefact(URI, "generator")
    section = Generate(images=images, images_per_shard=images, steps=STEPS, slots=SLOTS)
    return compile_plan(specify(section, "base", base.digest, base.manifest.statistics))


def seconds(engine: Engine, plan: Plan, gate: PrivacyGate | None) -> float:
    """CPU time per image, of one shard with all judges."""
    started = time.process_time()
    made = produce(engine, plan.spec, plan.rows(0), judges_of(plan.spec.quality, plan.spec.bits_stored, None, gate))
    return (time.process_time() - started) / len(made.attempts)


def look_ms(gate: PrivacyGate, images: int) -> float:
    """CPU time in ms to look at so many images of 64 px in one call, the best of some."""
    pixels: Any = np.random.default_rng(1).integers(0, 256, (images, 64, 64)).astype(np.uint8)
    best = float("inf")
    for _ in range(CALLS):
        started = time.process_time()
        gate.likeness(pixels, 8)
        best = min(best, time.process_time() - started)
    return 1e3 * best


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for likeness in (0.95, 1.0):
        tell(f"float16 changes a likeness of {likeness} by {rounding(likeness):.1e} at most")
    gates = {scans: gate_of(scans) for scans in SCANS}
    for scans, gate in gates.items():
        for images in (1, 16):
            tell(f"a look at {images} images among {scans} scans: {look_ms(gate, images):.1f} ms")
    engine, plan = Engine(load_generator(URI), SLOTS), plan_of(options.images)
    arms: dict[int, PrivacyGate | None] = {0: None, **gates}
    runs: dict[int, list[float]] = {scans: [] for scans in arms}
    for turn in range(options.rounds):
        for scans in list(arms)[:: -1 if turn % 2 else 1]:
            runs[scans].append(seconds(engine, plan, arms[scans]))
        tell(f"round {turn + 1}:", ", ".join(f"{scans or 'no gate'}: {1 / runs[scans][-1]:.3f}/s" for scans in arms))
    missed = 0
    for scans in SCANS:
        cost = statistics.median(1.0 - free / gated for free, gated in zip(runs[0], runs[scans], strict=True))
        tell(f"a gate of {scans} scans costs {cost:.2%} of the images per second, asked {MOST:.0%} at most")
        missed += cost > MOST
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
