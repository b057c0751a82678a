"""Every transfer syntax to the stored values, however its frames are cut into fragments; codestreams that lie."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate, encapsulate_extended

from scanloom.recipe import Decode
from scanloom.scans.codestream import jpeg2000_header, jpeg_header, jpegls_header, jpegxl_header
from scanloom.scans.decode import read_instance, stored_frames
from scanloom.scans.transfer_syntax import DECODERS, NATIVE
from tests.decoded import refusal, stored
from tests.made_dicom import LOSSLESS, dataset, file, radiograph, wrapped, written

Pixels = npt.NDArray[Any]

JPEG_XL = "1.2.840.10008.1.2.4.110"
DEFLATED_FRAME = "1.2.840.10008.1.2.8.1"
# pydicom writes no syntax that it does not know: the same length of the UID, and patched afterwards.
STAND_INS = {JPEG_XL: uid.HTJ2KLossless, DEFLATED_FRAME: uid.JPEG2000Lossless}

ENCODERS: dict[str, tuple[str, Callable[[Pixels, int], Any]]] = {
    "jpeg-lossless": (
        uid.JPEGLosslessSV1,
        lambda a, bits: imagecodecs.jpeg8_encode(a, lossless=True, bitspersample=bits),
    ),
    "jpeg-ls": (uid.JPEGLSLossless, lambda a, _: imagecodecs.jpegls_encode(a)),
    "jpeg-2000": (
        uid.JPEG2000Lossless,
        lambda a, bits: imagecodecs.jpeg2k_encode(a, level=0, reversible=True, codecformat="j2k", bitspersample=bits),
    ),
    "jpeg-2000 part 2": (
        uid.JPEG2000MCLossless,
        lambda a, _: imagecodecs.jpeg2k_encode(a, level=0, reversible=True, codecformat="j2k"),
    ),
    "jp2 file": (uid.JPEG2000Lossless, lambda a, _: imagecodecs.jpeg2k_encode(a, level=0, reversible=True)),
    "htj2k": (uid.HTJ2KLossless, lambda a, _: imagecodecs.htj2k_encode(a)),
    "jpeg-xl": (JPEG_XL, lambda a, _: imagecodecs.jpegxl_encode(a, lossless=True)),
    "jpeg-xl boxed": (JPEG_XL, lambda a, _: imagecodecs.jpegxl_encode(a, lossless=True, usecontainer=True)),
    "deflated frame": (DEFLATED_FRAME, lambda a, _: zlib.compress(a.tobytes(), wbits=-zlib.MAX_WBITS)),
    "rle": (uid.RLELossless, lambda a, _: rle(a)),
}


def rle(pixels: Pixels) -> bytes:
    """PS3.5 annex G, of literal runs alone."""
    planes = pixels.reshape(*pixels.shape[:2], -1)
    segments = []
    for sample in range(planes.shape[2]):
        octets = np.ascontiguousarray(planes[..., sample]).view(np.uint8).reshape(-1, pixels.itemsize)
        for place in reversed(range(pixels.itemsize)):
            plane = octets[:, place].tobytes()
            runs = (plane[i : i + 128] for i in range(0, len(plane), 128))
            segment = b"".join(bytes([len(run) - 1]) + run for run in runs)
            segments.append(segment + b"\0" * (len(segment) % 2))
    offsets = np.cumsum([64, *(len(segment) for segment in segments)])[:-1]
    head = np.zeros(16, "<u4")
    head[0], head[1 : 1 + len(segments)] = len(segments), offsets
    return head.tobytes() + b"".join(segments)


def saved(made: FileDataset, frames: bytes, syntax: str) -> bytes:
    stand_in = STAND_INS.get(syntax)
    if stand_in is None:
        return wrapped(made, frames, syntax)
    data = wrapped(made, frames, stand_in)
    assert data.count(str(stand_in).encode()) == 1
    return data.replace(str(stand_in).encode(), syntax.encode().ljust(len(stand_in), b"\0"))


def noise(bits: int, *, signed: bool = False, shape: tuple[int, ...] = (20, 24)) -> Pixels:
    low = -(1 << (bits - 1)) if signed else 0
    values = np.random.default_rng(bits).integers(low, low + (1 << bits), shape)
    return np.asarray(values).astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def unsigned(values: Pixels, bits: int) -> Pixels:
    """Two's complement of `bits` bits."""
    kind = np.dtype(f"u{values.itemsize}")
    return np.asarray(values.view(kind) & kind.type((1 << bits) - 1))


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("name", ENCODERS)
def test_gray_values_come_out_as_they_were(name: str, bits: int) -> None:
    syntax, encode = ENCODERS[name]
    values = noise(bits)
    (found,) = stored(saved(dataset(values, bits_stored=bits), bytes(encode(values, bits)), syntax))
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("name", ENCODERS)
def test_signed_values_in_unsigned_codestreams_keep_their_sign(name: str, bits: int) -> None:
    syntax, encode = ENCODERS[name]
    values = noise(bits, signed=True)
    frame = bytes(encode(unsigned(values, bits), bits))
    (found,) = stored(saved(dataset(values, bits_stored=bits), frame, syntax))
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("name", ["jpeg-2000", "htj2k"])
def test_signed_codestreams_of_unsigned_pixels_are_taken_by_the_header(name: str, bits: int) -> None:
    syntax, encode = ENCODERS[name]
    values = noise(bits, signed=True)
    made = dataset(values, bits_stored=bits, PixelRepresentation=0)
    (found,) = stored(saved(made, bytes(encode(values, bits)), syntax))
    np.testing.assert_array_equal(unsigned(found, bits), unsigned(values, bits))
    assert found.dtype.kind == "u"


