"""Procedural frontal chest radiographs with known ground truth: nobody's scans.

A phantom is a pure function of (seed, index, size). Structures are drawn as projected attenuation in a square field
with x and y in [-1, 1] (y down, +x the image's right, which is the patient's left) and pass one tone curve.
The draws come from Philox's raw stream, so the pixels do not hang on numpy's distribution code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FINDINGS = ("Cardiomegaly", "Effusion", "Nodule", "Pneumothorax", "Consolidation")
"""Spelled as in NIH ChestX-ray14."""
NO_FINDING = "No Finding"
FIELD_MM = 380.0
"""Side of the imaged square at the detector."""

# Scans per patient within a block of 12 scans: most have one scan, some two, one three.
_PATTERN = (1, 1, 2, 1, 3, 1, 2, 1)
_PATIENT_OF_SCAN = tuple((p, s) for p, scans in enumerate(_PATTERN) for s in range(scans))

Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Side = Literal[-1, 1]


@dataclass(frozen=True)
class Truth:
    """What was drawn. Widths are in px of the image, along its rows before the pose's small rotation."""

    cardiothoracic_ratio: float
    heart_width_px: float
    thorax_width_px: float
    heart: Mask
    lungs: Mask
    """Air-filled fields as seen: above the diaphragm, outside heart and effusion."""


@dataclass(frozen=True)
class Phantom:
    """One scan of one phantom patient; `pixels` is HxW u8, or u16 holding 12 bits, bright where dense."""

    index: int
    patient: int
    scan: int
    """Ordinal among the patient's scans."""
    pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    bits_stored: int
    spacing_mm: float
    sex: Literal["F", "M"]
    age_years: int
    view: Literal["PA", "AP"]
    findings: tuple[str, ...]
    truth: Truth

    @property
    def attributes(self) -> dict[str, Any]:
        """Values in the form that AttributeSchema.check takes."""
        return {"sex": self.sex, "age": float(self.age_years), "view": self.view, "findings": self.findings}

    @property
    def raw(self) -> dict[str, str]:
        """Texts as a DICOM source would give them, under the plain names and under the DICOM keywords."""
        texts = (self.sex, f"{self.age_years:03d}Y", self.view, "|".join(self.findings) or NO_FINDING)
        names = ("sex", "age", "view", "findings")
        keywords = ("PatientSex", "PatientAge", "ViewPosition", "ImageComments")
        return dict(zip(names + keywords, texts * 2, strict=True))


def phantom(seed: int, index: int, size_px: int = 64, *, bits_stored: Literal[8, 12] = 8) -> Phantom:
    """The scan number `index` of the endless series `seed`; neighbours in the series may share a patient."""
    block, place = divmod(index, len(_PATIENT_OF_SCAN))
    within, scan = _PATIENT_OF_SCAN[place]
    patient = block * len(_PATTERN) + within
    anatomy = _anatomy(_Draws(seed, 2 * patient))
    draws = _Draws(seed, 2 * index + 1)
    exam = _exam(draws, anatomy, scan)
    density, truth = _render(anatomy, exam, size_px)
    values = _expose(density, exam, draws)
    levels = (1 << bits_stored) - 1
    pixels = (values * levels + 0.5).astype(np.uint8 if bits_stored == 8 else np.uint16)
    return Phantom(
        index=index,
        patient=patient,
        scan=scan,
        pixels=pixels,
        bits_stored=bits_stored,
        spacing_mm=FIELD_MM / size_px,
        sex=anatomy.sex,
        age_years=exam.age_years,
        view=exam.view,
        findings=exam.findings,
        truth=truth,
    )


