"""From files to gray pixels: the viewing chain of PS3.3, enhanced objects frame by frame, and refusals."""

from __future__ import annotations

import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import BasicTextSRStorage, JPEGBaseline8Bit, JPEGExtended12Bit

from scanloom.errors import ScanError
from scanloom.recipe import Decode
from scanloom.scans.decode import file_image, frames, read_instance
from scanloom.scans.image import Rendering
from tests.decoded import image, images, refusal
from tests.made_dicom import LOSSLESS, dataset, file, radiograph, wrapped, written


def full_range(stored: Any, low: float, high: float, bits: int = 16) -> Any:
    shown = np.clip((stored.astype(np.float64) - low) / (high - low), 0, 1)
    return np.rint(shown * ((1 << bits) - 1))


# --- the chain ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("name", LOSSLESS)
def test_every_lossless_syntax_shows_the_same_pixels(name: str, bits: int) -> None:
    pixels = radiograph(bits)
    made = image(file(pixels, LOSSLESS[name]))
    assert made.bits_stored == (8 if bits == 8 else 16)
    np.testing.assert_array_equal(made.pixels, full_range(pixels, 0, (1 << bits) - 1, made.bits_stored))


def test_lossy_jpeg_of_12_bits_decodes_to_within_its_loss() -> None:
    pixels = radiograph(12)
    frame = bytes(imagecodecs.jpeg8_encode(pixels, level=98, bitspersample=12))
    shown = image(wrapped(dataset(pixels, bits_stored=12), frame, JPEGExtended12Bit)).pixels.astype(float)
    assert np.abs(shown - full_range(pixels, 0, 4095)).mean() < 0.005 * 65535


