"""From a scan's own size to the corpus's square: physical proportions kept, 8 to 16 bits kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from scanloom.scans.decode import Pixels, ScanImage

Resize = Literal["letterbox", "crop"]


@dataclass(frozen=True)
class Square:
    """Pixels size x size of the scan's dtype; spacing_mm is the same along both axes, None where it is unknown."""

    pixels: Pixels
    spacing_mm: float | None


def fit(image: ScanImage, size_px: int, how: Resize) -> Square:
    """The scan in a square of `size_px`: whole with black bars (letterbox), or its centre (crop).

    Pixels that are not square are made so. Shrinking averages by whole factors first (BOX) and ends with LANCZOS.
    """
    rows, columns = image.pixels.shape
    row_mm, column_mm = image.spacing_mm or (1.0, 1.0)
    height, width = rows * row_mm, columns * column_mm
    side = max(height, width) if how == "letterbox" else min(height, width)
    target = (max(1, round(height / side * size_px)), max(1, round(width / side * size_px)))
    resized = _resampled(image.pixels, target)
    return Square(_centred(resized, size_px), side / size_px if image.spacing_mm else None)


def _resampled(pixels: Pixels, shape: tuple[int, int]) -> Pixels:
    if pixels.shape == shape:
        return pixels
    # Mode F: Pillow resamples 16 bits in few modes, and F is exact for both depths.
    image = Image.fromarray(pixels.astype(np.float32)).resize(
        (shape[1], shape[0]), Image.Resampling.LANCZOS, reducing_gap=3.0
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
