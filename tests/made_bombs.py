"""Small files that ask for much: memory, time or stack; as anybody may make them who knows the formats."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import imagecodecs
import numpy as np
from pydicom import uid
from pydicom.encaps import encapsulate

from tests.made_dicom import radiograph, tar
from tests.made_mutants import DEFLATED_FRAME, JPEG_XL, Mutant, dicom_seeds, element, elements, made_file, replaced

_SIDE = 7000
"""49 million pixels: just what a frame may have."""
_COLOUR_SIDE = 4000
_UNDEFINED = b"\xff\xff\xff\xff"


def bomb(number: int) -> Mutant:
    """Bomb `number` of `BOMBS`."""
    kind, name, make = BOMBS[number]
    return Mutant(kind, name, make())


def with_frame(frame: bytes, syntax: str, *, rows: int = _SIDE, columns: int = _SIDE, **elements: Any) -> bytes:
    """An object of that size whose one frame is these bytes, whatever they are."""
    head = made_file(radiograph(8, (8, 8)), **elements)
    head = replaced(head, 0x00020010, b"UI", syntax.encode() + b"\0" * (len(syntax) % 2))
    for tag, value in ((0x00280010, rows), (0x00280011, columns)):
        head = replaced(head, tag, b"US", struct.pack("<H", value))
    pixels = b"\xe0\x7f\x10\x00OB\0\0" + _UNDEFINED + encapsulate([frame]) + b"\xfe\xff\xdd\xe0\0\0\0\0"
    return head[: head.rfind(b"\xe0\x7f\x10\x00")] + pixels


def deflated(pieces: Iterator[bytes]) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join([packer.compress(piece) for piece in pieces]) + packer.flush()


def behind_meta(syntax: str, body: bytes) -> bytes:
    """A file whose data set is these bytes."""
    seed = replaced(dicom_seeds()["explicit"], 0x00020010, b"UI", syntax.encode() + b"\0" * (len(syntax) % 2))
    start = next(e.start for e in elements(seed) if e.tag >> 16 > 2)
    return seed[:start] + body


def _zeros(total: int) -> Iterator[bytes]:
    return (bytes(1 << 20) for _ in range(total >> 20))


# --- data sets ------------------------------------------------------------------------------------------------


def _before_pixels(*parts: bytes) -> bytes:
    seed = dicom_seeds()["explicit"]
    at = seed.rfind(b"\xe0\x7f\x10\x00")
    return seed[:at] + b"".join(parts) + seed[at:]


def _deflated_zeros() -> bytes:
    return behind_meta(uid.DeflatedExplicitVRLittleEndian, deflated(_zeros(2 << 30)))


def _deflated_black_image() -> bytes:
    body = made_file(np.zeros((8, 8), np.uint16))
    body = replaced(
        replaced(body, 0x00280010, b"US", struct.pack("<H", _SIDE)), 0x00280011, b"US", struct.pack("<H", _SIDE)
    )
    start = next(e.start for e in elements(body) if e.tag >> 16 > 2)
    length = 2 * _SIDE * _SIDE
    head = body[start : body.rfind(b"\xe0\x7f\x10\x00")] + b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<I", length)
    ramp = bytes(range(256)) * 4096
    pieces = [head, *(ramp for _ in range(length // len(ramp))), ramp[: length % len(ramp)]]
    return behind_meta(uid.DeflatedExplicitVRLittleEndian, deflated(iter(pieces)))


def _million_frames(text: bytes) -> bytes:
    seed = made_file(radiograph(8, (1000, 100)))
    for tag, vr, value in ((0x00280010, b"US", b"\1\0"), (0x00280011, b"US", b"\1\0"), (0x00280008, b"IS", text)):
        seed = replaced(seed, tag, vr, value)
    return seed


def _many_elements() -> bytes:
    return _before_pixels(
        *(element(0x00091000 + i, b"LO", b"x") for i in range(0xEF00)),
        *(element((0x0011 + 2 * (i >> 12)) << 16 | 0x1000 + (i & 0xFFF), b"UN", b"") for i in range(300_000)),
    )


def _many_items() -> bytes:
    items = b"\xfe\xff\x00\xe0\0\0\0\0" * 1_000_000
    return _before_pixels(element(0x00290010, b"SQ", items))


def _many_fragments() -> bytes:
    fragments = b"\xfe\xff\x00\xe0\2\0\0\0\0\0" * 1_000_000
    head = with_frame(b"\0\0", uid.RLELossless, rows=8, columns=8)
    at = head.rfind(b"\xe0\x7f\x10\x00") + 12
    return head[:at] + b"\xfe\xff\x00\xe0\0\0\0\0" + fragments + b"\xfe\xff\xdd\xe0\0\0\0\0"


def _nested(depth: int, vr: bytes, closed: bool) -> bytes:
    opening = b"\x29\x00\x10\x10" + vr + b"\0\0" + _UNDEFINED + b"\xfe\xff\x00\xe0" + _UNDEFINED
    closing = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    return _before_pixels(opening * depth, closing * depth if closed else b"")


def _long_value(tag: int, vr: bytes, value: bytes) -> bytes:
    return replaced(dicom_seeds()["explicit"], tag, vr, value)


def _large_table(descriptor: tuple[int, int, int], entries: int) -> bytes:
    inner = element(0x00283002, b"US", struct.pack("<3H", *descriptor)) + element(0x00283006, b"OW", bytes(2 * entries))
    item = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(inner)) + inner
    return _long_value(0x00283010, b"SQ", item * 64)


DATASETS: dict[str, Callable[[], bytes]] = {
    "deflated zeros": _deflated_zeros,
    "deflated element of 1 GiB": lambda: behind_meta(
        uid.DeflatedExplicitVRLittleEndian,
        deflated(iter([b"\x08\x00\x05\x00UT\0\0\0\0\0\x40", *_zeros(1 << 30)])),
    ),
    "deflated large image": _deflated_black_image,
    "zeros": lambda: bytes(64 << 20),
    "zeros behind meta": lambda: behind_meta(uid.ImplicitVRLittleEndian, bytes(64 << 20)),
    "a million frames": lambda: _million_frames(b"1000000 "),
    "100,000 frames": lambda: _million_frames(b"100000"),
    "2^31 frames": lambda: _million_frames(b"2147483647"),
    "negative frames": lambda: _million_frames(b"-1"),
    "many elements": _many_elements,
    "many items": _many_items,
    "many fragments": _many_fragments,
    **{f"nested {depth} {vr.decode()} {closed}": lambda d=depth, v=vr, c=closed: _nested(d, v, c)  # type: ignore[misc]
       for depth in (100, 900, 20_000, 200_000) for vr in (b"SQ", b"UN") for closed in (False, True)},
    "a name of a million groups": lambda: _long_value(0x00100010, b"UT", b"^=" * 1_000_000),
    "an identifier of ten million letters": lambda: _long_value(0x00100020, b"UT", b"x" * 10_000_000),
    "an identifier of escapes": lambda: _long_value(0x00100020, b"UT", b"\x1b$B" * 1_000_000),
    "a million windows": lambda: _long_value(0x00281050, b"UT", b"1\\" * 1_000_000),
    "ten million findings": lambda: _long_value(0x00204000, b"UT", b"Mass|" * 2_000_000),
    "a sex of a megabyte": lambda: _long_value(0x00100040, b"UT", b"F\\" * 500_000),
    "a long number of frames": lambda: _long_value(0x00280008, b"UT", b"9" * 1_000_000),
    "a long slope": lambda: _long_value(0x00281053, b"UT", b"9" * 1_000_000),
    "large tables": lambda: _large_table((0, 0, 16), 65536),
    "tables that lie": lambda: _large_table((65535, 65535, 65535), 3),
}  # fmt: skip


# --- codestreams ----------------------------------------------------------------------------------------------


def _jpeg(encoded: bytes | bytearray, marker: int, side: int) -> bytes:
    at = encoded.index(bytes([0xFF, marker]))
    return bytes(encoded[: at + 5] + struct.pack(">HH", side, side) + encoded[at + 9 :])


def _jpeg2000(encoded: bytes | bytearray, side: int, tile: int | None = None, components: int | None = None) -> bytes:
    """The codestream with another size in its SIZ segment (ISO/IEC 15444-1 A.5.1)."""
    made = bytearray(encoded)
    at = made.index(b"\xff\x51") + 4
    struct.pack_into(">II", made, at + 2, side, side)
    struct.pack_into(">II", made, at + 18, tile or side, tile or side)
    if components:
        struct.pack_into(">H", made, at + 34, components)
    return bytes(made)


def _rle(side: int) -> bytes:
    """A byte plane of zeros."""
    count = side * side
    return struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * (count // 128 + 1)


def _codestreams() -> Iterator[tuple[str, Callable[[], bytes]]]:
    gray, colour = radiograph(8, (64, 64)), np.stack([radiograph(8, (64, 64))] * 3, axis=-1)
    rgb: dict[str, Any] = {"PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    for pixels, extra, largest in ((gray, {}, _SIDE), (colour, rgb, _COLOUR_SIDE)):
        for side in (largest, 65000):
            size: dict[str, Any] = {"rows": side, "columns": side}
            named = f"{side} {'gray' if pixels is gray else 'colour'}"

            def made(frame: bytes, syntax: str, size: Any = size, extra: Any = extra, pixels: Any = pixels) -> bytes:
                data = with_frame(frame, syntax, **size, **extra)
                return replaced(data, 0x00280002, b"US", struct.pack("<H", 1 if pixels.ndim == 2 else 3))

            def codecs(
                pixels: Any = pixels, side: int = side, made: Any = made
            ) -> Iterator[tuple[str, Callable[[], bytes]]]:
                baseline, lossless = imagecodecs.jpeg8_encode(pixels), imagecodecs.jpeg8_encode(pixels, lossless=True)
                near, j2k = imagecodecs.jpegls_encode(pixels), imagecodecs.jpeg2k_encode(pixels, level=0)
                htj2k = imagecodecs.htj2k_encode(pixels)
                yield "jpeg", lambda: made(_jpeg(baseline, 0xC0, side), uid.JPEGBaseline8Bit)
                yield "jpeg lossless", lambda: made(_jpeg(lossless, 0xC3, side), uid.JPEGLosslessSV1)
                yield "jpeg-ls", lambda: made(_jpeg(near, 0xF7, side), uid.JPEGLSLossless)
                yield "jpeg 2000", lambda: made(_jpeg2000(j2k, side), uid.JPEG2000Lossless)
                yield "jpeg 2000 of tiles", lambda: made(_jpeg2000(j2k, side, 1), uid.JPEG2000Lossless)
                yield "jpeg 2000 of small tiles", lambda: made(_jpeg2000(j2k, side, 64), uid.JPEG2000Lossless)
                yield "jpeg 2000 of components", lambda: made(_jpeg2000(j2k, side, None, 16384), uid.JPEG2000Lossless)
                yield "htj2k", lambda: made(_jpeg2000(htj2k, side), uid.HTJ2KLossless)
                yield "htj2k of tiles", lambda: made(_jpeg2000(htj2k, side, 1), uid.HTJ2KLossless)
                yield "htj2k of small tiles", lambda: made(_jpeg2000(htj2k, side, 64), uid.HTJ2KLossless)

            for codec, make in codecs():
                yield f"{codec} {named}", make
    yield "rle", lambda: with_frame(_rle(_SIDE), uid.RLELossless)
    yield "rle 65000", lambda: with_frame(_rle(_SIDE), uid.RLELossless, rows=65000, columns=65000)
    yield "deflated frame", lambda: with_frame(deflated(_zeros(1 << 30)), DEFLATED_FRAME)
    yield "deflated small frame", lambda: with_frame(deflated(_zeros(1 << 30)), DEFLATED_FRAME, rows=8, columns=8)
    yield (
        "jpeg xl",
        lambda: with_frame(bytes(imagecodecs.jpegxl_encode(np.zeros((_SIDE, _SIDE), np.uint8), effort=1)), JPEG_XL),
    )
    yield (
        "jpeg xl of another size",
        lambda: with_frame(
            bytes(imagecodecs.jpegxl_encode(np.zeros((_SIDE, _SIDE), np.uint8), effort=1)), JPEG_XL, rows=8, columns=8
        ),
    )


# --- images and archives --------------------------------------------------------------------------------------


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(side: int, depth: int, colour: int, body: bytes, *before: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _packed_zeros(total: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([packer.compress(piece) for piece in _zeros(total)]) + packer.flush()


def _tiff(pages: int, loop: bool) -> bytes:
    """Pages of one strip each; the last points to the first again."""
    out = bytearray(b"II*\0\x08\0\0\0")
    for page in range(pages):
        entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
        entries += [(277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 64)]
        out += struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        last = page == pages - 1
        out += struct.pack("<I", (8 if loop else 0) if last else len(out) + 4)
    return bytes(out) + bytes(64)


IMAGES: dict[str, Callable[[], bytes]] = {
    "png of 65,000 pixels a side": lambda: _png(65000, 1, 0, _packed_zeros(64 << 20)),
    "png as large as may be": lambda: _png(_SIDE, 16, 0, _packed_zeros(100 << 20)),
    "png as large as may be in colour": lambda: _png(_SIDE, 16, 6, _packed_zeros(400 << 20)),
    "png with a text of 1 GiB": lambda: _png(64, 8, 0, b"", _chunk(b"zTXt", b"a\0\0" + _packed_zeros(1 << 30))),
    "png with a profile of 1 GiB": lambda: _png(64, 8, 0, b"", _chunk(b"iCCP", b"a\0\0" + _packed_zeros(1 << 30))),
    "png with many chunks": lambda: _png(64, 8, 0, b"", _chunk(b"tEXt", b"a\0b") * 500_000),
    "png of a million frames": lambda: _png(64, 8, 0, b"", _chunk(b"acTL", struct.pack(">II", 1_000_000, 0))),
    "jpeg of 65,000 pixels a side": lambda: _jpeg(imagecodecs.jpeg8_encode(radiograph(8)), 0xC0, 65000),
    "jpeg as large as may be": lambda: _jpeg(imagecodecs.jpeg8_encode(radiograph(8)), 0xC0, _SIDE),
    "tiff of 100,000 pages": lambda: _tiff(100_000, loop=False),
    "tiff of pages in a circle": lambda: _tiff(3, loop=True),
}


def _tar_of_zeros() -> bytes:
    entry = tarfile.TarInfo("zeros.dcm")
    entry.size = 400 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    pieces = [packer.compress(entry.tobuf()), *map(packer.compress, _zeros(entry.size))] * 4
    return b"".join(pieces) + packer.flush()


def _zip_of_zeros() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
        for number in range(3):
            with made.open(f"{number}.dcm", "w") as member:
                for piece in _zeros(400 << 20):
                    member.write(piece)
    return sink.getvalue()


def _overlapping_zip(members: int) -> bytes:
    """Each entry of the directory names the same member (after D. Fifield, A better zip bomb, 2019)."""
    size = 16 << 20
    packed, checksum = deflated(_zeros(size)), zlib.crc32(bytes(size))
    fields = (20, 0, 8, 0, 0, checksum, len(packed), size, 1, 0)
    body = b"PK\3\4" + struct.pack("<5H3L2H", *fields) + b"x" + packed
    directory = (
        b"PK\1\2\x14\0" + struct.pack("<5H3L2H", *fields) + bytes(14)[:10] + struct.pack("<L", 0) + b"x"
    ) * members
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, members & 0xFFFF, members & 0xFFFF, len(directory), len(body), 0)
    return body + directory + end


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "tar.gz of zeros": _tar_of_zeros,
    "zip of zeros": _zip_of_zeros,
    "zip of members that share their bytes": lambda: _overlapping_zip(60_000),
    "tar of 150,000 empty members": lambda: tarfile.TarInfo("x").tobuf() * 150_000 + bytes(1024),
    "zip of a long directory": lambda: _overlapping_zip(1_000_000),
    "archives in archives": lambda: tar({"a.tar": tar({"b.tar": tar({"c.dcm": dicom_seeds()["explicit"]})})}),
}

BOMBS: tuple[tuple[str, str, Callable[[], bytes]], ...] = (
    *(("dicom", name, make) for name, make in DATASETS.items()),
    *(("dicom", name, make) for name, make in _codestreams()),
    *(("image", name, make) for name, make in IMAGES.items()),
    *(("archive", name, make) for name, make in ARCHIVES.items()),
)
