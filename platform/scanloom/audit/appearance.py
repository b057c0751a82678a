"""What images are like without any network: how alike pairs of them are, their spectra and their grey levels.

Legend of shape suffixes: N images, H W rows and columns, K radii, L grey levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, uniform_filter

from scanloom.audit.intervals import Estimate, mean_over, multiplicities, percentile

Floats = NDArray[np.float64]
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_K1, _K2 = 0.01, 0.03
_DEVIATION_PX, _WINDOW_PX = 1.5, 11
LEVELS = 64
_CHUNK = 64


# --- likeness of pairs ----------------------------------------------------------------------------------------


def ms_ssim(first_HW: NDArray[Any], second_HW: NDArray[Any]) -> float:
    """Multi-scale structural similarity of two images in [0, 1] (Wang, Simoncelli & Bovik 2003); 1 for equal ones.

    Over as many of the five scales as leave room for a window, their weights scaled to a sum of 1. ValueError where
    sides are below the window, 11 px.
    """
    first, second = np.asarray(first_HW, np.float64), np.asarray(second_HW, np.float64)
    scales = scales_of(min(first.shape))
    weights = np.array(_WEIGHTS[:scales]) / sum(_WEIGHTS[:scales])
    likeness = 1.0
    for scale in range(scales):
        structure, whole = _ssim(first, second)
        last = scale == scales - 1
        # Negative structure has no root; it counts as none.
        likeness *= max(0.0, whole if last else structure) ** weights[scale]
        first, second = _halved(first), _halved(second)
    return float(likeness)


def scales_of(side_px: int) -> int:
    """Over how many scales images of a side are compared."""
    if side_px < _WINDOW_PX:
        raise ValueError(f"ms_ssim: sides of {side_px} px; needs at least {_WINDOW_PX}")
    return min(len(_WEIGHTS), int(np.log2(side_px / _WINDOW_PX)) + 1)


def _ssim(first: Floats, second: Floats) -> tuple[float, float]:
    """Mean of contrast and structure, and mean of all three terms, over windows within the image."""
    reach = _WINDOW_PX // 2

    def blurred(image: Floats) -> Floats:
        smooth = gaussian_filter(image, _DEVIATION_PX, truncate=reach / _DEVIATION_PX)
        return np.asarray(smooth[reach:-reach, reach:-reach])

    mean_1, mean_2 = blurred(first), blurred(second)
    spread_1, spread_2 = blurred(first**2) - mean_1**2, blurred(second**2) - mean_2**2
    shared = blurred(first * second) - mean_1 * mean_2
    structure = (2.0 * shared + _K2**2) / (spread_1 + spread_2 + _K2**2)
    luminance = (2.0 * mean_1 * mean_2 + _K1**2) / (mean_1**2 + mean_2**2 + _K1**2)
    return float(structure.mean()), float((luminance * structure).mean())


def _halved(image: Floats) -> Floats:
    height, width = (side // 2 * 2 for side in image.shape)
    return np.asarray(uniform_filter(image[:height, :width], 2, origin=-1)[::2, ::2])


def pairs_within(groups: Sequence[str], patients: Sequence[str], most: int, seed: int = 0) -> NDArray[np.int64]:
    """At most `most` pairs int64 [P, 2] of images of one group and of different patients; each image is in at most one.

    So that pairs are independent where patients are.
    """
    order = np.random.default_rng(seed).permutation(len(groups))
    waiting: dict[str, list[int]] = {}
    found = []
    for image in map(int, order):
        rest = waiting.setdefault(groups[image], [])
        other = next((place for place in rest if patients[place] != patients[image]), None)
        if other is None:
            rest.append(image)
        else:
            rest.remove(other)
            found.append((other, image))
        if len(found) == most:
            break
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def likeness(images_NHW: NDArray[Any], pairs_P2: NDArray[np.int64]) -> Estimate:
    """Mean MS-SSIM of pairs of images in [0, 1]: the higher, the less they differ from one another."""
    each = np.array([ms_ssim(images_NHW[a], images_NHW[b]) for a, b in pairs_P2.tolist()])
    return mean_over(each, [str(number) for number in range(len(each))])


# --- spectra and grey levels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """What is averaged over the images of a set: rows float64 [N, ...], and whom each is of."""

    rows_NK: Floats
    groups: Sequence[str]


def radial_power(images_NHW: NDArray[Any]) -> Floats:
    """Power [N, K] of images at each whole number of periods across the side, averaged over directions.

    A Hann window keeps edges from looking like detail; the mean of the image is left out, K = side // 2 - 1.
    """
    images = np.asarray(images_NHW)
    height, width = images.shape[1:]
    window = np.outer(np.hanning(height), np.hanning(width))
    # Frequencies as periods across the image's shorter side, so that its shape does not matter.
    side = min(height, width)
    rows, columns = np.fft.fftfreq(height) * side, np.fft.rfftfreq(width) * side
    radius = np.round(np.hypot(rows[:, None], columns[None, :])).astype(int)
    # The half that rfft leaves out mirrors all columns but the first and, of even widths, the last.
    weight = np.full(radius.shape, 2.0)
    weight[:, 0] = 1.0
    if width % 2 == 0:
        weight[:, -1] = 1.0
    inside = (radius >= 1) & (radius < side // 2)
    counts = np.bincount(radius[inside], weight[inside], minlength=side // 2)[1:]
    out = np.zeros((len(images), side // 2 - 1))
    for start in range(0, len(images), _CHUNK):
        part = np.asarray(images[start : start + _CHUNK], dtype=np.float64)
        power = np.abs(np.fft.rfft2((part - part.mean(axis=(1, 2), keepdims=True)) * window)) ** 2 * weight
        for row, one in enumerate(power, start=start):
            out[row] = np.bincount(radius[inside], one[inside], minlength=side // 2)[1:] / counts
    out /= (window**2).sum()
    return out


def grey_levels(images_NHW: NDArray[Any]) -> Floats:
    """Share of each image's pixels at or below each of LEVELS equal steps of [0, 1], [N, LEVELS]."""
    edges = np.arange(1, LEVELS + 1) / LEVELS
    flat = np.asarray(images_NHW).reshape(len(images_NHW), -1)
    out = np.zeros((len(flat), LEVELS))
    for row, pixels in enumerate(flat):
        out[row] = np.searchsorted(np.sort(pixels), edges, side="right") / len(pixels)
    return out


