"""Windows on values of every type: one table per kind of scan gives what arithmetic on each value gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_voi_lut

from scanloom.errors import ScanError
from scanloom.recipe import FixedWindow, FullWindow, HeaderWindow
from scanloom.scans.grayscale import Grayscale, Rescale, VoiLut, rendered, windowed
from scanloom.scans.image import Rendering
from scanloom.scans.lookup_table import Lut

VALUES = np.random.default_rng(0).integers(-2000, 3000, (40, 50))

numbers = st.floats(-1e4, 1e4).map(lambda v: round(v, 3))


@settings(max_examples=100, deadline=None)
@given(numbers, st.floats(1.0, 5000.0), numbers, st.floats(-5.0, 5.0), st.booleans(), st.sampled_from([8, 16]))
def test_integers_of_16_bits_are_shown_as_the_same_numbers_in_floating_point(
    center: float, width: float, intercept: float, slope: float, inverted: bool, bits: int
) -> None:
    header = Grayscale(
        Rescale(slope, intercept), windows=(windowed(center, width),), inverted=inverted, padding=(-1500, -1200)
    )
    outcomes: list[tuple[Any, object]] = []
    for kind in (np.int16, np.int32, np.float64):
        try:
            outcomes.append(rendered(VALUES.astype(kind), HeaderWindow(), header, bits=bits))
        except ScanError as error:
            outcomes.append((0, error.code))
    for pixels, rendering in outcomes[1:]:
        np.testing.assert_array_equal(outcomes[0][0], pixels)
        assert outcomes[0][1] == rendering


@pytest.mark.parametrize("low, high", [(0, 255), (-128, 127), (0, 65535), (-32768, 32767), (-1, 0), (0, 1), (7, 300)])
def test_every_value_of_a_type_has_its_place_in_the_table(low: int, high: int) -> None:
    kind = next(
        k for k in (np.uint8, np.int8, np.uint16, np.int16) if np.iinfo(k).min <= low and high <= np.iinfo(k).max
    )
    values = np.arange(low, high + 1).astype(kind).reshape(1, -1)
    pixels, rendering = rendered(values, FullWindow())
    np.testing.assert_array_equal(pixels, np.rint((values.astype(float) - low) / (high - low) * 65535))
    assert rendering == Rendering("full", low, high)


def test_voxels_in_floating_point_are_shown_with_nothing_where_they_are_no_number() -> None:
    values = np.array([[np.nan, -1000.0, 0.0], [400.0, np.inf, 2000.0]], dtype=np.float32)
    pixels, rendering = rendered(values, FixedWindow(center=40.0, width=400.0), Grayscale(unit="HU"))
    assert rendering == Rendering("fixed", -160.0, 240.0, "HU")
    assert pixels.tolist() == [[0, 0, 26214], [65535, 65535, 65535]]
    full, rendering = rendered(values, FullWindow())
    assert (rendering.low, rendering.high) == (-1000.0, 2000.0)
    assert full.tolist() == [[0, 0, 21845], [30583, 65535, 65535]]


@pytest.mark.parametrize(
    "values",
    [np.full((3, 3), 7, np.int16), np.full((3, 3), np.nan), np.full((3, 3), 2.5, np.float32), np.full((3, 3), np.inf)],
)
def test_values_that_are_all_the_same_are_blank(values: Any) -> None:
    with pytest.raises(ScanError, match="blank-image"):
        rendered(values, FullWindow())


def test_images_larger_than_a_block_are_whole() -> None:
    values = np.arange(600 * 700, dtype=np.uint32).reshape(600, 700)
    pixels, _ = rendered(values, FullWindow())
    np.testing.assert_array_equal(pixels, np.rint(values / values.max() * 65535))
    small = (values % 65536).astype(np.uint16)
    np.testing.assert_array_equal(rendered(small, FullWindow())[0], small)


@pytest.mark.parametrize("first", [-1000, 0, 500])
def test_a_voi_lut_clamps_and_starts_where_it_says(first: int) -> None:
    entries = np.arange(1000, dtype=np.uint16)
    lut = VoiLut(Lut(first, 10, entries.tobytes()))
    pixels, rendering = rendered(VALUES.astype(np.int16), HeaderWindow(), Grayscale(lut=lut))
    expected = np.clip(VALUES - first, 0, 999) / 1023
    np.testing.assert_array_equal(pixels, np.rint(expected * 65535))
    assert rendering == Rendering("voi-lut", first, first + 999)


def test_a_sigmoid_is_pydicoms() -> None:
    made = Dataset()
    made.BitsStored, made.PixelRepresentation, made.PhotometricInterpretation = 16, 1, "MONOCHROME2"
    made.WindowCenter, made.WindowWidth, made.VOILUTFunction = 100.0, 900.0, "SIGMOID"
    made.RescaleSlope, made.RescaleIntercept = 1.0, 0.0
    theirs = np.asarray(apply_voi_lut(VALUES.astype(np.int16), made))
    header = Grayscale(windows=(windowed(100.0, 900.0, "SIGMOID"),))
    pixels, rendering = rendered(VALUES.astype(np.int16), HeaderWindow(), header)
    np.testing.assert_allclose(pixels, theirs + 32768.0, atol=1.0)
    assert rendering == Rendering("window-1", -350.0, 550.0)
