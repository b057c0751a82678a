"""The header of one encoded frame: what a decoder would allocate, read before any decoder sees the frame.

A codestream states its own size, and decoders believe it: a hundred bytes can ask for gigabytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_JP2_SIGNATURE = b"\0\0\0\x0cjP  "
_JXL_SIGNATURE = b"\0\0\0\x0cJXL "
# A scan is a pass over the whole image, however few bytes it has. Progressive JPEG has about a dozen.
_MOST_SCANS = 64
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


@dataclass(frozen=True)
class Codestream:
    """Size, and where the header has it: samples a pixel, precision in bits, sign, and for JPEG its colour space."""

    rows: int
    columns: int
    samples: int | None = None
    precision: int | None = None
    signed: bool = False
    colour: str = ""


def jpeg_header(frame: bytes) -> Codestream:
    """Of JPEG (T.81) up to the frame header. Raises ValueError where there is none, or no end, or too many scans.

    `colour` is RGB or YBR_FULL if Adobe's marker (transform 0 or 1) or the component names say so, JFIF if only that
    marker does, else empty.
    """
    header = _frame_header(frame)
    markers = _markers(frame)
    scans = np.flatnonzero(markers == 0xDA)
    if len(scans) > _MOST_SCANS:
        raise ValueError("too many scans")
    if len(scans) and not (markers[scans[-1] :] == 0xD9).any():
        # libjpeg fills up what is missing with gray and says nothing.
        raise ValueError("no end of image")
    return header


def jpegls_header(frame: bytes) -> Codestream:
    """Of JPEG-LS (T.87) up to the frame header. Raises ValueError where there is none.

    Scans and end are CharLS's to look for: it refuses more scans than there are components, a cut one and no end.
    """
    return _frame_header(frame)


def _frame_header(frame: bytes) -> Codestream:
    if frame[:2] != b"\xff\xd8":
        raise ValueError("no start of image")
    place, colour = 2, ""
    while place + 4 <= len(frame):
        if frame[place] != 0xFF:
            raise ValueError("no marker")
        marker = frame[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        body = frame[place + 4 : place + 2 + int.from_bytes(frame[place + 2 : place + 4], "big")]
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return _start_of_frame(body, colour)
        if marker in (0xD9, 0xDA):
            break
        colour = _application_colour(marker, body) or colour
        place += 4 + max(len(body), 0)
    raise ValueError("no start of frame")


def _markers(frame: bytes) -> npt.NDArray[np.uint8]:
    """Every byte that follows one of 0xFF, in their order: to search the bytes themselves takes four times as long."""
    content = np.frombuffer(frame, np.uint8)
    return np.asarray(content[1:][content[:-1] == 0xFF])


def _application_colour(marker: int, body: bytes) -> str:
    if marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
        return {0: "RGB", 1: "YBR_FULL"}.get(body[11], "")
    return "JFIF" if marker == 0xE0 and body[:4] == b"JFIF" else ""


def _start_of_frame(body: bytes, colour: str) -> Codestream:
    precision, rows, columns, samples = struct.unpack_from(">BHHB", body)
    if colour in ("", "JFIF") and body[6::3][:3] == b"RGB":
        colour = "RGB"
    return Codestream(rows, columns, samples, precision, colour=colour)


def jpeg2000_header(frame: bytes) -> Codestream:
    """SIZ of JPEG 2000 (T.800 A.5.1), bare or in a JP2 file. Raises ValueError where there is none, or tiles lack."""
    if frame[:8] == _JP2_SIGNATURE:
        frame = frame[frame.index(b"jp2c") + 4 :]
    if frame[:4] != b"\xff\x4f\xff\x51" or len(frame) < 43:
        raise ValueError("no image and tile size")
    x, y, x0, y0, tile_x, tile_y, tile_x0, tile_y0, samples = struct.unpack_from(">8IH", frame, 8)
    if any(frame[42 + 3 * i + 1 : 42 + 3 * i + 3] != b"\1\1" for i in range(samples)):
        raise ValueError("subsampled components")
    if tile_x < 1 or tile_y < 1 or tile_x0 > x0 or tile_y0 > y0:
        raise ValueError("impossible tiles")
    tiles = -(-(x - tile_x0) // tile_x) * -(-(y - tile_y0) // tile_y)
    if tiles > 65535:
        raise ValueError("too many tiles")
    if len(_tiles(frame)) != tiles:
        # OpenJPEG leaves missing ones black and says nothing.
        raise ValueError("tiles are missing")
    depth = frame[42]
    return Codestream(y - y0, x - x0, samples, (depth & 0x7F) + 1, signed=bool(depth & 0x80))


def _tiles(frame: bytes) -> set[int]:
    """The numbers of the tiles that the codestream has parts of (A.4.2)."""
    place, found = 2, set()
    while frame[place : place + 1] == b"\xff" and frame[place + 1] != 0x90:
        place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    while frame[place : place + 2] == b"\xff\x90" and place + 12 <= len(frame):
        found.add(int.from_bytes(frame[place + 4 : place + 6], "big"))
        length = int.from_bytes(frame[place + 6 : place + 10], "big")
        # 0: up to the end of the codestream.
        place += length if length >= 12 else len(frame)
    return found


def jpegxl_header(frame: bytes) -> Codestream:
    """SizeHeader of JPEG XL (ISO/IEC 18181-1), bare or boxed. Raises ValueError where there is none."""
    if frame[:8] == _JXL_SIGNATURE:
        frame = _boxed_codestream(frame)
    if frame[:2] != b"\xff\x0a":
        raise ValueError("no codestream signature")
    bits = _Bits(frame[2:18])
    small = bits.take(1)
    rows = _jxl_size(bits, small)
    ratio = bits.take(3)
    if ratio == 0:
        return Codestream(rows, _jxl_size(bits, small))
    over, under = _JXL_RATIOS[ratio - 1]
    return Codestream(rows, rows * over // under)


def _jxl_size(bits: _Bits, small: int) -> int:
    return 8 * (bits.take(5) + 1) if small else bits.take((9, 13, 18, 30)[bits.take(2)]) + 1


def _boxed_codestream(frame: bytes) -> bytes:
    place = 0
    while place + 8 <= len(frame):
        size, kind = int.from_bytes(frame[place : place + 4], "big"), frame[place + 4 : place + 8]
        if kind in (b"jxlc", b"jxlp"):
            return frame[place + (8 if kind == b"jxlc" else 12) :]
        if size < 8:
            break
        place += size
    raise ValueError("no codestream box")


class _Bits:
    """Least significant bit first."""

    def __init__(self, data: bytes) -> None:
        self._rest, self._left = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int) -> int:
        if count > self._left:
            raise ValueError("header is cut")
        value = self._rest & ((1 << count) - 1)
        self._rest >>= count
        self._left -= count
        return value
