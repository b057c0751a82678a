"""From the bytes of one file to grayscale pixels as a reader would see them, bright where dense.

The chain of PS3.3 C.11 and C.7.6.3: stored values -> modality (rescale or LUT) -> values of interest (LUT or window)
-> MONOCHROME2. Each transfer syntax has its decoder named here: left alone, pydicom picks by what happens to be
installed, and that can halve the speed or change the pixels between two machines.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image, UnidentifiedImageError
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut, apply_voi

from scanloom.errors import ScanError
from scanloom.scans.quarantine import reject

Pixels = npt.NDArray[np.uint8 | np.uint16]
Stored = npt.NDArray[np.integer[Any]]
Values = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

MAX_FILE_BYTES = 1 << 30
MAX_PIXELS = 100_000_000
"""A guard against headers that ask for more memory than any radiograph needs (mammography has about 25 million)."""

NATIVE = frozenset(
    {uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian}
    | {uid.DeflatedExplicitVRLittleEndian}
)
# imagecodecs wraps libjpeg-turbo, the one decoder here that reads lossless and 12-bit JPEG.
JPEG = frozenset({uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1})
PLUGINS: Mapping[str, str] = {
    uid.RLELossless: "pylibjpeg",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
}

# pydicom's warnings quote values of the header.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class ScanImage:
    """Pixels HxW, u8 or u16 over the full range, bright where dense; spacing_mm is (between rows, between columns)."""

    pixels: Pixels
    spacing_mm: tuple[float, float] | None

    @property
    def bits_stored(self) -> int:
        return 8 * self.pixels.dtype.itemsize


# --- DICOM ----------------------------------------------------------------------------------------------------


def read_dataset(data: bytes) -> Dataset:
    """The header and the still encoded pixel data of one DICOM Part 10 file.

    Raises ScanError: empty-file, not-dicom, unreadable-dicom, truncated.
    """
    if not data:
        raise reject("empty-file")
    if data[128:132] != b"DICM":
        raise reject("not-dicom")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = _parse(data)
    # pydicom returns what it could read of a cut file: with a warning where an item is open, without a word where
    # a value is short.
    if any("End of file" in str(w.message) for w in caught) or any(map(_is_cut, dataset.values())):
        raise reject("truncated")
    return dataset


def _parse(data: bytes) -> Dataset:
    try:
        return pydicom.dcmread(io.BytesIO(data))
    except zlib.error:
        raise reject("truncated") from None
    except Exception:  # noqa: BLE001 - a parser meets junk with any exception; its text may quote the junk
        raise reject("unreadable-dicom") from None


def _is_cut(element: object) -> bool:
    if not isinstance(element, RawDataElement) or element.value is None or element.length == 0xFFFFFFFF:
        return False
    return len(element.value) < element.length


def require_image(dataset: Dataset) -> None:
    """Raise ScanError unless this is one grayscale frame for viewing with pixel data.

    Codes: not-an-image, no-pixels, for-processing, multi-frame, colour, unsupported-pixels, too-large.
    """
    if not _is_image_class(dataset):
        raise reject("not-an-image", "SOPClassUID")
    if "PixelData" not in dataset:
        floating = "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset
        raise reject("unsupported-pixels" if floating else "no-pixels", "PixelData")
    if dataset.get("PresentationIntentType") == "FOR PROCESSING":
        raise reject("for-processing", "PresentationIntentType")
    if _whole(dataset, "NumberOfFrames", 1) > 1:
        raise reject("multi-frame", "NumberOfFrames")
    if dataset.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise reject("colour", "PhotometricInterpretation")
    if _whole(dataset, "BitsAllocated", 0) not in (8, 16, 32) or _whole(dataset, "SamplesPerPixel", 1) != 1:
        raise reject("unsupported-pixels", "BitsAllocated")
    if _whole(dataset, "Rows", 0) * _whole(dataset, "Columns", 0) > MAX_PIXELS:
        raise reject("too-large", "Rows")


def _is_image_class(dataset: Dataset) -> bool:
    name = uid.UID(str(dataset.get("SOPClassUID", ""))).name
    if "Storage" in name or "Directory" in name:
        return "Image Storage" in name
    # A class that pydicom does not know, or none: whoever holds pixels is an image.
    return "PixelData" in dataset


def _whole(dataset: Dataset, keyword: str, default: int) -> int:
    value = dataset.get(keyword)
    try:
        return default if value is None or value == "" else int(value)
    except (TypeError, ValueError):
        raise reject("unsupported-pixels", keyword) from None


def dicom_image(dataset: Dataset) -> ScanImage:
    """The image of a dataset that passed `require_image`.

    Its values of interest (first VOI LUT, else first window, else minimum to maximum outside the padding) fill the
    output range: u8 where at most 8 bits are stored, else u16. Padding becomes black.

    Raises ScanError: unsupported-syntax, undecodable-pixels, truncated, blank-image.
    """
    stored = _stored_values(dataset)
    padding = _padding(dataset, stored)
    try:
        values = _modality_values(dataset, stored)
        shown = _values_of_interest(dataset, values, padding)
    except ScanError:
        raise
    except Exception:  # noqa: BLE001 - a malformed LUT or window fails anywhere in numpy
        raise reject("undecodable-pixels", "VOILUTSequence") from None
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 1.0 - shown
    if padding is not None:
        shown[padding] = 0.0
    if not float(shown.max()) > float(shown.min()):
        raise reject("blank-image", "PixelData")
    return ScanImage(_quantised(shown, 8 if dataset.BitsStored <= 8 else 16), _spacing(dataset))


def _stored_values(dataset: Dataset) -> Stored:
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    if not isinstance(syntax, uid.UID) or syntax not in NATIVE | JPEG | PLUGINS.keys():
        raise reject("unsupported-syntax", "TransferSyntaxUID")
    if syntax in NATIVE and len(dataset.PixelData) < _native_bytes(dataset):
        raise reject("truncated", "PixelData")
    try:
        array = _decoded(dataset, syntax)
        return _significant_bits(array, dataset, native=syntax in NATIVE)
    except Exception:  # noqa: BLE001 - every codec has exceptions of its own
        raise reject("undecodable-pixels", "PixelData") from None


def _native_bytes(dataset: Dataset) -> int:
    return _whole(dataset, "Rows", 0) * _whole(dataset, "Columns", 0) * _whole(dataset, "BitsAllocated", 8) // 8


def _decoded(dataset: Dataset, syntax: uid.UID) -> Stored:
    if syntax in JPEG:
        array = imagecodecs.jpeg8_decode(next(generate_frames(dataset.PixelData, number_of_frames=1)))
    else:
        # pydicom declares every option as the TypedDict of all of them.
        off: Any = False
        plugin = PLUGINS.get(syntax, "")
        array, _ = get_decoder(syntax).as_array(dataset, decoding_plugin=plugin, correct_unused_bits=off)
    if array.shape != (dataset.Rows, dataset.Columns):
        raise ValueError("decoded shape differs from Rows x Columns")
    return np.asarray(array)


def _significant_bits(array: Stored, dataset: Dataset, *, native: bool) -> Stored:
    """The stored values alone: bits beside them may hold overlays or rubbish (PS3.5 8.1.1)."""
    kind = "i" if dataset.PixelRepresentation == 1 else "u"
    width = 8 * array.dtype.itemsize
    stored = min(int(dataset.BitsStored), width)
    high = int(dataset.get("HighBit", stored - 1)) if native else stored - 1
    values = array.astype(array.dtype.newbyteorder("=")).view(f"{kind}{array.dtype.itemsize}")
    lifted: Stored = np.left_shift(values, width - 1 - high)
    return np.asarray(np.right_shift(lifted, width - stored))


def _padding(dataset: Dataset, stored: Stored) -> Mask | None:
    """Where there is no patient: PixelPaddingValue, or the range up to PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2)."""
    value = _signed_as_stored(dataset, "PixelPaddingValue")
    if value is None:
        return None
    limit = _signed_as_stored(dataset, "PixelPaddingRangeLimit")
    low, high = sorted((value, value if limit is None else limit))
    mask = (stored >= low) & (stored <= high)
    return None if mask.all() else mask


def _signed_as_stored(dataset: Dataset, keyword: str) -> int | None:
    value = dataset.get(keyword)
    if not isinstance(value, int):
        return None
    # Writers often give the padding of signed pixels as US.
    if dataset.PixelRepresentation == 1 and value >= 1 << (int(dataset.BitsAllocated) - 1):
        return value - (1 << int(dataset.BitsAllocated))
    return value


def _modality_values(dataset: Dataset, stored: Stored) -> Values:
    if "ModalityLUTSequence" in dataset:
        return np.asarray(apply_modality_lut(stored, dataset), dtype=np.float32)
    slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _values_of_interest(dataset: Dataset, values: Values, padding: Mask | None) -> Values:
    """Values in [0, 1] as the first VOI of the header shows them."""
    if dataset.get("VOILUTSequence"):
        mapped = apply_voi(np.rint(values).astype(np.int32), dataset, index=0)
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return _unit(mapped / np.float32((1 << bits) - 1))
    width = _number(dataset, "WindowWidth", 0.0)
    if width > 0 and "WindowCenter" in dataset:
        return windowed(
            values, _number(dataset, "WindowCenter", 0.0), width, str(dataset.get("VOILUTFunction") or "LINEAR")
        )
    seen = values if padding is None else values[~padding]
    low, high = float(seen.min()), float(seen.max())
    return _unit((values - np.float32(low)) / np.float32(max(high - low, 1e-12)))


def windowed(values: Values, center: float, width: float, function: str = "LINEAR") -> Values:
    """Values in [0, 1] through a window: LINEAR, LINEAR_EXACT or SIGMOID (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        power = np.clip(np.float32(-4.0 / width) * (values - np.float32(center)), -80.0, 80.0)
        return _unit(1.0 / (1.0 + np.exp(power)))
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1.0, 1e-6)
    return _unit((values - np.float32(center)) / np.float32(width) + np.float32(0.5))


