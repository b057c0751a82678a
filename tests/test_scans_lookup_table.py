"""Palettes, segmented or not: as pydicom expands them, and within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from scanloom.errors import ScanError
from scanloom.scans.lookup_table import lut_of_item, palette

WELL_KNOWN = sorted((Path(pydicom.__file__).parent / "data" / "palettes").glob("*.dcm"))


@pytest.mark.parametrize("path", WELL_KNOWN, ids=lambda path: path.stem)
def test_the_well_known_palettes_are_pydicoms(path: Path) -> None:
    made = pydicom.dcmread(path)
    values = np.arange(256)
    theirs = apply_color_lut(values, made)
    for channel, table in enumerate(palette(made, signed=False)):
        np.testing.assert_array_equal(table(values.astype(np.float64)), theirs[..., channel])


def segmented(words: list[int], count: int, bits: int = 16) -> Dataset:
    made = Dataset()
    made.set_original_encoding(False, True)
    data = np.array(words, "<u2" if bits == 16 else "u1").tobytes()
    for colour in ("Red", "Green", "Blue"):
        made.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [count, 0, bits])
        made.add_new(f"Segmented{colour}PaletteColorLookupTableData", "OW", data + b"\0" * (len(data) % 2))
    return made


def entries(made: Dataset) -> list[int]:
    return list(np.frombuffer(palette(made, signed=False)[0].entries, np.uint16))


@pytest.mark.parametrize(
    "words, expected",
    [
        ([0, 3, 10, 20, 30], [10, 20, 30]),
        ([0, 1, 0, 1, 4, 200], [0, 50, 100, 150, 200]),
        ([0, 1, 200, 1, 4, 0], [200, 150, 100, 50, 0]),
        # An indirect segment: two segments from byte 0 on, whose line starts from what came before it.
        ([0, 2, 5, 9, 1, 2, 19, 2, 2, 0, 0], [5, 9, 14, 19, 5, 9, 14, 19]),
    ],
)
def test_segments_are_expanded_as_the_standard_says(words: list[int], expected: list[int]) -> None:
    assert entries(segmented(words, len(expected))) == expected


def test_indirect_segments_of_bytes_have_offsets_of_four_bytes() -> None:
    assert entries(segmented([0, 2, 5, 9, 2, 1, 0, 0, 0, 0], 4, bits=8)) == [5, 9, 5, 9]


@pytest.mark.parametrize(
    "words",
    [
        [1, 3, 10],
        [2, 1, 0, 0],
        [0, 9, 1, 2],
        [0, 1, 7],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 7, 2, 1, 6, 0],
        [7, 1, 1, 1],
        [0, 1, 7, 2, 9999, 9999, 9999],
    ],
)
def test_segments_that_lead_nowhere_are_refused(words: list[int]) -> None:
    with pytest.raises(ScanError) as caught:
        palette(segmented(words, 50), signed=False)
    assert (caught.value.code, caught.value.tag) == (
        "unsupported-pixels",
        "SegmentedRedPaletteColorLookupTableData",
    )


def test_segments_never_make_more_than_the_descriptor_says() -> None:
    assert len(entries(segmented([0, 1, 7] + [1, 65535, 9] * 1000, 100))) == 100


def lut_item(descriptor: list[int], data: Any, vr: str = "US") -> Dataset:
    made = Dataset()
    made.set_original_encoding(False, True)
    made.add_new("LUTDescriptor", "US", descriptor)
    made.add_new("LUTData", vr, data)
    return made


def test_luts_are_read_as_words_as_bytes_and_as_packed_bytes() -> None:
    for data, vr in (([1, 2, 3, 4], "US"), (np.arange(1, 5, dtype="<u2").tobytes(), "OW"), (b"\1\2\3\4", "OW")):
        table = lut_of_item(lut_item([4, 10, 8], data, vr), signed=False)
        assert np.frombuffer(table.entries, np.uint16).tolist() == [1, 2, 3, 4]
        assert (table.first, table.last, table.bits) == (10, 13, 8)
        assert table(np.array([-5.0, 10.4, 11.0, 99.0])).tolist() == [1, 1, 2, 4]


def test_a_count_of_zero_is_65536_and_a_first_value_has_the_sign_of_its_input() -> None:
    data = np.arange(65536, dtype="<u2").tobytes()
    assert lut_of_item(lut_item([0, 0, 16], data, "OW"), signed=False).last == 65535
    assert lut_of_item(lut_item([4, 65436, 16], [1, 2, 3, 4]), signed=True).first == -100
    assert lut_of_item(lut_item([4, 65436, 16], [1, 2, 3, 4]), signed=False).first == 65436


@pytest.mark.parametrize("descriptor", [[4, 0], [4, 0, 0], [4, 0, 17], [9, 0, 8]])
def test_luts_that_contradict_themselves_are_refused(descriptor: list[int]) -> None:
    with pytest.raises(ScanError, match="unsupported-pixels"):
        lut_of_item(lut_item(descriptor, [1, 2, 3, 4]), signed=False)
