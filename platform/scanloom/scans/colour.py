"""From colour to gray: what is gray already, and the luma of the rest.

Luma is that of ITU-R BT.601, 0.299 R + 0.587 G + 0.114 B, which is also the Y of DICOM's YBR_FULL (PS3.3 C.7.6.3.1.2).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from scanloom.scans.image import Pixels
from scanloom.scans.image_pixel import ImagePixel
from scanloom.scans.lookup_table import palette
from scanloom.scans.quarantine import reject

Samples = npt.NDArray[Any]
Colour = Literal["refuse", "luminance"]


def gray_of_colour(samples: Samples, photometric: str, bits: int, colour: Colour) -> Pixels:
    """Gray HxW of HxWx3 in RGB or YBR_FULL with `bits` stored bits, u8 for up to 8, else u16, over the full range.

    Raises ScanError colour, unsupported-pixels.
    """
    if samples.dtype.kind != "u":
        raise reject("unsupported-pixels", "PixelRepresentation")
    if bits > 16:
        samples, bits = (samples >> np.array(bits - 16, samples.dtype)).astype(np.uint16), 16
    gray = _of_ybr(samples, bits, colour) if photometric == "YBR_FULL" else _of_rgb(samples, colour)
    return full_range(gray, bits)


def full_range(gray: Samples, bits: int) -> Pixels:
    """Values of `bits` bits over all of u8 or u16."""
    if bits == 8:
        return np.minimum(gray, 255).astype(np.uint8)
    if bits == 16:
        return gray.astype(np.uint16)
    levels, kind = (255, np.uint8) if bits < 8 else (65535, np.uint16)
    values = np.arange(gray.max() + 1 if gray.size else 1, dtype=np.float64) / ((1 << bits) - 1)
    return np.asarray(np.rint(np.minimum(values, 1.0) * levels).astype(kind)[gray])


def _of_ybr(samples: Samples, bits: int, colour: Colour) -> Samples:
    middle = 1 << (bits - 1)
    if colour == "refuse" and not (samples[..., 1:] == middle).all():
        raise reject("colour", "PhotometricInterpretation")
    return np.ascontiguousarray(samples[..., 0])


def _of_rgb(samples: Samples, colour: Colour) -> Samples:
    red, green, blue = (samples[..., i] for i in range(3))
    if np.array_equal(red, green) and np.array_equal(red, blue):
        return np.ascontiguousarray(red)
    if colour == "refuse":
        raise reject("colour", "PhotometricInterpretation")
    return luma(red, green, blue)


def luma(red: Samples, green: Samples, blue: Samples) -> Samples:
    """Rounded luma of u8 or u16, of the same type: weights of 16 bits that sum to 1, so that gray stays as it is."""
    weighted = red.astype(np.uint32) * np.uint32(19595)
    weighted += green.astype(np.uint32) * np.uint32(38470)
    weighted += blue.astype(np.uint32) * np.uint32(7471)
    weighted += np.uint32(1 << 15)
    return (weighted >> np.uint32(16)).astype(red.dtype)


class Palette:
    """PALETTE COLOR (C.7.9) as tables from stored value to gray. Raises ScanError unsupported-pixels, too-large."""

    def __init__(self, dataset: Dataset, pixel: ImagePixel) -> None:
        if pixel.stored > 16 or pixel.signed or pixel.floating:
            raise reject("unsupported-pixels", "BitsStored")
        values = np.arange(1 << pixel.stored, dtype=np.float64)
        tables = palette(dataset, signed=False)
        kind = np.uint8 if tables[0].bits == 8 else np.uint16
        red, green, blue = (table(values).astype(kind) for table in tables)
        self._gray = luma(red, green, blue)
        self._coloured = (red != green) | (red != blue)

    def gray(self, stored: Samples, colour: Colour) -> Pixels:
        """Raises ScanError colour where a coloured entry is used and colour is refused."""
        if colour == "refuse" and self._coloured.any() and self._coloured[stored].any():
            raise reject("colour", "PhotometricInterpretation")
        return np.asarray(self._gray[stored])
