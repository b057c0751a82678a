"""Decoding: every syntax to the same pixels, the viewing chain of PS3.3, and junk to a typed refusal."""

from __future__ import annotations

import io
import tarfile
import warnings
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import (
    MPEG2MPML,
    BasicTextSRStorage,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    RLELossless,
)

from scanloom.errors import ScanError
from scanloom.scans import decode
from scanloom.scans.decode import ScanImage, dicom_image, file_image, read_dataset, require_image
from scanloom.scans.resize import fit
from tests.made_dicom import LOSSLESS, dataset, file, radiograph, wrapped, written


def decoded(data: bytes) -> ScanImage:
    made = read_dataset(data)
    require_image(made)
    return dicom_image(made)


def refusal(data: bytes) -> tuple[str, str]:
    with pytest.raises(ScanError) as caught:
        decoded(data)
    return caught.value.code, caught.value.tag


def full_range(stored: Any, low: float, high: float, bits: int = 16) -> Any:
    shown = np.clip((stored.astype(np.float64) - low) / (high - low), 0, 1)
    return np.rint(shown * ((1 << bits) - 1))


# --- the chain ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("name", LOSSLESS)
def test_every_lossless_syntax_gives_the_stored_pixels(name: str, bits: int) -> None:
    pixels = radiograph(bits)
    image = decoded(file(pixels, LOSSLESS[name]))
    assert image.bits_stored == (8 if bits == 8 else 16)
    np.testing.assert_array_equal(image.pixels, full_range(pixels, 0, (1 << bits) - 1, image.bits_stored))


def test_lossy_jpeg_of_12_bits_decodes_to_within_its_loss() -> None:
    pixels = radiograph(12)
    frame = imagecodecs.jpeg8_encode(pixels, level=98, bitspersample=12)
    shown = decoded(wrapped(dataset(pixels, bits_stored=12), bytes(frame), JPEGExtended12Bit)).pixels.astype(float)
    assert np.abs(shown - full_range(pixels, 0, 4095)).mean() < 0.005 * 65535


