"""Where a frame lies in the patient, from the words and numbers of its header."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from scanloom.scans.functional_groups import FrameHeader
from scanloom.scans.image import Geometry, Pixels

# PS3.3 C.7.6.1.1.1, for people: left, right, anterior, posterior, foot, head. Anything else is free text.
_OPPOSITES = ("LR", "AP", "FH")
_MOST_STRETCHED = 4.0
# A direction within 5 degrees of an axis is named by that axis alone.
_SMALLEST_PART = 0.087


def geometry(header: FrameHeader) -> Geometry:
    """Spacing, orientation and position; what is missing or impossible stays empty."""
    direction = _direction(header.numbers("ImageOrientationPatient"))
    position = header.numbers("ImagePositionPatient")
    return Geometry(
        spacing_mm=spacing(header),
        orientation=_orientation(header) or _letters(direction),
        direction=direction,
        position_mm=(position[0], position[1], position[2]) if len(position) == 3 else None,
    )


def spacing(header: FrameHeader) -> tuple[float, float] | None:
    """Millimetres between rows and between columns, in the patient where the header lets one know.

    PixelSpacing; else ImagerPixelSpacing, which is at the detector, divided by EstimatedRadiographicMagnificationFactor
    where there is one (PS3.3 C.8.11.2, 10.7.1.3); else NominalScannedPixelSpacing of digitised film.
    """
    of_patient = _positive(header.numbers("PixelSpacing"))
    if of_patient:
        return of_patient
    of_detector = _positive(header.numbers("ImagerPixelSpacing"))
    if of_detector:
        factor = header.numbers("EstimatedRadiographicMagnificationFactor")
        magnified = factor[0] if len(factor) == 1 and factor[0] >= 1.0 else 1.0
        return of_detector[0] / magnified, of_detector[1] / magnified
    return _positive(header.numbers("NominalScannedPixelSpacing"))


def with_square_pixels(pixels: Pixels, header: FrameHeader) -> Pixels:
    """Stretched along one axis where PixelAspectRatio, height to width, is all that is known of the pixels' size.

    Where there is a spacing, it says the same and the pixels are left as they are.
    """
    ratio = _positive(header.numbers("PixelAspectRatio"))
    if ratio is None or spacing(header) is not None:
        return pixels
    taller = ratio[0] / ratio[1]
    if not 1 / _MOST_STRETCHED <= taller <= _MOST_STRETCHED or abs(taller - 1) < 0.01:
        return pixels
    rows, columns = pixels.shape
    size = (columns, round(rows * taller)) if taller > 1 else (round(columns / taller), rows)
    stretched = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    return np.asarray(np.rint(stretched), dtype=pixels.dtype)


def _positive(values: Sequence[float]) -> tuple[float, float] | None:
    return (values[0], values[1]) if len(values) == 2 and min(values) > 0 else None


def _direction(values: Sequence[float]) -> tuple[float, float, float, float, float, float] | None:
    """Two orthogonal unit vectors, to within what rounded headers hold."""
    if len(values) != 6:
        return None
    row, column = np.array(values[:3]), np.array(values[3:])
    if abs(row @ row - 1) > 0.01 or abs(column @ column - 1) > 0.01 or abs(row @ column) > 0.01:
        return None
    return values[0], values[1], values[2], values[3], values[4], values[5]


def _orientation(header: FrameHeader) -> str:
    value = header.value("PatientOrientation")
    words = [str(v).strip() for v in value] if value is not None and not isinstance(value, str) else []
    return "\\".join(words) if len(words) == 2 and all(map(_is_orientation, words)) else ""


def _is_orientation(word: str) -> bool:
    """One to three letters, no two of them along the same axis."""
    axes = [next((i for i, pair in enumerate(_OPPOSITES) if letter in pair), -1) for letter in word]
    return 1 <= len(axes) <= 3 and -1 not in axes and len(set(axes)) == len(axes)


def _letters(direction: Sequence[float] | None) -> str:
    if direction is None:
        return ""
    return f"{_letters_of(direction[:3])}\\{_letters_of(direction[3:])}"


def _letters_of(vector: Sequence[float]) -> str:
    """Patient axes run to the left, the back and the head (LPS)."""
    named = zip(vector, ("LR", "PA", "HF"), strict=True)
    parts = sorted(((abs(v), pair[0 if v > 0 else 1]) for v, pair in named), reverse=True)
    return "".join(letter for size, letter in parts if size >= _SMALLEST_PART)
