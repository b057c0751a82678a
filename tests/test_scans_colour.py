"""Colour and palettes: gray where their channels are equal, else refused or read by its luma."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scanloom.scans.image import Rendering
from tests.decoded import image, refusal
from tests.made_dicom import dataset, file, radiograph, written


def colour_file(values: Any, photometric: str = "RGB", **elements: Any) -> bytes:
    header: dict[str, Any] = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": photometric}
    return file(values, **(header | elements))


def painted() -> Any:
    values = np.stack([radiograph(8, seed=seed) for seed in range(3)], axis=-1)
    values[0, :3] = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    return values


def test_colour_is_refused_or_read_by_its_luma() -> None:
    values = painted()
    assert refusal(colour_file(values)) == ("colour", "PhotometricInterpretation")
    made = image(colour_file(values), colour="luminance")
    np.testing.assert_allclose(made.pixels, values @ np.array([0.299, 0.587, 0.114]), atol=0.51)
    assert list(made.pixels[0, :3]) == [76, 150, 29]
    assert made.rendering == Rendering()


@pytest.mark.parametrize("bits, kind, levels", [(8, np.uint8, 255), (12, np.uint16, 65535), (16, np.uint16, 65535)])
def test_colour_whose_channels_are_equal_is_gray(bits: int, kind: Any, levels: int) -> None:
    gray = radiograph(bits)
    data = colour_file(np.repeat(gray[..., None], 3, axis=-1), bits_stored=bits)
    made = image(data)
    assert made.pixels.dtype == kind
    np.testing.assert_array_equal(made.pixels, np.rint(gray / ((1 << bits) - 1) * levels))
    np.testing.assert_array_equal(image(data, colour="luminance").pixels, made.pixels)


def test_ybr_is_gray_without_chroma_and_its_luma_is_its_first_sample() -> None:
    values = np.full((48, 40, 3), 128, np.uint8)
    values[..., 0] = radiograph(8)
    np.testing.assert_array_equal(image(colour_file(values, "YBR_FULL")).pixels, radiograph(8))
    values[5, 5, 1] = 90
    assert refusal(colour_file(values, "YBR_FULL")) == ("colour", "PhotometricInterpretation")
    np.testing.assert_array_equal(image(colour_file(values, "YBR_FULL"), colour="luminance").pixels, radiograph(8))


def palette_file(red: Any, green: Any, blue: Any, bits: int = 16, **elements: Any) -> bytes:
    made = dataset(radiograph(8), PhotometricInterpretation="PALETTE COLOR", **elements)
    for name, table in (("Red", red), ("Green", green), ("Blue", blue)):
        keyword = f"{name}PaletteColorLookupTable"
        made.add_new(f"{keyword}Descriptor", "US", [len(table) % 65536, 0, bits])
        made.add_new(f"{keyword}Data", "OW", np.asarray(table).tobytes())
    return written(made)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_gray_palette_is_gray_and_a_coloured_one_is_not(bits: int) -> None:
    kind, levels = (np.uint8, 255) if bits == 8 else (np.uint16, 65535)
    ramp = np.linspace(0, levels, 256).astype(kind)
    made = image(palette_file(ramp, ramp, ramp, bits))
    np.testing.assert_array_equal(made.pixels, ramp[radiograph(8)])
    assert refusal(palette_file(ramp, ramp, ramp[::-1].copy(), bits)) == ("colour", "PhotometricInterpretation")
    made = image(palette_file(ramp, ramp[::-1].copy(), ramp, bits), colour="luminance")
    expected = np.add(0.413 * ramp.astype(np.float64), 0.587 * ramp[::-1].astype(np.float64))[radiograph(8)]
    np.testing.assert_allclose(made.pixels, expected, atol=1.0)


def test_coloured_entries_that_no_pixel_uses_do_not_make_an_image_coloured() -> None:
    """Ultrasound keeps the colours of Doppler in the palette of its gray frames."""
    ramp = np.arange(256, dtype=np.uint8)
    pixels = (radiograph(8) // 2).astype(np.uint8)
    coloured = ramp.copy()
    coloured[200:] = 0
    data = palette_file(ramp, ramp, coloured, 8, PixelData=pixels.tobytes())
    np.testing.assert_array_equal(image(data).pixels, pixels)


def test_a_palette_whose_16_bits_hold_8_is_as_bright_as_one_of_8() -> None:
    ramp = np.arange(256, dtype=np.uint16)
    np.testing.assert_array_equal(image(palette_file(ramp, ramp, ramp)).pixels, radiograph(8))


def test_a_palette_that_is_cut_is_refused() -> None:
    ramp = np.arange(256, dtype=np.uint16)
    data = palette_file(ramp, ramp, ramp)
    made = data.replace(ramp.tobytes(), ramp.tobytes()[:-300] + bytes(300))
    assert image(made).pixels.any()
    short = dataset(radiograph(8), PhotometricInterpretation="PALETTE COLOR")
    assert refusal(written(short)) == ("unsupported-pixels", "RedPaletteColorLookupTableDescriptor")
    short.add_new("RedPaletteColorLookupTableDescriptor", "US", [256, 0, 16])
    short.add_new("RedPaletteColorLookupTableData", "OW", bytes(100))
    assert refusal(written(short)) == ("unsupported-pixels", "RedPaletteColorLookupTableData")
