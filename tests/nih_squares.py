"""The real chest X-rays as squares, split by patient: to train on, to calibrate with, and to check on."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scanloom.models.copy_encoder import square_of

Array = np.ndarray[Any, Any]
TRAIN, CALIBRATION = 0.6, 0.2


@dataclass(frozen=True)
class Squares:
    """Images [N, S, S] in [0, 1] of each part, and whose they are."""

    train: Array
    train_patients: list[str]
    calibration: Array
    calibration_patients: list[str]
    check: Array
    check_patients: list[str]


def nih_squares(folder: Path, size_px: int, seed: int) -> Squares:
    """All 758 scans of the folder with `labels.csv`, its 519 patients dealt out by `seed`."""
    with (folder / "labels.csv").open() as table:
        rows = list(csv.DictReader(table))
    squares = np.stack([square(folder / "images" / row["Image Index"], size_px) for row in rows])
    owners = np.array([row["Patient ID"] for row in rows])
    patients = np.unique(owners)
    np.random.default_rng(seed).shuffle(patients)
    first, second = int(TRAIN * len(patients)), int((TRAIN + CALIBRATION) * len(patients))
    parts: list[Any] = []
    for part in (patients[:first], patients[first:second], patients[second:]):
        chosen = np.isin(owners, part)
        parts += [squares[chosen], owners[chosen].tolist()]
    return Squares(*parts)


def square(file: Path, size_px: int) -> Array:
    return square_of(np.asarray(Image.open(file).convert("L")), 8, size_px)
