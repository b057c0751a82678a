"""From the pixel data of an object to the stored values of its frames, one decoder per transfer syntax.

Each decoder is named here: what happens to be installed must not choose it, since that can halve the speed or change
the pixels between two machines. All but native frames go through imagecodecs, which brings OpenJPEG, CharLS,
libjpeg-turbo (the one JPEG library that reads lossless and 12-bit frames), libjxl and an RLE decoder of its own.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom import uid
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

from scanloom.errors import ScanError
from scanloom.scans.codestream import Codestream, jpeg2000_header, jpeg_header, jpegls_header, jpegxl_header
from scanloom.scans.image_pixel import ImagePixel
from scanloom.scans.quarantine import reject

Samples = npt.NDArray[Any]

NATIVE = frozenset(
    {uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian}
    | {uid.DeflatedExplicitVRLittleEndian}
)
_RLE = uid.RLELossless
_JPEG = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
_JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000, uid.JPEG2000MCLossless, uid.JPEG2000MC)
_HTJ2K = (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
# Of the editions since 2023; pydicom 3.0 has no names for them.
_DEFLATED_FRAME = uid.UID("1.2.840.10008.1.2.8.1")
_JPEG_XL = (
    uid.UID("1.2.840.10008.1.2.4.110"),
    uid.UID("1.2.840.10008.1.2.4.111"),
    uid.UID("1.2.840.10008.1.2.4.112"),
)

_MOST_PADDING = 4096
_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ", b"\xff\x0a", b"\0\0\0\x0cJXL ")


@dataclass(frozen=True)
class StoredFrame:
    """Stored values HxW, or HxWx3 in the colour space `photometric`; integers are the stored bits alone, with their
    sign, in the smallest type of the bits allocated."""

    samples: Samples
    photometric: str


class PixelSource:
    """The pixel data of one object, a frame at a time.

    Raises ScanError unsupported-syntax, truncated, undecodable-pixels where not even the frames can be told apart.
    """

    def __init__(self, dataset: Dataset, syntax: uid.UID, pixel: ImagePixel) -> None:
        element = dataset.get_item(pixel.element, keep_deferred=True)
        value = element.value if isinstance(element.value, bytes) else b""
        encapsulated = value.startswith(_ITEM) and _undefined_length(element)
        self._pixel = pixel
        self._decode: Callable[[bytes, ImagePixel], StoredFrame] | None = None
        self._native: bytes | memoryview = b""
        self._frames: list[list[memoryview]] = []
        self._order = "<"
        if syntax in NATIVE and not encapsulated:
            self._native, self._order = _native_value(value, str(element.VR), syntax, pixel)
        elif syntax in DECODERS and not pixel.floating:
            self._decode = DECODERS[syntax]
            self._frames = frames_of_fragments(fragments(memoryview(value)), pixel.frames, _tables(dataset))
        else:
            raise reject("unsupported-syntax", "TransferSyntaxUID")

    def frame(self, index: int) -> StoredFrame:
        """Raises ScanError undecodable-pixels."""
        try:
            if self._decode is None:
                return native_frame(self._native, index, self._order, self._pixel)
            return self._decode(b"".join(self._frames[index]), self._pixel)
        except ScanError:
            raise
        except Exception:  # noqa: BLE001 - every codec has exceptions of its own
            raise reject("undecodable-pixels", self._pixel.element) from None


def _undefined_length(element: DataElement | RawDataElement) -> bool:
    return element.length == 0xFFFFFFFF if isinstance(element, RawDataElement) else element.is_undefined_length


# --- native ---------------------------------------------------------------------------------------------------


def _native_value(value: bytes, vr: str, syntax: uid.UID, pixel: ImagePixel) -> tuple[bytes | memoryview, str]:
    """The bytes of all frames, and their order."""
    if len(value) < pixel.native_bytes:
        raise reject("truncated", pixel.element)
    if len(value) - pixel.native_bytes >= max(pixel.native_bytes // pixel.frames, _MOST_PADDING):
        raise reject("undecodable-pixels", "NumberOfFrames")
    if syntax != uid.ExplicitVRBigEndian:
        return value, "<"
    if vr != "OW":
        return value, ">"
    # PS3.5 8.1.1 and 7.3: it is 16-bit words that are big endian, whether a sample is a part of one, or two of them.
    return np.frombuffer(value, ">u2", len(value) // 2).astype("<u2").data.cast("B"), "<"


def native_frame(value: bytes | memoryview, index: int, order: str, pixel: ImagePixel) -> StoredFrame:
    """Frame number `index` of native pixel data; `order` is its byte order, < or >."""
    shape = (pixel.rows, pixel.columns)
    if pixel.allocated == 1:
        return StoredFrame(_unpacked(value, index, pixel), pixel.photometric)
    kind = np.dtype(f"{order}{'f' if pixel.floating else 'u'}{pixel.allocated // 8}")
    words = np.frombuffer(value, kind, pixel.frame_bits // pixel.allocated, index * pixel.frame_bits // 8)
    if order == ">":
        words = words.astype(kind.newbyteorder("="))
    if pixel.floating:
        return StoredFrame(words.reshape(shape), pixel.photometric)
    if pixel.photometric == "YBR_FULL_422":
        return StoredFrame(significant_bits(_without_422(words, pixel), pixel), "YBR_FULL")
    if pixel.samples == 1:
        return StoredFrame(significant_bits(words.reshape(shape), pixel), pixel.photometric)
    planes = np.moveaxis(words.reshape(3, *shape), 0, -1) if pixel.planar == 1 else words.reshape(*shape, 3)
    return StoredFrame(significant_bits(planes, pixel), pixel.photometric)


def _unpacked(value: bytes | memoryview, index: int, pixel: ImagePixel) -> Samples:
    if pixel.samples != 1:
        raise reject("unsupported-pixels", "SamplesPerPixel")
    first, skipped = divmod(index * pixel.frame_bits, 8)
    count = (skipped + pixel.frame_bits + 7) // 8
    bits = np.unpackbits(np.frombuffer(value, np.uint8, count, first), bitorder="little")
    return bits[skipped : skipped + pixel.frame_bits].reshape(pixel.rows, pixel.columns)


def _without_422(words: Samples, pixel: ImagePixel) -> Samples:
    """Y Y Cb Cr for each pair of pixels (C.7.6.3.1.2), each chroma sample repeated."""
    if pixel.columns % 2:
        raise reject("unsupported-pixels", "Columns")
    pairs = words.reshape(pixel.rows, pixel.columns // 2, 4)
    whole = np.empty((pixel.rows, pixel.columns, 3), words.dtype)
    whole[..., 0] = pairs[..., :2].reshape(pixel.rows, pixel.columns)
    whole[..., 1] = np.repeat(pairs[..., 2], 2, axis=1)
    whole[..., 2] = np.repeat(pairs[..., 3], 2, axis=1)
    return whole


def significant_bits(words: Samples, pixel: ImagePixel) -> Samples:
    """The stored values in unsigned words: bits beside them may hold overlays or rubbish (PS3.5 8.1.1)."""
    width = 8 * words.dtype.itemsize
    values = words.view(f"i{words.dtype.itemsize}") if pixel.signed else words
    if pixel.stored == width or (pixel.high == pixel.stored - 1 and _fits(values, pixel)):
        return values
    lifted = np.left_shift(values, width - 1 - pixel.high)
    return np.asarray(np.right_shift(lifted, width - pixel.stored))


def _fits(values: Samples, pixel: ImagePixel) -> bool:
    half = 1 << (pixel.stored - 1)
    if pixel.signed:
        return bool(values.min() >= -half and values.max() < half)
    return bool(values.max() < 2 * half)


# --- encapsulated ---------------------------------------------------------------------------------------------


def fragments(value: memoryview) -> list[tuple[int, memoryview]]:
    """The items of encapsulated pixel data (PS3.5 A.4), each with its offset; the first is the offset table.

    Raises ScanError truncated, undecodable-pixels.
    """
    found, place = [], 0
    while place + 8 <= len(value):
        tag, length = bytes(value[place : place + 4]), int.from_bytes(value[place + 4 : place + 8], "little")
        if tag == _DELIMITER:
            break
        if tag != _ITEM:
            raise reject("undecodable-pixels", "PixelData")
        if place + 8 + length > len(value):
            raise reject("truncated", "PixelData")
        found.append((place, value[place + 8 : place + 8 + length]))
        place += 8 + length
    return found


def _tables(dataset: Dataset) -> list[int]:
    value = dataset.get("ExtendedOffsetTable")
    if not isinstance(value, bytes):
        return []
    return [int(v) for v in np.frombuffer(value, "<u8", len(value) // 8)]


def frames_of_fragments(
    items: Sequence[tuple[int, memoryview]], frames: int, extended: Sequence[int] = ()
) -> list[list[memoryview]]:
    """The fragments of each frame.

    An offset table is believed only if each of its offsets is that of a fragment; else frames are told apart by
    the signatures that their codestreams begin with. Raises ScanError truncated, undecodable-pixels.
    """
    if len(items) < 1 + frames:
        raise reject("truncated", "PixelData")
    table, parts = items[0][1], items[1:]
    beginnings = [i for i, (_, part) in enumerate(parts) if bytes(part[:12]).startswith(_STARTS)]
    if len(beginnings) > frames and len(beginnings) == len(parts):
        raise reject("undecodable-pixels", "NumberOfFrames")
    if len(parts) == frames:
        starts = list(range(frames))
    elif frames == 1:
        starts = [0]
    else:
        basic = [offset for (offset,) in struct.iter_unpack("<I", table[: len(table) // 4 * 4])]
        starts = _starts(parts, frames, extended) or _starts(parts, frames, basic) or beginnings
    if len(starts) != frames or starts[0] != 0:
        raise reject("undecodable-pixels", "NumberOfFrames")
    ends = [*starts[1:], len(parts)]
    return [[part for _, part in parts[a:b]] for a, b in zip(starts, ends, strict=True)]


def _starts(parts: Sequence[tuple[int, memoryview]], frames: int, offsets: Sequence[int]) -> list[int]:
    """Numbers of the fragments at these offsets, counted from the first fragment; none if the table is wrong."""
    places = {place - parts[0][0]: i for i, (place, _) in enumerate(parts)}
    starts = [places[offset] for offset in offsets if offset in places]
    return starts if len(starts) == len(offsets) == frames and starts == sorted(set(starts)) else []


# --- codecs ---------------------------------------------------------------------------------------------------


def _rle(frame: bytes, pixel: ImagePixel) -> StoredFrame:
    """PS3.5 annex G: a segment a byte of each sample, most significant first, planes one after the other."""
    size = pixel.allocated // 8
    expected = pixel.rows * pixel.columns * pixel.samples * size
    if size == 0 or int.from_bytes(frame[:4], "little") != pixel.samples * size:
        raise ValueError("segments differ from samples")
    decoded = imagecodecs.dicomrle_decode(frame, f"<u{size}", out=bytearray(expected))
    if len(decoded) != expected:
        raise ValueError("segments are short")
    planes = np.frombuffer(decoded, f"<u{size}").reshape(pixel.samples, pixel.rows, pixel.columns)
    whole = planes[0] if pixel.samples == 1 else np.moveaxis(planes, 0, -1)
    return StoredFrame(significant_bits(whole, pixel), _without_subsampling(pixel.photometric))


def _deflated(frame: bytes, pixel: ImagePixel) -> StoredFrame:
    """Deflated Image Frame Compression (PS3.5 A.4.13): each frame as native ones are, deflated."""
    expected = (pixel.frame_bits + 7) // 8
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(frame, expected)
    return native_frame(inflated, 0, "<", pixel)


def _jpeg(frame: bytes, pixel: ImagePixel) -> StoredFrame:
    header = _expected(jpeg_header(frame), pixel)
    if pixel.samples == 1:
        return StoredFrame(_restored(imagecodecs.jpeg8_decode(frame), header, pixel), pixel.photometric)
    # The same space in and out: the samples as they are coded, whatever libjpeg takes them for.
    samples = imagecodecs.jpeg8_decode(frame, colorspace="YCBCR", outcolorspace="YCBCR")
    return StoredFrame(_restored(samples, header, pixel), _jpeg_space(header, pixel))


def _jpeg_space(header: Codestream, pixel: ImagePixel) -> str:
    """Adobe's marker and component names are the encoder's own; the object's header is often wrong beside JFIF."""
    if header.colour in ("RGB", "YBR_FULL"):
        return header.colour
    return "RGB" if pixel.photometric == "RGB" and header.colour != "JFIF" else "YBR_FULL"


