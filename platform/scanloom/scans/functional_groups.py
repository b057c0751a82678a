"""What the header says of one frame: its own functional groups, else the shared ones, else the top level."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

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
    "PatientOrientation": "PatientOrientationInFrameSequence",
}

# A sequence of a defined length is parsed when it is asked for: no header of 100,000 frames is larger, and one that
# is would take minutes.
_LONGEST_SEQUENCE = 32 << 20


class FrameHeader:
    """The values of one frame's attributes by keyword, each None where it is absent, empty or no such value.

    Values are read from copies of pydicom's elements; nothing of them may reach a message.
    """

    def __init__(self, dataset: Dataset, frame: int = 0) -> None:
        self._top = dataset
        self._groups = tuple(_groups(dataset, frame))

    def value(self, keyword: str) -> Any:
        """The value as pydicom gives it; None also where pydicom cannot read it."""
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

    def item(self, keyword: str, index: int = 0) -> Dataset | None:
        """An item of a sequence; the first where it has no such one."""
        items = sequence(self._top, keyword)
        return items[index if index < len(items) else 0] if items else None

    def _levels(self, keyword: str) -> Iterator[Dataset]:
        macro = MACROS.get(keyword)
        for group in self._groups if macro else ():
            items = sequence(group, str(macro))
            if items:
                yield items[0]
        yield self._top


def sequence(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none where there is no readable one. Raises ScanError too-large."""
    if keyword not in dataset:
        return []
    element = dataset.get_item(keyword)
    if isinstance(element, RawDataElement) and len(element.value or b"") > _LONGEST_SEQUENCE:
        raise reject("too-large", keyword)
    value = _value(dataset, keyword)
    try:
        return [item for item in value or () if isinstance(item, Dataset)]
    except TypeError:
        return []


def _groups(dataset: Dataset, frame: int) -> Iterator[Dataset]:
    per_frame = sequence(dataset, "PerFrameFunctionalGroupsSequence")
    if frame < len(per_frame):
        yield per_frame[frame]
    yield from sequence(dataset, "SharedFunctionalGroupsSequence")[:1]


def _value(dataset: Dataset, keyword: str) -> Any:
    try:
        value = dataset.get(keyword)
    except Exception:  # noqa: BLE001 - pydicom converts values when they are asked for; junk raises anything
        return None
    return None if value is None or value == "" or value == b"" else value


def _first(value: Any) -> Any:
    if isinstance(value, MultiValue | list | tuple):
        return value[0] if len(value) else None
    return value
