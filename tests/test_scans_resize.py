"""The corpus's square: where its pixels lie in the patient is where the scan's lay."""

from __future__ import annotations

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
    """Its centre of mass, in millimetres, to half a pixel of the coarser grid."""
    down, across = (np.arange(n) for n in (rows, columns))
    centre = rows * 0.51, columns * 0.48
    spot = np.exp(-0.5 * (((down - centre[0]) / 1.2) ** 2)[:, None] - 0.5 * (((across - centre[1]) / 1.2) ** 2)[None])
    image = ScanImage(np.rint(60000 * spot).astype(np.uint16), Geometry(spacing, "L\\P", AXIAL, (-40.0, 25.0, 7.0)))
    square = fit(image, size, how)
    coarse = max(*spacing, square.geometry.spacing_mm[0] if square.geometry.spacing_mm else 0)
    np.testing.assert_allclose(
        place(square.pixels, square.geometry), place(image.pixels, image.geometry), atol=0.5 * coarse
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
