"""From a scan's own size to the corpus's square: physical proportions kept, 8 to 16 bits kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from scanloom.scans.image import Geometry, Pixels, ScanImage

Resize = Literal["letterbox", "crop"]


@dataclass(frozen=True)
class Square:
    """Pixels size x size of the scan's dtype and their geometry; the spacing is the same along both axes."""

    pixels: Pixels
    geometry: Geometry


def fit(image: ScanImage, size_px: int, how: Resize) -> Square:
    """The scan in a square of `size_px`: whole with black bars (letterbox), or its centre (crop).

    Pixels that are not square are made so. Shrinking averages over whole pixels as far as their number allows, and
    takes what is left, a factor below two, by Lanczos.
    """
    rows, columns = image.pixels.shape
    row_mm, column_mm = image.geometry.spacing_mm or (1.0, 1.0)
    height, width = rows * row_mm, columns * column_mm
    side = max(height, width) if how == "letterbox" else min(height, width)
    target = (max(1, round(height / side * size_px)), max(1, round(width / side * size_px)))
    resized = _resampled(image.pixels, target)
    return Square(_centred(resized, size_px), _moved(image, target, side, size_px))


def _moved(image: ScanImage, resized: tuple[int, int], side_mm: float, size_px: int) -> Geometry:
    """The geometry of the square: its pixels' size, and where the centre of its first one lies (PS3.3 C.7.6.2.1.1)."""
    geometry, step = image.geometry, side_mm / size_px
    if geometry.spacing_mm is None:
        return replace(geometry, position_mm=None)
    position = geometry.position_mm
    if position is not None and geometry.direction is not None:
        # From the old first pixel's centre to the frame's corner, over the bars or the cut, to the new one's centre.
        down, across = (
            (_start(n, size_px) + 0.5) * step - 0.5 * mm for n, mm in zip(resized, geometry.spacing_mm, strict=True)
        )
        along, downwards = geometry.direction[:3], geometry.direction[3:]
        x, y, z = (p + across * a + down * d for p, a, d in zip(position, along, downwards, strict=True))
        position = (x, y, z)
    return replace(geometry, spacing_mm=(step, step), position_mm=position)


def _start(extent: int, size_px: int) -> int:
    """Where the square begins along an axis of the resized frame: before it (bars) or inside it (cut), in pixels."""
    return (extent - size_px) // 2 if extent > size_px else -((size_px - extent) // 2)


def _resampled(pixels: Pixels, shape: tuple[int, int]) -> Pixels:
    if pixels.shape == shape:
        return pixels
    # Mode F: Pillow resamples 16 bits in few modes, and F is exact for both depths.
    image = Image.fromarray(pixels.astype(np.float32)).resize(
        (shape[1], shape[0]), Image.Resampling.LANCZOS, reducing_gap=1.0
    )
    levels = int(np.iinfo(pixels.dtype).max)
    return np.asarray(np.rint(np.clip(np.asarray(image), 0, levels)), dtype=pixels.dtype)


def _centred(pixels: Pixels, size_px: int) -> Pixels:
    """Cut what stands over and fill what is missing with black, evenly on both sides."""
    rows, columns = pixels.shape
    top, left = max(0, (rows - size_px) // 2), max(0, (columns - size_px) // 2)
    kept = pixels[top : top + size_px, left : left + size_px]
    square: Pixels = np.zeros((size_px, size_px), dtype=pixels.dtype)
    top, left = (size_px - kept.shape[0]) // 2, (size_px - kept.shape[1]) // 2
    square[top : top + kept.shape[0], left : left + kept.shape[1]] = kept
    return square
