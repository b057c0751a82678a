"""From values to gray pixels: modality (rescale or LUT), values of interest (LUT or window), inversion, padding.

The chain of PS3.3 C.11 and C.7.6.3. Every step is a function of one value, so all of them together are one table from
stored value to pixel where values have 8 or 16 bits; others go through the same functions in blocks of rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from scanloom.recipe import FixedWindow, HeaderWindow, Window
from scanloom.scans.image import Pixels, Rendering
from scanloom.scans.lookup_table import Doubles, Lut
from scanloom.scans.quarantine import reject

Numbers = npt.NDArray[Any]

_BLOCK_PIXELS = 1 << 16


@dataclass(frozen=True)
class Rescale:
    """value = stored * slope + intercept (C.7.6.16.2.9)."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, values: Doubles) -> Doubles:
        return values * self.slope + self.intercept


@dataclass(frozen=True)
class Ramp:
    """Straight from 0 at `low` to 1 at `high`; a threshold where they are equal."""

    low: float
    high: float

    def __call__(self, values: Doubles) -> Doubles:
        return np.clip((values - self.low) / max(self.high - self.low, 1e-12), 0.0, 1.0)


@dataclass(frozen=True)
class Sigmoid:
    """1 / (1 + exp(-4 (value - center) / width)) (C.11.2.1.3.1)."""

    center: float
    width: float

    def __call__(self, values: Doubles) -> Doubles:
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - self.center) / self.width, -80.0, 80.0))))

    @property
    def low(self) -> float:
        return self.center - self.width / 2

    @property
    def high(self) -> float:
        return self.center + self.width / 2


@dataclass(frozen=True)
class VoiLut:
    """A VOI LUT, its output range made [0, 1]."""

    lut: Lut

    def __call__(self, values: Doubles) -> Doubles:
        return np.clip(self.lut(values) / ((1 << self.lut.bits) - 1), 0.0, 1.0)

    @property
    def low(self) -> float:
        return float(self.lut.first)

    @property
    def high(self) -> float:
        return float(self.lut.last)


Voi = Ramp | Sigmoid | VoiLut


@dataclass(frozen=True)
class Grayscale:
    """What a header says of its values, and how it wants them shown: its VOI LUT and its windows, in its order.

    `padding` are the smallest and largest stored value that stand for no patient; such pixels become black. `possible`
    are the smallest and largest stored value that there can be, where they are few.
    """

    modality: Rescale | Lut = Rescale()
    lut: VoiLut | None = None
    windows: tuple[Ramp | Sigmoid, ...] = ()
    inverted: bool = False
    padding: tuple[float, float] | None = None
    unit: str = ""
    possible: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Chain:
    """Value -> pixel, all steps in one; equal chains share their table."""

    modality: Rescale | Lut
    voi: Voi
    inverted: bool
    padding: tuple[float, float] | None
    levels: int

    def __call__(self, values: Doubles) -> Pixels:
        with np.errstate(all="ignore"):
            shown = np.nan_to_num(self.voi(self.modality(values)), nan=0.0)
        if self.inverted:
            shown = 1.0 - shown
        if self.padding is not None:
            shown[(values >= self.padding[0]) & (values <= self.padding[1])] = 0.0
        return np.asarray(np.rint(shown * self.levels), dtype=np.uint8 if self.levels == 255 else np.uint16)


