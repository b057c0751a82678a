"""The corpus's square: where its pixels lie in the patient is where the scan's lay."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanloom.scans.image import Geometry, ScanImage
from scanloom.scans.resize import Resize, fit

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(20, 90),
    st.integers(20, 90),
    st.sampled_from([(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)]),
    st.sampled_from(["letterbox", "crop"]),
    st.sampled_from([16, 32, 64]),
)
def test_a_bright_spot_has_the_same_place_in_the_patient_before_and_after(
    rows: int, columns: int, spacing: tuple[float, float], how: Resize, size: int
) -> None:
    """Its centre of mass, in millimetres, to half a pixel of the coarser grid, which may hold it in one pixel.

    A letterbox rounds the scan's shorter side to whole pixels: its middle moves by a quarter of one at most.
    """
    down, across = (np.arange(n) for n in (rows, columns))
    centre = rows * 0.51, columns * 0.48
    spot = np.exp(-0.5 * (((down - centre[0]) / 1.2) ** 2)[:, None] - 0.5 * (((across - centre[1]) / 1.2) ** 2)[None])
    image = ScanImage(np.rint(60000 * spot).astype(np.uint16), Geometry(spacing, "L\\P", AXIAL, (-40.0, 25.0, 7.0)))
    square = fit(image, size, how)
    coarse = max(*spacing, square.geometry.spacing_mm[0] if square.geometry.spacing_mm else 0)
    np.testing.assert_allclose(
        place(square.pixels, square.geometry), place(image.pixels, image.geometry), atol=0.75 * coarse
    )
    assert square.geometry.direction == AXIAL
    assert square.geometry.orientation == "L\\P"
    assert square.geometry.position_mm is not None
    assert square.geometry.position_mm[2] == 7.0


def place(pixels: np.ndarray, geometry: Geometry) -> tuple[float, float]:
    """Centre of mass along x and y in mm, of an axial frame."""
    assert geometry.spacing_mm is not None
    assert geometry.position_mm is not None
    weights = pixels.astype(float)
    row = (weights.sum(1) * np.arange(pixels.shape[0])).sum() / weights.sum()
    column = (weights.sum(0) * np.arange(pixels.shape[1])).sum() / weights.sum()
    return (
        geometry.position_mm[0] + column * geometry.spacing_mm[1],
        geometry.position_mm[1] + row * geometry.spacing_mm[0],
    )


def test_an_oblique_frame_moves_along_its_own_axes() -> None:
    along, down = (0.6, 0.8, 0.0), (0.0, 0.0, -1.0)
    image = ScanImage(np.eye(64, dtype=np.uint8) * 255, Geometry((1.0, 1.0), "", (*along, *down), (10.0, 20.0, 30.0)))
    square = fit(image, 32, "letterbox")
    # The first new pixel covers two by two old ones: its centre is half an old pixel further along both axes.
    assert square.geometry.position_mm == pytest.approx((10.3, 20.4, 29.5))
    assert square.geometry.spacing_mm == (2.0, 2.0)


def test_without_spacing_no_place_is_claimed() -> None:
    image = ScanImage(np.eye(64, dtype=np.uint8), Geometry(None, "", AXIAL, (1.0, 2.0, 3.0)))
    geometry = fit(image, 32, "letterbox").geometry
    assert geometry.spacing_mm is None
    assert geometry.position_mm is None


@pytest.mark.parametrize("how", ["letterbox", "crop"])
@pytest.mark.parametrize("spacing", [(1e-3, 1e3), (1e307, 1e307), (1e-300, 1.0)])
def test_a_spacing_that_lies_costs_neither_the_memory_nor_the_job(how: Resize, spacing: tuple[float, float]) -> None:
    image = ScanImage(
        np.arange(64 * 64, dtype=np.uint16).reshape(64, 64), Geometry(spacing, "", AXIAL, (0.0, 0.0, 0.0))
    )
    tracemalloc.start()
    square = fit(image, 1024, how)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert square.pixels.shape == (1024, 1024)
    assert peak < 64 << 20


@pytest.mark.parametrize("how", ["letterbox", "crop"])
def test_a_strip_is_no_bomb(how: Resize) -> None:
    """Scaled as a whole to a height of 256 it would have 6.5 thousand million pixels."""
    image = ScanImage(np.tile(np.arange(200_000, dtype=np.uint16) % 999, (2, 1)))
    assert fit(image, 256, how).pixels.shape == (256, 256)


@pytest.mark.parametrize("shape, middle", [((100, 60), np.s_[20:80, :]), ((60, 100), np.s_[:, 20:80])])
def test_a_crop_is_the_centre_and_the_middle_of_the_centre_alone(shape: tuple[int, int], middle: Any) -> None:
    pixels = np.random.default_rng(1).integers(0, 65536, shape, dtype=np.uint16)
    np.testing.assert_array_equal(fit(ScanImage(pixels), 60, "crop").pixels, pixels[middle])
    halved, alone = (fit(ScanImage(p), 30, "crop").pixels for p in (pixels, pixels[middle].copy()))
    np.testing.assert_array_equal(halved, alone)


def test_pixels_that_are_not_square_are_made_so_where_their_number_fits_already() -> None:
    pixels = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32)
    square = fit(ScanImage(pixels, Geometry((2.0, 1.0))), 32, "crop")
    assert square.geometry.spacing_mm == (1.0, 1.0)
    # Rows are doubled and half of the columns stays.
    np.testing.assert_allclose(np.diff(square.pixels.astype(int), axis=0)[4:-4], 16, atol=3)
    np.testing.assert_array_equal(np.diff(square.pixels.astype(int), axis=1)[4:-4], 1)


@pytest.mark.parametrize("times", [(1, 2), (2, 2), (3, 3), (4, 4), (5, 1), (16, 16), (32, 32)])
def test_whole_pixels_are_averaged_to_the_nearest_value_whatever_their_number(times: tuple[int, int]) -> None:
    """Also of the largest values there are, and of two as near: then it is the even one."""
    down, across = times
    pixels = np.random.default_rng(2).integers(0, 65536, (32 * down, 32 * across), dtype=np.uint16)
    pixels[: 4 * down] = 65535
    pixels[4 * down : 8 * down, ::2] = 1
    pixels[4 * down : 8 * down, 1::2] = 2
    exact = pixels.reshape(32, down, 32, across).mean(axis=(1, 3), dtype=np.float64)
    square = fit(ScanImage(pixels, Geometry((1.0 / down, 1.0 / across))), 32, "letterbox")
    np.testing.assert_array_equal(square.pixels, np.rint(exact))
