"""Compressed Pixel Data: one lossless frame in one fragment (PS3.5 A.4), the same bytes for the same pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import imagecodecs
import jpeg_ls
import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID, ExplicitVRLittleEndian, HTJ2KLossless, JPEGLSLossless, RLELossless

from scanloom.errors import ArtefactError
from scanloom.recipe_generate import TransferSyntax

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

UIDS: Mapping[TransferSyntax, UID] = {
    "native": ExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg-ls": JPEGLSLossless,
    "htj2k": HTJ2KLossless,
}

_ITEM = b"\xfe\xff\x00\xe0"
_RLE_HEADER_BYTES = 64
_SIZ = b"\xff\x51"
# From the marker SIZ to Ssiz of the first component (ISO/IEC 15444-1 A.5.1).
_SSIZ_OFFSET = 40


def items(pixels: Pixels, bits_stored: int, syntax: TransferSyntax) -> bytes:
    """The value of Pixel Data: an empty offset table and the frame, without the delimiter that ends the sequence.

    `pixels`: [rows, columns], uint8 for 8 bits stored and uint16 for more. ValueError for `native`. ArtefactError for
    `jpeg-ls` of 12 bits stored and fewer than some hundred pixels.
    """
    if syntax == "native":
        raise ValueError("native Pixel Data has no items")
    frame = _ENCODERS[syntax](cast(Pixels, np.ascontiguousarray(pixels)), bits_stored)
    frame += b"\0" * (len(frame) % 2)
    return b"".join((_ITEM, bytes(4), _ITEM, len(frame).to_bytes(4, "little"), frame))


def _rle(pixels: Pixels, bits_stored: int) -> bytes:
    """PS3.5 annex G: a segment a byte plane, the most significant first, each row packed by itself."""
    segments = []
    for shift in reversed(range(0, 8 * pixels.dtype.itemsize, 8)):
        packed = imagecodecs.packbits_encode((pixels >> shift).astype(np.uint8))
        segments.append(packed + b"\0" * (len(packed) % 2))
    starts = np.zeros(_RLE_HEADER_BYTES // 4, "<u4")
    starts[0] = len(segments)
    starts[1 : len(segments) + 1] = _RLE_HEADER_BYTES + np.cumsum([0, *map(len, segments[:-1])])
    return b"".join((starts.tobytes(), *segments))


def _jpeg_ls(pixels: Pixels, bits_stored: int) -> bytes:
    rows, columns = pixels.shape
    if bits_stored == 8 * pixels.dtype.itemsize:
        # Noise takes more than the pixels themselves, and the encoder gives it no room of its own.
        return bytes(imagecodecs.jpegls_encode(pixels, out=2 * pixels.nbytes + 1024))
    # imagecodecs' codestream would state 16 bits for 12.
    little = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()
    told = {"rows": rows, "columns": columns, "samples_per_pixel": 1, "bits_stored": bits_stored}
    try:
        return bytes(jpeg_ls.encode_pixel_data(little, **told))
    except RuntimeError as error:
        # Its buffer holds no header beside so few pixels.
        raise ArtefactError(f"{rows} x {columns} pixels are too few for JPEG-LS; choose another syntax") from error


def _htj2k(pixels: Pixels, bits_stored: int) -> bytes:
    """A reversible codestream whose precision is the bits stored.

    The encoder knows precisions of 8 and 16 only. A reversible transform differs between precisions in nothing but the
    level that is taken off first, half of the range (ISO/IEC 15444-1 G.1): so that difference is added, and the
    precision set.
    """
    bits = 8 * pixels.dtype.itemsize
    if bits_stored == bits:
        return bytes(imagecodecs.htj2k_encode(pixels, reversible=True))
    raised = (pixels + (2 ** (bits - 1) - 2 ** (bits_stored - 1))).astype(pixels.dtype)
    stream = bytearray(imagecodecs.htj2k_encode(raised, reversible=True))
    stream[stream.index(_SIZ) + _SSIZ_OFFSET] = bits_stored - 1
    return bytes(stream)


_ENCODERS: Mapping[TransferSyntax, Callable[[Pixels, int], bytes]] = {
    "rle": _rle,
    "jpeg-ls": _jpeg_ls,
    "htj2k": _htj2k,
}
