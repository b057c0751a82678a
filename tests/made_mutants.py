"""DICOM, image and archive files as chance, a bad disk or malice makes them; the same number gives the same file."""

from __future__ import annotations

import functools
import gzip
import io
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom.data
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from tests.made_dicom import LOSSLESS, UID_ROOT, dataset, radiograph, tar, wrapped, written

JPEG_XL = uid.UID("1.2.840.10008.1.2.4.110")
DEFLATED_FRAME = uid.UID("1.2.840.10008.1.2.8.1")
_BUNDLED = Path(pydicom.data.__file__).parent / "test_files"
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_VRS = b"AE AS AT CS DA DS DT FL FD IS LO LT OB OW OF PN SH SL SQ SS ST TM UI UL UN US UT OV SV XX".split()


@dataclass(frozen=True)
class Mutant:
    """A file to read: `kind` is dicom, image or archive, `origin` says how it was made."""

    kind: str
    origin: str
    data: bytes


# --- seeds ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def dicom_seeds() -> dict[str, bytes]:
    """Whole files: every syntax, colours, frames, tables, and pydicom's own small test files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {name: made_file(radiograph(), syntax, bits_stored=12) for name, syntax in LOSSLESS.items()}
        made |= dict(_codestream_seeds()) | dict(_native_seeds())
    for path in sorted(_BUNDLED.glob("*.dcm")):
        if path.stat().st_size < 20_000:
            # Secondary captures that are silent about text would be refused before they are decoded.
            made[path.name] = replaced(path.read_bytes(), 0x00280301, b"CS", b"NO")
    return made


def made_file(pixels: np.ndarray[Any, Any], syntax: str = uid.ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """The same bytes every time, which generated UIDs would not be."""
    return written(dataset(pixels, **_named(elements)), syntax)


def _named(elements: dict[str, Any]) -> dict[str, Any]:
    names = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
    return {name: f"{UID_ROOT}{number}" for number, name in enumerate(names)} | elements


def _codestream_seeds() -> Iterator[tuple[str, bytes]]:
    gray8, gray12 = radiograph(8), radiograph(12)
    colour = np.stack([radiograph(8, seed=seed) for seed in range(3)], axis=-1)
    deflated = gzip.compress(gray12.tobytes(), mtime=0)[10:-8]
    for name, syntax, pixels, frame in (
        ("jpeg-baseline", uid.JPEGBaseline8Bit, gray8, imagecodecs.jpeg8_encode(gray8)),
        ("jpeg-colour", uid.JPEGBaseline8Bit, colour, imagecodecs.jpeg8_encode(colour)),
        ("jpeg-ls-near", uid.JPEGLSNearLossless, gray8, imagecodecs.jpegls_encode(gray8, level=2)),
        ("jpeg-ls-colour", uid.JPEGLSLossless, colour, imagecodecs.jpegls_encode(colour)),
        ("jpeg-2000-lossy", uid.JPEG2000, gray12, imagecodecs.jpeg2k_encode(gray12, level=40)),
        ("jpeg-2000-jp2", uid.JPEG2000, colour, imagecodecs.jpeg2k_encode(colour, codecformat="jp2")),
        ("htj2k-colour", uid.HTJ2K, colour, imagecodecs.htj2k_encode(colour)),
        ("jpeg-xl", JPEG_XL, gray12, imagecodecs.jpegxl_encode(gray12, lossless=True)),
        ("jpeg-xl-colour", JPEG_XL, colour, imagecodecs.jpegxl_encode(colour, level=90)),
        ("jpeg-xl-boxes", JPEG_XL, gray8, imagecodecs.jpegxl_encode(gray8, lossless=True, usecontainer=True)),
        ("deflated-frame", DEFLATED_FRAME, gray12, deflated),
    ):
        gray = pixels.ndim == 2
        layout = {} if gray else {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
        made = dataset(pixels, bits_stored=12 if pixels.dtype == np.uint16 else 8, **_named(layout))
        known = uid.JPEG2000 if syntax in (JPEG_XL, DEFLATED_FRAME) else syntax
        yield name, with_syntax(wrapped(made, bytes(frame), known), syntax)


def _native_seeds() -> Iterator[tuple[str, bytes]]:
    gray8, gray12 = radiograph(8), radiograph(12)
    three = np.concatenate([radiograph(12, seed=seed) for seed in range(3)])
    yield "frames", made_file(three, NumberOfFrames=3, Rows=48, bits_stored=12, **functional_groups(3))
    yield "frames-rle", made_file(three, uid.RLELossless, NumberOfFrames=3, Rows=48, bits_stored=12)
    for space in ("RGB", "YBR_FULL"):
        colour = np.stack([gray8, gray8, gray8[::-1]], axis=-1)
        layout: dict[str, Any] = {"SamplesPerPixel": 3, "PhotometricInterpretation": space, "PlanarConfiguration": 1}
        yield space, made_file(colour, **layout)
    table = np.arange(256, dtype=np.uint16).tobytes()
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = table
    yield "palette", made_file(gray8, **palette)
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 12], np.arange(4096, dtype=np.uint16).tobytes()
    item.ModalityLUTType = "US"
    tables: dict[str, Any] = {"ModalityLUTSequence": Sequence([item]), "VOILUTSequence": Sequence([item])}
    yield "tables", made_file(gray12, bits_stored=12, **tables)
    signed = (radiograph(12).astype(np.int32) - 2048).astype(np.int16)
    padded: dict[str, Any] = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1900, "PixelRepresentation": 1}
    windows: dict[str, Any] = {
        "WindowCenter": [40, 300],
        "WindowWidth": [400, 1500],
        "RescaleSlope": "1",
        "RescaleIntercept": "-24",
    }
    place: dict[str, Any] = {
        "PixelSpacing": [0.5, 0.5],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [1, 2, 3],
    }
    yield "signed", made_file(signed, VOILUTFunction="SIGMOID", **padded, **windows, **place)
    yield "monochrome1", made_file(gray12, bits_stored=12, PhotometricInterpretation="MONOCHROME1", **windows)
    yield "bits", made_file(np.packbits(gray8 > 99, bitorder="little")[None], BitsAllocated=1, BitsStored=1, HighBit=0,
                            Rows=48, Columns=40)  # fmt: skip


def functional_groups(frames: int) -> dict[str, Any]:
    """Pixel measures and windows shared and per frame."""
    measures, window, shared, per_frame = Dataset(), Dataset(), Dataset(), []
    measures.PixelSpacing = [0.7, 0.7]
    window.WindowCenter, window.WindowWidth = 2000, 4000
    shared.PixelMeasuresSequence = Sequence([measures])
    for _ in range(frames):
        frame = Dataset()
        frame.FrameVOILUTSequence = Sequence([window])
        per_frame.append(frame)
    return {
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence(per_frame),
    }


@functools.lru_cache(maxsize=1)
def image_seeds() -> dict[str, bytes]:
    """PNG, JPEG and TIFF files of every mode that is read."""
    gray8, gray16 = Image.fromarray(radiograph(8)), Image.fromarray(radiograph(16))
    colour, palette, bits = gray8.convert("RGB"), gray8.convert("P"), gray8.convert("1")
    modes = {"gray": gray8, "gray16": gray16, "rgb": colour, "palette": palette, "bits": bits}
    made = {f"png-{name}": _saved(image, "PNG") for name, image in modes.items()}
    made |= {f"tiff-{name}": _saved(image, "TIFF") for name, image in modes.items()}
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        made[f"tiff-{compression}"] = _saved(gray8, "TIFF", compression=compression)
    made["tiff-pages"] = _saved(gray8, "TIFF", save_all=True, append_images=[gray8])
    made |= {f"jpeg-{name}": _saved(modes[name], "JPEG") for name in ("gray", "rgb")}
    made["jpeg-progressive"] = _saved(gray8, "JPEG", progressive=True)
    made["jpeg-cmyk"] = _saved(colour.convert("CMYK"), "JPEG")
    return made


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


@functools.lru_cache(maxsize=1)
def archive_seeds() -> dict[str, bytes]:
    """A few small scans in a tar, a tar.gz and a zip."""
    files = {f"study/{name}.dcm": dicom_seeds()[name] for name in ("explicit", "rle", "jpeg-2000")}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in files.items():
            made.writestr(zipfile.ZipInfo(name), data)
    return {"tar": tar(files), "tar.gz": gzip.compress(tar(files), mtime=0), "zip": zipped.getvalue()}


# --- damage to bytes ------------------------------------------------------------------------------------------

Damage = Callable[[bytes, random.Random], bytes]


def flip(data: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(chance.choice([1, 2, 8, 64])):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def flip_head(data: bytes, chance: random.Random) -> bytes:
    """Where file meta information and codestream headers stand."""
    damaged = bytearray(data)
    start = chance.choice([0, 128, max(data.find(b"\xe0\x7f\x10\x00"), 0), max(data.find(b"\xfe\xff\x00\xe0"), 0)])
    for _ in range(chance.choice([1, 2, 4])):
        damaged[min(start + chance.randrange(160), len(damaged) - 1)] = chance.choice(
            [0, 1, 255, chance.randrange(256)]
        )
    return bytes(damaged)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.choice([chance.randrange(len(data)), len(data) - chance.randint(1, 40)])]


def splice(data: bytes, chance: random.Random) -> bytes:
    """Bytes left out, doubled, or put elsewhere."""
    a, b, c = sorted(chance.randrange(len(data) + 1) for _ in range(3))
    return chance.choice([data[:a] + data[b:], data[:b] + data[a:], data[:a] + data[b:c] + data[a:b] + data[c:]])


def overwrite(data: bytes, chance: random.Random) -> bytes:
    at, length = chance.randrange(len(data)), chance.choice([1, 2, 4, 8, 64])
    new = chance.choice([b"\0" * length, b"\xff" * length, chance.randbytes(length), b"\x7f\xff\xff\xff"])
    return data[:at] + new + data[at + len(new) :]


def codestream(data: bytes, chance: random.Random) -> bytes:
    """Damage behind the start of the pixel data alone."""
    start = data.rfind(b"\xe0\x7f\x10\x00")
    if not 0 < start < len(data) - 20:
        return flip(data, chance)
    return data[: start + 12] + chance.choice([flip, overwrite, splice, cut])(data[start + 12 :], chance)


# --- lies of the header ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Element:
    """Where one top-level element of an Explicit VR Little Endian file stands."""

    tag: int
    start: int
    value: int
    end: int


def elements(data: bytes) -> list[Element]:
    """The top-level elements as far as they can be told; none where the file is of another syntax."""
    found, at = [], 132
    while at + 12 <= len(data):
        group, element = struct.unpack_from("<HH", data, at)
        vr = data[at + 4 : at + 6]
        if not vr.isalpha():
            break
        long = vr in _LONG_VRS
        (length,) = struct.unpack_from("<I" if long else "<H", data, at + 8 if long else at + 6)
        value = at + (12 if long else 8)
        end = len(data) if length == 0xFFFFFFFF else value + length
        found.append(Element(group << 16 | element, at, value, end))
        at = end
    return found


def lie_about_length(data: bytes, chance: random.Random) -> bytes:
    known = elements(data)
    lies = [0, 1, 0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x80000000, chance.randrange(1 << 16), chance.randrange(1 << 32)]
    lie = chance.choice(lies)
    if not known:
        return overwrite(data, chance)
    if chance.random() < 0.2 and (item := data.find(b"\xfe\xff\x00\xe0")) > 0:
        return data[: item + 4] + struct.pack("<I", lie) + data[item + 8 :]
    chosen = chance.choice(known)
    if chosen.value - chosen.start == 12:
        return data[: chosen.start + 8] + struct.pack("<I", lie) + data[chosen.value :]
    return data[: chosen.start + 6] + struct.pack("<H", lie & 0xFFFF) + data[chosen.value :]


def lie_about_vr(data: bytes, chance: random.Random) -> bytes:
    known = elements(data)
    if not known:
        return flip_head(data, chance)
    damaged = bytearray(data)
    for _ in range(chance.choice([1, 1, 3])):
        chosen = chance.choice(known)
        damaged[chosen.start + 4 : chosen.start + 6] = chance.choice(_VRS)
    return bytes(damaged)


_WORDS = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    12,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    48,
    64,
    128,
    255,
    256,
    4096,
    7000,
    32767,
    32768,
    65535,
]
_WHOLE = [b"0", b"1", b"2", b"3", b"1000", b"99999", b"2147483647", b"-1", b"9" * 30, b"1e3", b"1.5", b"two", b""]
_REAL = [b"0", b"-1", b"1e308", b"-1e308", b"1e-320", b"nan", b"inf", b"-inf", b"", b"1\\2", b"\\", b"one", b"1,5",
         b"0\\0", b"-1\\-1", b"1e300\\1e300", b"9" * 64, b"1\\0\\0\\0\\1\\0", b"0\\0\\0\\0\\0\\0"]  # fmt: skip
_TERMS = [b"MONOCHROME1 ", b"MONOCHROME2 ", b"RGB ", b"YBR_FULL", b"YBR_FULL_422", b"YBR_RCT ", b"YBR_ICT ", b"ARGB",
          b"PALETTE COLOR ", b"", b"HSV ", b"\xff\xfe", b"SIGMOID ", b"LINEAR_EXACT"]  # fmt: skip
_CHARSETS = [b"", b"ISO_IR 192", b"ISO 2022 IR 87", b"\\ISO 2022 IR 149", b"ISO_IR 6", b"nonsense", b"\\\\\\\\"]
_SYNTAXES = [str(syntax) for syntax in uid.AllTransferSyntaxes] + [
    str(JPEG_XL),
    str(DEFLATED_FRAME),
    "1.2.3",
    "",
    "x" * 65,
]

_LIES: dict[int, tuple[bytes, list[bytes]]] = {
    **dict.fromkeys(
        (0x00280002, 0x00280006, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103),
        (b"US", [struct.pack("<H", word) for word in _WORDS]),
    ),
    **dict.fromkeys(
        (0x00280120, 0x00280121, 0x00281101, 0x00281102, 0x00281103),
        (b"US", [struct.pack("<H", word) * count for word in _WORDS for count in (1, 3)]),
    ),
    0x00280008: (b"IS", _WHOLE),
    **dict.fromkeys(
        (0x00281050, 0x00281051, 0x00281052, 0x00281053, 0x00280030, 0x00181164, 0x00200037, 0x00200032),
        (b"DS", _REAL),
    ),
    **dict.fromkeys((0x00280004, 0x00281056, 0x00080068), (b"CS", _TERMS)),
    0x00080005: (b"CS", _CHARSETS),
    0x00101010: (b"AS", [b"061Y", b"0", b"999Y", b"-01Y", b"12M", b"\xff" * 4]),
    **dict.fromkeys((0x00100020, 0x00080018), (b"LO", [b"", b"\0" * 8, b"\xff" * 8, b"\\" * 40, b"x" * 60_000])),
    0x00080016: (b"UI", [b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.840.10008.5.1.4.1.1.77.1.6", b"", b"x", b"\0\0"]),
}  # fmt: skip


def lie(data: bytes, chance: random.Random) -> bytes:
    """One to four wrong values of the image pixel module and of what else decoding reads."""
    for _ in range(chance.choice([1, 1, 2, 4])):
        tag = chance.choice(list(_LIES))
        vr, values = _LIES[tag]
        data = replaced(data, tag, vr, chance.choice(values))
    return data


def replaced(data: bytes, tag: int, vr: bytes, value: bytes) -> bytes:
    """The file with that element in its place; files of other syntaxes than explicit little endian as they are."""
    known = elements(data)
    if not known:
        return data
    same = next((e for e in known if e.tag == tag), None)
    after = next((e.start for e in known if e.tag > tag), known[-1].end)
    start, end = (same.start, same.end) if same else (after, after)
    return data[:start] + element(tag, vr, value) + data[end:]


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    """One element, Explicit VR Little Endian; its length as it is, odd or not."""
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr
    if vr in _LONG_VRS:
        return head + b"\0\0" + struct.pack("<I", len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def retype(data: bytes, chance: random.Random) -> bytes:
    """An element of another type, with a value too short for most."""
    known = elements(data)
    if not known:
        return flip_head(data, chance)
    value = chance.choice([b"", b"", b"\0", b"abc", b"12", b"\xfe\xff\x00\xe0\0\0\0\0"])
    return replaced(data, chance.choice(known).tag, chance.choice([*_VRS, b"??", b"\0\0"]), value)


def swap_syntax(data: bytes, chance: random.Random) -> bytes:
    return with_syntax(data, chance.choice(_SYNTAXES))


def with_syntax(data: bytes, syntax: str) -> bytes:
    """The file with that name for its transfer syntax, also one that pydicom does not know."""
    return replaced(data, 0x00020010, b"UI", syntax.encode() + b"\0" * (len(syntax) % 2))


def nest(data: bytes, chance: random.Random) -> bytes:
    """Sequences in sequences, of undefined or defined length, closed or left open."""
    depth = chance.choice([3, 50, 300, 3000])
    tag = chance.choice([0x00081140, 0x00091001, 0x00283010, 0x52009229, 0x52009230])
    opening = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + chance.choice([b"SQ", b"UN"]) + b"\0\0\xff\xff\xff\xff"
    opening += b"\xfe\xff\x00\xe0" + chance.choice([b"\xff\xff\xff\xff", struct.pack("<I", 40)])
    closing = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    inner = opening * depth + (closing * depth if chance.random() < 0.7 else b"")
    known = elements(data)
    at = next((e.start for e in known if e.tag > tag), chance.randrange(132, len(data)) if len(data) > 132 else 0)
    return data[:at] + inner + data[at:]


_BLIND: list[Damage] = [flip, flip, flip_head, flip_head, cut, splice, overwrite, overwrite]
_AIMED: list[Damage] = [
    *(codestream, codestream, codestream, codestream, lie_about_length, lie_about_vr, lie, lie, lie, retype, retype),
    *(swap_syntax, nest),
]


def mutant(number: int) -> Mutant:
    """File `number`: nine tenths DICOM, the rest images and archives."""
    chance = random.Random(number)
    draw = chance.random()
    if draw < 0.05:
        return _mutated("image", image_seeds(), _BLIND, chance)
    if draw < 0.1:
        return _mutated("archive", archive_seeds(), _BLIND, chance)
    return _mutated("dicom", dicom_seeds(), [*_BLIND, *_AIMED], chance)


def _mutated(kind: str, seeds: dict[str, bytes], damages: list[Damage], chance: random.Random) -> Mutant:
    name = chance.choice(list(seeds))
    data, done = seeds[name], [name]
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if not data:
            break
        damage = chance.choice(damages)
        data = damage(data, chance)
        done.append(damage.__name__)
    return Mutant(kind, " ".join(done), data)