def colour(values: Pixels, bits: int, **elements: Any) -> FileDataset:
    header = {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0} | elements
    return dataset(values, bits_stored=bits, **header)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "deflated frame"])
def test_colour_comes_out_by_pixel_whatever_the_order_in_the_codestream(name: str, bits: int) -> None:
    syntax, encode = ENCODERS[name]
    values = noise(bits, shape=(20, 24, 3))
    (found,) = stored(saved(colour(values, bits), bytes(encode(values, bits)), syntax))
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("planar", [0, 1])
def test_native_colour_comes_out_by_pixel(planar: int) -> None:
    values = noise(8, shape=(20, 24, 3))
    laid_out = values if planar == 0 else np.moveaxis(values, -1, 0)
    made = colour(values, 8, PlanarConfiguration=planar, PixelData=np.ascontiguousarray(laid_out).tobytes())
    np.testing.assert_array_equal(stored(written(made))[0], values)


def test_halved_chroma_is_repeated() -> None:
    luma, chroma = noise(8, shape=(20, 24)), noise(8, shape=(20, 12, 2))
    pairs = np.concatenate([luma.reshape(20, 12, 2), chroma], axis=-1)
    made = colour(noise(8, shape=(20, 24, 3)), 8, PhotometricInterpretation="YBR_FULL_422", PixelData=pairs.tobytes())
    (found,) = stored(written(made))
    np.testing.assert_array_equal(found[..., 0], luma)
    np.testing.assert_array_equal(found[:, 0::2, 1:], chroma)
    np.testing.assert_array_equal(found[:, 1::2, 1:], chroma)


