"""Lookup tables of DICOM: modality and VOI LUTs (PS3.3 C.11.1, C.11.2) and palettes, segmented or not (C.7.9)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from scanloom.scans.functional_groups import FrameHeader
from scanloom.scans.quarantine import reject

Doubles = npt.NDArray[np.float64]
Entries = npt.NDArray[np.uint16]

_DISCRETE, _LINEAR, _INDIRECT = 0, 1, 2


@dataclass(frozen=True)
class Lut:
    """`entries` are u16 of native order with `bits` bits, the first for the value `first` and all below it."""

    first: int
    bits: int
    entries: bytes

    def __call__(self, values: Doubles) -> Doubles:
        table = np.frombuffer(self.entries, np.uint16)
        places = np.clip(np.rint(values) - self.first, 0, len(table) - 1).astype(np.intp)
        return np.asarray(table[places], dtype=np.float64)

    @property
    def last(self) -> int:
        return self.first + len(self.entries) // 2 - 1


def lut_of_item(item: Dataset, *, signed: bool) -> Lut:
    """The LUT of a sequence's item; `signed` if its input is. Raises ScanError unsupported-pixels, too-large."""
    header = FrameHeader(item)
    count, first, bits = _descriptor(header, "LUTDescriptor", signed=signed)
    return Lut(first, bits, _entries(header, "LUTData", count).tobytes())


def palette(dataset: Dataset, *, signed: bool) -> tuple[Lut, Lut, Lut]:
    """Red, green and blue. Raises ScanError unsupported-pixels, too-large."""
    header = FrameHeader(dataset)
    tables = []
    for colour in ("Red", "Green", "Blue"):
        name = f"{colour}PaletteColorLookupTable"
        count, first, bits = _descriptor(header, f"{name}Descriptor", signed=signed)
        if header.value(f"{name}Data") is not None:
            entries = _entries(header, f"{name}Data", count)
        else:
            entries = _segmented(header, f"Segmented{name}Data", count, bits)
        tables.append((first, entries))
    # Some writers say 16 and fill 8.
    bits = 8 if max(int(entries.max()) for _, entries in tables) < 256 else 16
    red, green, blue = (Lut(first, bits, entries.tobytes()) for first, entries in tables)
    return red, green, blue


def _descriptor(header: FrameHeader, keyword: str, *, signed: bool) -> tuple[int, int, int]:
    numbers = [int(v) for v in header.numbers(keyword)]
    if len(numbers) != 3 or not 0 <= numbers[0] <= 1 << 16 or not 1 <= numbers[2] <= 16:
        raise reject("unsupported-pixels", keyword)
    count, first, bits = numbers
    # The first input value has the sign of the input, whatever representation it was written in.
    return count or 1 << 16, first - (1 << 16) if signed and first >= 1 << 15 else first, bits


def _entries(header: FrameHeader, keyword: str, count: int) -> Entries:
    """`count` entries: words, or bytes of which some writers pack two in a word."""
    data = header.value(keyword)
    if isinstance(data, bytes):
        kind = "u1" if len(data) < 2 * count else f"{header.byte_order}u2"
        entries = np.frombuffer(data, kind)[:count].astype(np.uint16)
    else:
        entries = np.asarray(header.numbers(keyword)[:count]).astype(np.uint16)
    if len(entries) != count:
        raise reject("unsupported-pixels", keyword)
    return entries


def _segmented(header: FrameHeader, keyword: str, count: int, bits: int) -> Entries:
    data = header.value(keyword)
    if not isinstance(data, bytes):
        raise reject("unsupported-pixels", keyword)
    kind = "u1" if bits <= 8 else f"{header.byte_order}u2"
    words = np.frombuffer(data, kind, len(data) // np.dtype(kind).itemsize).astype(np.int64).tolist()
    try:
        entries = _expand(words, 0, len(words), count, [], wide=bits > 8)
    except IndexError:
        raise reject("unsupported-pixels", keyword) from None
    if len(entries) < count:
        raise reject("unsupported-pixels", keyword)
    return np.array(entries[:count], dtype=np.uint16)


def _expand(words: list[int], place: int, segments: int, count: int, before: list[int], *, wide: bool) -> list[int]:
    """What the segments from `place` on stand for, up to `count` entries; a line starts at the last entry `before`.

    Raises IndexError for segments that are cut or of no known kind.
    """
    entries: list[int] = []
    while segments > 0 and place + 2 < len(words) and len(entries) < count:
        kind, length = words[place], words[place + 1]
        place += 2
        if kind == _DISCRETE and length:
            entries += words[place : place + length]
            place += length
        elif kind == _LINEAR and length:
            entries += _line((entries or before)[-1], words[place], length)
            place += 1
        elif kind == _INDIRECT and entries and not before:
            # Copies earlier segments; none of them may be indirect, so that they cannot go round in circles.
            entries += _expand(words, _target(words[place:], wide=wide), length, count, entries[-1:], wide=wide)
            place += 2 if wide else 4
        else:
            raise IndexError
        segments -= 1
    return entries


def _line(start: int, end: int, length: int) -> list[int]:
    steps = np.linspace(start, end, length + 1)[1:]
    return [int(v) for v in np.rint(steps)]


def _target(words: list[int], *, wide: bool) -> int:
    """The place of a segment, from an offset in bytes: two words or four bytes, the lower ones first."""
    if wide:
        return (words[0] | words[1] << 16) // 2
    return words[0] | words[1] << 8 | words[2] << 16 | words[3] << 24
