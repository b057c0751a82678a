"""The phantoms' patients and exams: every number that a drawing needs, drawn from (seed, stream).

The draws come from Philox's raw stream, so they do not hang on numpy's distribution code.
Lengths are in field units: the imaged square is 2 wide, x and y run from -1 to 1, y down, +x the image's right,
which is the patient's left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FINDINGS = ("Cardiomegaly", "Effusion", "Nodule", "Pneumothorax", "Consolidation")
"""Spelled as in NIH ChestX-ray14."""

# Scans per patient within a block of 12 scans: most have one, some two, one has three.
_PATTERN = (1, 1, 2, 1, 3, 1, 2, 1)
_PATIENT_OF_SCAN = tuple((patient, scan) for patient, scans in enumerate(_PATTERN) for scan in range(scans))

Side = Literal[-1, 1]
"""-1 the patient's right (image left), 1 the patient's left."""
Sex = Literal["F", "M"]
View = Literal["PA", "AP"]


def patient_of(index: int) -> tuple[int, int]:
    """Patient number and the scan's ordinal among the patient's scans."""
    block, place = divmod(index, len(_PATIENT_OF_SCAN))
    within, scan = _PATIENT_OF_SCAN[place]
    return block * len(_PATTERN) + within, scan


class Draws:
    """Uniform draws of the stream (seed, counter), stable across numpy versions."""

    def __init__(self, seed: int, stream: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))
        self._pool = iter((self._bits.random_raw(160) >> np.uint64(11)) * 2.0**-53)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(next(self._pool))

    def chance(self, share: float) -> bool:
        return float(next(self._pool)) < share

    def pick(self, count: int) -> int:
        return int(float(next(self._pool)) * count)

    def side(self) -> Side:
        return 1 if self.chance(0.5) else -1

    def grain(self, size_px: int) -> npt.NDArray[np.float32]:
        """HxW noise, mean 0, deviation 1: sums of four bytes (Irwin-Hall), near normal and cheap."""
        raw = self._bits.random_raw(-(-size_px * size_px // 2)).view(np.uint8)
        total = raw[: 4 * size_px * size_px].reshape(-1, 4).sum(axis=1, dtype=np.float32)
        grain: npt.NDArray[np.float32] = (total * np.float32(1 / 147.8) - np.float32(510.0 / 147.8)).reshape(
            size_px, size_px
        )
        return grain


@dataclass(frozen=True)
class Anatomy:
    """What a patient's scans share. Lengths in field units (half the image is 1)."""

    sex: Sex
    age_years: int
    cardiomegaly: bool
    torso: float
    """Half width of the body below the armpits."""
    thorax: float
    """Half of the widest inner thoracic width."""
    apex: float
    base: float
    """Height of the right dome at mid inspiration."""
    dome: float
    rib_phase: float
    rib_pitch: float
    rib_slope: float
    bone: float
    heart_ratio: float
    heart_tilt: float
    heart_shift: float
    knob: float
    aorta_sway: float
    calcified: float
    fat: float
    breast: float
    vessels: tuple[float, ...]


def draw_anatomy(d: Draws) -> Anatomy:
    """A patient's lasting anatomy, drawn at random."""
    female = d.chance(0.5)
    age = 20 + d.pick(68)
    old = (age - 20) / 70.0
    frame = 0.94 if female else 1.0
    enlarged = d.chance(0.3)
    return Anatomy(
        sex="F" if female else "M",
        age_years=age,
        cardiomegaly=enlarged,
        torso=frame * d.between(0.87, 0.94),
        thorax=frame * d.between(0.70, 0.765),
        apex=d.between(-0.80, -0.73),
        base=d.between(0.42, 0.52) - (0.04 if female else 0.0),
        dome=d.between(0.13, 0.17) - 0.08 * old,
        rib_phase=d.between(0.0, 1.0),
        rib_pitch=frame * d.between(0.165, 0.185),
        rib_slope=d.between(0.26, 0.38) + 0.1 * old,
        bone=(1.0 - 0.35 * old * (1.2 if female else 0.8)) * d.between(0.9, 1.1),
        heart_ratio=d.between(0.56, 0.68) if enlarged else d.between(0.40, 0.48),
        heart_tilt=d.between(0.25, 0.55),
        heart_shift=d.between(0.105, 0.155),
        knob=d.between(0.062, 0.078) + 0.055 * old,
        aorta_sway=d.between(0.0, 0.03) + 0.10 * old * old,
        calcified=max(0.0, old - 0.35) * d.between(0.6, 1.4),
        fat=d.between(0.0, 1.0),
        breast=d.between(0.55, 1.0) if female else 0.0,
        vessels=tuple(d.between(-1.0, 1.0) for _ in range(48)),
    )