def _jpeg_ls(frame: bytes, pixel: ImagePixel) -> StoredFrame:
    # Other bindings (pyjpegls, pillow-jpls, dicomsdl) are to the same CharLS, and take 3 to 7 % longer.
    header = _expected(jpegls_header(frame), pixel)
    samples = imagecodecs.jpegls_decode(frame)
    return StoredFrame(_restored(samples, header, pixel), _without_subsampling(pixel.photometric))


def _jpeg_2000(frame: bytes, pixel: ImagePixel) -> StoredFrame:
    """High throughput too: OpenJPH is faster, but imagecodecs gives half an image for a cut codestream with it."""
    header = _expected(jpeg2000_header(frame), pixel)
    samples = imagecodecs.jpeg2k_decode(frame, planar=False, numthreads=1)
    return StoredFrame(_restored(samples, header, pixel), _untransformed(pixel.photometric))


def _jpeg_xl(frame: bytes, pixel: ImagePixel) -> StoredFrame:
    """libjxl gives RGB whatever the codestream's own space is."""
    header = _expected(jpegxl_header(frame), pixel)
    samples = imagecodecs.jpegxl_decode(frame, index=0, keeporientation=True, numthreads=1)
    return StoredFrame(_restored(samples, header, pixel), "RGB" if pixel.samples == 3 else pixel.photometric)


