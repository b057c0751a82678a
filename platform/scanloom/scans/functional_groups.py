"""What the header says of one frame: its own functional groups, else the shared ones, else the top level."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydicom
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag

from scanloom.scans.quarantine import reject

# PS3.3 C.7.6.16.2: the macro in which an enhanced object keeps an attribute.
MACROS: Mapping[str, str] = {
    "PixelSpacing": "PixelMeasuresSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "VOILUTFunction": "FrameVOILUTSequence",
    "VOILUTSequence": "FrameVOILUTSequence",
    "PatientOrientation": "PatientOrientationInFrameSequence",
}

# pydicom parses values when they are asked for, and makes an object of each number in a text: the largest that is
# asked for here, a palette of 65,536 words, is half of this.
_LONGEST_VALUE = 256 << 10


class FrameHeader:
    """The values of one frame's attributes by keyword, each None where it is absent, empty or no such value.

    Nothing of the values may reach a message.
    """

    def __init__(self, dataset: Dataset, frame: int = 0) -> None:
        self._top = dataset
        self._groups = tuple(_groups(dataset, frame))

    @property
    def byte_order(self) -> str:
        """The order of the bytes in words that pydicom leaves as they are: < or >."""
        return ">" if self._top.original_encoding[1] is False else "<"

    def value(self, keyword: str) -> Any:
        """The value as Python's own numbers and texts; None also for what is unreadable. Raises ScanError too-large."""
        for level in self._levels(keyword):
            found = _value(level, keyword)
            if found is not None:
                return found
        return None

    def whole(self, keyword: str) -> int | None:
        """An integer. Raises ScanError unsupported-pixels where something else stands there."""
        value = _first(self.value(keyword))
        if value is None:
            return None
        try:
            return int(value)
        except (TypeError, ValueError, OverflowError):
            raise reject("unsupported-pixels", keyword) from None

    def numbers(self, keyword: str) -> tuple[float, ...]:
        """Finite numbers, all or none."""
        value = self.value(keyword)
        if value is None:
            return ()
        try:
            found = tuple(float(v) for v in (value if isinstance(value, MultiValue | list | tuple) else (value,)))
        except (TypeError, ValueError, OverflowError):
            return ()
        return found if all(map(math.isfinite, found)) else ()

    def term(self, keyword: str) -> str:
        """A code string such as MONOCHROME2; empty where there is none."""
        value = _first(self.value(keyword))
        return value.strip() if isinstance(value, str) else ""

    def item(self, keyword: str) -> Dataset | None:
        """The first item of a sequence."""
        found = (sequence(level, keyword) for level in self._levels(keyword))
        return next((items[0] for items in found if items), None)

    def _levels(self, keyword: str) -> Iterator[Dataset]:
        macro = MACROS.get(keyword)
        for group in self._groups if macro else ():
            items = sequence(group, str(macro))
            if items:
                yield items[0]
        yield self._top


def sequence(dataset: Dataset, keyword: str) -> Sequence[Dataset]:
    """The items of a sequence; none where there is no readable one."""
    value = _value(dataset, keyword)
    return value if isinstance(value, pydicom.Sequence) else ()


def _groups(dataset: Dataset, frame: int) -> Iterator[Dataset]:
    per_frame = sequence(dataset, "PerFrameFunctionalGroupsSequence")
    if frame < len(per_frame):
        yield per_frame[frame]
    shared = sequence(dataset, "SharedFunctionalGroupsSequence")
    if shared:
        yield shared[0]


@functools.cache
def _tag(keyword: str) -> BaseTag:
    return Tag(keyword)


def _value(dataset: Dataset, keyword: str) -> Any:
    # By tag: by keyword, pydicom takes several times as long, and a header is asked for some thirty attributes.
    tag = _tag(keyword)
    if tag not in dataset.keys():  # noqa: SIM118 - the dataset itself makes a tag of whatever it is asked for
        return None
    element = dataset.get_item(tag, keep_deferred=True)
    if isinstance(element, RawDataElement):
        if element.length > _LONGEST_VALUE and not keyword.endswith("Sequence"):
            raise reject("too-large", keyword)
        plain = _plain(element, tag)
        if plain is not None:
            return plain
    try:
        value = dataset[tag].value
    except Exception:  # noqa: BLE001 - pydicom converts values when they are asked for; junk raises anything
        return None
    return None if value is None or value == "" or value == b"" else value


def _plain(element: RawDataElement, tag: BaseTag) -> Any:
    """The value of the plainest kinds of element; None for every other, and for one that is not what its VR says.

    pydicom's own conversion makes an object of its classes of each value, which takes ten times as long.
    """
    raw = element.value
    if not isinstance(raw, bytes) or not raw:
        return None
    vr = element.VR or _vr(tag)
    if vr == "US" and len(raw) == 2:
        return int.from_bytes(raw, "little" if element.is_little_endian else "big")
    if vr not in ("DS", "IS", "CS", "UI") or not raw.isascii():
        return None
    words = [word.strip(" \0") for word in raw.decode("ascii").split("\\")]
    if vr in ("DS", "IS"):
        try:
            numbers = [float(word) if vr == "DS" else int(word) for word in words]
        except ValueError:
            return None
        return numbers[0] if len(numbers) == 1 else numbers
    return None if not any(words) else words[0] if len(words) == 1 else words


@functools.cache
def _vr(tag: BaseTag) -> str:
    return dictionary_VR(tag) if dictionary_has_tag(tag) else ""


def _first(value: Any) -> Any:
    if isinstance(value, MultiValue | list | tuple):
        return value[0] if len(value) else None
    return value