def test_monochrome1_comes_out_inverted_and_says_so() -> None:
    pixels = radiograph(8)
    made = image(file(pixels, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(made.pixels, 255 - pixels)
    assert (made.rendering.low, made.rendering.high) == (255.0, 0.0)


@pytest.mark.parametrize("bits", [8, 12])
def test_signed_values_with_rescale_keep_their_order_and_zero(bits: int) -> None:
    pixels: Any = (radiograph(bits).astype(np.int32) - (1 << (bits - 1))).astype(np.int8 if bits == 8 else np.int16)
    window: dict[str, Any] = {
        "WindowCenter": 0.0,
        "WindowWidth": float(1 << bits),
        "RescaleSlope": 2.0,
        "RescaleIntercept": 10.0,
    }
    made = image(file(pixels, bits_stored=bits, **window))
    low = -(1 << (bits - 1))
    expected = full_range(pixels * 2.0 + 10.0, low, low + (1 << bits) - 1, made.bits_stored)
    np.testing.assert_array_equal(made.pixels, expected)
    assert made.rendering == Rendering("window-1", low, low + (1 << bits) - 1, "")


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("center, width", [(2048.0, 4096.0), (1200.0, 300.0), (3000.5, 777.0), (100.0, 2.0)])
def test_windows_agree_with_pydicoms(function: str, center: float, width: float) -> None:
    made = dataset(radiograph(12), bits_stored=12, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    theirs = np.asarray(apply_voi_lut(radiograph(12), made), dtype=float)
    np.testing.assert_allclose(image(written(made)).pixels, np.rint(theirs / 4095 * 65535), atol=1.5)


def test_a_linear_window_of_width_one_is_a_threshold() -> None:
    made = image(file(radiograph(12), WindowCenter=1000.0, WindowWidth=1.0))
    np.testing.assert_array_equal(made.pixels, np.where(radiograph(12) > 999.5, 65535, 0))


def test_stored_values_of_32_bits_go_the_same_way() -> None:
    small = radiograph(12)
    window: dict[str, Any] = {
        "RescaleSlope": 0.5,
        "RescaleIntercept": -3.0,
        "WindowCenter": 900.0,
        "WindowWidth": 500.0,
    }
    for kind in (np.uint32, np.int32):
        wide = file(small.astype(kind), PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=None, **window)
        narrow = file(small, PhotometricInterpretation="MONOCHROME1", **window)
        np.testing.assert_array_equal(image(wide).pixels, image(narrow).pixels)


# --- which window ---------------------------------------------------------------------------------------------

SEVERAL: dict[str, Any] = {"WindowCenter": [1000.0, 3000.0], "WindowWidth": [501.0, 101.0]}


def test_the_window_that_the_recipe_counts_to_is_shown() -> None:
    first, second = (image(file(**SEVERAL), window={"kind": "header", "index": i}) for i in (0, 1))
    np.testing.assert_array_equal(first.pixels, image(file(WindowCenter=1000.0, WindowWidth=501.0)).pixels)
    np.testing.assert_array_equal(second.pixels, image(file(WindowCenter=3000.0, WindowWidth=101.0)).pixels)
    assert first.rendering == Rendering("window-1", 749.5, 1249.5)
    assert second.rendering == Rendering("window-2", 2949.5, 3049.5)


@pytest.mark.parametrize(
    "elements",
    [
        SEVERAL,
        {},
        {"WindowCenter": 5.0},
        {"WindowCenter": 5.0, "WindowWidth": 0.0},
        {"WindowCenter": 5.0, "WindowWidth": -2.0},
    ],
    ids=["too few", "none", "no width", "width 0", "width below 0"],
)
def test_without_the_window_asked_for_the_whole_range_is_shown(elements: dict[str, Any]) -> None:
    made = image(file(**elements), window={"kind": "header", "index": 2})
    assert made.rendering == Rendering("full", 0.0, 4095.0)
    np.testing.assert_array_equal(made.pixels, full_range(radiograph(), 0, 4095))


def test_full_ignores_the_header_and_fixed_is_in_modality_values() -> None:
    rescaled = SEVERAL | {"RescaleSlope": 1.0, "RescaleIntercept": -1024.0, "RescaleType": "HU"}
    full = image(file(**rescaled), window={"kind": "full"})
    assert full.rendering == Rendering("full", -1024.0, 3071.0, "HU")
    fixed = image(file(**rescaled), window={"kind": "fixed", "center": 40.0, "width": 400.0})
    assert fixed.rendering == Rendering("fixed", -160.0, 240.0, "HU")
    np.testing.assert_array_equal(fixed.pixels, full_range(radiograph() - 1024.0, -160.0, 240.0))


@pytest.mark.parametrize(
    "elements, unit",
    [
        ({"RescaleType": "HU", "Modality": "MR"}, "HU"),
        ({"Modality": "CT"}, "HU"),
        ({"Modality": "CT", "RescaleType": "US"}, ""),
        ({"Modality": "MR"}, ""),
        ({"RescaleType": "PHITEST of ward 7"}, ""),
    ],
)
def test_the_unit_is_one_of_dicoms_and_never_free_text(elements: dict[str, Any], unit: str) -> None:
    assert image(file(RescaleSlope=1.0, RescaleIntercept=-1024.0, **elements)).rendering.unit == unit


def lut(values: list[int], first: int, bits: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "US", values)
    return item


def test_modality_and_voi_luts_are_applied_in_turn() -> None:
    pixels = radiograph(8)
    reverse = lut([255 - v for v in range(256)], 0, 16)
    reverse.ModalityLUTType = "US"
    steps = lut([0] * 100 + [700] * 56 + [1023] * 100, 0, 10)
    made = image(file(pixels, ModalityLUTSequence=Sequence([reverse]), VOILUTSequence=Sequence([steps])))
    inverted = 255 - pixels.astype(int)
    expected = np.where(inverted < 100, 0, np.where(inverted < 156, 700, 1023)) / 1023 * 255
    np.testing.assert_array_equal(made.pixels, np.rint(expected))
    assert made.rendering == Rendering("voi-lut", 0.0, 255.0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["implicit", "explicit", "big-endian", "deflated"])
def test_luts_and_padding_mean_the_same_in_every_encoding(name: str, signed: bool) -> None:
    """Their VRs are US or SS, by the sign of the pixels; Implicit VR does not say which."""
    pixels = radiograph(8)
    stored: Any = (pixels.astype(np.int16) - 128).astype(np.int8) if signed else pixels
    reverse = Dataset()
    reverse.add_new("LUTDescriptor", "SS" if signed else "US", [256, -128 if signed else 0, 16])
    reverse.add_new("LUTData", "US", [255 - v for v in range(256)])
    reverse.ModalityLUTType = "US"
    luts = {"ModalityLUTSequence": Sequence([reverse]), "VOILUTSequence": Sequence([lut(list(range(256)), 0, 8)])}
    made = image(file(stored, LOSSLESS[name], PixelPaddingValue=-128 if signed else 0, **luts))
    np.testing.assert_array_equal(made.pixels, np.where(pixels == 0, 0, 255 - pixels))


def test_the_full_range_behind_a_modality_lut_is_that_of_its_output() -> None:
    pixels = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)
    jumps = lut([500, 7, 900, 100], 0, 16)
    made = image(file(pixels, ModalityLUTSequence=Sequence([jumps])), window={"kind": "full"})
    assert made.rendering == Rendering("full", 7.0, 900.0)
    np.testing.assert_array_equal(made.pixels, full_range(np.array([[500, 7, 900], [100, 900, 7]]), 7, 900, 8))


# --- padding and unused bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_stretch_the_range(photometric: str) -> None:
    pixels = (radiograph(12) // 4 + 1000).astype(np.uint16)
    pixels[:, :9] = 4095
    made = image(file(pixels, PixelPaddingValue=4095, PhotometricInterpretation=photometric))
    assert not made.pixels[:, :9].any()
    assert made.pixels[:, 9:].min() == 0
    assert made.pixels[:, 9:].max() == 65535


def test_a_padding_range_in_signed_pixels_is_black_though_the_header_says_it_unsigned() -> None:
    pixels = radiograph(12).astype(np.int16)
    pixels[:5] = -2000
    pixels[5:9] = -1990
    made = dataset(pixels)
    made.add_new("PixelPaddingValue", "US", 65536 - 2000)
    made.add_new("PixelPaddingRangeLimit", "US", 65536 - 1990)
    shown = image(written(made))
    assert not shown.pixels[:9].any()
    assert shown.pixels[9:].max() == 65535


def test_an_image_of_nothing_but_its_padding_value_and_range_is_shown() -> None:
    made = image(file(radiograph(8), PixelPaddingValue=0, PixelPaddingRangeLimit=255))
    np.testing.assert_array_equal(made.pixels, radiograph(8))


def test_overlay_bits_beside_the_stored_bits_do_not_show() -> None:
    pixels = radiograph(12)
    drawn = pixels | np.where(np.indices(pixels.shape)[1] % 2, 0x8000, 0).astype(np.uint16)
    np.testing.assert_array_equal(image(file(drawn)).pixels, image(file(pixels)).pixels)


def test_stored_bits_in_the_high_end_of_their_word_are_found() -> None:
    pixels = radiograph(12)
    shifted = file((pixels << 4).astype(np.uint16), HighBit=15)
    np.testing.assert_array_equal(image(shifted).pixels, image(file(pixels)).pixels)


@pytest.mark.parametrize("high", [0, 3, 30])
def test_an_impossible_high_bit_is_taken_for_a_slip(high: int) -> None:
    np.testing.assert_array_equal(image(file(HighBit=high)).pixels, image(file()).pixels)


# --- enhanced multi-frame -------------------------------------------------------------------------------------


def group(**macros: dict[str, Any]) -> Dataset:
    made = Dataset()
    for name, elements in macros.items():
        item = Dataset()
        for keyword, value in elements.items():
            setattr(item, keyword, value)
        setattr(made, name, Sequence([item]))
    return made


def enhanced(count: int = 3, **elements: Any) -> bytes:
    """Frames that differ in rescale, window and position, and share their spacing and orientation."""
    pixels = radiograph(12)
    shared = group(
        PixelMeasuresSequence={"PixelSpacing": [0.5, 0.25]},
        PlaneOrientationSequence={"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
        PixelValueTransformationSequence={"RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU"},
        FrameVOILUTSequence={"WindowCenter": 40, "WindowWidth": 400},
    )
    own = [
        group(
            PlanePositionSequence={"ImagePositionPatient": [1.5, -2.0, float(index)]},
            PixelValueTransformationSequence={"RescaleSlope": index + 1, "RescaleIntercept": -7, "RescaleType": "US"},
            **({"FrameVOILUTSequence": {"WindowCenter": 999.5 + index, "WindowWidth": 2000}} if index else {}),
        )
        for index in range(count)
    ]
    header: dict[str, Any] = {
        "SOPClassUID": uid.EnhancedCTImageStorage,
        "NumberOfFrames": count,
        "PixelData": pixels.tobytes() * count,
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence(own),
        "WindowCenter": 1.0,
        "WindowWidth": 2.0,
        "PixelSpacing": [9.0, 9.0],
    }
    return file(pixels, **(header | elements))


def test_every_frame_has_its_own_values_else_the_shared_ones_else_the_top_levels() -> None:
    shown = images(enhanced())
    assert [made.rendering for made in shown] == [
        Rendering("window-1", -160.0 + 0.0, 239.0, ""),
        Rendering("window-1", 0.5, 1999.5, ""),
        Rendering("window-1", 1.5, 2000.5, ""),
    ]
    np.testing.assert_array_equal(shown[2].pixels, full_range(radiograph() * 3.0 - 7.0, 1.5, 2000.5))
    assert [made.geometry.position_mm for made in shown] == [(1.5, -2.0, float(index)) for index in range(3)]
    assert {made.geometry.spacing_mm for made in shown} == {(0.5, 0.25)}
    assert {made.geometry.orientation for made in shown} == {"P\\F"}
    bare = images(enhanced(SharedFunctionalGroupsSequence=None, PerFrameFunctionalGroupsSequence=None))
    assert bare[0].rendering == Rendering("window-1", 0.0, 1.0)
    assert bare[0].geometry.spacing_mm == (9.0, 9.0)


def test_fewer_groups_than_frames_leave_the_rest_to_the_shared_ones() -> None:
    (_, _, last) = images(enhanced(PerFrameFunctionalGroupsSequence=Sequence([Dataset()])))
    assert last.rendering == Rendering("window-1", -160.0, 239.0, "HU")


def test_a_plain_multi_frame_object_is_as_many_scans() -> None:
    stack = np.stack([radiograph(8, seed=seed) for seed in range(4)])
    shown = images(file(stack[0], NumberOfFrames=4, PixelData=stack.tobytes()))
    for made, frame in zip(shown, stack, strict=True):
        np.testing.assert_array_equal(made.pixels, frame)


def test_a_blank_frame_is_refused_by_itself() -> None:
    stack = np.stack([radiograph(8), np.full((48, 40), 7, np.uint8), radiograph(8)])
    data = file(stack[0], NumberOfFrames=3, PixelData=stack.tobytes())
    made = list(frames(read_instance(data, Decode()), Decode()))
    assert [getattr(frame, "code", "image") for frame in made] == ["image", "blank-image", "image"]


def test_frames_are_decoded_one_at_a_time() -> None:
    pixels = radiograph(12, (256, 256))
    frame = bytes(imagecodecs.jpegls_encode(pixels))
    made = dataset(pixels, bits_stored=12, NumberOfFrames=200)
    data = wrapped(made, frame, uid.JPEGLSLossless).replace(item(frame), item(frame) * 200)
    instance = read_instance(data, Decode())
    tracemalloc.start()
    try:
        count = sum(not isinstance(made_frame, ScanError) for made_frame in frames(instance, Decode()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 200
    # Decoded, a frame is 128 KiB, and the table of a window as much.
    assert peak < 3 << 20


def item(frame: bytes) -> bytes:
    padded = frame + b"\0" * (len(frame) % 2)
    return b"\xfe\xff\0\xe0" + len(padded).to_bytes(4, "little") + padded


# --- refusals -------------------------------------------------------------------------------------------------


def test_each_unusable_file_has_its_own_code() -> None:
    rubbish = b"\xff\xd8 no jpeg at all"
    assert refusal(file(SOPClassUID=BasicTextSRStorage)) == ("not-an-image", "SOPClassUID")
    assert refusal(file(SOPClassUID=uid.RTDoseStorage)) == ("not-an-image", "SOPClassUID")
    assert refusal(file(SOPClassUID=uid.SegmentationStorage)) == ("not-an-image", "SOPClassUID")
    assert refusal(written_without_pixels()) == ("no-pixels", "PixelData")
    assert refusal(file(PresentationIntentType="FOR PROCESSING")) == ("for-processing", "PresentationIntentType")
    assert refusal(wrapped(dataset(radiograph(8)), rubbish, JPEGBaseline8Bit)) == ("undecodable-pixels", "PixelData")
    assert refusal(file(Rows=60000, Columns=60000)) == ("too-large", "Rows")
    assert refusal(file(NumberOfFrames=100_001)) == ("too-large", "NumberOfFrames")
    assert refusal(file(np.full((8, 8), 7, np.uint8))) == ("blank-image", "PixelData")
    assert refusal(file(WindowCenter=-5000.0, WindowWidth=10.0)) == ("blank-image", "PixelData")
    assert refusal(file(Rows=None)) == ("unsupported-pixels", "Rows")
    assert refusal(file(RescaleSlope=0.0, RescaleIntercept=1.0)) == ("blank-image", "PixelData")
    assert refusal(file(RescaleSlope=1e308, RescaleIntercept=1e308)) == ("blank-image", "PixelData")


def test_a_rescale_that_is_no_number_is_not_ignored() -> None:
    data = file(RescaleSlope=1.0, RescaleIntercept=-1024.0)
    assert refusal(data.replace(b"-1024.0 ", b"minus1k ")) == ("unsupported-pixels", "RescaleIntercept")


def written_without_pixels() -> bytes:
    made = dataset(radiograph(8))
    del made.PixelData
    return written(made)


def test_parametric_maps_in_floating_point_are_shown() -> None:
    values = np.linspace(-1.0, 3.0, 48 * 40).astype(np.float32).reshape(48, 40)
    values[0, 0] = np.nan
    values[1, 1] = -1e9
    made = dataset(radiograph(8), PixelData=None, BitsStored=None, HighBit=None, SOPClassUID=uid.ParametricMapStorage)
    made.BitsAllocated = 32
    made.FloatPixelData = values.tobytes()
    made.FloatPixelPaddingValue = -1e9
    shown = image(written(made))
    assert shown.rendering.choice == "full"
    assert shown.rendering.low == pytest.approx(float(values[0, 1]))
    assert shown.rendering.high == pytest.approx(3.0)
    assert shown.pixels[0, 0] == shown.pixels[1, 1] == 0
    assert shown.pixels[-1, -1] == 65535


def test_the_header_may_be_read_before_the_frames_are() -> None:
    """De-identification looks at every element first, and pydicom then keeps them in another form."""
    for name in ("explicit", "rle", "jpeg-ls"):
        instance = read_instance(file(radiograph(8), LOSSLESS[name]), Decode())
        assert any(element.keyword == "PixelData" for element in instance.dataset)
        made = next(frames(instance, Decode()))
        np.testing.assert_array_equal(made.pixels, radiograph(8))  # type: ignore[union-attr]


def test_the_real_dicom_scans_show_the_published_png(nih_dicom: Path, nih_png: Path) -> None:
    checked = 0
    for name, data in members(nih_dicom / "scans-00000.tar"):
        original = nih_png / "images" / name.replace(".dcm", ".png")
        shown = image(data).pixels.astype(float)
        shown *= 255.0 / (255.0 if shown.max() < 256 else 65535.0)
        # 12 bits were made of the 8 with noise below one step.
        assert np.abs(shown - file_image(original.read_bytes(), Decode()).pixels).max() <= 1.1
        checked += 1
    assert checked == 100


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            yield member.name, archive.extractfile(member).read()  # type: ignore[union-attr]
