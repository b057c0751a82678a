"""From the bytes of one file to gray pixels as a reader would see them, bright where dense."""

from __future__ import annotations

from collections.abc import Iterator

from pydicom import uid
from pydicom.dataset import Dataset

from scanloom.errors import ScanError
from scanloom.recipe import Decode
from scanloom.scans.colour import Palette, gray_of_colour
from scanloom.scans.functional_groups import FrameHeader
from scanloom.scans.geometry import geometry, with_square_pixels
from scanloom.scans.grayscale import Grayscale, Ramp, Rescale, Sigmoid, VoiLut, is_blank, rendered, windowed
from scanloom.scans.image import Pixels, Rendering, ScanImage
from scanloom.scans.image_file import file_image
from scanloom.scans.image_pixel import GRAY, MAX_PIXELS, ImagePixel, pixel_element
from scanloom.scans.lookup_table import Lut, lut_of_item
from scanloom.scans.part10 import MAX_FILE_BYTES, Instance, quiet, read_instance
from scanloom.scans.quarantine import reject
from scanloom.scans.transfer_syntax import PixelSource, StoredFrame

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "Instance",
    "file_image",
    "frames",
    "read_instance",
    "rendered",
    "require_image",
    "stored_frames",
]

_FEW_BITS = 12
# Of PS3.3 C.11.1.1.2; a header may hold anything, and a unit is written into the corpus.
_RESCALE_TYPES = frozenset({"OD", "HU", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT"})


def require_image(instance: Instance) -> None:
    """Raise ScanError unless the object holds grayscale or colour frames that are there to be looked at.

    Dose grids and segmentations have pixels, but are no scans. Codes: not-an-image, no-pixels, for-processing,
    unsupported-pixels, too-large.
    """
    with quiet():
        if not _is_image_class(instance.dataset):
            raise reject("not-an-image", "SOPClassUID")
        intent = FrameHeader(instance.dataset).term("PresentationIntentType")
    _ = instance.pixel
    if intent == "FOR PROCESSING":
        raise reject("for-processing", "PresentationIntentType")


def _is_image_class(dataset: Dataset) -> bool:
    name = uid.UID(FrameHeader(dataset).term("SOPClassUID")).name
    if "Storage" in name or "Directory" in name:
        return "Image Storage" in name or name in ("Parametric Map Storage", "Enhanced US Volume Storage")
    # A class that pydicom does not know, or none: whoever holds pixels is an image.
    return bool(pixel_element(dataset))


def stored_frames(instance: Instance) -> Iterator[StoredFrame | ScanError]:
    """The stored values of every frame, one decoded at a time, or why that frame cannot be decoded.

    Raises ScanError where the fault is the object's: no-pixels, unsupported-pixels, unsupported-syntax, too-large,
    truncated, undecodable-pixels.
    """
    pixel = instance.pixel
    with quiet():
        source = PixelSource(instance.dataset, instance.syntax, pixel)
    return (_stored(source, index) for index in range(pixel.frames))


def _stored(source: PixelSource, index: int) -> StoredFrame | ScanError:
    try:
        return source.frame(index)
    except ScanError as error:
        return error


def frames(instance: Instance, rules: Decode) -> Iterator[ScanImage | ScanError]:
    """Every frame of the object once, in order, one decoded at a time.

    Pixels are u8 where at most 8 bits are stored, else u16. Raises what `stored_frames` raises, before the first frame.
    A frame's own reasons: undecodable-pixels, unsupported-pixels, colour, blank-image.
    """
    stored = stored_frames(instance)
    pixel = instance.pixel
    with quiet():
        palette = Palette(instance.dataset, pixel) if pixel.photometric == "PALETTE COLOR" else None
    return (_image(instance, palette, index, frame, rules) for index, frame in enumerate(stored))


def _image(
    instance: Instance, palette: Palette | None, index: int, frame: StoredFrame | ScanError, rules: Decode
) -> ScanImage | ScanError:
    if isinstance(frame, ScanError):
        return frame
    try:
        with quiet():
            header = FrameHeader(instance.dataset, index)
            pixels, rendering = _shown(frame, header, instance.pixel, palette, rules)
            return ScanImage(with_square_pixels(pixels, header), geometry(header), rendering, instance.repairs)
    except ScanError as error:
        return error
    except Exception:  # noqa: BLE001 - a malformed header fails anywhere in numpy
        return reject("undecodable-pixels", instance.pixel.element)


def _shown(
    frame: StoredFrame, header: FrameHeader, pixel: ImagePixel, palette: Palette | None, rules: Decode
) -> tuple[Pixels, Rendering]:
    if pixel.photometric in GRAY:
        bits = 8 if pixel.stored <= 8 else 16
        return rendered(frame.samples, rules.window, grayscale(header, pixel), bits=bits)
    if palette is not None:
        pixels = palette.gray(frame.samples, rules.colour)
    else:
        pixels = gray_of_colour(frame.samples, frame.photometric, pixel.stored, rules.colour)
    if is_blank(pixels):
        raise reject("blank-image", "PixelData")
    return pixels, Rendering()


# --- what the header says of its values -----------------------------------------------------------------------


def grayscale(header: FrameHeader, pixel: ImagePixel) -> Grayscale:
    """Modality, VOI LUT, windows, padding and unit of one frame. Raises ScanError unsupported-pixels."""
    lut = header.item("VOILUTSequence")
    return Grayscale(
        modality=_modality(header, pixel),
        lut=None if lut is None else VoiLut(lut_of_item(lut, signed=False)),
        windows=_windows(header),
        inverted=pixel.photometric == "MONOCHROME1",
        padding=_padding(header, pixel),
        unit=_unit(header),
        possible=_possible(pixel),
    )


def _possible(pixel: ImagePixel) -> tuple[int, int] | None:
    """The ends of what the stored bits can hold, unless they are so many that a table of them all takes long."""
    if pixel.floating or pixel.stored > _FEW_BITS:
        return None
    half = 1 << (pixel.stored - 1)
    return (-half, half - 1) if pixel.signed else (0, 2 * half - 1)


def _modality(header: FrameHeader, pixel: ImagePixel) -> Rescale | Lut:
    item = header.item("ModalityLUTSequence")
    if item is not None:
        return lut_of_item(item, signed=pixel.signed)
    return Rescale(_rescale(header, "RescaleSlope", 1.0), _rescale(header, "RescaleIntercept", 0.0))


def _rescale(header: FrameHeader, keyword: str, default: float) -> float:
    numbers = header.numbers(keyword)
    if not numbers and header.value(keyword) is not None:
        raise reject("unsupported-pixels", keyword)
    return numbers[0] if numbers else default


def _unit(header: FrameHeader) -> str:
    """HU is what CT has unless it says otherwise (C.8.2.1.1.2)."""
    named = header.term("RescaleType")
    if not named and header.term("Modality") == "CT" and header.numbers("RescaleIntercept"):
        return "HU"
    return named if named in _RESCALE_TYPES else ""


def _windows(header: FrameHeader) -> tuple[Ramp | Sigmoid, ...]:
    function = header.term("VOILUTFunction")
    pairs = zip(header.numbers("WindowCenter"), header.numbers("WindowWidth"), strict=False)
    return tuple(windowed(center, width, function) for center, width in pairs if width > 0)


def _padding(header: FrameHeader, pixel: ImagePixel) -> tuple[float, float] | None:
    """PixelPaddingValue, or the range up to PixelPaddingRangeLimit (C.7.5.1.1.2)."""
    prefix = {"FloatPixelData": "Float", "DoubleFloatPixelData": "DoubleFloat"}.get(pixel.element, "")
    values = header.numbers(f"{prefix}PixelPaddingValue")
    if not values:
        return None
    low = _as_stored(values[0], pixel)
    limits = header.numbers(f"{prefix}PixelPaddingRangeLimit")
    high = _as_stored(limits[0], pixel) if limits else low
    return min(low, high), max(low, high)


def _as_stored(value: float, pixel: ImagePixel) -> float:
    """Writers often give the padding of signed pixels as US."""
    return value - (1 << pixel.allocated) if pixel.signed and value >= 1 << (pixel.allocated - 1) else value
