"""Procedural frontal chest radiographs with known ground truth: nobody's scans.

A phantom is a pure function of (seed, index, size). Structures are drawn as projected attenuation (0 air, about 0.7
heart and liver) and pass one tone curve. Coordinates are those of `phantom_patients`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scanloom.scans.phantom_patients import (
    Anatomy,
    Draws,
    Exam,
    Nodule,
    Patch,
    Sex,
    Side,
    View,
    draw_anatomy,
    draw_exam,
    patient_of,
)

NO_FINDING = "No Finding"
FIELD_MM = 380.0
"""Side of the imaged square at the detector."""

Image = npt.NDArray[Any]
"""HxW float32 in the picture's plane; 1xW or Hx1 where it varies along one axis alone."""
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Truth:
    """What was drawn. Widths are in px of the image, along its rows before the pose's small rotation."""

    cardiothoracic_ratio: float
    heart_left_px: float
    """Column of the heart's border at the image's left."""
    heart_width_px: float
    thorax_left_px: float
    thorax_width_px: float
    heart: Mask
    lungs: Mask
    """Aerated fields as seen: above the diaphragm, beside heart and great vessels, outside fluid."""


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
    sex: Sex
    age_years: int
    view: View
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
    """The scan number `index` of the endless series `seed`; scans of one patient are neighbours in the series."""
    patient, scan = patient_of(index)
    anatomy = draw_anatomy(Draws(seed, 2 * patient))
    draws = Draws(seed, 2 * index + 1)
    exam = draw_exam(draws, anatomy, scan)
    density, truth = _render(anatomy, exam, size_px)
    values = _expose(density, exam, draws.grain(size_px))
    return Phantom(
        index=index,
        patient=patient,
        scan=scan,
        pixels=_quantised(values, bits_stored),
        bits_stored=bits_stored,
        spacing_mm=FIELD_MM / size_px,
        sex=anatomy.sex,
        age_years=exam.age_years,
        view=exam.view,
        findings=exam.findings,
        truth=truth,
    )


