"""Parsing: files without preamble, meta or syntax, cut files, bombs; and nothing of a header in what gets out."""

from __future__ import annotations

import contextlib
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from scanloom.errors import ScanError
from scanloom.recipe import Decode
from scanloom.scans import part10
from scanloom.scans.decode import read_instance
from tests.decoded import image, images, refusal
from tests.made_dicom import CANARY, LOSSLESS, dataset, file, radiograph, written

NATIVE = {"implicit": ImplicitVRLittleEndian, "explicit": ExplicitVRLittleEndian, "big-endian": ExplicitVRBigEndian}
GROUP_8 = {"implicit": b"\x08\0", "explicit": b"\x08\0", "big-endian": b"\0\x08"}


def without_meta(data: bytes, name: str) -> bytes:
    """The data set alone, as old archives and network dumps have it."""
    length = struct.unpack_from("<I", data, 140)[0]
    body = data[144 + length :]
    assert body[:2] == GROUP_8[name]
    return body


@pytest.mark.parametrize("name", NATIVE)
def test_a_data_set_alone_is_read_by_a_guess_at_its_syntax_and_flagged(name: str) -> None:
    whole = file(radiograph(12), NATIVE[name])
    guessed = image(without_meta(whole, name))
    np.testing.assert_array_equal(guessed.pixels, image(whole).pixels)
    assert guessed.repairs == ("guessed-syntax",)
    assert image(whole).repairs == ()


@pytest.mark.parametrize("name", NATIVE)
def test_a_file_that_names_no_syntax_is_read_by_a_guess_and_flagged(name: str) -> None:
    whole = file(radiograph(12), NATIVE[name])
    element = struct.pack("<HH2sH", 2, 0x0010, b"UI", len(uid_bytes(NATIVE[name]))) + uid_bytes(NATIVE[name])
    assert element in whole
    guessed = image(whole.replace(element, b""))
    np.testing.assert_array_equal(guessed.pixels, image(whole).pixels)
    assert guessed.repairs == ("guessed-syntax",)


def uid_bytes(syntax: str) -> bytes:
    return syntax.encode() + b"\0" * (len(syntax) % 2)


def test_without_repair_a_missing_syntax_is_refused() -> None:
    whole = file()
    named = struct.pack("<HH2sH", 2, 0x0010, b"UI", 20) + uid_bytes(ExplicitVRLittleEndian)
    assert refusal(whole.replace(named, b""), repair=False) == ("unsupported-syntax", "TransferSyntaxUID")
    assert refusal(without_meta(whole, "explicit"), repair=False) == ("not-dicom", "")


def test_a_missing_preamble_is_no_fault_where_the_syntax_is_named() -> None:
    whole = file()
    for headless in (whole[128:], whole[132:]):
        read = image(headless, repair=False)
        np.testing.assert_array_equal(read.pixels, image(whole).pixels)
        assert read.repairs == ()


@pytest.mark.parametrize(
    "junk",
    [b"a letter, not an image" * 99, b"\x08\0", b"PK\3\4" + bytes(500), bytes(600), b"\x08\0\0\0" + b"\xff" * 400],
)
def test_what_does_not_begin_like_dicom_is_not_dicom(junk: bytes) -> None:
    assert refusal(junk)[0] in ("not-dicom", "truncated", "unreadable-dicom")


def test_an_empty_file_is_empty() -> None:
    assert refusal(b"") == ("empty-file", "")


# --- cut files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_file_cut_anywhere_is_refused(name: str) -> None:
    whole = file(radiograph(12), LOSSLESS[name])
    for share in (0.02, 0.2, 0.5, 0.8, 0.95):
        refusal(whole[: int(len(whole) * share)])
    # The last bytes hold pixels or the end of a sequence in each syntax.
    assert refusal(whole[:-9], repair=False)[0] in ("truncated", "undecodable-pixels")


@pytest.mark.parametrize("name", NATIVE)
def test_native_pixels_that_lack_one_percent_are_filled_up_and_flagged(name: str) -> None:
    pixels = radiograph(12, (100, 100))
    whole = file(pixels, NATIVE[name])
    mended = image(whole[:-200], window={"kind": "fixed", "center": 2048.0, "width": 4096.0})
    kept = image(whole, window={"kind": "fixed", "center": 2048.0, "width": 4096.0})
    assert mended.repairs == ("zero-padded",)
    np.testing.assert_array_equal(mended.pixels[:-1], kept.pixels[:-1])
    assert not mended.pixels[-1].any()
    assert refusal(whole[:-202]) == ("truncated", "PixelData")
    assert refusal(whole[:-200], repair=False) == ("truncated", "PixelData")


def test_pixel_data_shorter_than_rows_and_columns_say_is_truncated() -> None:
    assert refusal(file(radiograph(8), Rows=1000)) == ("truncated", "PixelData")
    assert refusal(file(radiograph(8), NumberOfFrames=2)) == ("truncated", "PixelData")


