"""Cardiothoracic ratio from the picture alone, and how well such a measure separates two groups.

The borders of heart and thorax are read by a linear probe: ridge regression from the blurred, contrast-normalised
picture to the four border columns, fitted on phantoms whose borders are known, as they are and with the blur and
noise that an autoencoder leaves. It states its own error on phantoms that it has not seen.
Source of the ratio: Danzer 1919, widest heart over widest inner thorax; over 0.5 counts as enlarged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from scanloom.scans.phantoms import Phantom, phantom

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[Any]

_SIZE_PX = 64
_BANDS, _COLUMNS = 16, 32
_RIDGE = 300.0
_COMPONENTS = 60
# Autoencoder-like damage that the probe must read through: (blur deviation in px, noise deviation).
_DAMAGE = ((0.0, 0.0), (1.0, 0.01), (1.6, 0.03))


@dataclass(frozen=True)
class Borders:
    """Columns of the borders as shares of the image's width, left and right as in the image."""

    heart_left: float
    heart_right: float
    thorax_left: float
    thorax_right: float

    @property
    def ratio(self) -> float:
        return (self.heart_right - self.heart_left) / (self.thorax_right - self.thorax_left)

    @property
    def plausible(self) -> bool:
        inside = 0.0 <= self.thorax_left < self.heart_left < self.heart_right < self.thorax_right <= 1.0
        return inside and self.thorax_right - self.thorax_left > 0.4 and 0.2 < self.ratio < 0.95


@dataclass(frozen=True)
class HeldOut:
    """The probe's error on phantoms that it was not fitted on."""

    scans: int
    ratio_mae: float
    """Mean absolute error of the ratio."""
    cardiomegaly_auc: float


@dataclass(frozen=True)
class Probe:
    """A fitted probe; reads images of any size, best of the phantoms' framing."""

    weights: Array
    """[features + 1, 4], the last row the offset."""
    centre: Array
    basis: Array
    """[features, components] of the phantoms' principal subspace."""
    limit: float
    """Largest distance from that subspace at which a picture still counts as a frontal chest."""
    held_out: HeldOut

    def borders(self, pixels: Pixels) -> Borders | None:
        """Where the borders are, or None when the picture is no frontal chest that the probe can read."""
        picture = _standard(pixels)
        features = _features(picture[None])[0]
        # An even picture has nothing to measure, and no contrast that could be normalised.
        if np.ptp(picture) == 0 or _distances((features - self.centre)[None], self.basis)[0] > self.limit:
            return None
        found = Borders(*(float(x) for x in features @ self.weights[:-1] + self.weights[-1]))
        return found if found.plausible else None

    def ratio(self, pixels: Pixels) -> float:
        """The cardiothoracic ratio, or nan when it cannot be measured."""
        found = self.borders(pixels)
        return found.ratio if found else math.nan


def cardiothoracic_ratio(pixels: Pixels) -> float:
    """Widest heart over widest inner thorax of a frontal chest radiograph (HxW, any dtype, bright where dense).

    nan when the picture cannot be measured. The first call fits the probe, some seconds.
    """
    return fit_probe().ratio(pixels)


