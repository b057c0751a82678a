"""Each rule catches the fault it is there for; dciodvfy's own errors come through."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from scanloom.dicom import checks
from scanloom.dicom.checks import RULES, dciodvfy, violations
from scanloom.dicom.synthetic import InstanceDescription, build
from scanloom.dicom.template import render
from scanloom.errors import ScanloomError


def sound() -> Dataset:
    instance = InstanceDescription("00c0ffee", "demo", "ab" * 32, "chest", "cd" * 32, 8, 0.143, "20000101", audit="x")
    return build(np.zeros((4, 4), np.uint8), instance)


def compressed() -> InstanceDescription:
    return InstanceDescription("a", "d", "ab", "g", "cd", 8, 1.0, "20000101", transfer_syntax="rle")


def remove(keyword: str) -> Callable[[Dataset], None]:
    return lambda dataset: delattr(dataset, keyword)


def change(keyword: str, value: object) -> Callable[[Dataset], None]:
    return lambda dataset: setattr(dataset, keyword, value)


def another_purpose(dataset: Dataset) -> None:
    dataset.ContributingEquipmentSequence[0].PurposeOfReferenceCodeSequence[0].CodeValue = "109101"


def nested_vendor(dataset: Dataset) -> None:
    dataset.ContributingEquipmentSequence[0].Manufacturer = "SIEMENS SYNTHETIC DATA"


def private_element(dataset: Dataset) -> None:
    dataset.private_block(0x0011, "ACME", create=True).add_new(0x01, "LO", "x")


def another_file_meta(dataset: Dataset) -> None:
    dataset.file_meta.MediaStorageSOPInstanceUID = UID("2.25.1")


PLANTED: list[tuple[str, Callable[[Dataset], None]]] = [
    ("synthetic-data", remove("SyntheticData")),
    ("synthetic-data", change("SyntheticData", "NO")),
    ("image-type", change("ImageType", ["DERIVED", "SECONDARY", "", "OTHER"])),
    ("image-type", change("ImageType", ["DERIVED", "SECONDARY", "AXIAL", "SYNTHETIC"])),
    ("image-type", remove("ImageType")),
    ("manufacturer", change("Manufacturer", "scanloom")),
    ("vendor", change("Manufacturer", "GE SYNTHETIC DATA")),
    ("vendor", change("ManufacturerModelName", "DigitalDiagnost (Philips)")),
    ("vendor", nested_vendor),
    ("contributing-equipment", remove("ContributingEquipmentSequence")),
    ("contributing-equipment", another_purpose),
    ("identity", change("PatientID", "0001")),
    ("identity", change("PatientName", "Doe^Jane")),
    ("identity", remove("IssuerOfPatientID")),
    ("people-and-places", change("PatientBirthDate", "19500101")),
    ("people-and-places", change("InstitutionName", "St. Elsewhere")),
    ("private-elements", private_element),
    ("uids", change("SOPInstanceUID", "1.2.840.1")),
    ("uids", change("StudyInstanceUID", "2.16.840.1")),
    ("uids", another_file_meta),
    ("identity-removed", remove("DeidentificationMethod")),
    ("identity-removed", remove("PatientIdentityRemoved")),
    ("identity-removed", remove("LongitudinalTemporalInformationModified")),
    ("descriptions", change("ImageComments", "")),
    ("descriptions", change("StudyDescription", "chest")),
    ("derivation", remove("DerivationDescription")),
    ("derivation", change("SourceImageSequence", [Dataset()])),
    ("pixels", change("BurnedInAnnotation", "YES")),
    ("pixels", change("PixelData", b"\0\0")),
]


@pytest.mark.parametrize(
    "value", [b"", b"\0\0", encapsulate([b"one", b"two"]), encapsulate([b"a frame"], has_bot=True)]
)
def test_compressed_pixels_must_be_one_frame_behind_an_empty_offset_table(value: bytes) -> None:
    dataset = dcmread(io.BytesIO(render(np.zeros((4, 4), np.uint8), compressed())))
    assert violations(dataset) == []
    dataset.PixelData = value
    assert [violation.rule for violation in violations(dataset)] == ["pixels"]


@pytest.mark.parametrize("rule, plant", PLANTED)
def test_a_rule_catches_its_planted_fault_and_no_other_rule_does(rule: str, plant: Callable[[Dataset], None]) -> None:
    dataset = sound()
    assert violations(dataset) == []
    plant(dataset)
    assert {violation.rule for violation in violations(dataset)} == {rule}


def test_every_rule_has_a_planted_fault() -> None:
    assert {rule for rule, _ in PLANTED} == set(RULES)


def test_a_scan_that_is_not_ours_breaks_rules_without_an_exception() -> None:
    assert {v.rule for v in violations(Dataset())} >= {"synthetic-data", "image-type", "pixels"}


def test_dciodvfy_reports_a_planted_error_and_passes_the_sound_file() -> None:
    dataset = sound()
    assert dciodvfy(encoded(dataset)).errors == ()
    del dataset.ImageLaterality
    (error,) = dciodvfy(encoded(dataset)).errors
    assert "ImageLaterality" in error


def test_dciodvfy_finds_a_truncated_file() -> None:
    assert dciodvfy(encoded(sound())[:-4]).errors


def test_a_violation_reads_as_rule_and_finding() -> None:
    dataset = dcmread(io.BytesIO(encoded(sound())))
    dataset.SyntheticData = "NO"
    (violation,) = violations(dataset)
    assert str(violation) == "synthetic-data: Synthetic Data (0008,001C) is 'NO', not YES"


def test_a_missing_validator_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_VALIDATOR", "no-such-distribution")
    with pytest.raises(ScanloomError, match="pip install"):
        dciodvfy(b"")


def encoded(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()
