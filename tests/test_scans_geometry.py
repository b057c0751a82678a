"""Spacing, orientation and position: what a header means, and that nothing else of it passes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from scanloom.scans.functional_groups import FrameHeader
from scanloom.scans.geometry import geometry, with_square_pixels
from scanloom.scans.image import Geometry
from tests.made_dicom import radiograph


def read(**elements: Any) -> Geometry:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return geometry(FrameHeader(made))


def test_spacing_is_of_the_object_before_of_the_detector_before_of_the_film() -> None:
    everything: dict[str, Any] = {
        "PixelSpacing": [0.5, 0.25],
        "ImagerPixelSpacing": [0.143, 0.2],
        "NominalScannedPixelSpacing": [0.1, 0.1],
    }
    assert read(**everything).spacing_mm == (0.5, 0.25)
    del everything["PixelSpacing"]
    assert read(**everything).spacing_mm == (0.143, 0.2)
    del everything["ImagerPixelSpacing"]
    assert read(**everything).spacing_mm == (0.1, 0.1)
    assert read().spacing_mm is None


@pytest.mark.parametrize("spacing", [[0.0, 0.0], [-1.0, 1.0], [1.0], [1.0, 2.0, 3.0], "wide"])
def test_impossible_spacing_is_none(spacing: Any) -> None:
    made = Dataset()
    made.add_new("PixelSpacing", "LO" if spacing == "wide" else "DS", spacing)
    assert geometry(FrameHeader(made)).spacing_mm is None


def test_magnified_detector_spacing_is_that_in_the_patient() -> None:
    magnified = read(ImagerPixelSpacing=[0.2, 0.3], EstimatedRadiographicMagnificationFactor=1.25)
    assert magnified.spacing_mm == pytest.approx((0.16, 0.24))
    # A patient cannot be behind the detector.
    assert read(ImagerPixelSpacing=[0.2, 0.3], EstimatedRadiographicMagnificationFactor=0.5).spacing_mm == (0.2, 0.3)
    assert read(PixelSpacing=[0.2, 0.3], EstimatedRadiographicMagnificationFactor=1.25).spacing_mm == (0.2, 0.3)


def header_of(**elements: Any) -> FrameHeader:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return FrameHeader(made)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    "ratio, shape", [([2, 1], (96, 40)), ([1, 2], (48, 80)), ([4, 3], (64, 40)), ([1, 1], (48, 40))]
)
def test_pixels_of_which_only_the_aspect_is_known_are_made_square(ratio: Any, shape: Any, bits: int) -> None:
    pixels = radiograph(bits)
    squared = with_square_pixels(pixels, header_of(PixelAspectRatio=ratio))
    assert squared.shape == shape
    assert squared.dtype == pixels.dtype
    assert float(squared.mean()) == pytest.approx(float(pixels.mean()), rel=0.01)


@pytest.mark.parametrize("ratio", [[0, 1], [-2, 1], [1, 100], [2]])
def test_an_impossible_aspect_is_left_alone(ratio: Any) -> None:
    assert with_square_pixels(radiograph(8), header_of(PixelAspectRatio=ratio)).shape == (48, 40)


def test_pixels_whose_spacing_is_known_are_left_to_the_resizing() -> None:
    header = header_of(PixelAspectRatio=[2, 1], PixelSpacing=[1.0, 0.5])
    assert with_square_pixels(radiograph(8), header).shape == (48, 40)


@pytest.mark.parametrize("words", [["L", "F"], ["A", "FR"], ["PL", "HAR"], ["HLP", "AF"]])
def test_orientation_is_kept_in_dicoms_letters(words: list[str]) -> None:
    assert read(PatientOrientation=words).orientation == "\\".join(words)


@pytest.mark.parametrize(
    "words",
    [
        ["LEFT", "FOOT"],
        ["L"],
        ["L", "F", "A"],
        ["", ""],
        ["LR", "F"],
        ["LL", "F"],
        ["LAFP", "F"],
        ["l", "f"],
        "PHITEST",
    ],
)
def test_other_orientations_are_free_text_and_do_not_pass(words: Any) -> None:
    assert read(PatientOrientation=words).orientation == ""


@pytest.mark.parametrize(
    "direction, letters",
    [
        ([1, 0, 0, 0, 1, 0], "L\\P"),
        ([0, 1, 0, 0, 0, -1], "P\\F"),
        ([-1, 0, 0, 0, 0, 1], "R\\H"),
        ([0.8, 0.6, 0, 0, 0, -1], "LP\\F"),
        ([0.999, 0.0447, 0, -0.0447, 0.999, 0], "L\\P"),
    ],
)
def test_letters_come_from_the_direction_where_none_are_written(direction: list[float], letters: str) -> None:
    made = read(ImageOrientationPatient=direction, PatientOrientation="")
    assert made.orientation == letters
    assert made.direction == tuple(direction)


@pytest.mark.parametrize("direction", [[1, 0, 0, 1, 0, 0], [2, 0, 0, 0, 1, 0], [0] * 6, [1, 0, 0], ["nan"] * 6])
def test_a_direction_that_is_none_is_left_out(direction: list[Any]) -> None:
    made = read(ImageOrientationPatient=direction)
    assert made == Geometry()


def test_position_is_kept_whole_or_not_at_all() -> None:
    assert read(ImagePositionPatient=[1.0, -2.5, 3.0]).position_mm == (1.0, -2.5, 3.0)
    assert read(ImagePositionPatient=[1.0, -2.5]).position_mm is None
    assert read(ImagePositionPatient=[1.0, "inf", 3.0]).position_mm is None


@given(st.lists(st.text(alphabet="LRAPFHX 1", max_size=5), min_size=2, max_size=2))
def test_an_orientation_that_passes_names_each_axis_at_most_once(words: list[str]) -> None:
    passed = read(PatientOrientation=words).orientation
    for word in passed.split("\\") if passed else []:
        assert 1 <= len(word) <= 3
        assert all(sum(letter in axis for letter in word) <= 1 for axis in ("LR", "AP", "FH"))