@lru_cache(maxsize=4)
def fit_probe(seed: int = 0, scans: int = 1200) -> Probe:
    """The probe fitted on `scans` phantoms of the series `seed` and judged on a third as many of another."""
    drawn = [phantom(seed, index, _SIZE_PX) for index in range(scans)]
    pictures = np.stack([scan.pixels / 255.0 for scan in drawn])
    features = np.concatenate([_features(damaged(pictures, *damage, seed=seed)) for damage in _DAMAGE])
    borders = np.tile(np.array([_true_borders(scan) for scan in drawn]), (len(_DAMAGE), 1))
    centre = features.mean(axis=0)
    gram = (features - centre).T @ (features - centre)
    slopes = np.linalg.solve(
        gram + _RIDGE * np.eye(len(gram)), (features - centre).T @ (borders - borders.mean(axis=0))
    )
    offset = borders.mean(axis=0) - centre @ slopes
    basis = np.linalg.eigh(gram)[1][:, -_COMPONENTS:]
    # The pictures of a generator early in its training are up to half as odd again as the oddest phantom.
    limit = 2.0 * float(_distances(features - centre, basis).max())
    weights = np.vstack([slopes, offset])
    return Probe(weights, centre, basis, limit, _held_out(weights, seed, scans // 3))


def _held_out(weights: Array, seed: int, scans: int) -> HeldOut:
    # Philox keys are (seed, index): the next seed is another, unrelated series.
    drawn = [phantom(seed + 1, index, _SIZE_PX) for index in range(scans)]
    features = _features(np.stack([scan.pixels / 255.0 for scan in drawn]))
    ratios = np.array([Borders(*row).ratio for row in features @ weights[:-1] + weights[-1]])
    truth = np.array([scan.truth.cardiothoracic_ratio for scan in drawn])
    large = np.array(["Cardiomegaly" in scan.findings for scan in drawn])
    return HeldOut(scans, float(np.abs(ratios - truth).mean()), auc(ratios[large], ratios[~large]))


def auc(positive: Sequence[float] | Array, negative: Sequence[float] | Array) -> float:
    """Chance that a positive's score is above a negative's, ties half: the area under the ROC curve (Mann-Whitney).

    nan when either side is empty; ValueError when a score is nan.
    """
    high, low = np.asarray(positive, dtype=np.float64), np.sort(np.asarray(negative, dtype=np.float64))
    if np.isnan(high).any() or np.isnan(low).any():
        raise ValueError("auc: a score is nan; leave out what could not be measured, and say how many")
    if not (high.size and low.size):
        return math.nan
    below = np.searchsorted(low, high, side="left")
    not_above = np.searchsorted(low, high, side="right")
    return float((below + not_above).mean() / (2.0 * low.size))


def damaged(pictures: Array, blur_px: float, noise: float, *, seed: int) -> Array:
    """Pictures [N, H, W] in [0, 1] after a Gaussian blur and added Gaussian noise, clipped to [0, 1]."""
    blurred = _blurred(pictures, blur_px) if blur_px else pictures
    if noise:
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, round(1e6 * noise)], dtype=np.uint64)))
        blurred = blurred + noise * generator.standard_normal(pictures.shape)
    return np.clip(blurred, 0.0, 1.0)


def _blurred(pictures: Array, deviation_px: float) -> Array:
    reach = math.ceil(3 * deviation_px)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation_px) ** 2)
    kernel /= kernel.sum()
    height, width = pictures.shape[1:]
    padded = np.pad(pictures, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    rows = sum((k * padded[:, i : i + height] for i, k in enumerate(kernel)), np.zeros(()))
    return sum((k * rows[:, :, i : i + width] for i, k in enumerate(kernel)), np.zeros(()))


def _standard(pixels: Pixels) -> Array:
    """HxW of any size and dtype as 64x64; the scale of its values is left to the normalisation."""
    values = np.asarray(pixels, dtype=np.float32)
    if values.shape != (_SIZE_PX, _SIZE_PX):
        values = np.asarray(Image.fromarray(values).resize((_SIZE_PX, _SIZE_PX), Image.Resampling.BILINEAR))
    return values.astype(np.float64)


def _features(pictures: Array) -> Array:
    """[N, bands x columns] smoothed, normalised to mean 0 and deviation 1 per picture, and pooled."""
    smooth = _blurred(pictures, 1.0)
    spread = smooth.std(axis=(1, 2), keepdims=True)
    normal = (smooth - smooth.mean(axis=(1, 2), keepdims=True)) / np.maximum(spread, 1e-6)
    blocks = normal.reshape(-1, _BANDS, _SIZE_PX // _BANDS, _COLUMNS, _SIZE_PX // _COLUMNS)
    pooled: Array = blocks.mean(axis=(2, 4)).reshape(len(pictures), -1)
    return pooled


def _distances(centred: Array, basis: Array) -> Array:
    """Distance of each row from the span of `basis`."""
    distances: Array = np.linalg.norm(centred - (centred @ basis) @ basis.T, axis=1)
    return distances


def _true_borders(scan: Phantom) -> tuple[float, float, float, float]:
    t, size = scan.truth, scan.pixels.shape[1]
    heart_right, thorax_right = t.heart_left_px + t.heart_width_px, t.thorax_left_px + t.thorax_width_px
    return t.heart_left_px / size, heart_right / size, t.thorax_left_px / size, thorax_right / size