@pytest.mark.parametrize(
    "marker, photometric, space",
    [
        (b"", "RGB", "RGB"),
        (b"", "YBR_FULL_422", "YBR_FULL"),
        (b"\xff\xee\0\x0eAdobe\0\x65\0\0\0\0\0", "YBR_FULL", "RGB"),
        (b"\xff\xee\0\x0eAdobe\0\x65\0\0\0\0\1", "RGB", "YBR_FULL"),
        (b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0", "RGB", "YBR_FULL"),
    ],
)
def test_the_colour_space_of_jpeg_is_the_codestreams_before_the_headers(
    marker: bytes, photometric: str, space: str
) -> None:
    values = np.repeat(radiograph(8)[..., None], 3, axis=-1)
    frame = bytes(imagecodecs.jpeg8_encode(values, level=95, colorspace="RGB", outcolorspace="RGB"))
    bare = frame[:2] + frame[frame.index(b"\xff\xdb") :]
    # libjpeg names the components of RGB R, G and B.
    bare = bare.replace(b"\x03R\x11\0G\x11\0B\x11\0", b"\x03\1\x11\0\2\x11\0\3\x11\0")
    bare = bare.replace(b"\x03R\0G\0B\0", b"\x03\1\0\2\0\3\0")
    data = wrapped(colour(values, 8, PhotometricInterpretation=photometric), bare[:2] + marker + bare[2:], BASELINE)
    (found,) = stored_frames(read_instance(data, Decode()))
    assert found.photometric == space  # type: ignore[union-attr]
    # Whatever the space is called, the samples are those that were coded.
    assert np.abs(found.samples.astype(int) - values).max() < 12  # type: ignore[union-attr]


BASELINE = uid.JPEGBaseline8Bit


@pytest.mark.parametrize("order", ["little", "big"])
def test_frames_of_one_bit_follow_each_other_without_a_gap(order: str) -> None:
    frames = np.random.default_rng(3).integers(0, 2, (5, 7, 9), dtype=np.uint8)
    packed = np.packbits(frames.reshape(-1), bitorder="little").tobytes()
    made = dataset(frames[0], NumberOfFrames=5, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed)
    data = written(made, uid.ExplicitVRLittleEndian if order == "little" else uid.ExplicitVRBigEndian)
    np.testing.assert_array_equal(stored(data), frames)


def test_big_endian_words_of_bytes_are_swapped_back() -> None:
    values = noise(8, shape=(20, 24))
    made = dataset(values, PixelData=values.reshape(-1, 2)[:, ::-1].tobytes())
    data = written(made, uid.ExplicitVRBigEndian)
    as_words = data.replace(b"\x7f\xe0\0\x10OB", b"\x7f\xe0\0\x10OW")
    np.testing.assert_array_equal(stored(as_words)[0], values)


@pytest.mark.parametrize("bits", [32, 64])
def test_floating_point_values_come_out_as_they_were(bits: int) -> None:
    values = np.linspace(-3.5, 1e6, 24).astype(f"f{bits // 8}").reshape(4, 6)
    keyword = "FloatPixelData" if bits == 32 else "DoubleFloatPixelData"
    made = dataset(np.zeros((4, 6), np.uint32), PixelData=None, BitsStored=None, HighBit=None)
    made.BitsAllocated = bits
    setattr(made, keyword, values.tobytes())
    np.testing.assert_array_equal(stored(written(made))[0], values)


# --- fragments and frames -------------------------------------------------------------------------------------

FRAMES = np.stack([radiograph(8, seed=seed) for seed in range(4)])


def encoded_frames() -> list[bytes]:
    return [bytes(imagecodecs.jpegls_encode(frame)) for frame in FRAMES]


def multi_frame(pixel_data: bytes, frames: int = 4, **elements: Any) -> bytes:
    made = dataset(FRAMES[0], NumberOfFrames=frames, **elements)
    data = wrapped(made, b"to be replaced", uid.JPEGLSLossless)
    value = data.index(b"\xe0\x7f\x10\0OB\0\0") + 12
    return data[:value] + pixel_data + b"\xfe\xff\xdd\xe0\0\0\0\0"


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("fragments", [1, 3])
def test_frames_in_fragments_are_put_together(fragments: int, table: bool) -> None:
    data = multi_frame(encapsulate(encoded_frames(), fragments_per_frame=fragments, has_bot=table))
    np.testing.assert_array_equal(stored(data), FRAMES)


def test_a_wrong_offset_table_is_not_believed() -> None:
    value = bytearray(encapsulate(encoded_frames(), fragments_per_frame=3))
    value[8:24] = np.array([0, 5, 77777, 99], "<u4").tobytes()
    np.testing.assert_array_equal(stored(multi_frame(bytes(value))), FRAMES)


def test_an_extended_offset_table_tells_frames_apart() -> None:
    value, offsets, lengths = encapsulate_extended(encoded_frames())
    data = multi_frame(value, ExtendedOffsetTable=offsets, ExtendedOffsetTableLengths=lengths)
    np.testing.assert_array_equal(stored(data), FRAMES)


def test_one_frame_in_many_fragments_without_a_number_of_frames() -> None:
    frame = bytes(imagecodecs.jpegls_encode(FRAMES[0]))
    made = wrapped(dataset(FRAMES[0]), frame, uid.JPEGLSLossless)
    several = made.replace(encapsulate([frame]), encapsulate([frame], fragments_per_frame=5))
    assert several != made
    np.testing.assert_array_equal(stored(several)[0], FRAMES[0])


def test_more_frames_than_the_header_says_are_no_silent_loss() -> None:
    value = encapsulate(encoded_frames())
    assert refusal(multi_frame(value, frames=3)) == ("undecodable-pixels", "NumberOfFrames")
    assert refusal(multi_frame(value, frames=1)) == ("undecodable-pixels", "NumberOfFrames")
    assert refusal(multi_frame(value, frames=5)) == ("truncated", "PixelData")
    pixels = radiograph(8, (100, 100))
    twice = dataset(pixels, PixelData=pixels.tobytes() * 2)
    assert refusal(written(twice)) == ("undecodable-pixels", "NumberOfFrames")


def test_a_fragment_that_ends_behind_the_pixel_data_is_refused() -> None:
    made = dataset(FRAMES[0])
    data = wrapped(made, bytes(imagecodecs.jpegls_encode(FRAMES[0])), uid.JPEGLSLossless)
    item = data.rindex(b"\xfe\xff\0\xe0")
    assert refusal(data[: item + 4] + b"\xff\xff\xff\0" + data[item + 8 :])[0] in ("truncated", "undecodable-pixels")


def test_a_bad_frame_does_not_take_the_others_with_it() -> None:
    frames = encoded_frames()
    frames[2] = frames[2][:60] + bytes(len(frames[2]) - 60)
    results = list(stored_frames(read_instance(multi_frame(encapsulate(frames)), Decode())))
    assert [getattr(result, "code", "fine") for result in results] == ["fine", "fine", "undecodable-pixels", "fine"]


# --- what is refused ------------------------------------------------------------------------------------------


def test_every_image_syntax_that_pydicom_decodes_is_decoded() -> None:
    from pydicom.pixels.decoders import base

    assert {str(value) for value in base._PIXEL_DATA_DECODERS} - {*DECODERS, *uid.UncompressedTransferSyntaxes} == set()


def test_the_document_names_every_syntax_that_is_decoded() -> None:
    document = (Path(__file__).parents[1] / "docs" / "decoding.md").read_text("utf-8")
    cells = [
        cell.strip() for line in document.splitlines() for column in line.split("|")[2:3] for cell in column.split(",")
    ]
    named = {f"1.2.840.10008.1.2{cell}" for cell in cells if cell.startswith(".")} | {"1.2.840.10008.1.2"}
    assert named == {str(syntax) for syntax in (*DECODERS, *NATIVE)}


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.102", "1.2.840.10008.1.2.4.107"])
def test_video_is_refused(syntax: str) -> None:
    assert refusal(wrapped(dataset(radiograph(8)), b"\0\0\1\xb3" + bytes(64), syntax)) == (
        "unsupported-syntax",
        "TransferSyntaxUID",
    )


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95, 0.99])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_codestream_that_is_cut_is_refused(name: str, share: float) -> None:
    syntax, encode = ENCODERS[name]
    frame = bytes(encode(noise(12), 12))
    made = dataset(noise(12), bits_stored=12)
    assert refusal(saved(made, frame[: int(len(frame) * share)], syntax))[0] == "undecodable-pixels"


