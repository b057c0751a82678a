"""One scan as every source yields it: gray pixels, where they lie in the patient, and what their values stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8 | np.uint16]


@dataclass(frozen=True)
class Geometry:
    """Where a frame lies; None or empty where the source does not say. Millimetres, patient axes as DICOM's (LPS).

    `spacing_mm` is (between rows, between columns). `orientation` names the directions of increasing column and
    increasing row as PS3.3 C.7.6.1.1.1 spells them, such as `L\\F`. `direction` is ImageOrientationPatient,
    `position_mm` the centre of the first pixel (ImagePositionPatient).
    """

    spacing_mm: tuple[float, float] | None = None
    orientation: str = ""
    direction: tuple[float, float, float, float, float, float] | None = None
    position_mm: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Rendering:
    """How values became pixels: black is `low` and white is `high`, in `unit` (HU, or empty for unspecified).

    `choice` is voi-lut, window-N (the header's N-th), fixed, full, or as-is for image files, which have no values
    beside their pixels. Where the way between low and high is not straight (voi-lut, sigmoid) they are its ends.
    """

    choice: str = "as-is"
    low: float | None = None
    high: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class ScanImage:
    """Pixels HxW, u8 or u16 over the full range, bright where dense; `repairs` names what had to be mended."""

    pixels: Pixels
    geometry: Geometry = Geometry()
    rendering: Rendering = Rendering()
    repairs: tuple[str, ...] = ()

    @property
    def bits_stored(self) -> int:
        return 8 * self.pixels.dtype.itemsize
