# ruff: noqa: T201
"""How many planted copies of real scans are found, by the encoder and by its peers, at one threshold rule for all.

PYTHONPATH=.:platform python tests/benchmarks/bench_copies.py NIH_FOLDER [--seeds 0 1 2] [--steps 800] [--add FILE]

The scans of NIH ChestX-ray14's patients are dealt out by each seed: 60 % to train on, 20 % to calibrate the threshold
with, 20 % to count false positives on. One thread. With --add the figures of each seed are kept in a file, and the
table is over all seeds in it, so that seeds can be run one by one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from scanloom.audit.copies import PEERS, Detector, Embeddings, calibrate, power
from scanloom.audit.intervals import share
from scanloom.audit.plants import SLIGHT, STRONG
from scanloom.models.copy_encoder import embedding
from scanloom.recipe_audit import CopyDetection
from scanloom.training.copy_encoder import fit
from tests.nih_squares import Squares, nih_squares

Figures = dict[str, dict[str, float]]
FALSE, CHECKED, LOWEST = "held-out scans above the threshold", "held-out scans", "lowest of the slight ones"


def measure(scans: Squares, settings: CopyDetection, seed: int) -> Figures:
    """By detector the recall of each plant and how many held-out scans lie above the threshold; prints what it took."""
    started = time.monotonic()
    network = fit(settings, torch.from_numpy(scans.train)[:, None] * 2.0 - 1.0, seed)
    print(f"seed {seed}: trained on {len(scans.train)} scans in {time.monotonic() - started:.0f} s", flush=True)
    started = time.monotonic()
    detectors: dict[str, Detector] = {"encoder": Embeddings.of(embedding(network), scans.train)}
    print(f"  {1000 * (time.monotonic() - started) / len(scans.train):.1f} s per 1,000 training scans kept", flush=True)
    detectors |= {name: peer(scans.train) for name, peer in PEERS.items()}
    told: Figures = {}
    for name, detector in detectors.items():
        threshold = calibrate(detector(scans.calibration).likeness_N, scans.calibration_patients, scale=detector.scale)
        false = detector(scans.check).likeness_N > threshold.tau
        found = power(
            detector, threshold, scans.train, range(len(scans.train)), scans.train_patients, (*SLIGHT, *STRONG)
        )
        told[name] = {one.plant: one.recall.value for one in found}
        told[name] |= {FALSE: float(false.sum()), CHECKED: float(len(false))}
        told[name][LOWEST] = min(told[name][plant.name] for plant in SLIGHT)
        print(
            f"  {name}: tau {threshold.tau:.4f} of {threshold.patients} patients, {false.sum()} of {len(false)} "
            f"held-out scans above it, lowest slight recall {told[name][LOWEST]:.3f}", flush=True,
        )  # fmt: skip
    started = time.monotonic()
    detectors["encoder"](scans.check)
    print(f"  {1000 * (time.monotonic() - started) / len(scans.check):.2f} s per 1,000 images looked up", flush=True)
    return told


def show(by_seed: dict[str, Figures]) -> None:
    """The table of the means over seeds, and false positives of all seeds together."""
    names = ("encoder", *PEERS)
    print(f"\n{len(by_seed)} seeds\n\n| planted | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for what in (*(plant.name for plant in (*SLIGHT, *STRONG)), LOWEST):
        means = [np.mean([figures[name][what] for figures in by_seed.values()]) for name in names]
        print(f"| {what} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    false = {name: int(sum(figures[name][FALSE] for figures in by_seed.values())) for name in names}
    checked = int(sum(figures["encoder"][CHECKED] for figures in by_seed.values()))
    print(f"| {FALSE}, of {checked} | {' | '.join(f'{share(false[name], checked)}' for name in names)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=CopyDetection().steps)
    parser.add_argument("--size", type=int, default=CopyDetection().size_px)
    parser.add_argument("--add", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = CopyDetection(steps=arguments.steps, size_px=arguments.size)
    kept: Path | None = arguments.add
    by_seed: dict[str, Figures] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    for seed in arguments.seeds:
        by_seed[str(seed)] = measure(nih_squares(arguments.folder, arguments.size, seed), settings, seed)
        if kept:
            kept.write_text(json.dumps(by_seed))
    show(by_seed)


if __name__ == "__main__":
    main()
