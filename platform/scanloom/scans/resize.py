"""From a scan's own size to the corpus's square: physical proportions kept, 8 to 16 bits kept."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from scanloom.scans.image import Geometry, Pixels, ScanImage

Resize = Literal["letterbox", "crop"]
_POSSIBLE_MM = (1e-4, 1e4)
"""Where no spacing is outside; one that is says nothing of the pixels, not even of their shape."""


@dataclass(frozen=True)
class Square:
    """Pixels size x size of the scan's dtype and their geometry; the spacing is the same along both axes."""

    pixels: Pixels
    geometry: Geometry


def fit(image: ScanImage, size_px: int, how: Resize) -> Square:
    """The scan in a square of `size_px`: whole with black bars (letterbox), or its centre (crop).

    Pixels that are not square are made so. Shrinking averages over whole pixels as far as their number allows, and
    takes what is left, a factor below two, by Lanczos. A spacing that cannot be is taken as none.
    """
    geometry = _possible(image.geometry)
    spacing = geometry.spacing_mm or (1.0, 1.0)
    extent = image.pixels.shape[0] * spacing[0], image.pixels.shape[1] * spacing[1]
    step = (max(extent) if how == "letterbox" else min(extent)) / size_px
    if how == "crop":
        corner = (extent[0] - size_px * step) / 2, (extent[1] - size_px * step) / 2
        pixels = _cropped(image.pixels, (corner[0] / spacing[0], corner[1] / spacing[1]), size_px)
    else:
        shape = max(1, round(extent[0] / step)), max(1, round(extent[1] / step))
        corner = -step * ((size_px - shape[0]) // 2), -step * ((size_px - shape[1]) // 2)
        pixels = _centred(_resampled(image.pixels, shape), size_px)
    return Square(pixels, _moved(geometry, corner, step))


def _possible(geometry: Geometry) -> Geometry:
    low, high = _POSSIBLE_MM
    spacing = geometry.spacing_mm
    possible = spacing is None or all(low <= mm <= high for mm in spacing)
    return geometry if possible else replace(geometry, spacing_mm=None)


def _moved(geometry: Geometry, corner_mm: tuple[float, float], step_mm: float) -> Geometry:
    """The geometry of the square: its pixels' size, and where the centre of its first one lies (PS3.3 C.7.6.2.1.1).

    `corner_mm` is the square's corner, down and across from the frame's: inside it (cut) or before it (bars).
    """
    if geometry.spacing_mm is None:
        return replace(geometry, position_mm=None)
    position = geometry.position_mm
    if position is not None and geometry.direction is not None:
        # From the old first pixel's centre to the frame's corner, to the square's, to the new one's centre.
        down, across = (c + 0.5 * step_mm - 0.5 * mm for c, mm in zip(corner_mm, geometry.spacing_mm, strict=True))
        along, downwards = geometry.direction[:3], geometry.direction[3:]
        x, y, z = (p + across * a + down * d for p, a, d in zip(position, along, downwards, strict=True))
        position = (x, y, z)
    return replace(geometry, spacing_mm=(step_mm, step_mm), position_mm=position)


def _cropped(pixels: Pixels, margin: tuple[float, float], size_px: int) -> Pixels:
    """The centre, without `margin` pixels (down and across, on both sides); what is cut off is never resampled.

    At least one pixel is kept.
    """
    top, left = (min(max(0.0, cut), (n - 1) / 2) for cut, n in zip(margin, pixels.shape, strict=True))
    down, across = math.floor(top), math.floor(left)
    kept = pixels[down : pixels.shape[0] - down, across : pixels.shape[1] - across]
    box = left - across, top - down, kept.shape[1] - (left - across), kept.shape[0] - (top - down)
    return _resampled(kept, (size_px, size_px), box)


def _resampled(pixels: Pixels, shape: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Pixels:
    """The pixels, or those in a box (left, top, right, bottom) of them, in another shape."""
    rows, columns = pixels.shape
    whole = box in (None, (0.0, 0.0, columns, rows))
    if pixels.shape == shape and whole:
        return pixels
    if whole and rows % shape[0] == 0 and columns % shape[1] == 0:
        return _averaged(pixels, rows // shape[0], columns // shape[1])
    # Mode F: Pillow resamples 16 bits in few modes, and F is exact for both depths.
    image = Image.fromarray(pixels.astype(np.float32)).resize(
        (shape[1], shape[0]), Image.Resampling.LANCZOS, box=box, reducing_gap=1.0
    )
    levels = int(np.iinfo(pixels.dtype).max)
    return np.asarray(np.rint(np.clip(np.asarray(image), 0, levels)), dtype=pixels.dtype)


def _averaged(pixels: Pixels, down: int, across: int) -> Pixels:
    """Means of blocks: what `_resampled` gives where whole pixels are all there is to average, at half of the cost."""
    add = functools.partial(np.add, dtype=np.uint32)
    bands = functools.reduce(add, (pixels[start::down] for start in range(down)))
    sums = functools.reduce(add, (bands[:, start::across] for start in range(across)))
    count = down * across
    # Single precision takes half of the time, and is exact for sums below 2 ** 24 and halves of halves.
    exact = count <= 256 and count & (count - 1) == 0
    numbers: npt.NDArray[np.floating[Any]] = np.asarray(sums, dtype=np.float32 if exact else np.float64)
    return np.asarray(np.rint(numbers / count), dtype=pixels.dtype)


def _centred(pixels: Pixels, size_px: int) -> Pixels:
    """Fill what is missing with black, evenly on both sides."""
    rows, columns = pixels.shape
    square: Pixels = np.zeros((size_px, size_px), dtype=pixels.dtype)
    top, left = (size_px - rows) // 2, (size_px - columns) // 2
    square[top : top + rows, left : left + columns] = pixels
    return square
