"""The template's files equal pydicom's, byte for byte."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread, dcmwrite
from pydicom.pixels.processing import apply_modality_lut

from scanloom.dicom.checks import dciodvfy, violations
from scanloom.dicom.encapsulated import UIDS, items
from scanloom.dicom.synthetic import InstanceDescription, Pixels, build
from scanloom.dicom.template import render
from scanloom.errors import ArtefactError
from scanloom.recipe_generate import SopClass, TransferSyntax

NAMES = st.text("abcXYZ019._-", min_size=1, max_size=80)
LABELS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30)


SOP_CLASSES: tuple[SopClass, ...] = ("DX", "CT", "MR")
SYNTAXES: tuple[TransferSyntax, ...] = ("native", "rle", "jpeg-ls", "htj2k")


@st.composite
def descriptions(draw: st.DrawFn) -> InstanceDescription:
    sop_class = draw(st.sampled_from(SOP_CLASSES))
    return InstanceDescription(
        image_id=draw(st.text("abcXYZ019._-", min_size=1, max_size=54)),
        dataset_name=draw(NAMES),
        plan_digest=draw(NAMES),
        generator_name=draw(NAMES),
        generator_digest=draw(NAMES),
        bits_stored=draw(st.sampled_from((8, 12, 16) if sop_class == "DX" else (12, 16))),
        spacing_mm=draw(st.floats(1e-6, 1e6)),
        content_date=draw(st.dates(date(1000, 1, 1), date(2999, 12, 31))).isoformat().replace("-", ""),
        sex=draw(st.none() | st.sampled_from(("F", "M", "O", "female", "x"))),
        age_years=draw(st.none() | st.floats(0, 999)),
        view=draw(st.none() | st.sampled_from(("PA", "AP", "LL", "RL", "pa")) | LABELS),
        findings=draw(st.none() | st.lists(LABELS, max_size=4).map(tuple)),
        audit=draw(st.none() | NAMES),
        sop_class=sop_class,
        transfer_syntax=draw(st.sampled_from(SYNTAXES)),
        hu_range=draw(st.sampled_from(((-1024.0, 3071.0), (-160.0, 240.0), (-1000.5, 400.25)))),
    )


def pixels_for(instance: InstanceDescription, rows: int, columns: int, seed: int = 0) -> Pixels:
    values = np.random.default_rng(seed).integers(0, 2**instance.bits_stored, (rows, columns))
    return values.astype(np.uint8) if instance.bits_stored == 8 else values.astype(np.uint16)


def fitting(instance: InstanceDescription, side: int) -> int:
    """A side that the JPEG-LS encoder of 12 bits takes too."""
    return side + 16 if (instance.transfer_syntax, instance.bits_stored) == ("jpeg-ls", 12) else side


def written_by_pydicom(pixels: Pixels, instance: InstanceDescription) -> bytes:
    file = io.BytesIO()
    dcmwrite(file, build(pixels, instance), enforce_file_format=True)
    return file.getvalue()


@settings(max_examples=200, deadline=None)
@given(descriptions(), st.integers(1, 9), st.integers(1, 9))
def test_bytes_equal_pydicoms_whatever_the_lengths(instance: InstanceDescription, rows: int, columns: int) -> None:
    pixels = pixels_for(instance, fitting(instance, rows), fitting(instance, columns))
    assert render(pixels, instance) == written_by_pydicom(pixels, instance)


@settings(max_examples=40, deadline=None)
@given(descriptions())
def test_no_description_makes_a_file_that_a_validator_refuses(instance: InstanceDescription) -> None:
    assert dciodvfy(render(pixels_for(instance, fitting(instance, 3), fitting(instance, 5)), instance)).errors == ()


@settings(max_examples=30, deadline=None)
@given(st.lists(descriptions(), min_size=2, max_size=5))
def test_one_image_leaves_nothing_in_the_next(instances: list[InstanceDescription]) -> None:
    pixels = [pixels_for(i, fitting(i, 4), fitting(i, 4)) for i in instances]
    alone = [written_by_pydicom(p, i) for p, i in zip(pixels, instances, strict=True)]
    again = [render(p, i) for p, i in zip(pixels + pixels, instances + instances, strict=True)]
    assert again == alone + alone


@pytest.mark.parametrize("rearranged", ["transposed", "strided", "read-only"])
def test_pixels_in_any_memory_order_are_written_row_by_row(rearranged: str) -> None:
    instance = InstanceDescription("a", "d", "ab", "g", "cd", 16, 1.0, "20000101")
    wide = pixels_for(instance, 6, 8)
    arrays: dict[str, Any] = {"transposed": wide.T, "strided": wide[::2, ::3]}
    pixels = arrays.get(rearranged, wide)
    pixels.flags.writeable = False
    rendered = dcmread(io.BytesIO(render(pixels, instance)))
    np.testing.assert_array_equal(rendered.pixel_array, pixels)


def test_rendered_files_pass_every_check() -> None:
    instance = InstanceDescription(
        "00c0ffee", "demo", "ab" * 32, "chest", "cd" * 32, 12, 0.143, "20000101", "M", 61.0, "AP", ("effusion",)
    )
    file = render(pixels_for(instance, 33, 31), instance)
    assert dciodvfy(file).errors == ()
    assert violations(dcmread(io.BytesIO(file))) == []


@pytest.mark.parametrize("bits_stored", [8, 12, 16])
@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("sop_class", SOP_CLASSES)
def test_every_sop_class_in_every_syntax_is_valid_and_gives_its_pixels_back(
    sop_class: Any, syntax: Any, bits_stored: Any
) -> None:
    if sop_class != "DX" and bits_stored == 8:
        with pytest.raises(ArtefactError, match=f"{sop_class} images hold 12 or 16 bits"):
            InstanceDescription("a", "d", "ab", "g", "cd", 8, 1.0, "20000101", sop_class=sop_class)
        return
    instance = InstanceDescription(
        "a", "d", "ab", "g", "cd", bits_stored, 0.7, "20000101", sop_class=sop_class, transfer_syntax=syntax
    )
    for shape in ((1, 1), (1, 9), (8, 1), (31, 33), (130, 200)):
        if fitting(instance, 0) and min(shape) < 16:
            with pytest.raises(ArtefactError, match="too few for JPEG-LS"):
                render(pixels_for(instance, *shape), instance)
            continue
        pixels = pixels_for(instance, *shape)
        pixels.flat[0], pixels.flat[-1] = 0, 2**bits_stored - 1
        file = render(pixels, instance)
        back = dcmread(io.BytesIO(file))
        assert dciodvfy(file).errors == ()
        assert violations(back) == []
        assert back.file_meta.TransferSyntaxUID == UIDS[syntax]
        np.testing.assert_array_equal(back.pixel_array.reshape(shape), pixels)
        assert render(pixels.copy(), instance) == file


@pytest.mark.slow
@pytest.mark.parametrize("sop_class", SOP_CLASSES)
def test_a_thousand_files_of_a_sop_class_have_no_error(sop_class: Any) -> None:
    def faults(number: int) -> list[str]:
        rng = np.random.default_rng(number)
        bits: Any = (12, 16, 8)[number % (3 if sop_class == "DX" else 2)]
        instance = InstanceDescription(
            f"{number:016x}", "demo", "ab" * 32, "chest", "cd" * 32, bits, float(rng.uniform(0.1, 2.0)), "20000101",
            sex=(None, "F", "M", "O")[rng.integers(4)],
            age_years=None if number % 7 == 0 else float(rng.uniform(0, 110)),
            view=(None, "PA", "AP", "LL", "RL")[rng.integers(5)],
            findings=(None, (), ("effusion",), ("cardiomegaly", "nodule"))[rng.integers(4)],
            sop_class=sop_class,
            transfer_syntax=SYNTAXES[number % len(SYNTAXES)],
        )  # fmt: skip
        rows, columns = rng.integers(20, 90, 2).tolist()
        pixels = pixels_for(instance, rows, columns, number)
        file = render(pixels, instance)
        back = dcmread(io.BytesIO(file))
        wrong = [] if np.array_equal(back.pixel_array, pixels) else ["pixels differ"]
        return [*dciodvfy(file).errors, *map(str, violations(back)), *wrong]

    with ThreadPoolExecutor(2) as pool:
        found = [fault for faults_of_one in pool.map(faults, range(1000)) for fault in faults_of_one]
    assert found == []


@pytest.mark.parametrize("bits_stored", [8, 12, 16])
@pytest.mark.parametrize("decode", [imagecodecs.htj2k_decode, imagecodecs.jpeg2k_decode])
def test_two_decoders_read_htj2k_alike_and_its_precision_is_the_bits_stored(decode: Any, bits_stored: int) -> None:
    instance = InstanceDescription("a", "d", "ab", "g", "cd", 16, 1.0, "20000101")
    pixels = pixels_for(replace(instance, bits_stored=bits_stored), 50, 70)  # type: ignore[arg-type]
    codestream = items(pixels, bits_stored, "htj2k")[16:]
    assert codestream[42] + 1 == bits_stored
    np.testing.assert_array_equal(decode(codestream), pixels)


@pytest.mark.parametrize("hu_range, bits", [((-1024.0, 3071.0), 12), ((-1024.0, 3071.0), 16), ((-160.0, 240.0), 16)])
def test_black_and_white_of_a_ct_image_are_the_ends_of_its_range(hu_range: tuple[float, float], bits: Any) -> None:
    instance = InstanceDescription("a", "d", "ab", "g", "cd", bits, 0.7, "20000101", sop_class="CT", hu_range=hu_range)
    back = dcmread(io.BytesIO(render(np.array([[0, 2**bits - 1]], np.uint16), instance)))
    np.testing.assert_allclose(apply_modality_lut(back.pixel_array, back), [hu_range], atol=0.01)
    low = float(back.WindowCenter) - 0.5 - (float(back.WindowWidth) - 1) / 2
    assert (low, low + float(back.WindowWidth) - 1) == hu_range


def test_a_slice_is_centred_on_the_origin_and_of_a_frame_of_reference_of_its_own() -> None:
    instance = InstanceDescription("a", "d", "ab", "g", "cd", 12, 0.5, "20000101", sop_class="MR")
    first, second = (
        dcmread(io.BytesIO(render(np.zeros((5, 9), np.uint16), replace(instance, image_id=i)))) for i in "ab"
    )
    assert first.ImagePositionPatient == [-2.0, -1.0, 0.0]
    assert first.FrameOfReferenceUID != second.FrameOfReferenceUID
    assert (first.ScanningSequence, first.SequenceVariant, first.EchoTime) == ("RM", "NONE", None)


def test_pixels_that_do_not_fit_are_refused() -> None:
    instance = InstanceDescription("a", "d", "ab", "g", "cd", 12, 1.0, "20000101")
    with pytest.raises(ArtefactError, match="4095"):
        render(np.full((2, 2), 4096, np.uint16), instance)
