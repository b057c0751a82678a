"""The template's files equal pydicom's, byte for byte."""

from __future__ import annotations

import io
from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread, dcmwrite

from scanloom.dicom.checks import dciodvfy, violations
from scanloom.dicom.synthetic import InstanceDescription, Pixels, build
from scanloom.dicom.template import render
from scanloom.errors import ArtefactError

NAMES = st.text("abcXYZ019._-", min_size=1, max_size=80)
LABELS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30)


@st.composite
def descriptions(draw: st.DrawFn) -> InstanceDescription:
    return InstanceDescription(
        image_id=draw(st.text("abcXYZ019._-", min_size=1, max_size=54)),
        dataset_name=draw(NAMES),
        plan_digest=draw(NAMES),
        generator_name=draw(NAMES),
        generator_digest=draw(NAMES),
        bits_stored=draw(st.sampled_from((8, 12, 16))),
        spacing_mm=draw(st.floats(1e-6, 1e6)),
        content_date=draw(st.dates(date(1000, 1, 1), date(2999, 12, 31))).isoformat().replace("-", ""),
        sex=draw(st.none() | st.sampled_from(("F", "M", "O", "female", "x"))),
        age_years=draw(st.none() | st.floats(0, 999)),
        view=draw(st.none() | st.sampled_from(("PA", "AP", "LL", "RL", "pa")) | LABELS),
        findings=draw(st.none() | st.lists(LABELS, max_size=4).map(tuple)),
        audit=draw(st.none() | NAMES),
    )


def pixels_for(instance: InstanceDescription, rows: int, columns: int, seed: int = 0) -> Pixels:
    values = np.random.default_rng(seed).integers(0, 2**instance.bits_stored, (rows, columns))
    return values.astype(np.uint8) if instance.bits_stored == 8 else values.astype(np.uint16)


def written_by_pydicom(pixels: Pixels, instance: InstanceDescription) -> bytes:
    file = io.BytesIO()
    dcmwrite(file, build(pixels, instance), enforce_file_format=True)
    return file.getvalue()


@settings(max_examples=200, deadline=None)
@given(descriptions(), st.integers(1, 9), st.integers(1, 9))
def test_bytes_equal_pydicoms_whatever_the_lengths(instance: InstanceDescription, rows: int, columns: int) -> None:
    pixels = pixels_for(instance, rows, columns)
    assert render(pixels, instance) == written_by_pydicom(pixels, instance)


@settings(max_examples=40, deadline=None)
@given(descriptions())
def test_no_description_makes_a_file_that_a_validator_refuses(instance: InstanceDescription) -> None:
    assert dciodvfy(render(pixels_for(instance, 3, 5), instance)).errors == ()


@settings(max_examples=30, deadline=None)
@given(st.lists(descriptions(), min_size=2, max_size=5))
def test_one_image_leaves_nothing_in_the_next(instances: list[InstanceDescription]) -> None:
    alone = [written_by_pydicom(pixels_for(i, 4, 4), i) for i in instances]
    assert [render(pixels_for(i, 4, 4), i) for i in instances + instances] == alone + alone


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


def test_pixels_that_do_not_fit_are_refused() -> None:
    instance = InstanceDescription("a", "d", "ab", "g", "cd", 12, 1.0, "20000101")
    with pytest.raises(ArtefactError, match="4095"):
        render(np.full((2, 2), 4096, np.uint16), instance)
