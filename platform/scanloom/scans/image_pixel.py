"""The Image Pixel module (PS3.3 C.7.6.3): how the pixel data of an object is laid out."""

from __future__ import annotations

from dataclasses import dataclass

from pydicom.dataset import Dataset

from scanloom.scans.functional_groups import FrameHeader
from scanloom.scans.quarantine import reject

MAX_PIXELS = 50_000_000
"""Samples of a frame; mammography, the largest of radiology, has about 25 million pixels of one sample."""
MAX_FRAMES = 50_000

ELEMENTS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
GRAY = frozenset({"MONOCHROME1", "MONOCHROME2"})
COLOUR = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
_SAMPLES = dict.fromkeys((*GRAY, "PALETTE COLOR"), 1) | dict.fromkeys(COLOUR, 3)


@dataclass(frozen=True)
class ImagePixel:
    """Sizes in pixels and bits; `high` is the place of a stored value's highest bit, `planar` 1 for colour-by-plane."""

    element: str
    photometric: str
    rows: int
    columns: int
    frames: int
    samples: int
    allocated: int
    stored: int
    high: int
    signed: bool
    planar: int

    @property
    def floating(self) -> bool:
        return self.element != "PixelData"

    @property
    def frame_bits(self) -> int:
        """Bits of one native frame; YBR_FULL_422 keeps two chroma samples for two pixels (C.7.6.3.1.2)."""
        samples = 2 if self.photometric == "YBR_FULL_422" else self.samples
        return self.rows * self.columns * samples * self.allocated

    @property
    def native_bytes(self) -> int:
        """Bytes of native pixel data; frames of one bit a pixel follow each other without a gap."""
        return (self.frames * self.frame_bits + 7) // 8


def pixel_element(dataset: Dataset) -> str:
    """The keyword of the element that holds the pixels, empty where there is none."""
    return next((keyword for keyword in ELEMENTS if keyword in dataset), "")


def frame_count(dataset: Dataset) -> int:
    """Number of Frames; 1 where it is absent or 0. Raises ScanError unsupported-pixels, too-large."""
    frames = FrameHeader(dataset).whole("NumberOfFrames") or 1
    if frames < 0:
        raise reject("unsupported-pixels", "NumberOfFrames")
    if frames > MAX_FRAMES:
        raise reject("too-large", "NumberOfFrames")
    return frames


def image_pixel(dataset: Dataset) -> ImagePixel:
    """The layout that the header declares. Raises ScanError no-pixels, unsupported-pixels, too-large."""
    header = FrameHeader(dataset)
    element = pixel_element(dataset)
    if not element:
        raise reject("no-pixels", "PixelData")
    allocated = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(element) or header.whole("BitsAllocated") or 0
    stored = header.whole("BitsStored") if element == "PixelData" else None
    high = header.whole("HighBit") if stored else None
    stored = allocated if stored is None else stored
    made = ImagePixel(
        element=element,
        photometric=header.term("PhotometricInterpretation"),
        rows=header.whole("Rows") or 0,
        columns=header.whole("Columns") or 0,
        frames=frame_count(dataset),
        samples=header.whole("SamplesPerPixel") or 1,
        allocated=allocated,
        stored=stored,
        # A high bit that leaves no room for the stored bits is a slip of the writer's.
        high=high if high is not None and stored - 1 <= high < allocated else stored - 1,
        signed=element == "PixelData" and header.whole("PixelRepresentation") == 1,
        planar=header.whole("PlanarConfiguration") or 0,
    )
    _require_readable(made)
    return made


def _require_readable(pixel: ImagePixel) -> None:
    if pixel.rows < 1 or pixel.columns < 1:
        raise reject("unsupported-pixels", "Rows")
    if pixel.photometric not in _SAMPLES:
        raise reject("unsupported-pixels", "PhotometricInterpretation")
    if pixel.samples != _SAMPLES[pixel.photometric]:
        raise reject("unsupported-pixels", "SamplesPerPixel")
    if pixel.allocated not in (1, 8, 16, 32, 64) or (pixel.allocated == 64 and not pixel.floating):
        raise reject("unsupported-pixels", "BitsAllocated")
    if not 1 <= pixel.stored <= pixel.allocated:
        raise reject("unsupported-pixels", "BitsStored")
    if pixel.rows * pixel.columns * pixel.samples > MAX_PIXELS:
        raise reject("too-large", "Rows")