@pytest.mark.parametrize("name", ["jpeg-lossless", "jpeg-ls", "jpeg-2000", "jp2 file", "htj2k", "jpeg-xl"])
def test_a_codestream_of_another_size_than_the_header_says_is_refused(name: str) -> None:
    syntax, encode = ENCODERS[name]
    frame = bytes(encode(noise(8), 8))
    for rows, columns in ((21, 24), (20, 25), (24, 20), (5, 6)):
        made = dataset(noise(8), Rows=rows, Columns=columns)
        assert refusal(saved(made, frame, syntax))[0] == "undecodable-pixels"


def test_jpeg_2000_without_all_of_its_tiles_is_refused() -> None:
    values = noise(8, shape=(64, 96))
    sink = io.BytesIO()
    Image.fromarray(values).save(sink, "JPEG2000", tile_size=(32, 32), irreversible=False, no_jp2=True)
    whole = sink.getvalue()
    made = dataset(values)
    np.testing.assert_array_equal(stored(wrapped(made, whole, uid.JPEG2000Lossless))[0], values)
    parts = whole.split(b"\xff\x90\0\x0a")
    assert len(parts) == 1 + 6
    for gone in range(1, 7):
        kept = [part for number, part in enumerate(parts) if number != gone]
        frame = b"\xff\x90\0\x0a".join(kept)
        if gone == 6:
            frame += b"\xff\xd9"
        assert refusal(wrapped(made, frame, uid.JPEG2000Lossless)) == ("undecodable-pixels", "PixelData")


def test_rle_of_fewer_pixels_than_the_header_says_is_refused() -> None:
    assert refusal(saved(dataset(noise(8), Rows=21), rle(noise(8)), uid.RLELossless))[0] == "undecodable-pixels"


def test_a_codestream_that_asks_for_gigabytes_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a decoder was called")

    for decoder in ("jpeg8_decode", "jpegls_decode", "jpeg2k_decode", "jpegxl_decode"):
        monkeypatch.setattr(imagecodecs, decoder, never)
    made = {
        uid.JPEGBaseline8Bit: b"\xff\xd8\xff\xc0\0\x0b\x08\xff\xff\xff\xff\1\1\x11\0\xff\xda\0\x08\1\1\0\0?\0\xff\xd9",
        uid.JPEGLSLossless: b"\xff\xd8\xff\xf7\0\x0b\x08\xff\xff\xff\xff\1\1\x11\0\xff\xda\0\x08\1\1\0\0\0\0\xff\xd9",
        uid.JPEG2000Lossless: siz(1 << 31, 1 << 31),
    }
    for syntax, frame in made.items():
        assert refusal(wrapped(dataset(radiograph(8)), frame, syntax))[0] == "undecodable-pixels"


