# ruff: noqa: T201
"""How many planted copies of real scans are found, by the encoder and by its peers, at one threshold rule for all.

PYTHONPATH=.:platform python tests/benchmarks/bench_copies.py NIH_FOLDER [--seeds 0 1 2] [--steps 400]

The scans of NIH ChestX-ray14's patients are dealt out by each seed: 60 % to train on, 20 % to calibrate the threshold
with, 20 % to count false positives on. One thread.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from scanloom.audit.copies import PEERS, Detector, Embeddings, calibrate, power
from scanloom.audit.intervals import clustered_share
from scanloom.audit.plants import SLIGHT, STRONG
from scanloom.models.copy_encoder import embedding
from scanloom.recipe_audit import CopyDetection
from scanloom.training.copy_encoder import fit
from tests.nih_squares import Squares, nih_squares


def measure(scans: Squares, settings: CopyDetection, seed: int) -> dict[str, dict[str, float]]:
    """By detector and plant the recall, and the share of false positives; prints what it took."""
    started = time.monotonic()
    network = fit(settings, torch.from_numpy(scans.train)[:, None] * 2.0 - 1.0, seed)
    print(f"seed {seed}: trained on {len(scans.train)} scans in {time.monotonic() - started:.0f} s", flush=True)
    detectors: dict[str, Detector] = {"encoder": Embeddings.of(embedding(network), scans.train)}
    detectors |= {name: peer(scans.train) for name, peer in PEERS.items()}
    told: dict[str, dict[str, float]] = {}
    for name, detector in detectors.items():
        threshold = calibrate(detector(scans.calibration).likeness_N, scans.calibration_patients, scale=detector.scale)
        false = detector(scans.check).likeness_N > threshold.tau
        found = power(
            detector, threshold, scans.train, range(len(scans.train)), scans.train_patients, (*SLIGHT, *STRONG)
        )
        told[name] = {one.plant: one.recall.value for one in found}
        told[name]["false positives"] = float(false.mean())
        told[name]["lowest slight recall"] = min(told[name][plant.name] for plant in SLIGHT)
        print(
            f"  {name}: tau {threshold.tau:.4f} of {threshold.patients} patients, false positives "
            f"{clustered_share(false, scans.check_patients)} of {len(false)} scans, lowest slight recall "
            f"{told[name]['lowest slight recall']:.3f}", flush=True,
        )  # fmt: skip
    started = time.monotonic()
    detectors["encoder"](scans.check)
    print(f"  {1000 * (time.monotonic() - started) / len(scans.check):.2f} s per 1,000 images looked up", flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=CopyDetection().steps)
    parser.add_argument("--size", type=int, default=CopyDetection().size_px)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = CopyDetection(steps=arguments.steps, size_px=arguments.size)
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in arguments.seeds:
        for name, figures in measure(nih_squares(arguments.folder, arguments.size, seed), settings, seed).items():
            for what, figure in figures.items():
                rows[what][name].append(figure)
    names = ("encoder", *PEERS)
    print(f"\n| planted | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for what, by_name in rows.items():
        print(f"| {what} | {' | '.join(f'{np.mean(by_name[name]):.3f}' for name in names)} |")


if __name__ == "__main__":
    main()