def _quantised(values: Image, bits_stored: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    levels = values * float((1 << bits_stored) - 1) + 0.5
    return levels.astype(np.uint8) if bits_stored == 8 else levels.astype(np.uint16)


# --- the picture's plane --------------------------------------------------------------------------------------


def _unit(values: Image) -> Image:
    """Clipped to [0, 1]."""
    clipped: Image = np.minimum(np.maximum(values, 0.0), 1.0)
    return clipped


def _root(values: Image) -> Image:
    """Square root of the values clipped to [0, 1]: the thickness of a rounded body."""
    root: Image = np.sqrt(_unit(values))
    return root


def _either(one: Image, other: Image) -> Image:
    larger: Image = np.maximum(one, other)
    return larger


def _distance(dx: Image, dy: Image) -> Image:
    distance: Image = np.sqrt(dx * dx + dy * dy)
    return distance


def _size(values: Image) -> Image:
    size: Image = np.abs(values)
    return size


def _sin(values: Image) -> Image:
    sine: Image = np.sin(values)
    return sine


@lru_cache(maxsize=8)
def _axes(size_px: int) -> tuple[Image, Image]:
    centres = ((np.arange(size_px, dtype=np.float32) + 0.5) * (2.0 / size_px) - 1.0).astype(np.float32)
    return centres[None, :], centres[:, None]


@dataclass(frozen=True)
class _Plane:
    """Posed coordinates of every pixel, and the softest edge that does not alias."""

    x: Image
    y: Image
    ax: Image
    """|x|."""
    left: Image
    """1 on the patient's left (image right), else 0."""
    px: float

    def inside(self, depth: Image, softness: float = 0.0) -> Image:
        """Coverage in [0, 1] of the region where `depth` is positive, with an edge of at least one pixel."""
        return _unit(depth * (1.0 / max(softness, self.px)) + 0.5)

    def on(self, side: Side) -> Image:
        return self.left if side > 0 else 1.0 - self.left


def _plane(exam: Exam, size_px: int) -> _Plane:
    u, v = _axes(size_px)
    cos, sin = math.cos(exam.turn) / exam.zoom, math.sin(exam.turn) / exam.zoom
    x = cos * u - sin * v - exam.shift[0]
    y = sin * u + cos * v - exam.shift[1]
    return _Plane(x, y, _size(x), (x > 0).astype(np.float32), 2.0 / size_px / exam.zoom)


# --- chest ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Thorax:
    """The lung cavities, per pixel."""

    height: Image
    """0 at the apex, 1 at the lung's lower end."""
    wall: Image
    """|x| of the inner chest wall."""
    depth: Image
    """Distance above the diaphragm's surface, negative below it."""
    cavity: Image
    """Coverage by the cavities."""
    air: Image
    """Air along the ray, in [0, 1]."""


@dataclass(frozen=True)
class _Heart:
    depth: Image
    """Distance inside the outline, negative outside."""
    left: float
    """x of the border at the image's left."""
    width: float


def _render(a: Anatomy, exam: Exam, size_px: int) -> tuple[Image, Truth]:
    p = _plane(exam, size_px)
    thorax = _thorax(p, a, exam)
    heart = _heart(p, a, exam)
    density, aerated = _lungs_in_tissue(p, a, exam, thorax)
    density = density + _bones(p, a, exam, thorax)
    density = _behind_mediastinum(p, a, density, heart)
    density = density + (_abdomen(p, a, exam, density) - density) * _below(p, a, thorax)
    return density * _body(p, a, exam), _truth(p, a, exam, aerated, heart)


def _outline(height: Image) -> Image:
    """|x| of the chest wall at a height (0 apex, 1 lower end) as a share of the widest."""
    outline: Image = np.sqrt(1.0 - (1.0 - _unit(height)) ** 2.6)
    return outline


def _thorax(p: _Plane, a: Anatomy, exam: Exam) -> _Thorax:
    base = a.base + exam.breath
    height = (p.y - a.apex) * (1.0 / (base + 0.2 - a.apex))
    wall = a.thorax * _outline(height)
    crest = 0.55 * a.thorax
    across = (p.ax - crest) * (1.0 / (a.thorax - crest))
    drop = across * across * (0.45 + 0.8 * (across > 0).astype(np.float32))
    # The right dome (image left) stands higher: the liver is under it.
    depth = (base + 0.04 - a.dome) + 0.05 * p.left + a.dome * drop - p.y
    edge = wall - p.ax
    cavity = p.inside(edge) * p.inside(depth) * p.inside(p.ax - 0.05)
    thickness = (0.35 + 0.65 * _root(edge * 3.3)) * _unit(0.55 + 0.9 * height) * _unit(0.35 + 3.0 * depth)
    return _Thorax(height, wall, depth, cavity, cavity * thickness)


def _heart(p: _Plane, a: Anatomy, exam: Exam) -> _Heart:
    """An ellipse that points down to the patient's left, of exactly the width that the ratio asks for."""
    width = exam.heart_ratio * 2.0 * a.thorax
    cos, sin = math.cos(a.heart_tilt), math.sin(a.heart_tilt)
    aspect = 0.72
    long = 0.5 * width / math.hypot(cos, aspect * sin)
    short = aspect * long
    cx = a.heart_shift + 0.16 * (width - 0.62)
    cy = a.base + exam.breath - 0.02 - 0.62 * short
    dx, dy = p.x - cx, p.y - cy
    u = (cos * dx + sin * dy) * (1.0 / long)
    v = (cos * dy - sin * dx) * (1.0 / short)
    return _Heart((1.0 - _distance(u, v)) * short, cx - 0.5 * width, width)


def _body(p: _Plane, a: Anatomy, exam: Exam) -> Image:
    """Coverage of the body: torso, shoulders cut by the image's edge, neck."""
    flare = 0.42 * _unit((-0.30 - p.y) * 2.2)
    side = a.torso + flare + 0.05 * _unit(p.y) - p.ax
    slope = 0.26 if exam.view == "PA" else 0.15
    neck = 0.34 if a.sex == "F" else 0.38
    rise = _unit((neck - p.ax) * 5.0)
    top = p.y + 0.98 - slope * p.ax + 0.5 * rise * rise
    return p.inside(side, 0.03) * p.inside(top, 0.04)


def _lungs_in_tissue(p: _Plane, a: Anatomy, exam: Exam, t: _Thorax) -> tuple[Image, Image]:
    """Density of soft tissue and lungs with their findings; coverage of the aerated lung."""
    tissue = 0.34 + 0.07 * a.fat + (0.20 + 0.05 * a.fat) * _root((a.torso + 0.12 - p.ax) * 1.6) + 0.05 * p.y
    tissue = tissue + _breasts(p, a)
    marks, air = _markings(p, a, t), t.air
    side, share = exam.pneumothorax
    if share:
        marks, air = _collapse(p, t, side, share, marks, air)
    opaque, fluid = _opacities(p, a, exam), _fluids(p, a, exam, t)
    hidden = _either(opaque, fluid)
    density = tissue - 0.50 * air * (1.0 - hidden) * (1.0 - 0.55 * marks)
    density = density + 0.13 * opaque * t.cavity
    return density + (0.57 - density) * fluid * t.cavity, t.cavity * (1.0 - fluid)


def _breasts(p: _Plane, a: Anatomy) -> Image:
    dy = (p.y - 0.14) * (0.75 + 0.35 * (p.y > 0.14).astype(np.float32))
    depth = 1.0 - _distance(p.ax - 0.43, dy) * (1.0 / (0.26 + 0.10 * a.breast))
    return 0.17 * a.breast * _root(depth * 2.2)


def _markings(p: _Plane, a: Anatomy, t: _Thorax) -> Image:
    """Vessels: ridges over the angle around each hilum that wriggle and fade outwards, and the hila themselves."""
    dx, dy = p.ax - 0.17, p.y + 0.06
    r = _distance(dx, dy)
    wave = 0.22 * _sin(9.0 * r + 5.0 * a.vessels[0] + 1.3 * p.left)
    turns = len(a.vessels)
    phase = (np.arctan2(dy, dx) + wave) * (0.5 * turns / math.pi) + 11.3 * p.left
    ring = np.array([*a.vessels, a.vessels[0]], dtype=np.float32)
    strength = np.interp(phase % turns, np.arange(turns + 1), ring).astype(np.float32)
    spokes = _unit(strength) * _unit(1.15 - 1.5 * r) * _unit(9.0 * r)
    return _unit(0.95 * spokes + 0.9 * _unit(1.0 - 5.0 * r)) * (0.75 + 0.25 * t.height)


def _collapse(p: _Plane, t: _Thorax, side: Side, share: float, marks: Image, air: Image) -> tuple[Image, Image]:
    """Markings and air with a pneumothorax: black and empty outside the lung's edge, a fine line along it."""
    gap = share * (1.35 - t.height) + 0.02 + 0.25 * _unit(4.0 * (share - t.height))
    free = p.inside(p.ax - t.wall + gap) * p.on(side)
    line = 4.0 * free * (1.0 - free)
    marks = marks * (1.0 - free) + 0.5 * line + 0.10 * (1.0 - free) * p.on(side)
    return marks, air + (_unit(air + 0.4) - air) * free * t.cavity


def _opacities(p: _Plane, a: Anatomy, exam: Exam) -> Image:
    opaque: Image = np.zeros_like(p.x)
    for patch in exam.patches:
        opaque = _either(opaque, _patch(p, a, exam, patch))
    for nodule in exam.nodules:
        opaque = _either(opaque, _nodule(p, a, exam, nodule))
    return opaque


def _place(a: Anatomy, exam: Exam, side: Side, across: float, down: float) -> tuple[float, float]:
    """A point of a lung from shares of its width and height."""
    base = a.base + exam.breath
    y = a.apex + down * (base - 0.08 - a.apex)
    height = (y - a.apex) / (base + 0.2 - a.apex)
    return side * across * a.thorax * math.sqrt(1.0 - (1.0 - height) ** 2.6), y


def _nodule(p: _Plane, a: Anatomy, exam: Exam, nodule: Nodule) -> Image:
    x, y = _place(a, exam, nodule.side, nodule.across, nodule.down)
    return 0.8 * p.inside(nodule.radius - _distance(p.x - x, p.y - y), 0.03)


def _patch(p: _Plane, a: Anatomy, exam: Exam, patch: Patch) -> Image:
    x, y = _place(a, exam, patch.side, patch.across, patch.down)
    dx, dy = p.x - x, p.y - y
    rough: Image = np.zeros_like(p.x)
    for wave in range(4):
        turn = patch.phase * (wave + 1) + 0.9 * wave
        pitch = 9.0 + 5.0 * wave
        rough = rough + _sin(pitch * (math.cos(turn) * dx + math.sin(turn) * dy) + 2.0 * turn) * (1.0 - 0.15 * wave)
    depth = patch.radius - _distance(dx, 1.15 * dy) + 0.035 * rough
    return p.inside(depth, 0.2) * (0.68 + 0.09 * rough)


def _fluids(p: _Plane, a: Anatomy, exam: Exam, t: _Thorax) -> Image:
    """Pleural fluid: a level that climbs along the chest wall (the meniscus) and blunts the angle."""
    covered: Image = np.zeros_like(p.x)
    across = _unit(p.ax / (t.wall + 0.02))
    for side, level in exam.effusion:
        surface = a.base + exam.breath + 0.10 - level * (0.45 + 0.75 * across**4)
        covered = _either(covered, p.inside(p.y - surface, 0.035) * p.on(side))
    return covered


# --- bones ----------------------------------------------------------------------------------------------------


def _bones(p: _Plane, a: Anatomy, exam: Exam, t: _Thorax) -> Image:
    caged = p.inside(t.wall + 0.045 - p.ax, 0.02) * _unit(0.6 + 8.0 * t.height) * _unit(5.0 * (1.12 - t.height))
    bones: Image = _ribs(p, a) * caged + _clavicles(p, exam) + _shoulders(p, exam)
    return bones * a.bone


def _ribs(p: _Plane, a: Anatomy) -> Image:
    """All ribs at once: a rib is where the phase of a bent coordinate is near a whole number.

    Posterior ribs fall away from the spine; anterior ones are fainter and fall towards the midline.
    """
    back = (p.y + 0.16 * p.ax - (a.rib_slope + 0.30) * p.ax * p.ax) * (1.0 / a.rib_pitch) + a.rib_phase
    front = (p.y + (0.55 + 0.3 * a.rib_slope) * p.ax) * (0.85 / a.rib_pitch) + a.rib_phase
    soft = p.px / a.rib_pitch
    posterior = 0.135 * _bars(back, 0.19, soft)
    anterior = 0.055 * _bars(front, 0.17, soft) * _unit(6.0 * (p.ax - 0.24))
    return posterior * (0.75 + 0.55 * p.ax) + anterior


def _bars(phase: Image, half: float, soft: float) -> Image:
    """Bars around whole phases with brighter rims: the cortex is seen edge on."""
    away = _size(phase - np.round(phase))
    rims = 0.75 + 0.35 * _unit(away * (1.0 / half))
    return rims * _unit((half - away) * (1.0 / max(soft, 0.08)) + 0.5)


def _clavicles(p: _Plane, exam: Exam) -> Image:
    level = -0.62 if exam.view == "PA" else -0.67
    curve = level - 0.16 * p.ax + 0.05 * _sin(7.0 * p.ax)
    thick = 0.030 + 0.05 * _unit(0.3 - p.ax)
    bar = p.inside(thick - _size(p.y - curve), 0.015)
    return 0.20 * bar * p.inside(p.ax - 0.09, 0.03) * p.inside(0.92 - p.ax, 0.04)


def _shoulders(p: _Plane, exam: Exam) -> Image:
    """Shoulder blades (over the lungs in AP, turned outwards in PA) and the heads of the upper arms."""
    medial = exam.scapula + 0.30 * _unit(-0.45 - p.y) + 0.22 * _unit(p.y + 0.45)
    lateral = exam.scapula + 0.30 - 0.12 * (p.y + 0.45)
    blade = p.inside(p.ax - medial, 0.02) * p.inside(lateral - p.ax, 0.06)
    blade = blade * p.inside(0.16 - p.y, 0.08) * p.inside(p.y + 0.72, 0.06)
    head = p.inside(0.17 - _distance(p.ax - 1.0, p.y + 0.66), 0.03)
    return 0.09 * blade + 0.16 * head


# --- mediastinum and abdomen ----------------------------------------------------------------------------------


def _behind_mediastinum(p: _Plane, a: Anatomy, density: Image, heart: _Heart) -> Image:
    """Density with heart, great vessels, trachea and spine: they take the place of the air on their rays."""
    knob_x, knob_y = 0.10 + 0.4 * a.aorta_sway, -0.34 - 0.05 * a.aorta_sway
    from_knob = _distance(p.x - knob_x, p.y - knob_y)
    core = _either(p.inside(heart.depth, 0.03), _vessels(p, a, knob_y))
    core = _either(core, p.inside(a.knob - from_knob, 0.025))
    thick = 0.60 + 0.10 * _unit(3.0 * heart.depth)
    merged: Image = density + (_either(density, thick) - density) * core
    rim = _unit(1.0 - _size(from_knob - a.knob + 0.012) * (1.0 / max(0.016, 0.7 * p.px)))
    calcified = rim * p.inside(p.x - 0.08) * (0.22 * a.calcified)
    return merged + calcified + _spine(p, a) - _airway(p)


def _vessels(p: _Plane, a: Anatomy, knob_y: float) -> Image:
    """Coverage of the vascular pedicle, the pulmonary trunk and the descending aorta."""
    pedicle = p.inside(0.115 + 0.05 * _unit(p.y + 0.15) + 0.04 * _unit(-0.62 - p.y) - p.ax, 0.035)
    trunk = p.inside(0.15 - _distance(p.x - 0.06, (p.y + 0.12) * 0.8), 0.04)
    sway = a.aorta_sway * _sin(math.pi * _unit(1.08 * (p.y + 0.34)))
    descending = p.inside(0.12 + sway - p.x, 0.03) * p.left * p.inside(p.y - knob_y)
    return _either(_either(pedicle, trunk), descending)


def _spine(p: _Plane, a: Anatomy) -> Image:
    column = p.inside(0.078 + 0.02 * _unit(p.y) - p.ax, 0.025)
    discs = _sin((p.y + 0.02 * p.ax) * (2 * math.pi / 0.135) + 2 * math.pi * a.rib_phase)
    return column * a.bone * (0.060 + 0.014 * discs) * (1.0 - 0.45 * _unit(2.5 * p.y))


def _airway(p: _Plane) -> Image:
    """Air of the trachea down to the carina, and of the two main bronchi below it."""
    tube = p.inside(0.042 - _size(p.x + 0.012), 0.03) * p.inside(-0.26 - p.y, 0.08)
    bronchus = 0.026 - _size(p.y + 0.26 - 0.75 * p.ax)
    bronchi = p.inside(bronchus, 0.04) * p.inside(0.22 - p.ax, 0.05) * p.inside(p.y + 0.28, 0.04)
    return 0.15 * tube + 0.06 * bronchi


def _below(p: _Plane, a: Anatomy, t: _Thorax) -> Image:
    """Coverage of the belly, which fades into the flanks."""
    return p.inside(-t.depth, 0.02) * p.inside(a.thorax + 0.04 - p.ax, 0.2) * p.inside(p.y)


def _abdomen(p: _Plane, a: Anatomy, exam: Exam, density: Image) -> Image:
    """Liver, spleen and gut, with the stomach's air bubble under the left dome; bones shine through."""
    tissue = 0.66 - 0.04 * _unit(0.5 + 1.5 * p.x) + 0.04 * _unit(p.y - 0.5) + 0.25 * (density - 0.60)
    if exam.bubble:
        top = a.base + exam.breath + 0.21 - a.dome
        away = _distance((p.x - 0.42) * (1.0 / 0.17), (p.y - top) * (1.0 / 0.085))
        tissue = tissue - 0.22 * exam.bubble * p.inside(1.0 - away, 0.25)
    return tissue


# --- what comes out -------------------------------------------------------------------------------------------


def _truth(p: _Plane, a: Anatomy, exam: Exam, aerated: Image, heart: _Heart) -> Truth:
    size = p.x.shape[0]
    scale = 0.5 * size * exam.zoom

    def column(x: float) -> float:
        return float(scale * (x + exam.shift[0]) + 0.5 * size)

    return Truth(
        cardiothoracic_ratio=heart.width / (2.0 * a.thorax),
        heart_left_px=column(heart.left),
        heart_width_px=heart.width * scale,
        thorax_left_px=column(-a.thorax),
        thorax_width_px=2.0 * a.thorax * scale,
        heart=heart.depth > 0,
        lungs=(aerated > 0.5) & (heart.depth <= 0) & (p.ax > 0.115),
    )


def _expose(density: Image, exam: Exam, grain: Image) -> Image:
    """Tone curve, exposure and quantum noise; values in [0, 1]."""
    toned = _unit(0.5 + (density * exam.gain - 0.42) * (1.25 * exam.contrast)) ** exam.gamma
    lit: Image = np.where(density > 0.02, np.maximum(toned, 0.03), toned)
    return _unit(lit + grain * exam.noise)