def _expected(header: Codestream, pixel: ImagePixel) -> Codestream:
    if (header.rows, header.columns) != (pixel.rows, pixel.columns):
        raise reject("undecodable-pixels", "Rows")
    if header.samples not in (None, pixel.samples):
        raise reject("undecodable-pixels", "SamplesPerPixel")
    return header


def _restored(samples: Samples, header: Codestream, pixel: ImagePixel) -> Samples:
    """Decoded samples in the type of the bits allocated, their sign as Pixel Representation says.

    Codestreams of signed values are often marked unsigned, and then hold two's complement of `precision` bits.
    """
    if samples.shape not in ((pixel.rows, pixel.columns), (pixel.rows, pixel.columns, pixel.samples)):
        raise ValueError("decoded shape differs from Rows x Columns")
    if samples.ndim == 3 and pixel.samples == 1:
        samples = samples[..., 0]
    precision = header.precision or pixel.stored
    size = max(pixel.allocated // 8, 1, samples.dtype.itemsize)
    if pixel.signed and samples.dtype.kind == "u":
        samples = _with_sign(samples, precision, pixel.stored)
    elif samples.dtype.kind == "i" and not pixel.signed:
        kind = np.dtype(f"u{samples.dtype.itemsize}")
        samples = samples.view(kind) & kind.type((1 << precision) - 1)
    return samples.astype(f"{'i' if pixel.signed else 'u'}{size}", copy=False)


def _with_sign(samples: Samples, precision: int, stored: int) -> Samples:
    extended = _extended(samples, precision)
    if precision > stored and extended.min() >= 0 and extended.max() < 1 << stored:
        # The encoder was given words whose unused bits were cleared.
        return _extended(samples, stored)
    return extended


def _extended(samples: Samples, bits: int) -> Samples:
    """Two's complement of `bits` bits in unsigned words."""
    shift = 8 * samples.dtype.itemsize - bits
    return np.asarray(np.right_shift(np.left_shift(samples, shift).view(f"i{samples.dtype.itemsize}"), shift))


def _without_subsampling(photometric: str) -> str:
    return "YBR_FULL" if photometric == "YBR_FULL_422" else photometric


def _untransformed(photometric: str) -> str:
    """OpenJPEG undoes the transform that YBR_ICT and YBR_RCT stand for."""
    return "RGB" if photometric in ("YBR_ICT", "YBR_RCT") else _without_subsampling(photometric)


DECODERS: Mapping[uid.UID, Callable[[bytes, ImagePixel], StoredFrame]] = {
    _RLE: _rle,
    _DEFLATED_FRAME: _deflated,
    **dict.fromkeys(_JPEG, _jpeg),
    **dict.fromkeys(_JPEG_LS, _jpeg_ls),
    **dict.fromkeys(_JPEG_2000 + _HTJ2K, _jpeg_2000),
    **dict.fromkeys(_JPEG_XL, _jpeg_xl),
}
