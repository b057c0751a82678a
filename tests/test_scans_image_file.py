"""PNG, JPEG and TIFF: pixels and depth as the file has them, and junk to a typed refusal."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scanloom.errors import ScanError
from scanloom.recipe import Decode
from scanloom.scans import image_file
from scanloom.scans.decode import file_image
from scanloom.scans.image import Geometry, Rendering
from tests.made_dicom import radiograph

REFUSE, LUMINANCE = Decode(), Decode(colour="luminance")


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def code(data: bytes) -> str:
    with pytest.raises(ScanError) as caught:
        file_image(data, REFUSE)
    return caught.value.code


def test_grayscale_files_keep_their_pixels_and_depth() -> None:
    eight, sixteen = radiograph(8), radiograph(16)
    made = file_image(encoded(Image.fromarray(eight)), REFUSE)
    np.testing.assert_array_equal(made.pixels, eight)
    assert (made.geometry, made.rendering, made.repairs) == (Geometry(), Rendering(), ())
    for form in ("PNG", "TIFF"):
        image = file_image(encoded(Image.fromarray(sixteen), form), REFUSE)
        assert image.bits_stored == 16
        np.testing.assert_array_equal(image.pixels, sixteen)


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_whose_zero_is_white_is_inverted(bits: int) -> None:
    pixels = radiograph(bits)
    black_is_zero = struct.pack("<HHIH", 262, 3, 1, 1)
    data = encoded(Image.fromarray(pixels), "TIFF")
    assert data.count(black_is_zero) == 1
    made = file_image(data.replace(black_is_zero, struct.pack("<HHIH", 262, 3, 1, 0)), REFUSE)
    np.testing.assert_array_equal(made.pixels, (1 << bits) - 1 - pixels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_gray_pixels_in_a_colour_mode_are_gray(mode: str) -> None:
    gray = Image.fromarray(radiograph(8))
    np.testing.assert_array_equal(file_image(encoded(gray.convert(mode)), REFUSE).pixels, radiograph(8))


def test_black_and_white_is_gray() -> None:
    bits = radiograph(8) > 127
    np.testing.assert_array_equal(file_image(encoded(Image.fromarray(bits)), REFUSE).pixels, bits * 255)


def test_colour_is_refused_or_read_by_its_luma() -> None:
    values = np.stack([radiograph(8, seed=seed) for seed in range(3)], axis=-1)
    assert code(encoded(Image.fromarray(values))) == "colour"
    shown = file_image(encoded(Image.fromarray(values)), LUMINANCE).pixels
    np.testing.assert_allclose(shown, values @ np.array([0.299, 0.587, 0.114]), atol=0.51)


def test_each_unusable_image_file_has_its_own_code() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    assert code(b"") == "empty-file"
    assert code(b"Image Index,Finding Labels\n") == "not-an-image-file"
    assert code(encoded(Image.fromarray(noise))[:2000]) == "truncated"
    assert code(encoded(Image.fromarray(noise), "JPEG")[:1500]) == "truncated"
    assert code(encoded(Image.fromarray(noise.astype(np.float32)), "TIFF")) == "unsupported-pixels"
    assert code(encoded(Image.new("L", (9, 9), 3))) == "blank-image"
    assert code(encoded(Image.new("CMYK", (9, 9), 3), "JPEG")) == "colour"
    pages = [Image.fromarray(noise)]
    assert code(encoded(pages[0], "TIFF", save_all=True, append_images=pages)) == "several-pages"


def test_an_image_file_larger_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "MAX_PIXELS", 100)
    assert code(encoded(Image.fromarray(radiograph(8)))) == "too-large"