def windowed(center: float, width: float, function: str = "LINEAR") -> Ramp | Sigmoid:
    """A window of the header: LINEAR, LINEAR_EXACT or SIGMOID (C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return Sigmoid(center, width)
    if function == "LINEAR_EXACT":
        return Ramp(center - width / 2, center + width / 2)
    half = max(width - 1.0, 1e-6) / 2
    return Ramp(center - 0.5 - half, center - 0.5 + half)


def rendered(
    values: Numbers, window: Window, header: Grayscale | None = None, *, bits: int = 16
) -> tuple[Pixels, Rendering]:
    """Pixels of the shape of `values` (integers or floats, NaN for nothing), u8 or u16 by `bits`, over the full range.

    `header` says what the values are and which windows they come with: for stored values of DICOM its modality and
    windows, for values that are ready, such as voxels of NIfTI, a Grayscale() with their unit.
    Raises ScanError blank-image.
    """
    known = header or Grayscale()
    named = _named(window, known)
    low: float
    high: float
    if named is not None and known.possible is not None and known.padding is None:
        # Nothing is asked of the values themselves; to look for their ends would take as long as all the rest.
        (low, high), padding = known.possible, None
    else:
        low, high, padding = _extent(values, known.padding)
    voi, choice = named or (_full(values, known.modality, (low, high), padding), "full")
    chain = _Chain(known.modality, voi, known.inverted, padding, (1 << bits) - 1)
    pixels = _mapped(values, chain, low, high)
    if is_blank(pixels):
        raise reject("blank-image", "PixelData")
    ends = (voi.high, voi.low) if known.inverted else (voi.low, voi.high)
    return pixels, Rendering(choice, ends[0], ends[1], known.unit)


def is_blank(pixels: Pixels) -> bool:
    """Whether every pixel has the same value."""
    # Nearly every scan shows in the row through its middle that it is not.
    return not (pixels[len(pixels) // 2] != pixels[0, 0]).any() and bool((pixels == pixels[0, 0]).all())


def _named(window: Window, known: Grayscale) -> tuple[Voi, str] | None:
    """The values of interest that the recipe or the header names; None where all are."""
    if isinstance(window, FixedWindow):
        return Ramp(window.center - window.width / 2, window.center + window.width / 2), "fixed"
    if isinstance(window, HeaderWindow) and known.lut is not None:
        return known.lut, "voi-lut"
    if isinstance(window, HeaderWindow) and window.index < len(known.windows):
        return known.windows[window.index], f"window-{window.index + 1}"
    return None


def _full(
    values: Numbers, modality: Rescale | Lut, extent: tuple[float, float], padding: tuple[float, float] | None
) -> Ramp:
    ends = np.array(_without_padding(values, extent, padding), dtype=np.float64)
    if isinstance(modality, Lut):
        seen = np.unique(values).astype(np.float64)
        ends = seen[(seen >= ends[0]) & (seen <= ends[1])]
        if padding is not None:
            ends = ends[(ends < padding[0]) | (ends > padding[1])]
    with np.errstate(all="ignore"):
        mapped = modality(ends)
    if not np.isfinite(mapped).all():
        raise reject("blank-image", "PixelData")
    return Ramp(float(mapped.min()), float(mapped.max()))


def _extent(values: Numbers, padding: tuple[float, float] | None) -> tuple[float, float, tuple[float, float] | None]:
    """The smallest and the largest value, and the padding unless it is all there is."""
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)]
        if finite.size == 0:
            raise reject("blank-image", "PixelData")
        low, high = float(finite.min()), float(finite.max())
    else:
        low, high = int(values.min()), int(values.max())
    if padding is not None and ((padding[0] <= low and high <= padding[1]) or padding[1] < low or high < padding[0]):
        padding = None
    return low, high, padding


def _without_padding(
    values: Numbers, extent: tuple[float, float], padding: tuple[float, float] | None
) -> tuple[float, float]:
    if padding is None:
        return extent
    kept = values[(values < padding[0]) | (values > padding[1])]
    kept = kept[np.isfinite(kept)] if kept.dtype.kind == "f" else kept
    return (kept.min(), kept.max()) if kept.size else extent


def _mapped(values: Numbers, chain: _Chain, low: float, high: float) -> Pixels:
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        return _looked_up(values, chain, int(low), int(high))
    pixels = np.empty(values.shape, np.uint8 if chain.levels == 255 else np.uint16)
    rows = max(1, _BLOCK_PIXELS // max(1, values.shape[1]))
    for start in range(0, values.shape[0], rows):
        pixels[start : start + rows] = chain(values[start : start + rows].astype(np.float64))
    return pixels


def _looked_up(values: Numbers, chain: _Chain, low: int, high: int) -> Pixels:
    table = _table(chain, values.dtype.str, *_span(low, high))
    places = pa.array(values.view(f"u{values.dtype.itemsize}").reshape(-1))
    # By Arrow, which takes by places of two bytes: NumPy makes one of eight for each pixel first. The table is as long
    # as the type is wide, so that no place lies outside.
    pixels = pc.take(table, places, boundscheck=False).to_numpy()
    return np.asarray(pixels).reshape(values.shape)


def _span(low: int, high: int) -> tuple[int, int]:
    """`low` and `high` rounded outwards to powers of two, so that scans of one kind share a table."""
    return (-(1 << (-low - 1).bit_length()) if low < 0 else 0), (1 << max(high, 0).bit_length()) - 1


@functools.lru_cache(maxsize=32)
def _table(chain: _Chain, kind: str, low: int, high: int) -> pa.Array:
    """The pixel of every value from low to high, by its bit pattern."""
    dtype = np.dtype(kind)
    values = np.arange(low, high + 1)
    pixels = chain(values.astype(np.float64))
    table = np.zeros(1 << (8 * dtype.itemsize), pixels.dtype)
    table[values & (len(table) - 1)] = pixels
    return pa.array(table)
