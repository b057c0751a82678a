"""The DX Dataset of a synthetic image: valid for a strict validator, marked everywhere, the same each time."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.sr.codedict import codes

from scanloom.dicom.checks import dciodvfy, violations
from scanloom.dicom.synthetic import InstanceDescription, Pixels, build, instance_uid
from scanloom.errors import ArtefactError

PLAIN = InstanceDescription(
    image_id="00c0ffee00c0ffee",
    dataset_name="demo",
    plan_digest="ab" * 32,
    generator_name="demo-chest",
    generator_digest="cd" * 32,
    bits_stored=8,
    spacing_mm=0.143,
    content_date="20000101",
)
ASKED = replace(PLAIN, sex="F", age_years=54.0, view="PA", findings=("cardiomegaly", "effusion"))


def blank(bits_stored: int, rows: int = 6, columns: int = 4) -> Pixels:
    return np.zeros((rows, columns), np.uint8) if bits_stored == 8 else np.zeros((rows, columns), np.uint16)


def written(instance: InstanceDescription, pixels: Pixels | None = None) -> bytes:
    file = io.BytesIO()
    dataset = build(blank(instance.bits_stored) if pixels is None else pixels, instance)
    dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def reread(instance: InstanceDescription) -> Dataset:
    return dcmread(io.BytesIO(written(instance)))


@pytest.mark.parametrize("bits_stored", [8, 12, 16])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"sex": "F", "age_years": 54.4, "view": "PA", "findings": ("cardiomegaly",)},
        {"sex": "M", "age_years": 0.4, "view": "AP", "findings": ()},
        {"sex": "other", "age_years": 104, "view": "LL", "audit": "audit 3f2a"},
        {"sex": "unheard of", "view": "oblique", "findings": ("Infiltrat, links (è)",)},
    ],
)
def test_dciodvfy_finds_neither_error_nor_warning(bits_stored: Any, asked: dict[str, Any]) -> None:
    verdict = dciodvfy(written(replace(PLAIN, bits_stored=bits_stored, **asked)))
    assert (verdict.errors, verdict.warnings) == ((), ())


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 64), (1024, 1)])
def test_every_shape_is_valid_and_keeps_its_pixels(shape: tuple[int, int]) -> None:
    for bits in (8, 12, 16):
        pixels = blank(bits, *shape)
        pixels[...] = np.random.default_rng(0).integers(0, 2**bits, shape)
        file = written(replace(PLAIN, bits_stored=bits), pixels)
        assert dciodvfy(file).errors == ()
        np.testing.assert_array_equal(dcmread(io.BytesIO(file)).pixel_array.reshape(shape), pixels)


def test_own_rules_hold_with_and_without_an_audit() -> None:
    for instance in (PLAIN, ASKED, replace(ASKED, audit="audit 3f2a")):
        assert violations(reread(instance)) == []


def test_unknown_attributes_are_empty_not_guessed() -> None:
    dataset = reread(PLAIN)
    assert (dataset.PatientSex, dataset.PatientAge, dataset.ViewPosition) == ("", "", "")
    assert "ViewCodeSequence" not in dataset
    assert dataset.ImageComments.endswith("Asked of the generator: nothing")


def test_asked_attributes_are_said_in_dicoms_words() -> None:
    dataset = reread(ASKED)
    assert (dataset.PatientSex, dataset.PatientAge, dataset.ViewPosition) == ("F", "054Y", "PA")
    assert dataset.PatientOrientation == ["L", "F"]
    assert dataset.ImageComments.endswith("sex F; age 54 years; view PA; findings cardiomegaly, effusion")


@pytest.mark.parametrize(
    "years, text", [(0, "000M"), (0.5, "006M"), (0.99, "011M"), (1, "001Y"), (69.6, "070Y"), (104, "104Y")]
)
def test_ages_are_four_characters_and_infants_are_counted_in_months(years: float, text: str) -> None:
    assert reread(replace(PLAIN, age_years=years)).PatientAge == text


def test_codes_are_those_of_the_standards_context_groups() -> None:
    def triple(item: Dataset) -> tuple[str, ...]:
        return item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning

    views = {
        "PA": codes.cid4010.PosteroAnterior,
        "AP": codes.cid4010.AnteroPosterior,
        "LL": codes.cid4010.LeftLateral,
        "RL": codes.cid4010.RightLateral,
    }
    for view, code in views.items():
        assert triple(reread(replace(PLAIN, view=view)).ViewCodeSequence[0]) == code[:3]
    dataset = reread(PLAIN)
    assert triple(dataset.AnatomicRegionSequence[0]) == codes.cid4031.Chest[:3]
    purpose = dataset.ContributingEquipmentSequence[0].PurposeOfReferenceCodeSequence[0]
    assert triple(purpose) == codes.cid7005.SynthesizingEquipment[:3]


def test_no_audit_no_claim_that_identity_was_removed() -> None:
    assert "PatientIdentityRemoved" not in reread(PLAIN)
    assert "DeidentificationMethod" not in reread(PLAIN)
    assert reread(replace(PLAIN, audit="audit 3f2a")).PatientIdentityRemoved == "YES"


def test_the_window_shows_the_full_range() -> None:
    for bits in (8, 12, 16):
        dataset = reread(replace(PLAIN, bits_stored=bits))
        low = dataset.WindowCenter - 0.5 - (dataset.WindowWidth - 1) / 2
        assert (low, low + dataset.WindowWidth - 1) == (0, 2**bits - 1)


def test_uids_depend_on_plan_image_and_kind_alone() -> None:
    uids = {
        instance_uid(plan, image, kind)
        for plan in ("a", "b")
        for image in ("1", "2")
        for kind in ("study", "series", "instance")
    }
    assert len(uids) == 12
    # Frozen: another value would rename every image of every dataset handed out so far.
    assert instance_uid("ab", "00", "instance") == "2.25.185131579438783401552734087032150663193"


def test_the_same_description_gives_the_same_bytes() -> None:
    assert written(ASKED) == written(replace(ASKED))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"image_id": "x" * 55}, "54"),
        ({"image_id": "a\\b"}, "image_id"),
        ({"image_id": ""}, "image_id"),
        ({"dataset_name": "a^b"}, "dataset_name"),
        ({"bits_stored": 10}, "bits_stored"),
        ({"spacing_mm": 0.0}, "spacing_mm"),
        ({"spacing_mm": float("nan")}, "spacing_mm"),
        ({"content_date": "20010229"}, "content_date"),
        ({"content_date": "2001111"}, "content_date"),
        ({"content_date": "30000101"}, "content_date"),
        ({"age_years": -1.0}, "age_years"),
        ({"age_years": 999.5}, "age_years"),
        ({"age_years": float("nan")}, "age_years"),
        ({"findings": ("a\nb",)}, "control"),
        ({"findings": ("x" * 10240,)}, "10240"),
        ({"audit": "a\\b"}, "audit"),
        ({"audit": "è"}, "audit"),
        ({"sop_class": "CT"}, "CT images hold 12 or 16"),
        ({"hu_range": (100.0, 100.0)}, "hu_range"),
        ({"hu_range": (0.0, float("inf"))}, "hu_range"),
    ],
)
def test_a_value_that_dicom_cannot_hold_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ArtefactError, match=named):
        replace(PLAIN, **change)


@pytest.mark.parametrize(
    "bits_stored, pixels, named",
    [
        (8, np.zeros((2, 2), np.uint16), "uint8"),
        (16, np.zeros((2, 2), np.uint8), "uint16"),
        (12, np.full((2, 2), 4096, np.uint16), "4095"),
        (8, np.zeros((2, 2, 1), np.uint8), "shape"),
        (8, np.zeros((0, 2), np.uint8), "shape"),
        (8, np.zeros((1, 65536), np.uint8), "65535"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(bits_stored: Any, pixels: Pixels, named: str) -> None:
    with pytest.raises(ArtefactError, match=named):
        build(pixels, replace(PLAIN, bits_stored=bits_stored))