def spectral_distance(first: Curves, second: Curves, seed: int = 0) -> Estimate:
    """Mean over radii of how many decibels the mean power of two sets differs, by `radial_power`."""
    return _distance(first, second, seed, lambda a, b: np.abs(10.0 * np.log10((a + _TINY) / (b + _TINY))).mean(-1))


def level_distance(first: Curves, second: Curves, seed: int = 0) -> Estimate:
    """The Wasserstein-1 distance of the pooled grey levels of two sets, as a share of full range, by `grey_levels`."""
    return _distance(first, second, seed, lambda a, b: np.abs(a - b).mean(-1))


_TINY = 1e-12


def _distance(first: Curves, second: Curves, seed: int, between: Any) -> Estimate:
    """A distance of mean curves with a basic bootstrap interval over groups of both sets.

    The basic one (Davison & Hinkley 1997, section 5.2), mirrored at the estimate: resampling adds to a distance what
    chance adds, and mirroring takes it off again.
    """
    value = float(between(first.rows_NK.mean(axis=0), second.rows_NK.mean(axis=0)))
    means = []
    for number, curves in enumerate((first, second)):
        weights = multiplicities(curves.groups, seed=seed + number)
        means.append(weights @ curves.rows_NK / weights.sum(axis=1, keepdims=True))
    spread = percentile(value, between(*means))
    return Estimate(value, max(0.0, 2.0 * value - spread.high), max(value, 2.0 * value - spread.low))