def test_monochrome1_comes_out_inverted() -> None:
    pixels = radiograph(8)
    image = decoded(file(pixels, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(image.pixels, 255 - pixels)


@pytest.mark.parametrize("bits", [8, 12])
def test_signed_values_with_rescale_keep_their_order_and_zero(bits: int) -> None:
    pixels: Any = (radiograph(bits).astype(np.int32) - (1 << (bits - 1))).astype(np.int8 if bits == 8 else np.int16)
    window: dict[str, Any] = {
        "WindowCenter": 0.0,
        "WindowWidth": float(1 << bits),
        "RescaleSlope": 2.0,
        "RescaleIntercept": 10.0,
    }
    image = decoded(file(pixels, bits_stored=bits, **window))
    low = -(1 << (bits - 1))
    np.testing.assert_allclose(
        image.pixels, full_range(pixels * 2.0 + 10.0, low, low + (1 << bits) - 1, image.bits_stored), atol=1
    )


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("center, width", [(2048.0, 4096.0), (1200.0, 300.0), (3000.5, 777.0), (100.0, 2.0)])
def test_windows_agree_with_pydicoms(function: str, center: float, width: float) -> None:
    made = dataset(radiograph(12), bits_stored=12, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    theirs = np.asarray(apply_voi_lut(radiograph(12), made), dtype=float)
    np.testing.assert_allclose(decoded(written(made)).pixels, np.rint(theirs / 4095 * 65535), atol=1.5)


def test_a_linear_window_of_width_one_is_a_threshold() -> None:
    image = decoded(file(radiograph(12), WindowCenter=1000.0, WindowWidth=1.0))
    np.testing.assert_array_equal(image.pixels, np.where(radiograph(12) > 999.5, 65535, 0))


def test_the_first_of_several_windows_is_shown() -> None:
    several = decoded(file(WindowCenter=[1000.0, 3000.0], WindowWidth=[500.0, 100.0]))
    np.testing.assert_array_equal(several.pixels, decoded(file(WindowCenter=1000.0, WindowWidth=500.0)).pixels)


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
    image = decoded(file(pixels, ModalityLUTSequence=Sequence([reverse]), VOILUTSequence=Sequence([steps])))
    inverted = 255 - pixels.astype(int)
    expected = np.where(inverted < 100, 0, np.where(inverted < 156, 700, 1023)) / 1023 * 255
    np.testing.assert_array_equal(image.pixels, np.rint(expected))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_stretch_the_range(photometric: str) -> None:
    pixels = (radiograph(12) // 4 + 1000).astype(np.uint16)
    pixels[:, :9] = 4095
    image = decoded(file(pixels, PixelPaddingValue=4095, PhotometricInterpretation=photometric))
    assert not image.pixels[:, :9].any()
    assert image.pixels[:, 9:].min() == 0
    assert image.pixels[:, 9:].max() == 65535


def test_a_padding_range_in_signed_pixels_is_black_though_the_header_says_it_unsigned() -> None:
    pixels = radiograph(12).astype(np.int16)
    pixels[:5] = -2000
    pixels[5:9] = -1990
    made = dataset(pixels)
    made.add_new("PixelPaddingValue", "US", 65536 - 2000)
    made.add_new("PixelPaddingRangeLimit", "US", 65536 - 1990)
    image = decoded(written(made))
    assert not image.pixels[:9].any()
    assert image.pixels[9:].max() == 65535


def test_overlay_bits_beside_the_stored_bits_do_not_show() -> None:
    pixels = radiograph(12)
    drawn = pixels | np.where(np.indices(pixels.shape)[1] % 2, 0x8000, 0).astype(np.uint16)
    np.testing.assert_array_equal(decoded(file(drawn)).pixels, decoded(file(pixels)).pixels)


def test_stored_bits_in_the_high_end_of_their_word_are_found() -> None:
    pixels = radiograph(12)
    np.testing.assert_array_equal(
        decoded(file((pixels << 4).astype(np.uint16), HighBit=15)).pixels, decoded(file(pixels)).pixels
    )


def test_spacing_is_of_the_object_before_of_the_detector_and_none_where_it_is_nonsense() -> None:
    assert decoded(file(PixelSpacing=[0.5, 0.25], ImagerPixelSpacing=[0.6, 0.6])).spacing_mm == (0.5, 0.25)
    assert decoded(file(ImagerPixelSpacing=[0.143, 0.143])).spacing_mm == (0.143, 0.143)
    assert decoded(file(PixelSpacing=[0.0, 0.0])).spacing_mm is None
    assert decoded(file()).spacing_mm is None


# --- refusals -------------------------------------------------------------------------------------------------


def test_each_unusable_file_has_its_own_code() -> None:
    frames = np.stack([radiograph(8)] * 2)
    two_frames = dataset(frames[0], NumberOfFrames=2, PixelData=frames.tobytes())
    colour = dataset(np.zeros((4, 4), np.uint8), SamplesPerPixel=3, PlanarConfiguration=0, PixelData=bytes(48))
    colour.PhotometricInterpretation = "RGB"
    floating = dataset(radiograph(8), PixelData=None)
    floating.FloatPixelData = bytes(4)
    rubbish = b"\xff\xd8 no jpeg at all"
    assert refusal(b"") == ("empty-file", "")
    assert refusal(b"a letter, not an image" * 99) == ("not-dicom", "")
    assert refusal(file(SOPClassUID=BasicTextSRStorage)) == ("not-an-image", "SOPClassUID")
    assert refusal(written_without_pixels()) == ("no-pixels", "PixelData")
    assert refusal(file(PresentationIntentType="FOR PROCESSING")) == ("for-processing", "PresentationIntentType")
    assert refusal(written(two_frames)) == ("multi-frame", "NumberOfFrames")
    assert refusal(written(colour)) == ("colour", "PhotometricInterpretation")
    assert refusal(written(floating)) == ("unsupported-pixels", "PixelData")
    assert refusal(wrapped(dataset(radiograph(8)), rubbish, MPEG2MPML)) == ("unsupported-syntax", "TransferSyntaxUID")
    assert refusal(wrapped(dataset(radiograph(8)), rubbish, JPEGBaseline8Bit)) == ("undecodable-pixels", "PixelData")
    assert refusal(file(Rows=60000, Columns=60000)) == ("too-large", "Rows")
    assert refusal(file(np.full((8, 8), 7, np.uint8))) == ("blank-image", "PixelData")
    assert refusal(file(WindowCenter=-5000.0, WindowWidth=10.0)) == ("blank-image", "PixelData")


def written_without_pixels() -> bytes:
    made = dataset(radiograph(8))
    del made.PixelData
    return written(made)


@pytest.mark.parametrize("name", ["implicit", "explicit", "deflated", "rle", "jpeg-lossless", "jpeg-2000"])
def test_a_file_cut_anywhere_is_refused(name: str) -> None:
    whole = file(radiograph(12), LOSSLESS[name])
    for share in (0.02, 0.2, 0.5, 0.8, 0.95):
        refusal(whole[: int(len(whole) * share)])
    # The last bytes hold pixels or the end of a sequence in each syntax.
    assert refusal(whole[:-9])[0] in ("truncated", "undecodable-pixels")


def test_pixel_data_shorter_than_rows_and_columns_say_is_truncated() -> None:
    assert refusal(file(radiograph(8), Rows=1000)) == ("truncated", "PixelData")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=20), st.booleans())
def test_flipped_bytes_give_an_image_or_a_typed_refusal(changes: list[tuple[int, int]], compressed: bool) -> None:
    data = bytearray(file(radiograph(8), RLELossless if compressed else ExplicitVRLittleEndian))
    for place, value in changes:
        data[132 + place % (len(data) - 132)] = value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert decoded(bytes(data)).pixels.ndim == 2
    except ScanError:
        pass


def test_pydicoms_own_corpus_gives_images_or_typed_refusals() -> None:
    files = sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"))
    results: dict[str, str] = {}
    for path in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                decoded(path.read_bytes())
                results[path.name] = "image"
            except ScanError as error:
                results[path.name] = error.code
    assert results["MR_truncated.dcm"] == results["rtplan_truncated.dcm"] == "truncated"
    assert results["rtdose.dcm"] == results["test-SR.dcm"] == "not-an-image"
    grayscale = {name for name, result in results.items() if result == "image"}
    assert {"JPGExtended.dcm", "J2K_pixelrep_mismatch.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm"} <= grayscale
    # Eight encodings of one MR slice.
    slices = [p for p in files if p.name.startswith("MR_small") and p.name != "MR_small_padded.dcm"]
    pixels = [decoded(path.read_bytes()).pixels for path in slices]
    assert len(pixels) == 7
    assert all(np.array_equal(pixels[0], other) for other in pixels[1:])


def test_nothing_a_header_says_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    decoded(file(PatientAge="061Y", StudyTime="PHITEST is no time", WindowCenter=2000.0, WindowWidth=4000.0))
    assert "PHITEST" not in caplog.text


def test_the_real_dicom_scans_show_the_published_png(nih_dicom: Path, nih_png: Path) -> None:
    checked = 0
    with tarfile.open(nih_dicom / "scans-00000.tar") as archive:
        for member in archive:
            original = nih_png / "images" / member.name.replace(".dcm", ".png")
            shown = decoded(archive.extractfile(member).read()).pixels.astype(float)  # type: ignore[union-attr]
            shown *= 255.0 / (255.0 if shown.max() < 256 else 65535.0)
            # 12 bits were made of the 8 with noise below one step.
            assert np.abs(shown - file_image(original.read_bytes()).pixels).max() <= 1.1
            checked += 1
    assert checked == 100


# --- image files ----------------------------------------------------------------------------------------------


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def test_grayscale_files_keep_their_pixels_and_depth() -> None:
    eight, sixteen = radiograph(8), radiograph(16)
    np.testing.assert_array_equal(file_image(encoded(Image.fromarray(eight))).pixels, eight)
    for form in ("PNG", "TIFF"):
        image = file_image(encoded(Image.fromarray(sixteen), form))
        assert image.bits_stored == 16
        np.testing.assert_array_equal(image.pixels, sixteen)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_gray_pixels_in_a_colour_mode_are_gray(mode: str) -> None:
    gray = Image.fromarray(radiograph(8))
    np.testing.assert_array_equal(file_image(encoded(gray.convert(mode))).pixels, radiograph(8))


def test_each_unusable_image_file_has_its_own_code() -> None:
    def code(data: bytes) -> str:
        with pytest.raises(ScanError) as caught:
            file_image(data)
        return caught.value.code

    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:, 8:, 0] = 200
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    assert code(b"") == "empty-file"
    assert code(b"Image Index,Finding Labels\n") == "not-an-image-file"
    assert code(encoded(Image.fromarray(colours))) == "colour"
    assert code(encoded(Image.fromarray(noise))[:2000]) == "truncated"
    assert code(encoded(Image.fromarray(noise), "JPEG")[:1500]) == "truncated"
    assert code(encoded(Image.fromarray(noise.astype(np.float32)), "TIFF")) == "unsupported-pixels"
    assert code(encoded(Image.new("L", (9, 9), 3))) == "blank-image"
    pages = [Image.fromarray(noise)]
    assert code(encoded(pages[0], "TIFF", save_all=True, append_images=pages)) == "multi-frame"


def test_an_image_file_larger_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    with pytest.raises(ScanError, match="too-large"):
        file_image(encoded(Image.fromarray(radiograph(8))))


# --- resize ---------------------------------------------------------------------------------------------------


def test_a_letterbox_shows_the_whole_scan_between_even_black_bars() -> None:
    square = fit(ScanImage(np.full((100, 200), 60000, np.uint16), (0.5, 0.5)), 64, "letterbox")
    assert square.pixels.dtype == np.uint16
    assert square.spacing_mm == pytest.approx(200 * 0.5 / 64)
    rows = square.pixels[:, 32]
    assert (rows[:16] == 0).all()
    assert (rows[16:48] == 60000).all()
    assert (rows[48:] == 0).all()


def test_a_crop_fills_the_square_with_the_centre() -> None:
    pixels = np.zeros((100, 200), np.uint8)
    pixels[:, 50:150] = 200
    square = fit(ScanImage(pixels, (0.5, 0.5)), 64, "crop")
    assert square.spacing_mm == pytest.approx(100 * 0.5 / 64)
    assert (square.pixels[:, 2:-2] == 200).all()


@pytest.mark.parametrize("how", ["letterbox", "crop"])
def test_pixels_that_are_not_square_are_made_so(how: Any) -> None:
    """A disc of 40 mm on pixels of 1 x 2 mm is as wide as it is high afterwards."""
    y, x = np.mgrid[:100, :50]
    disc = (np.hypot((y - 50) * 1.0, (x - 25) * 2.0) < 20) * 255
    square = fit(ScanImage(disc.astype(np.uint8), (1.0, 2.0)), 64, how)
    drawn = square.pixels > 127
    assert drawn.any(0).sum() == pytest.approx(drawn.any(1).sum(), abs=1)
    assert drawn.any(0).sum() * (square.spacing_mm or 0) == pytest.approx(40, abs=2)


def test_a_scan_of_the_size_asked_for_is_left_as_it_is() -> None:
    pixels = radiograph(12, (64, 64))
    np.testing.assert_array_equal(fit(ScanImage(pixels, None), 64, "letterbox").pixels, pixels)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [24, 120])
def test_resizing_keeps_mean_and_range(bits: int, size: int) -> None:
    pixels = radiograph(bits, (96, 96))
    shrunk = fit(ScanImage(pixels, None), size, "letterbox").pixels
    top = (1 << bits) - 1
    assert abs(float(shrunk.mean()) - float(pixels.mean())) < 0.005 * top
    assert shrunk.max() > 0.9 * top
