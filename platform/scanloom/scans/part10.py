"""From the bytes of a DICOM Part 10 file (PS3.10) to its header and its still encoded pixel data.

Two small faults are mended where the recipe allows it, and flagged:

guessed-syntax  the file names no transfer syntax: Explicit or Implicit VR Little Endian, or Explicit VR Big Endian,
                whichever its first element is written in
zero-padded     at most 1 % of the bytes of native pixel data are missing at the end: they become 0
"""

from __future__ import annotations

import io
import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from pydicom import config, uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.values import converters

from scanloom.errors import ScanError
from scanloom.recipe import Decode
from scanloom.scans.image_pixel import ImagePixel, frame_count, image_pixel, pixel_element
from scanloom.scans.quarantine import reject
from scanloom.scans.transfer_syntax import NATIVE

MAX_FILE_BYTES = 512 << 20
"""Of a file, and of what a deflated one inflates to."""
MAX_READS = 1_000_000
"""Reads of the parser, two or three an element: some seconds. Functional groups of 5,000 frames need as many."""

_MOST_META_ELEMENTS = 1000
# A sequence of a defined length is parsed when it is asked for, an object for every eight bytes of it if it is junk.
_LONGEST_SEQUENCE = 4 << 20
_UNDEFINED = 0xFFFFFFFF
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_VRS = frozenset(vr.encode() for vr in converters if len(vr) == 2)

_ALL_IGNORED = [("ignore", None, Warning, None, 0)]
"""The first of the filters after `warnings.simplefilter("ignore")`: to set it again costs more than to look."""

# pydicom's warnings and log lines quote values of the header.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
config.settings.reading_validation_mode = config.IGNORE


@dataclass(frozen=True)
class Instance:
    """One parsed DICOM object; `repairs` names what had to be mended to read it."""

    dataset: Dataset = field(repr=False)
    syntax: uid.UID
    repairs: tuple[str, ...] = ()

    @cached_property
    def pixel(self) -> ImagePixel:
        """The layout of its pixel data. Raises ScanError no-pixels, unsupported-pixels, too-large."""
        with quiet():
            return image_pixel(self.dataset)

    @property
    def frames(self) -> int:
        """Number of Frames. Raises ScanError unsupported-pixels, too-large."""
        with quiet():
            return frame_count(self.dataset)


class _Meter(io.BytesIO):
    """Bytes that can be read so many times: a parser's work is bounded by reads, not by bytes."""

    def __init__(self, data: bytes, start: int) -> None:
        super().__init__(data)
        self.seek(start)
        self._left = MAX_READS

    @property
    def spent(self) -> bool:
        return self._left < 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise reject("too-large")
        return super().read(size)


@contextmanager
def quiet() -> Iterator[None]:
    """Let no warning out: pydicom's quote values of the header."""
    if warnings.filters[:1] == _ALL_IGNORED:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_instance(data: bytes, rules: Decode) -> Instance:
    """One object with its pixel data still encoded.

    Raises ScanError: empty-file, too-large, not-dicom, unreadable-dicom, truncated, unsupported-syntax.
    """
    if not data:
        raise reject("empty-file")
    if len(data) > MAX_FILE_BYTES:
        raise reject("too-large")
    start, syntax = _file_meta(data)
    repairs: tuple[str, ...] = ()
    if syntax is None:
        syntax = _guessed_syntax(data, start, rules)
        repairs = ("guessed-syntax",)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        dataset, cut = _parsed(_inflated(data, start), 0, syntax)
    else:
        dataset, cut = _parsed(data, start, syntax)
    if data[128:132] != b"DICM" and not any(keyword in dataset for keyword in ("SOPClassUID", "Rows")):
        raise reject("not-dicom")
    with quiet():
        if _mended(dataset, syntax, rules, cut):
            repairs = (*repairs, "zero-padded")
    return Instance(dataset, syntax, repairs)


# --- file meta information ------------------------------------------------------------------------------------


def _file_meta(data: bytes) -> tuple[int, uid.UID | None]:
    """Where the data set begins, and the transfer syntax that the file meta information names.

    Files without preamble or prefix are common in old archives. Raises ScanError not-dicom.
    """
    place = 132 if data[128:132] == b"DICM" else 4 if data[:4] == b"DICM" else 0
    if place == 0 and not _looks_like_element(data):
        raise reject("not-dicom")
    syntax = None
    for _ in range(_MOST_META_ELEMENTS):
        if data[place : place + 2] != b"\2\0":
            break
        element = int.from_bytes(data[place + 2 : place + 4], "little")
        head, length = _value_place(data, place)
        if element == 0x0010:
            text = data[head : head + length].decode("ascii", "replace").strip(" \0")
            syntax = uid.UID(text) if text else None
        place = head + length
    return place, syntax