def _unit(values: npt.NDArray[Any]) -> Values:
    return np.asarray(np.clip(values, 0.0, 1.0), dtype=np.float32)


def _quantised(shown: Values, bits: int) -> Pixels:
    levels = (1 << bits) - 1
    return np.asarray(np.rint(shown * np.float32(levels)), dtype=np.uint8 if bits == 8 else np.uint16)


def _number(dataset: Dataset, keyword: str, default: float) -> float:
    value: Any = dataset.get(keyword)
    first: Any = value[0] if isinstance(value, MultiValue) and value else value
    try:
        return float(first) if first not in (None, "") else default
    except (TypeError, ValueError):
        return default


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        try:
            rows, columns = (float(v) for v in dataset.get(keyword) or ())
        except (TypeError, ValueError):
            continue
        if all(math.isfinite(v) and v > 0 for v in (rows, columns)):
            return rows, columns
    return None


# --- image files ----------------------------------------------------------------------------------------------


def file_image(data: bytes, spacing_mm: tuple[float, float] | None = None) -> ScanImage:
    """The image of a PNG, JPEG or TIFF file; RGB whose channels are equal counts as grayscale (NIH has such files).

    Raises ScanError: empty-file, not-an-image-file, too-large, multi-frame, colour, unsupported-pixels, truncated,
    undecodable-pixels, blank-image.
    """
    if not data:
        raise reject("empty-file")
    pixels = _file_pixels(data)
    if int(pixels.max()) == int(pixels.min()):
        raise reject("blank-image")
    return ScanImage(pixels, spacing_mm)


def _file_pixels(data: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise reject("too-large")
            if getattr(image, "n_frames", 1) > 1:
                raise reject("multi-frame")
            return _gray(image)
    except ScanError:
        raise
    except UnidentifiedImageError:
        raise reject("not-an-image-file") from None
    except Image.DecompressionBombError:
        raise reject("too-large") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders meet junk with any exception
        # Pillow has no type for it; "Truncated File Read" is its TIFF reader.
        raise reject("truncated" if "truncated" in str(error).lower() else "undecodable-pixels") from None


def _gray(image: Image.Image) -> Pixels:
    if image.mode in ("L", "LA"):
        return np.asarray(image.getchannel(0))
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("RGB", "RGBA", "P"):
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
        if np.array_equal(red, green) and np.array_equal(red, blue):
            return np.asarray(red.copy())
        raise reject("colour")
    raise reject("colour" if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") else "unsupported-pixels")