def test_a_cut_that_is_not_in_the_pixels_is_never_mended() -> None:
    made = dataset(radiograph(8))
    made.add_new(0x00204000, "LT", "x" * 2)
    made.add_new(0xFFFCFFFC, "OB", bytes(64))
    assert refusal(written(made)[:-1]) == ("truncated", "")


# --- bombs ----------------------------------------------------------------------------------------------------


def deflated(body: bytes, name: str = "deflated") -> bytes:
    whole = file(radiograph(12), LOSSLESS[name])
    length = struct.unpack_from("<I", whole, 140)[0]
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return whole[: 144 + length] + squeeze.compress(body) + squeeze.flush()


def test_what_inflates_beyond_the_limit_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part10, "MAX_FILE_BYTES", 1 << 20)
    body = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 1 << 20) + bytes(1 << 20)
    assert refusal(deflated(body)) == ("too-large", "")
    assert refusal(file(radiograph(12, (1000, 1000)))) == ("too-large", "")


def test_a_deflated_file_without_its_end_is_truncated() -> None:
    assert refusal(file(radiograph(12), DeflatedExplicitVRLittleEndian)[:-9]) == ("truncated", "")


SEQUENCE = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)


@pytest.mark.parametrize(
    "body",
    [
        bytes(4_000_000),
        b"".join(struct.pack("<HH2sH", 9, e, b"LO", 0) for e in range(65536)) * 4,
        SEQUENCE + struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 200_000,
        SEQUENCE + (struct.pack("<HHI", 0xFFFE, 0xE000, 8) + struct.pack("<HH2sH", 8, 0x1150, b"LO", 0)) * 100_000,
    ],
    ids=["zeros", "elements", "items", "items with an element"],
)
def test_a_header_of_millions_of_elements_is_too_large(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part10, "MAX_READS", 100_000)
    assert refusal(deflated(body)) == ("too-large", "")


def test_sequences_nested_without_end_are_unreadable() -> None:
    level = SEQUENCE + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    assert refusal(deflated(level * 50_000)) == ("unreadable-dicom", "")


def test_a_sequence_that_would_take_minutes_to_parse_is_too_large() -> None:
    junk = struct.pack("<HHI", 0xFFFE, 0xE000, 0) * (1 << 20)
    groups = struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, len(junk)) + junk
    body = file(radiograph(12)).replace(b"\xe0\x7f\x10\0OW", groups + b"\xe0\x7f\x10\0OW")
    assert refusal(body) == ("too-large", "")


def test_a_value_of_a_million_numbers_is_too_large() -> None:
    numbers = struct.pack("<HHI", 0x0028, 0x1050, 1 << 20) + b"1\\" * (1 << 19)
    body = file(radiograph(12), ImplicitVRLittleEndian).replace(b"\xe0\x7f\x10\0", numbers + b"\xe0\x7f\x10\0")
    assert refusal(body) == ("too-large", "WindowCenter")


def test_file_meta_information_without_end_is_read_to_a_limit() -> None:
    element = struct.pack("<HH2sH", 2, 0x0012, b"UI", 0)
    assert refusal(bytes(128) + b"DICM" + element * 100_000)[0] in ("unsupported-syntax", "no-pixels", "not-an-image")


# --- nothing gets out -----------------------------------------------------------------------------------------


def junk_header() -> bytes:
    with warnings.catch_warnings():
        # pydicom warns of it when it is written, too.
        warnings.simplefilter("ignore")
        body = file(
            PatientAge="061Y",
            StudyTime=f"{CANARY} is no time",
            WindowCenter=2000.0,
            WindowWidth=4000.0,
            SpecificCharacterSet=f"{CANARY}_CHARSET",
        )
    return body.replace(b"4000.0", CANARY[:6].encode())


def test_nothing_a_header_says_is_logged_warned_of_or_raised(caplog: pytest.LogCaptureFixture) -> None:
    junk = junk_header()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images(junk)
        code = refusal(junk[:-50], repair=False)
    assert CANARY not in caplog.text + str(caught) + str(code)
    assert [str(w.message) for w in caught] == []


def test_an_instance_does_not_print_its_header() -> None:
    assert CANARY not in repr(read_instance(file(), Decode()))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=20),
    st.sampled_from(["explicit", "implicit", "big-endian", "rle", "jpeg-ls", "jpeg-2000", "htj2k", "jpeg-lossless"]),
)
def test_flipped_bytes_give_images_or_a_typed_refusal(changes: list[tuple[int, int]], name: str) -> None:
    data = bytearray(SMALL[name])
    for place, value in changes:
        data[132 + place % (len(data) - 132)] = value
    with contextlib.suppress(ScanError):
        assert all(made.pixels.ndim == 2 for made in images(bytes(data), colour="luminance"))


SMALL: dict[str, Any] = {name: file(radiograph(8), LOSSLESS[name]) for name in LOSSLESS if name != "deflated"}