class _Draws:
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

    def grain(self, size_px: int) -> Image:
        """HxW noise, mean 0, deviation 1: sums of four bytes (Irwin-Hall), near normal and cheap."""
        raw = self._bits.random_raw(-(-size_px * size_px // 2)).view(np.uint8)
        total = raw[: 4 * size_px * size_px].reshape(-1, 4).sum(axis=1, dtype=np.float32)
        return ((total - 510.0) / 147.8).reshape(size_px, size_px).astype(np.float32)


@dataclass(frozen=True)
class _Anatomy:
    """What a patient's scans share. Lengths in field units (half the image is 1)."""

    sex: Literal["F", "M"]
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


def _anatomy(d: _Draws) -> _Anatomy:
    female = d.chance(0.5)
    age = 20 + d.pick(68)
    old = (age - 20) / 70.0
    frame = 0.94 if female else 1.0
    enlarged = d.chance(0.3)
    return _Anatomy(
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
class _Exam:
    """What is particular to one scan of a patient."""

    age_years: int
    view: Literal["PA", "AP"]
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
    nodules: tuple[tuple[Side, float, float, float], ...]
    """Each as side, share of the lung's width, share of its height, radius."""
    pneumothorax: tuple[Side, float]
    patches: tuple[tuple[Side, float, float, float, float], ...]
    """Each as side, share of width, share of height, radius, phase of its texture."""


def _exam(d: _Draws, a: _Anatomy, scan: int) -> _Exam:
    view: Literal["PA", "AP"] = "AP" if d.chance(0.35) else "PA"
    findings = _findings(d, a.cardiomegaly)
    age = a.age_years + scan
    old = (age - 20) / 70.0
    both = d.chance(0.35)
    side = d.side()
    sides: tuple[Side, ...] = (-1, 1) if both else (side,)
    return _Exam(
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
        effusion=tuple((s, d.between(0.16, 0.48)) for s in sides) if "Effusion" in findings else (),
        nodules=_nodules(d) if "Nodule" in findings else (),
        pneumothorax=(side, d.between(0.16, 0.34) if "Pneumothorax" in findings else 0.0),
        patches=_patches(d) if "Consolidation" in findings else (),
    )


def _findings(d: _Draws, cardiomegaly: bool) -> tuple[str, ...]:
    """About half of all scans end with none; the others beside cardiomegaly are equally frequent."""
    found = {"Cardiomegaly"} if cardiomegaly else set[str]()
    others, more = d.chance(0.28), d.chance(0.15)
    first, second = d.pick(4), d.pick(4)
    if others:
        found |= {FINDINGS[1 + first]} | ({FINDINGS[1 + second]} if more else set())
    return tuple(name for name in FINDINGS if name in found)


def _nodules(d: _Draws) -> tuple[tuple[Side, float, float, float], ...]:
    count = 1 + d.pick(3)
    return tuple((d.side(), d.between(0.45, 0.85), d.between(0.2, 0.8), d.between(0.05, 0.085)) for _ in range(count))


def _patches(d: _Draws) -> tuple[tuple[Side, float, float, float, float], ...]:
    count = 1 + d.pick(2)
    return tuple(
        (d.side(), d.between(0.45, 0.75), d.between(0.3, 0.85), d.between(0.17, 0.26), d.between(0.0, 6.28))
        for _ in range(count)
    )


@lru_cache(maxsize=8)
def _grid(size_px: int) -> tuple[Image, Image]:
    centres = ((np.arange(size_px, dtype=np.float32) + 0.5) * (2.0 / size_px) - 1.0).astype(np.float32)
    return centres[None, :], centres[:, None]


@dataclass(frozen=True)
class _Field:
    """Posed coordinates of every pixel, and the softest edge that does not alias."""

    x: Image
    y: Image
    ax: Image
    """|x|."""
    right: Mask
    """Image right: the patient's left."""
    px: float

    def inside(self, distance: Image, softness: float = 0.0) -> Image:
        """Coverage in [0, 1] of the region where `distance` is positive, with an edge of at least one pixel."""
        width = max(softness, self.px)
        return np.clip(distance * np.float32(1.0 / width) + np.float32(0.5), 0.0, 1.0)


def _field(exam: _Exam, size_px: int) -> _Field:
    u, v = _grid(size_px)
    cos, sin = np.cos(exam.turn) / exam.zoom, np.sin(exam.turn) / exam.zoom
    x = np.float32(cos) * u - np.float32(sin) * v - np.float32(exam.shift[0])
    y = np.float32(sin) * u + np.float32(cos) * v - np.float32(exam.shift[1])
    return _Field(x, y, np.abs(x), x > 0, 2.0 / size_px / exam.zoom)


@dataclass(frozen=True)
class _Thorax:
    """The lung cavities: outlines per pixel, and their air."""

    height: Image
    """0 at the apex, 1 at the diaphragm's reference level."""
    wall: Image
    """|x| of the inner chest wall at the pixel's height."""
    depth: Image
    """Distance above the diaphragm's surface, negative below it."""
    cavity: Image
    air: Image
    """Air along the ray, in [0, 1]."""


def _render(a: _Anatomy, exam: _Exam, size_px: int) -> tuple[Image, Truth]:
    f = _field(exam, size_px)
    thorax = _thorax(f, a, exam)
    heart, extent = _heart(f, a, exam)
    density, air = _air_and_tissue(f, a, exam, thorax)
    density += _bones(f, a, exam, thorax)
    density = _add_mediastinum(f, a, density, heart)
    density = np.where(f.y > 0, np.maximum(density, _abdomen(f, a, exam, thorax)), density)
    truth = _truth(f, a, exam, thorax, air, heart, extent, size_px)
    return density * _body(f, a, exam), truth


def _thorax(f: _Field, a: _Anatomy, exam: _Exam) -> _Thorax:
    base = a.base + exam.breath
    # The right dome (image left) stands higher: the liver is under it.
    level = np.where(f.right, np.float32(base + 0.05), np.float32(base))
    height = (f.y - np.float32(a.apex)) * np.float32(1.0 / (base + 0.2 - a.apex))
    t = np.clip(height, 0.0, 1.0)
    wall = np.float32(a.thorax) * np.sqrt(1.0 - (1.0 - t) ** 2.6) * (1.0 - 0.06 * np.clip(t - 0.7, 0.0, 1.0))
    crest = np.float32(0.55 * a.thorax)
    across = (f.ax - crest) * np.float32(1.0 / (a.thorax - crest))
    drop = np.where(across > 0, 1.25 * across * across, 0.45 * across * across)
    depth = level + np.float32(a.dome) * (drop - 1.0) - f.y + np.float32(0.04)
    edge = wall - f.ax
    cavity = f.inside(edge) * f.inside(depth) * f.inside(f.ax - 0.05)
    round_edge = np.sqrt(np.clip(edge * np.float32(1.0 / 0.3), 0.0, 1.0))
    apical = np.clip(0.55 + 0.9 * t, 0.0, 1.0)
    low = np.clip(0.35 + depth * 3.0, 0.0, 1.0)
    return _Thorax(height, wall, depth, cavity, cavity * (0.35 + 0.65 * round_edge) * apical * low)


def _heart(f: _Field, a: _Anatomy, exam: _Exam) -> tuple[Image, float]:
    """Signed distance-like map of the heart (positive inside) and its full horizontal extent."""
    extent = exam.heart_ratio * 2.0 * a.thorax
    half = 0.5 * extent
    cos, sin = np.cos(a.heart_tilt), np.sin(a.heart_tilt)
    # Ellipse with semi-axes long and short, tilted down to the image's right: half^2 = (long cos)^2 + (short sin)^2.
    aspect = 0.72
    long = half / float(np.sqrt(cos * cos + (aspect * sin) ** 2))
    short = aspect * long
    cx = a.heart_shift + 0.16 * (extent - 0.62)
    cy = a.base + exam.breath - 0.02 - 0.62 * short
    dx, dy = f.x - np.float32(cx), f.y - np.float32(cy)
    u = (np.float32(cos) * dx + np.float32(sin) * dy) * np.float32(1.0 / long)
    v = (np.float32(cos) * dy - np.float32(sin) * dx) * np.float32(1.0 / short)
    return (1.0 - np.sqrt(u * u + v * v)) * np.float32(short), extent


def _body(f: _Field, a: _Anatomy, exam: _Exam) -> Image:
    """Coverage of the body: torso, shoulders cut by the image's edge, neck."""
    flare = 0.42 * np.clip((-0.30 - f.y) * 2.2, 0.0, 1.0)
    torso = np.float32(a.torso) + flare + 0.05 * np.clip(f.y, 0.0, 1.0)
    slope = 0.24 if exam.view == "PA" else 0.16
    shoulder = f.y + np.float32(1.0) - np.float32(slope) * np.clip(f.ax - 0.22, 0.0, 1.0) * 1.3
    neck = np.float32(0.25 if a.sex == "F" else 0.29) - f.ax
    return f.inside(torso - f.ax, 0.03) * f.inside(np.maximum(shoulder, neck), 0.04)


def _air_and_tissue(f: _Field, a: _Anatomy, exam: _Exam, t: _Thorax) -> tuple[Image, Image]:
    """Soft tissue, breasts and lungs with their findings; returns (density, the visible air's coverage)."""
    round_body = np.sqrt(np.clip((np.float32(a.torso + 0.12) - f.ax) * 1.6, 0.0, 1.0))
    density = (0.34 + 0.07 * a.fat) + (0.20 + 0.05 * a.fat) * round_body + 0.05 * np.clip(f.y, -1, 1)
    if a.breast:
        density = density + _breasts(f, a)
    marks = _markings(f, a, t)
    air, seen = t.air, t.cavity
    collapse_side, share = exam.pneumothorax
    opaque = np.zeros_like(air)
    if share:
        outside = _pneumothorax(f, t, collapse_side, share)
        line = outside * (1.0 - outside) * 4.0 * t.cavity
        marks = marks * (1.0 - outside) + 0.5 * line + 0.10 * (1.0 - outside) * (f.right == (collapse_side > 0))
        air = np.minimum(air + 0.30 * outside * t.cavity, 1.25)
    for patch in exam.patches:
        opaque = np.maximum(opaque, _patch(f, a, exam, patch))
    for nodule in exam.nodules:
        opaque = np.maximum(opaque, _nodule(f, a, exam, nodule))
    for side, level in exam.effusion:
        fluid = _fluid(f, a, exam, t, side, level)
        opaque = np.maximum(opaque, fluid)
        seen = seen * (1.0 - fluid)
    density = density - 0.50 * air * (1.0 - opaque) * (1.0 - 0.55 * marks)
    return density + 0.16 * opaque * t.cavity, seen


def _breasts(f: _Field, a: _Anatomy) -> Image:
    r = np.float32(0.26 + 0.10 * a.breast)
    dx, dy = f.ax - np.float32(0.44), (f.y - np.float32(0.16)) * np.where(f.y > 0.16, 1.0, 0.7).astype(np.float32)
    d = 1.0 - np.sqrt(dx * dx + dy * dy) / r
    return 0.15 * a.breast * np.sqrt(np.clip(d * 1.6, 0.0, 1.0))


def _markings(f: _Field, a: _Anatomy, t: _Thorax) -> Image:
    """Vessels: ridges over the angle around each hilum that wriggle and fade outwards, and the hila themselves."""
    dx, dy = f.ax - np.float32(0.17), f.y + np.float32(0.06)
    r = np.sqrt(dx * dx + dy * dy)
    angle = np.arctan2(dy, dx)
    wave = np.sin(9.0 * r + 5.0 * a.vessels[0] + np.where(f.right, 1.3, 0.0)) * 0.22
    phase = (angle + wave) * (24 / np.pi) + np.where(f.right, 11.3, 0.0)
    strength = np.interp(phase % 48.0, np.arange(49), (*a.vessels, a.vessels[0])).astype(np.float32)
    spokes = np.clip(strength, 0.0, 1.0) * np.clip(1.15 - 1.5 * r, 0.0, 1.0) * np.clip(r * 9.0, 0.0, 1.0)
    hilum = np.clip(1.0 - r * np.float32(5.0), 0.0, 1.0)
    return np.clip(0.95 * spokes + 0.9 * hilum, 0.0, 1.0) * (0.75 + 0.25 * t.height)


def _pneumothorax(f: _Field, t: _Thorax, side: Side, share: float) -> Image:
    """Coverage of the space between the chest wall and the collapsed lung's edge, widest at the apex."""
    gap = np.float32(share) * (1.35 - t.height) + 0.02
    top = np.clip((0.30 * share / 0.3 - t.height) * 4.0, 0.0, 1.0) * 0.25
    return f.inside(f.ax - (t.wall - gap - top)) * (f.right == (side > 0))


def _place(a: _Anatomy, exam: _Exam, side: Side, across: float, down: float) -> tuple[float, float]:
    """A point inside a lung from shares of its width and height."""
    y = a.apex + down * (a.base + exam.breath - 0.08 - a.apex)
    t = min(max((y - a.apex) / (a.base + exam.breath + 0.2 - a.apex), 0.0), 1.0)
    return side * across * a.thorax * float(np.sqrt(1.0 - (1.0 - t) ** 2.6)), y


def _nodule(f: _Field, a: _Anatomy, exam: _Exam, nodule: tuple[Side, float, float, float]) -> Image:
    side, across, down, radius = nodule
    x, y = _place(a, exam, side, across, down)
    r = np.sqrt((f.x - np.float32(x)) ** 2 + (f.y - np.float32(y)) ** 2)
    return 0.85 * f.inside(np.float32(radius) - r, 0.03)


def _patch(f: _Field, a: _Anatomy, exam: _Exam, patch: tuple[Side, float, float, float, float]) -> Image:
    side, across, down, radius, phase = patch
    x, y = _place(a, exam, side, across, down)
    dx, dy = f.x - np.float32(x), f.y - np.float32(y)
    rough = np.sin(13.0 * dx + 7.0 * dy + phase) * np.sin(11.0 * dy - 8.0 * dx + 1.7 * phase)
    rough = rough + 0.6 * np.sin(29.0 * dx + 2.0 * phase) * np.sin(27.0 * dy - phase)
    d = np.float32(radius) - np.sqrt(dx * dx + 1.3 * dy * dy) + 0.05 * rough
    return f.inside(d, 0.16) * (0.72 + 0.12 * rough)


def _fluid(f: _Field, a: _Anatomy, exam: _Exam, t: _Thorax, side: Side, level: float) -> Image:
    """Pleural fluid on one side: a level that climbs along the chest wall, the meniscus."""
    lateral = np.clip(f.ax / np.maximum(t.wall, np.float32(0.2)), 0.0, 1.2)
    surface = a.base + exam.breath + 0.10 - level * (0.45 + 0.75 * lateral**4)
    return f.inside(f.y - surface, 0.035) * (f.right == (side > 0)) * (f.ax > 0.04)


def _bones(f: _Field, a: _Anatomy, exam: _Exam, t: _Thorax) -> Image:
    caged = f.inside(t.wall + 0.045 - f.ax, 0.02) * np.clip(t.height * 8.0 + 0.6, 0.0, 1.0)
    ribs = _ribs(f, a) * caged * np.clip((1.12 - t.height) * 5.0, 0.0, 1.0)
    return np.float32(a.bone) * (ribs + _clavicles(f, exam) + _scapulae(f, exam))


def _ribs(f: _Field, a: _Anatomy) -> Image:
    """All ribs at once: a rib is where the phase of a bent coordinate is near a whole number.

    Posterior ribs fall away from the spine; anterior ones are fainter and fall towards the midline.
    """
    x2 = f.ax * f.ax
    back = (f.y + 0.16 * f.ax - np.float32(a.rib_slope + 0.30) * x2) * np.float32(1.0 / a.rib_pitch) + a.rib_phase
    front = (f.y + np.float32(0.55 + 0.3 * a.rib_slope) * f.ax) * np.float32(0.85 / a.rib_pitch) + a.rib_phase
    soft = f.px / a.rib_pitch
    flank = np.clip(0.75 + 0.55 * f.ax, 0.0, 1.2)
    return flank * (0.135 * _bars(back, 0.19, soft)) + 0.055 * _bars(front, 0.17, soft) * np.clip(
        (f.ax - 0.24) * 6.0, 0.0, 1.0
    )


def _bars(phase: Image, half: float, soft: float) -> Image:
    """Bars around whole phases with brighter rims (the cortex is seen edge on)."""
    away = np.abs(phase - np.round(phase))
    width = np.float32(1.0 / max(soft, 0.08))
    body = np.clip((half - away) * width + 0.5, 0.0, 1.0)
    return body * (0.75 + 0.35 * np.clip(away * np.float32(1.0 / half), 0.0, 1.0))


def _clavicles(f: _Field, exam: _Exam) -> Image:
    lift = 0.0 if exam.view == "PA" else -0.05
    curve = np.float32(-0.62 + lift) - 0.16 * f.ax + 0.05 * np.sin(7.0 * f.ax)
    thick = 0.030 + 0.018 * np.clip(0.3 - f.ax, 0.0, 1.0) * 3.0
    bar = f.inside(thick - np.abs(f.y - curve), 0.015)
    return 0.20 * bar * f.inside(f.ax - 0.09, 0.03) * f.inside(0.92 - f.ax, 0.04)


def _scapulae(f: _Field, exam: _Exam) -> Image:
    """Shoulder blades (over the lungs in AP, turned outwards in PA) and the heads of the upper arms."""
    edge = np.float32(exam.scapula) + 0.30 * np.clip(-0.45 - f.y, 0.0, 1.0) + 0.25 * np.clip(f.y + 0.45, 0.0, 1.0)
    blade = f.inside(f.ax - edge, 0.02) * f.inside(0.06 - f.y, 0.08) * f.inside(f.y + 0.72, 0.06)
    blade = blade * f.inside(edge + 0.27 - f.ax, 0.1)
    r = np.sqrt((f.ax - 1.0) ** 2 + (f.y + 0.66) ** 2)
    return 0.10 * blade + 0.16 * f.inside(0.17 - r, 0.03)


def _add_mediastinum(f: _Field, a: _Anatomy, density: Image, heart: Image) -> Image:
    """Density with heart, great vessels, trachea and spine over it: they hide the air on their rays."""
    pedicle = 0.115 + 0.05 * np.clip(f.y + 0.15, 0.0, 1.0) + 0.04 * np.clip(-0.62 - f.y, 0.0, 1.0)
    centre = f.inside(pedicle - f.ax, 0.035)
    knob_y = -0.34 - 0.05 * a.aorta_sway
    r = np.sqrt((f.x - np.float32(0.10 + 0.4 * a.aorta_sway)) ** 2 + (f.y - np.float32(knob_y)) ** 2)
    knob = f.inside(np.float32(a.knob) - r, 0.025)
    sway = np.float32(a.aorta_sway) * np.sin(np.clip((f.y + 0.34) * 3.4, 0.0, 3.14))
    descending = f.inside(0.12 + sway - f.x, 0.03) * (f.x > 0) * (f.y > knob_y)
    core = np.maximum(np.maximum(f.inside(heart, 0.03), centre), np.maximum(knob, descending))
    thick = 0.60 + 0.10 * np.clip(heart * 3.0, 0.0, 1.0)
    merged = density * (1.0 - core) + core * np.maximum(density, thick)
    rim = np.clip(1.0 - np.abs(r - np.float32(a.knob - 0.012)) * np.float32(1.0 / max(0.016, f.px * 0.7)), 0.0, 1.0)
    merged = merged + 0.22 * a.calcified * rim * (f.x > 0.08)
    return merged + _spine(f, a) - _trachea(f)


def _spine(f: _Field, a: _Anatomy) -> Image:
    column = f.inside(0.078 + 0.02 * np.clip(f.y, 0.0, 1.0) - f.ax, 0.025)
    disc = np.cos((f.y + 0.02 * f.ax) * np.float32(6.2832 / 0.135) + 6.28 * a.rib_phase)
    return np.float32(a.bone) * column * (0.085 + 0.028 * disc)


def _trachea(f: _Field) -> Image:
    """Air column down to the carina, and the two main bronchi below it."""
    tube = f.inside(0.042 - np.abs(f.x + 0.012), 0.03) * f.inside(-0.26 - f.y, 0.08)
    branch = np.abs(f.y + 0.26 - 0.75 * f.ax)
    bronchi = f.inside(0.026 - branch, 0.04) * f.inside(0.22 - f.ax, 0.05) * f.inside(f.y + 0.28, 0.04)
    return 0.17 * tube + 0.07 * bronchi


def _abdomen(f: _Field, a: _Anatomy, exam: _Exam, t: _Thorax) -> Image:
    """Liver, spleen and gut under the diaphragm, with the stomach's air bubble under the left dome."""
    below = f.inside(-t.depth, 0.02) * f.inside(t.wall + 0.10 - f.ax, 0.06)
    tissue = np.where(f.right, 0.64, 0.70).astype(np.float32) + 0.04 * np.clip(f.y - 0.5, 0.0, 1.0)
    if exam.bubble:
        top = a.base + exam.breath + 0.05 - a.dome + 0.16
        r = np.sqrt(((f.x - 0.42) / 0.17) ** 2 + ((f.y - np.float32(top)) / 0.085) ** 2)
        tissue = tissue - 0.22 * exam.bubble * f.inside(1.0 - r, 0.25)
    return below * tissue


def _truth(
    f: _Field, a: _Anatomy, exam: _Exam, t: _Thorax, air: Image, heart: Image, extent: float, size_px: int
) -> Truth:
    per_unit = 0.5 * size_px * exam.zoom
    outside = heart < 0
    return Truth(
        cardiothoracic_ratio=extent / (2.0 * a.thorax),
        heart_width_px=extent * per_unit,
        thorax_width_px=2.0 * a.thorax * per_unit,
        heart=~outside,
        lungs=(air > 0.5) & outside & (f.ax > 0.11),
    )


def _expose(density: Image, exam: _Exam, d: _Draws) -> Image:
    """Tone curve, scatter fog, exposure and quantum noise; values in [0, 1]."""
    toned = 0.5 + (density * np.float32(exam.gain) - 0.42) * np.float32(1.25 * exam.contrast)
    lit = np.clip(toned, 0.0, 1.0) ** np.float32(exam.gamma)
    lit = np.where(density > 0.02, np.maximum(lit, 0.03), lit)
    grain = d.grain(density.shape[0])
    return np.clip(lit + grain * np.float32(exam.noise), 0.0, 1.0)