@dataclass(frozen=True)
class Nodule:
    side: Side
    across: float
    """Place as a share of the lung's width there."""
    down: float
    """Place as a share of the lung's height."""
    radius: float


@dataclass(frozen=True)
class Patch:
    """A consolidation."""

    side: Side
    across: float
    down: float
    radius: float
    phase: float
    """Of its texture, in radians."""


@dataclass(frozen=True)
class Exam:
    """What is particular to one scan of a patient."""

    age_years: int
    view: View
    findings: tuple[str, ...]
    heart_ratio: float
    breath: float
    turn: float
    zoom: float
    shift: tuple[float, float]
    gain: float
    gamma: float
    noise: float
    contrast: float
    bubble: float
    scapula: float
    effusion: tuple[tuple[Side, float], ...]
    """Each with the height of its level."""
    nodules: tuple[Nodule, ...]
    pneumothorax: tuple[Side, float]
    """With its width; 0: none."""
    patches: tuple[Patch, ...]


def draw_exam(d: Draws, a: Anatomy, scan: int) -> Exam:
    """What one scan of the patient shows, drawn at random; `scan` counts from 0, a year apart."""
    view: View = "AP" if d.chance(0.35) else "PA"
    findings = _findings(d, a.cardiomegaly)
    age = a.age_years + scan
    old = (age - 20) / 70.0
    both = d.chance(0.35)
    side = d.side()
    sides: tuple[Side, ...] = (-1, 1) if both else (side,)
    return Exam(
        age_years=age,
        view=view,
        findings=findings,
        heart_ratio=a.heart_ratio * d.between(0.985, 1.015) * (1.05 if view == "AP" else 1.0),
        breath=d.between(-0.035, 0.035) - (0.035 if view == "AP" else 0.0),
        turn=d.between(-0.035, 0.035),
        zoom=d.between(0.965, 1.035),
        shift=(d.between(-0.035, 0.035), d.between(-0.03, 0.03)),
        gain=d.between(0.94, 1.04),
        gamma=d.between(0.88, 1.12),
        noise=d.between(0.006, 0.016) + (0.004 if view == "AP" else 0.0),
        contrast=1.0 - 0.16 * old - (0.05 if view == "AP" else 0.0),
        bubble=d.between(0.4, 1.0) if d.chance(0.55) else 0.0,
        scapula=d.between(0.50, 0.58) if view == "AP" else d.between(0.72, 0.80),
        effusion=tuple((s, d.between(0.26, 0.54)) for s in sides) if "Effusion" in findings else (),
        nodules=_nodules(d) if "Nodule" in findings else (),
        pneumothorax=(side, d.between(0.16, 0.34) if "Pneumothorax" in findings else 0.0),
        patches=_patches(d) if "Consolidation" in findings else (),
    )


def _findings(d: Draws, cardiomegaly: bool) -> tuple[str, ...]:
    """About half of all scans end with none; the others beside cardiomegaly are equally frequent."""
    found = {"Cardiomegaly"} if cardiomegaly else set[str]()
    others, more = d.chance(0.28), d.chance(0.15)
    first, second = d.pick(4), d.pick(4)
    if others:
        found |= {FINDINGS[1 + first]} | ({FINDINGS[1 + second]} if more else set())
    return tuple(name for name in FINDINGS if name in found)


def _nodules(d: Draws) -> tuple[Nodule, ...]:
    count = 1 + d.pick(3)
    return tuple(
        Nodule(d.side(), d.between(0.45, 0.85), d.between(0.2, 0.8), d.between(0.05, 0.085)) for _ in range(count)
    )


def _patches(d: Draws) -> tuple[Patch, ...]:
    count = 1 + d.pick(2)
    return tuple(
        Patch(d.side(), d.between(0.45, 0.75), d.between(0.3, 0.85), d.between(0.17, 0.26), d.between(0.0, 6.28))
        for _ in range(count)
    )