def siz(rows: int, columns: int, tile: int = 1 << 30) -> bytes:
    numbers = (columns, rows, 0, 0, tile, tile, 0, 0)
    return b"\xff\x4f\xff\x51\0\x29\0\0" + b"".join(n.to_bytes(4, "big") for n in numbers) + b"\0\1\x07\1\1"


def test_headers_that_only_cost_time_are_refused() -> None:
    with pytest.raises(ValueError, match="tiles"):
        jpeg2000_header(siz(48, 40, tile=0))
    with pytest.raises(ValueError, match="tiles"):
        jpeg2000_header(siz(4800, 4000, tile=1))
    progressive = bytes(imagecodecs.jpeg8_encode(radiograph(8), level=90))
    scan = progressive[progressive.index(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match="scans"):
        jpeg_header(progressive[:-2] + scan * 100 + b"\xff\xd9")


def test_jpeg_ls_that_is_cut_has_no_end_or_repeats_its_scan_is_refused() -> None:
    """By CharLS: its header is read no further than the size."""
    whole = bytes(imagecodecs.jpegls_encode(radiograph(16)))
    scan = whole[whole.index(b"\xff\xda") : -2]
    made = dataset(radiograph(16), bits_stored=16)
    with pytest.raises(ValueError, match="no start of frame"):
        jpegls_header(whole[:12])
    for bad in (whole[:-2], whole[: len(whole) // 2] + whole[-2:], whole[:-2] + scan * 100 + whole[-2:]):
        assert jpegls_header(bad) == jpegls_header(whole)
        assert refusal(wrapped(made, bad, uid.JPEGLSLossless)) == ("undecodable-pixels", "PixelData")


@pytest.mark.parametrize("shape", [(8, 8), (48, 40), (100, 120), (120, 160), (90, 160), (301, 777), (9, 3000)])
def test_the_size_in_a_jpeg_xl_header_is_the_images(shape: tuple[int, int]) -> None:
    values = np.zeros(shape, np.uint8)
    for boxed in (False, True):
        header = jpegxl_header(bytes(imagecodecs.jpegxl_encode(values, lossless=True, usecontainer=boxed)))
        assert (header.rows, header.columns) == shape


@pytest.mark.parametrize("cut", range(0, 60, 7))
@pytest.mark.parametrize("header", [jpeg_header, jpeg2000_header, jpegxl_header])
def test_headers_that_are_cut_are_value_errors(header: Callable[[bytes], object], cut: int) -> None:
    frames = {
        jpeg_header: imagecodecs.jpeg8_encode(radiograph(8)),
        jpeg2000_header: imagecodecs.jpeg2k_encode(radiograph(8)),
        jpegxl_header: imagecodecs.jpegxl_encode(radiograph(8), usecontainer=True),
    }
    if cut < 40:
        with pytest.raises(ValueError):
            header(bytes(frames[header][:cut]))  # type: ignore[index]


def test_rle_of_too_few_or_too_short_segments_is_refused() -> None:
    good = rle(noise(16))
    made = dataset(noise(16), bits_stored=16)
    short = bytearray(good)
    short[0] = 1
    assert refusal(wrapped(made, bytes(short), uid.RLELossless)) == ("undecodable-pixels", "PixelData")
    assert refusal(wrapped(made, good[:80], uid.RLELossless)) == ("undecodable-pixels", "PixelData")


def test_bits_that_no_decoder_reads_are_refused() -> None:
    assert refusal(file(radiograph(8), BitsAllocated=12)) == ("unsupported-pixels", "BitsAllocated")
    assert refusal(file(radiograph(8), BitsStored=9)) == ("unsupported-pixels", "BitsStored")
    assert refusal(file(radiograph(8), SamplesPerPixel=3)) == ("unsupported-pixels", "SamplesPerPixel")
    assert refusal(file(radiograph(8), PhotometricInterpretation="ARGB"))[1] == "PhotometricInterpretation"


def test_the_syntaxes_made_for_other_tests_are_all_here() -> None:
    assert {str(value) for value in LOSSLESS.values()} - {str(syntax) for syntax, _ in ENCODERS.values()} == {
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    }
