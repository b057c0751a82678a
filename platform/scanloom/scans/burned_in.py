"""Lines of text burned into a scan's pixels, found by their shape alone: no learned weights, no reading.

Text is drawn, anatomy is cast: strokes have one value, steep edges and one width, and glyphs of like height stand on
one line with short gaps. Blocks without a steep edge are dropped first, so that a scan without text costs two passes
over its pixels; around the others both polarities are cut at half of the local contrast, and what hangs together is
measured as a glyph. One or two glyphs alone are a side marker and no text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from scanloom.scans.image import Pixels

Gray = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
Signed = npt.NDArray[np.int16]
Labels = npt.NDArray[np.int32]
Window = tuple[int, int, int, int]
"""Top, left, bottom, right in cells."""

BLOCK = 4
CELL = 16
"""Side in px of the cells that windows are made of."""
MOST_PIXELS = 16_000_000
LEAST_CONTRAST = 40
"""Of 255: fainter writing is not looked for."""
LEAST_GLYPHS = 4
LEAST_PARTS = 3
"""Components of a line; glyphs that touch are one."""
MOST_TOGETHER = 600
HEIGHT_PX = (5, 90)
"""Of a glyph: from x-height of the smallest letters to a descending capital of the largest."""
_EIGHT = np.ones((3, 3), dtype=np.int8)


@dataclass(frozen=True, slots=True)
class TextLine:
    """A box in pixels of the scan, and about how many glyphs stand in it; taller than wide where text runs upright."""

    top: int
    left: int
    height: int
    width: int
    glyphs: int

    def scaled(self, factor: int) -> TextLine:
        """The line in a scan of which this one is each `factor`-th row and column."""
        top, left, height, width = (factor * side for side in (self.top, self.left, self.height, self.width))
        return TextLine(top, left, height, width, self.glyphs)


@dataclass(frozen=True)
class _Glyphs:
    """Boxes of glyph-like components, N each: first and past-the-end row and column, and the highest value in them."""

    top: Whole
    left: Whole
    bottom: Whole
    right: Whole
    ink: Floats
    stroke: Floats
    """Mean width of the strokes."""

    def __len__(self) -> int:
        return len(self.top)

    def at(self, which: npt.NDArray[Any]) -> _Glyphs:
        return _Glyphs(*(getattr(self, field.name)[which] for field in fields(self)))

    def turned(self) -> _Glyphs:
        """Rows and columns exchanged."""
        return _Glyphs(self.left, self.top, self.right, self.bottom, self.ink, self.stroke)


def text_lines(pixels: Pixels) -> tuple[TextLine, ...]:
    """The lines of text in a scan, HxW u8 or u16, from top to bottom; the same pixels always give the same lines.

    Of scans of more than 16 million pixels every second row and column is looked at, or every third, and so on.
    """
    step = math.ceil(math.sqrt(pixels.size / MOST_PIXELS)) or 1
    if step > 1:
        return tuple(line.scaled(step) for line in text_lines(pixels[::step, ::step]))
    gray = _eight_bits(pixels)
    if min(gray.shape) < 2 * CELL:
        return ()
    low, high = _block_extremes(gray)
    floor = _least_contrast(gray, low, high)
    windows = list(_windows(low, high, floor))
    if not windows:
        return ()
    # Of the whole scan at once: the windows are many and small.
    across, down = _rises(gray, floor), _rises(gray.T, floor)
    found = [
        line
        for window in windows
        if _is_busy(across, down, window)
        for glyphs in _glyphs(gray, low, high, window, floor)
        for line in _lines(glyphs)
    ]
    return _joined(found)


def _eight_bits(pixels: npt.NDArray[Any]) -> Gray:
    """The upper eight of the bits that are in use: a u16 scan may hold 12."""
    spare = max(0, int(pixels.max(initial=0)).bit_length() - 8)
    return np.ascontiguousarray(pixels >> spare if spare else pixels).astype(np.uint8, copy=False)


# --- where to look --------------------------------------------------------------------------------------------


def _block_extremes(gray: Gray) -> tuple[Gray, Gray]:
    """Lowest and highest value of each whole 4x4 block and of the row and column after it."""
    rows, columns = (side // BLOCK for side in gray.shape)
    bands = gray[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns * BLOCK)
    low, high = bands.min(axis=1), bands.max(axis=1)
    # Edges of enlarged pixel fonts may fall between the blocks everywhere.
    low[:-1], high[:-1] = np.minimum(low[:-1], bands[1:, 0]), np.maximum(high[:-1], bands[1:, 0])
    ends, starts = slice(BLOCK - 1, -1, BLOCK), slice(BLOCK, None, BLOCK)
    low[:, ends] = np.minimum(low[:, ends], low[:, starts])
    high[:, ends] = np.maximum(high[:, ends], high[:, starts])
    for _ in range(2):
        low, high = np.minimum(low[:, ::2], low[:, 1::2]), np.maximum(high[:, ::2], high[:, 1::2])
    return low, high


def _least_contrast(gray: Gray, low: Gray, high: Gray) -> int:
    """The contrast below which a block counts as flat: above the grain of the scan.

    What a block spans is grain or, in a small scan, the slope of anatomy; what bends within five pixels is grain.
    """
    spans = _upper_quartile((high - low)[::3, ::3])
    if 2.0 * spans <= LEAST_CONTRAST:
        return LEAST_CONTRAST
    rows = gray[5::11].astype(np.int16)
    bends = np.abs(rows[:, 4:] + rows[:, :-4] - 2 * rows[:, 2:-2])
    grain = min(spans, 2.0 * _upper_quartile(bends[:, ::3]))
    return int(max(LEAST_CONTRAST, min(2.0 * grain, 120.0)))


def _upper_quartile(values: npt.NDArray[Any]) -> float:
    """What `np.percentile(values, 75)` gives, in a third of its time."""
    below, part = divmod(0.75 * (values.size - 1), 1.0)
    place = int(below)
    above = min(place + 1, values.size - 1)
    ordered = np.partition(values, (place, above), axis=None)
    return float(ordered[place]) + part * (float(ordered[above]) - float(ordered[place]))


def _windows(low: Gray, high: Gray, floor: int) -> Iterator[Window]:
    """Boxes of cells, each around neighbouring cells in which a block spans most of the cell's contrast."""
    per = CELL // BLOCK
    shape = tuple(-(-side // per) for side in low.shape)
    low, high = (
        np.pad(a, [(0, n * per - s) for n, s in zip(shape, a.shape, strict=True)], mode="edge") for a in (low, high)
    )
    low, high = (a.reshape(shape[0], per, shape[1], per).swapaxes(1, 2).reshape(*shape, -1) for a in (low, high))
    spans = high - low
    whole = high.max(axis=2) - low.min(axis=2)
    cells = (np.maximum(floor, 0.6 * whole)[..., None] <= spans).sum(axis=2) >= 2
    if not cells.any():
        return
    labels, _ = _labelled(ndimage.binary_dilation(cells, _EIGHT))
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        own = cells[box] & (labels[box] == number)
        yield from _split(own, box[0].start, box[1].start)


def _split(cells: Mask, top: int, left: int) -> Iterator[Window]:
    """The box of the cells, or, where it is large and mostly empty (a frame, a tube), those of its two parts."""
    # A scan's cells are few, and cut a hundred times: what NumPy's functions do around their loops is what this costs.
    of_rows, of_columns = np.add.reduce(cells, 1, np.int64), np.add.reduce(cells, 0, np.int64)
    rows, columns = of_rows.nonzero()[0], of_columns.nonzero()[0]
    if not len(rows):
        return
    kept = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    cells, of_rows, of_columns = cells[kept], of_rows[kept[0]], of_columns[kept[1]]
    top, left = top + kept[0].start, left + kept[1].start
    height, width = cells.shape
    if cells.size <= 64 or np.add.reduce(of_rows) > 0.5 * cells.size:
        yield top, left, top + height, left + width
    elif height >= width:
        cut = _gap(of_rows)
        yield from _split(cells[:cut], top, left)
        yield from _split(cells[cut:], top + cut, left)
    else:
        cut = _gap(of_columns)
        yield from _split(cells[:, :cut], top, left)
        yield from _split(cells[:, cut:], top, left + cut)


def _gap(counts: Whole) -> int:
    """Where to cut: at the emptiest place of the middle half, so that lines stay whole where they can."""
    start = len(counts) // 4
    between = counts[start : len(counts) - start] + counts[start - 1 : len(counts) - start - 1]
    return start + int(between.argmin())


def _rises(gray: Gray, floor: int) -> Mask:
    """Where along the rows a steep rise begins: its third column at [r, c] is c + 3."""
    steep = floor * 3 // 4
    steps = gray[:, 2:] > np.minimum(gray[:, :-2], 255 - steep) + np.uint8(steep)
    return np.asarray(steps[:, 1:] > steps[:, :-1])


def _is_busy(across: Mask, down: Mask, window: Window) -> bool:
    """Whether rows or columns through the window rise as often as they do through a line of text.

    `across` are the rises along the rows of the scan, `down` those along its columns, rows and columns exchanged.
    """
    top, left, bottom, right = (CELL * edge for edge in window)
    top, left, bottom, right = max(0, top - CELL), max(0, left - CELL), bottom + CELL, right + CELL
    return _is_crossed(across[top:bottom:3, left : right - 3]) or _is_crossed(down[left:right:3, top : bottom - 3])


def _is_crossed(rises: Mask) -> bool:
    if np.count_nonzero(rises) < 2 * LEAST_GLYPHS:
        return False
    return bool(np.count_nonzero(np.add.reduce(rises, 1, np.int64) >= LEAST_GLYPHS) >= 2)


# --- glyphs ---------------------------------------------------------------------------------------------------


def _glyphs(gray: Gray, low: Gray, high: Gray, window: Window, floor: int) -> Iterator[_Glyphs]:
    """The glyph-like components of a window, bright ones and dark ones apart."""
    per = CELL // BLOCK
    rows = slice(max(0, window[0] * per - 4), min(low.shape[0], window[2] * per + 4))
    columns = slice(max(0, window[1] * per - 4), min(low.shape[1], window[3] * per + 4))
    dark = ndimage.minimum_filter(low[rows, columns], 5).astype(np.int16)
    bright = ndimage.maximum_filter(high[rows, columns], 5).astype(np.int16)
    contrast = bright - dark
    ones = np.ones((BLOCK, BLOCK), dtype=np.int16)
    seen = np.kron(contrast >= floor, ones.astype(np.bool_))
    cut = np.kron((bright + dark) // 2, ones)
    spread = np.kron(np.maximum(contrast, 1), ones)
    top, left = rows.start * BLOCK, columns.start * BLOCK
    part = gray[top : rows.stop * BLOCK, left : columns.stop * BLOCK].astype(np.int16)
    for sign in (1, -1):
        mask = seen & (sign * part > sign * cut)
        yield _measured(sign * part, mask, spread, (top, left))


def _measured(part: Signed, mask: Mask, spread: Signed, corner: tuple[int, int]) -> _Glyphs:
    """The glyph-like ones of the mask's components; `part` is bright where ink is, `spread` the local contrast."""
    labels, count = _labelled(mask)
    boxes = _boxes(labels)
    sides = boxes[:, 2:] - boxes[:, :2]
    area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    down, fall = _edges(part.T, mask.T, spread.T, labels.T, count)
    across, rise = _edges(part, mask, spread, labels, count)
    stroke = area / np.maximum(np.maximum(down, across), 1)
    longer, shorter = sides.max(axis=1), sides.min(axis=1)
    fits = (
        (longer >= HEIGHT_PX[0])
        & (shorter <= HEIGHT_PX[1])
        & (longer <= 14 * shorter)
        & (stroke <= 0.5 * longer)
        & (area >= 0.12 * longer * shorter)
        & (fall + rise >= 0.5 * (down + across))
    )
    which = np.flatnonzero(fits)
    ink = ndimage.maximum(part, labels, which + 1) if len(which) else np.zeros(0)
    kept = boxes[which] + np.asarray(corner + corner)
    top, left, bottom, right = kept.T
    return _Glyphs(top, left, bottom, right, np.asarray(ink, dtype=np.float64), stroke[which])


def _edges(part: Signed, mask: Mask, spread: Signed, labels: Labels, count: int) -> tuple[Whole, Floats]:
    """Per component, along the rows: how many strokes begin, and the sum of their rises in parts of the contrast."""
    row, column = np.nonzero(mask[:, 2:-1] & ~mask[:, 1:-2])
    owner = labels[row, column + 2] - 1
    inside = np.maximum(part[row, column + 2], part[row, column + 3])
    outside = np.minimum(part[row, column], part[row, column + 1])
    rise = (inside - outside) / spread[row, column + 2]
    begun = np.bincount(owner, minlength=count).astype(np.int64)
    return begun, np.bincount(owner, weights=rise, minlength=count).astype(np.float64)


def _labelled(mask: npt.NDArray[Any]) -> tuple[Labels, int]:
    """The mask's components, numbered from 1, and how many they are; corners connect."""
    # SciPy's types leave open what comes back.
    found: Any = ndimage.label(mask, _EIGHT)
    return np.asarray(found[0], dtype=np.int32), int(found[1])


def _boxes(labels: Labels) -> Whole:
    found = ndimage.find_objects(labels)
    boxes = [(b[0].start, b[1].start, b[0].stop, b[1].stop) for b in found if b is not None]
    return np.asarray(boxes, dtype=np.int64).reshape(-1, 4)


# --- lines ----------------------------------------------------------------------------------------------------


def _lines(glyphs: _Glyphs) -> Iterator[TextLine]:
    """Lines of text among the glyphs of one window and polarity, lying and upright."""
    if len(glyphs) < LEAST_PARTS:
        return
    yield from _rows(glyphs)
    for line in _rows(glyphs.turned()):
        yield TextLine(line.left, line.top, line.width, line.height, line.glyphs)


def _rows(glyphs: _Glyphs) -> Iterator[TextLine]:
    """Lying lines among the glyphs; where there are very many, among those of the upper and the lower half."""
    if len(glyphs) > MOST_TOGETHER:
        order = np.argsort(glyphs.top, kind="stable")
        for half in np.array_split(order, 2):
            yield from _rows(glyphs.at(half))
        return
    height, width = glyphs.bottom - glyphs.top, glyphs.right - glyphs.left
    # Glyphs that touch are one component.
    narrow = (width <= 4 * height) | ((width <= 14 * height) & (glyphs.stroke <= 0.5 * height))
    standing = glyphs.at(np.flatnonzero((height >= HEIGHT_PX[0]) & (height <= HEIGHT_PX[1]) & narrow))
    first, second = _neighbours(standing)
    links = coo_array((np.ones(len(first)), (first, second)), shape=(len(standing), len(standing)))
    groups, member = connected_components(links, directed=False)
    for group in np.flatnonzero(np.bincount(member, minlength=groups) >= LEAST_PARTS):
        line = _line(standing.at(np.flatnonzero(member == group)))
        if line is not None:
            yield line


def _neighbours(glyphs: _Glyphs) -> tuple[Whole, Whole]:
    """Pairs of glyphs that may stand beside each other in a line."""
    height = glyphs.bottom - glyphs.top
    taller = np.maximum(height[:, None], height[None, :])
    shorter = np.minimum(height[:, None], height[None, :])
    gap = glyphs.left[None, :] - glyphs.right[:, None]
    base = np.abs(glyphs.bottom[None, :] - glyphs.bottom[:, None])
    beside = (
        (glyphs.left[None, :] >= glyphs.left[:, None])
        & (taller <= 1.8 * shorter)
        & (gap >= -0.4 * taller)
        & (gap <= 1.5 * taller)
        & (base <= np.maximum(0.35 * taller, 1))
    )
    np.fill_diagonal(beside, False)
    first, second = np.nonzero(beside)
    return first, second


def _line(glyphs: _Glyphs) -> TextLine | None:
    """The line of neighbouring glyphs; None unless most stand on one base line and all are of one ink."""
    height, width = glyphs.bottom - glyphs.top, glyphs.right - glyphs.left
    size = float(np.percentile(height, 75))
    slack = max(1.0, 0.1 * size)
    standing = np.abs(glyphs.bottom - np.median(glyphs.bottom)) <= slack
    count = int(np.maximum(1, np.rint(width / (0.9 * size))).sum())
    even = np.std(glyphs.ink) <= 0.15 * 255
    if count < LEAST_GLYPHS or standing.sum() < max(LEAST_PARTS, 0.6 * len(glyphs)) or not even:
        return None
    top, left = int(glyphs.top.min()), int(glyphs.left.min())
    return TextLine(top, left, int(glyphs.bottom.max()) - top, int(glyphs.right.max()) - left, count)


def _joined(lines: Iterable[TextLine]) -> tuple[TextLine, ...]:
    """The lines without those that two windows both saw parts of: overlapping boxes become one."""
    joined: list[TextLine] = []
    for line in lines:
        whole = line
        while parts := [other for other in joined if _overlap(whole, other)]:
            whole = reduce(_union, parts, whole)
            joined = [other for other in joined if other not in parts]
        joined.append(whole)
    return tuple(sorted(joined, key=lambda line: (line.top, line.left)))


def _overlap(one: TextLine, other: TextLine) -> bool:
    return (
        one.top < other.top + other.height
        and other.top < one.top + one.height
        and one.left < other.left + other.width
        and other.left < one.left + one.width
    )


def _union(one: TextLine, other: TextLine) -> TextLine:
    top, left = min(one.top, other.top), min(one.left, other.left)
    height = max(one.top + one.height, other.top + other.height) - top
    width = max(one.left + one.width, other.left + other.width) - left
    longest = max(one.height, one.width) + max(other.height, other.width)
    glyphs = round((one.glyphs + other.glyphs) * max(height, width) / longest)
    return TextLine(top, left, height, width, max(one.glyphs, other.glyphs, glyphs))