def _value_place(data: bytes, place: int) -> tuple[int, int]:
    """Where the value of the element at `place` begins, and its length; Little Endian, explicit VR or not."""
    vr = data[place + 4 : place + 6]
    if vr in _LONG_VRS:
        return place + 12, int.from_bytes(data[place + 8 : place + 12], "little")
    if vr in _VRS:
        return place + 8, int.from_bytes(data[place + 6 : place + 8], "little")
    return place + 8, int.from_bytes(data[place + 4 : place + 8], "little")


def _looks_like_element(data: bytes) -> bool:
    """Whether a file without prefix begins with an element of group 0002 or 0008."""
    return len(data) >= 16 and data[:2] in (b"\2\0", b"\x08\0", b"\0\x08") and data[3 if data[0] else 2] == 0


def _guessed_syntax(data: bytes, start: int, rules: Decode) -> uid.UID:
    if not rules.repair:
        raise reject("unsupported-syntax" if start else "not-dicom", "TransferSyntaxUID" if start else "")
    if data[start + 4 : start + 6] not in _VRS:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRBigEndian if data[start] == 0 and data[start + 1] else uid.ExplicitVRLittleEndian


def _inflated(data: bytes, start: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(memoryview(data)[start:], MAX_FILE_BYTES + 1)
    except zlib.error:
        raise reject("truncated") from None
    if len(inflated) > MAX_FILE_BYTES:
        raise reject("too-large")
    if not inflater.eof:
        raise reject("truncated")
    return inflated


# --- data set -------------------------------------------------------------------------------------------------


def _parsed(data: bytes, start: int, syntax: uid.UID) -> tuple[Dataset, bool]:
    """The data set, and whether its last element is cut."""
    big = syntax == uid.ExplicitVRBigEndian
    meter = _Meter(data, start)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dataset = read_dataset(meter, syntax == uid.ImplicitVRLittleEndian, not big)
        except Exception:  # noqa: BLE001 - a parser meets junk with any exception; its text may quote the junk
            raise reject("too-large" if meter.spent else "unreadable-dicom") from None
    if pixel_element(dataset) and sum(map(_unparsed_bytes, dataset.values())) > _LONGEST_SEQUENCE:
        raise reject("too-large")
    # pydicom returns what it could read of a cut file: with a warning where an item is open, without a word where
    # a value is short.
    if any("End of file" in str(w.message) for w in caught):
        raise reject("truncated")
    return dataset, any(map(_is_cut, dataset.values()))


def _unparsed_bytes(element: object) -> int:
    """Bytes that may turn out to be a sequence; a private one is not asked for."""
    if not isinstance(element, RawDataElement) or element.VR not in (None, "SQ", "UN"):
        return 0
    return 0 if element.tag.is_private or element.tag.group == 0x7FE0 else len(element.value or b"")


def _is_cut(element: object) -> bool:
    if not isinstance(element, RawDataElement) or element.value is None or element.length == _UNDEFINED:
        return False
    return len(element.value) < element.length


def _mended(dataset: Dataset, syntax: uid.UID, rules: Decode, cut: bool) -> bool:
    """Fill up native pixel data that is a little short. Raises ScanError truncated for other cuts."""
    keyword = pixel_element(dataset)
    element = dataset.get_item(keyword, keep_deferred=True) if keyword else None
    cut_pixels = cut and element is not None and _is_cut(element)
    if cut and not cut_pixels:
        raise reject("truncated")
    needed = _native_bytes(dataset) if syntax in NATIVE and rules.repair else 0
    missing = needed - len(element.value) if element is not None and isinstance(element.value, bytes) else needed
    mendable = element is not None and needed > 0 and missing * 100 <= needed
    if cut_pixels and not mendable:
        raise reject("truncated", keyword)
    if element is not None and mendable and missing > 0:
        dataset.add_new(element.tag, element.VR or "OW", element.value + bytes(missing))
    return mendable and (cut_pixels or missing > 0)


def _native_bytes(dataset: Dataset) -> int:
    """What native pixel data needs; 0 where the header does not say."""
    try:
        return image_pixel(dataset).native_bytes
    except ScanError:
        return 0
