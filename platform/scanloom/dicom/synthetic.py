"""One synthetic image as a DICOM Dataset: a chest radiograph (PS3.3 A.26, for presentation), a CT or an MR slice.

That the image is synthetic is said in several places at once (PS3.3 C.12.1.1 Synthetic Data, Image Type value 4,
Manufacturer, patient name and id, contributing equipment, comments), because tools drop some of them. Nothing depends
on clock, host or chance: the same description gives the same Dataset.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from math import isfinite
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    PYDICOM_IMPLEMENTATION_UID,
    UID,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    MRImageStorage,
)
from pydicom.valuerep import format_number_as_ds

from scanloom import __version__
from scanloom.dicom import encapsulated
from scanloom.errors import ArtefactError
from scanloom.recipe_generate import SopClass, TransferSyntax

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Code = tuple[str, str, str]
"""Code value, coding scheme designator, code meaning (PS3.3 8.8)."""

MARK = "SYNTHETIC DATA"
MANUFACTURER = f"scanloom {MARK}"
IMAGE_TYPES: Mapping[UID, tuple[str, ...]] = {
    DigitalXRayImageStorageForPresentation: ("DERIVED", "SECONDARY", "", "SYNTHETIC"),
    CTImageStorage: ("DERIVED", "SECONDARY", "AXIAL", "SYNTHETIC"),
    MRImageStorage: ("DERIVED", "SECONDARY", "OTHER", "SYNTHETIC"),
}
"""By SOP class."""
SYNTHESIZING_EQUIPMENT: Code = ("109100", "DCM", "Synthesizing Equipment")
CHEST: Code = ("816094009", "SCT", "Chest")

# Root of every UID below 2.25 that scanloom makes; a new value would rename every image ever made.
_UID_NAMESPACE = uuid.UUID("6f5d3c5e-6a0b-5d0e-9d0a-7b1f4a6c2e91")
# Of the file format that this module writes, not of the package: bytes must not change with each release.
_IMPLEMENTATION_VERSION = "SCANLOOM_1"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_SEXES = {"M": "M", "MALE": "M", "F": "F", "FEMALE": "F", "O": "O", "OTHER": "O"}


@dataclass(frozen=True)
class _View:
    position: str
    code: Code
    orientation: tuple[str, str]
    """Patient Orientation, where rows and columns run to: the image is hung as seen from the detector's side."""


_FRONTAL = ("L", "F")
_VIEWS = {
    "PA": _View("PA", ("272479007", "SCT", "postero-anterior"), _FRONTAL),
    "AP": _View("AP", ("399348003", "SCT", "antero-posterior"), _FRONTAL),
    "LL": _View("LL", ("399173006", "SCT", "left lateral"), ("P", "F")),
    "RL": _View("RL", ("399198007", "SCT", "right lateral"), ("A", "F")),
}


@dataclass(frozen=True)
class InstanceDescription:
    """What one synthetic image says about itself; None is unknown.

    `image_id` is unique within a dataset, at most 54 of [A-Za-z0-9._-]; `plan_digest` and `generator_digest` are hex
    digests; `content_date` is YYYYMMDD and comes from the plan; `audit` names the privacy audit that the generator
    passed, and only then may the image state that no identity is in it.

    Raises ArtefactError where DICOM cannot hold a value.
    """

    image_id: str
    dataset_name: str
    plan_digest: str
    generator_name: str
    generator_digest: str
    bits_stored: Literal[8, 12, 16]
    spacing_mm: float
    content_date: str
    sex: str | None = None
    age_years: float | None = None
    view: str | None = None
    findings: tuple[str, ...] | None = None
    """None: not asked for; the empty tuple: none of them."""
    audit: str | None = None
    sop_class: SopClass = "DX"
    transfer_syntax: TransferSyntax = "native"
    hu_range: tuple[float, float] = (-1024.0, 3071.0)
    """What black and white stand for in a CT image."""

    def __post_init__(self) -> None:
        _require(len(self.image_id) <= 54, f"image_id of {len(self.image_id)} characters; DICOM holds 54")
        for name in ("image_id", "dataset_name", "plan_digest", "generator_name", "generator_digest"):
            _require(_NAME.fullmatch(getattr(self, name)), f"{name} {getattr(self, name)!r} is not of [A-Za-z0-9._-]")
        _require(self.bits_stored in (8, 12, 16), f"bits_stored {self.bits_stored}; allowed: 8, 12, 16")
        _require(self.sop_class == "DX" or self.bits_stored > 8, f"{self.sop_class} images hold 12 or 16 bits, not 8")
        low, high = self.hu_range
        _require(isfinite(low) and isfinite(high) and low < high, f"hu_range {self.hu_range} is not black below white")
        _require(isfinite(self.spacing_mm) and self.spacing_mm > 0, f"spacing_mm {self.spacing_mm} is not positive")
        _require(_is_date(self.content_date), f"content_date {self.content_date!r} is not a date YYYYMMDD")
        _require(
            self.age_years is None or 0 <= self.age_years < 999.5,
            f"age_years {self.age_years}; DICOM holds 0 to 999",
        )
        _require(_comment(self).isprintable(), "view or findings hold control characters")
        _require(len(_comment(self).encode()) <= 10240, "findings are longer than the 10240 bytes of Image Comments")
        audit = self.audit or "-"
        _require(audit.isascii() and audit.isprintable() and "\\" not in audit, f"audit {audit!r} is not plain ASCII")

    def shared(self) -> InstanceDescription:
        """The description of every instance of the same series kind: without what `individual` says of this one."""
        return replace(self, image_id="0", sex=None, age_years=None, findings=None)


@lru_cache(maxsize=4096)
def instance_uid(
    plan_digest: str, image_id: str, kind: Literal["study", "series", "instance", "frame-of-reference"]
) -> str:
    """The UID `2.25.<UUIDv5>` of one image's study, series, and so on: a function of its arguments alone."""
    return f"2.25.{uuid.uuid5(_UID_NAMESPACE, f'{plan_digest}/{image_id}/{kind}').int}"


def build(pixels: Pixels, instance: InstanceDescription) -> Dataset:
    """A complete Dataset with file meta information, ready for `dcmwrite(..., enforce_file_format=True)`.

    `pixels`: [rows, columns], uint8 for 8 bits stored and uint16 for more, bright is dense (MONOCHROME2).
    Raises ArtefactError where they do not fit `instance.bits_stored`.
    """
    require_fit(pixels, instance.bits_stored)
    dataset = header(instance, rows=pixels.shape[0], columns=pixels.shape[1])
    if instance.transfer_syntax == "native":
        dataset.add_new("PixelData", "OB" if instance.bits_stored == 8 else "OW", b"".join(pixel_data(pixels)))
    else:
        value = encapsulated.items(pixels, instance.bits_stored, instance.transfer_syntax)
        dataset.add_new("PixelData", "OB", value)
        dataset["PixelData"].is_undefined_length = True
    return dataset


def header(instance: InstanceDescription, *, rows: int, columns: int) -> Dataset:
    """The Dataset of `build` without Pixel Data."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    _image(dataset, instance, rows, columns)
    for fill in (_mark, _patient_study_series, _equipment, *_KINDS[instance.sop_class].modules):
        fill(dataset, instance)
    for keyword, value in individual(instance).items():
        setattr(dataset, keyword, value)
    dataset.file_meta = _file_meta(dataset.SOPInstanceUID, instance)
    return dataset


def individual(instance: InstanceDescription) -> dict[str, str]:
    """The elements (keyword -> text) whose values tell this instance from others of equal `shared()`."""
    image_id, plan = instance.image_id, instance.plan_digest
    placed = {"FrameOfReferenceUID": instance_uid(plan, image_id, "frame-of-reference")}
    return {
        "SOPInstanceUID": instance_uid(plan, image_id, "instance"),
        "StudyInstanceUID": instance_uid(plan, image_id, "study"),
        "SeriesInstanceUID": instance_uid(plan, image_id, "series"),
        "PatientName": f"SYNTHETIC^{image_id}",
        "PatientID": f"SYN-{image_id}",
        "StudyID": image_id[:16],
        "PatientSex": _SEXES.get((instance.sex or "").upper(), ""),
        "PatientAge": _age_string(instance.age_years),
        "ImageComments": _comment(instance),
        **({} if instance.sop_class == "DX" else placed),
    }


def require_fit(pixels: Pixels, bits_stored: int) -> None:
    """Raise ArtefactError unless `pixels` is a non-empty [rows, columns] array that `bits_stored` bits can hold."""
    dtype = np.uint8 if bits_stored == 8 else np.uint16
    _require(pixels.dtype == dtype, f"pixels are {pixels.dtype}; {bits_stored} bits stored need {np.dtype(dtype)}")
    _require(pixels.ndim == 2 and pixels.size > 0, f"pixels have shape {pixels.shape}; expected [rows, columns]")
    _require(max(pixels.shape) <= 65535, f"pixels have shape {pixels.shape}; DICOM holds at most 65535 a side")
    if bits_stored == 12:
        _require(int(pixels.max()) <= 4095, f"pixel value {int(pixels.max())} is over the 4095 of 12 bits stored")


def pixel_data(pixels: Pixels) -> tuple[memoryview, bytes]:
    """Native little-endian Pixel Data and what pads it to an even length (PS3.5 8.1.1); uncopied where it can be."""
    data = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    return data.reshape(-1).view(np.uint8).data, b"\0" * (data.nbytes % 2)


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ArtefactError(f"cannot be written as DICOM: {message}")


@lru_cache(maxsize=64)
def _is_date(text: str) -> bool:
    try:
        # Validators refuse other millennia as a slip of the pen.
        return len(text) == 8 and text[0] in "12" and bool(datetime.strptime(text, "%Y%m%d"))
    except ValueError:
        return False


def _age_string(years: float | None) -> str:
    if years is None:
        return ""
    # AS has whole units only (PS3.5 6.2): months below a year, so that an infant is not 000Y.
    return f"{round(years):03d}Y" if years >= 1 else f"{int(years * 12):03d}M"


def _comment(instance: InstanceDescription) -> str:
    findings = None if instance.findings is None else ", ".join(instance.findings) or "none"
    age = None if instance.age_years is None else f"{instance.age_years:g} years"
    asked = {"sex": instance.sex, "age": age, "view": instance.view, "findings": findings}
    known = "; ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
    return f"{MARK}, not a scan of anyone. Asked of the generator: {known or 'nothing'}"


def _code(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    return item


def _file_meta(sop_instance_uid: str, instance: InstanceDescription) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = _KINDS[instance.sop_class].uid
    meta.MediaStorageSOPInstanceUID = UID(sop_instance_uid)
    meta.TransferSyntaxUID = encapsulated.UIDS[instance.transfer_syntax]
    # pydicom defines the encoding; a UID below 2.25 may not stand here, and scanloom has no registered root.
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    meta.ImplementationVersionName = _IMPLEMENTATION_VERSION
    return meta


def _mark(dataset: Dataset, instance: InstanceDescription) -> None:
    dataset.SOPClassUID = _KINDS[instance.sop_class].uid
    dataset.SyntheticData = "YES"
    dataset.ImageType = list(IMAGE_TYPES[dataset.SOPClassUID])
    dataset.DerivationDescription = "Synthesized by a generative model; no source image"
    dataset.ContributingEquipmentSequence = [_contributing_equipment(instance)]
    dataset.LongitudinalTemporalInformationModified = "REMOVED"
    if instance.audit is not None:
        dataset.update(identity_removed(instance.audit))


def identity_removed(audit: str) -> Dataset:
    """What an image says only once its dataset passed the audit that is named (PS3.3 C.7.1.1).

    In words alone: no code of CID 7050 is true of an image that never was a person's.
    """
    told = Dataset()
    told.PatientIdentityRemoved = "YES"
    told.DeidentificationMethod = f"Synthetic; passed {audit}"[:64]
    return told


def _contributing_equipment(instance: InstanceDescription) -> Dataset:
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [_code(SYNTHESIZING_EQUIPMENT)]
    item.Manufacturer = MANUFACTURER
    item.ManufacturerModelName = instance.generator_name[:64]
    item.DeviceSerialNumber = instance.generator_digest[:16]
    item.SoftwareVersions = [instance.generator_digest[:16], __version__]
    item.ContributionDateTime = f"{instance.content_date}000000"
    item.ContributionDescription = f"plan {instance.plan_digest}"
    return item


def _patient_study_series(dataset: Dataset, instance: InstanceDescription) -> None:
    dataset.IssuerOfPatientID = f"scanloom {instance.dataset_name}"[:64]
    dataset.PatientBirthDate = ""
    dataset.StudyDate = dataset.ContentDate = instance.content_date
    dataset.StudyTime = dataset.ContentTime = "000000"
    dataset.AccessionNumber = ""
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = f"{MARK}: {_KINDS[instance.sop_class].description}"
    dataset.SeriesDescription = f"{MARK}: {instance.dataset_name}"[:64]
    dataset.Modality = instance.sop_class
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = 1


def _equipment(dataset: Dataset, instance: InstanceDescription) -> None:
    dataset.Manufacturer = MANUFACTURER
    dataset.ManufacturerModelName = instance.generator_name[:64]
    dataset.DeviceSerialNumber = instance.generator_digest[:16]
    dataset.SoftwareVersions = [instance.generator_digest[:16], __version__]


def _image(dataset: Dataset, instance: InstanceDescription, rows: int, columns: int) -> None:
    """Image Pixel (PS3.3 C.7.6.3): the full range of the bits."""
    bits = instance.bits_stored
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = rows, columns
    dataset.BitsAllocated = 8 if bits == 8 else 16
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, 0
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"


# --- radiographs ----------------------------------------------------------------------------------------------


def _anatomy(dataset: Dataset, instance: InstanceDescription) -> None:
    """DX Anatomy Imaged (PS3.3 C.8.11.2) and DX Positioning (C.8.11.5); an unknown view stays empty."""
    dataset.BodyPartExamined = "CHEST"
    dataset.AnatomicRegionSequence = [_code(CHEST)]
    dataset.ImageLaterality = "U"
    view = _VIEWS.get((instance.view or "").upper())
    dataset.ViewPosition = view.position if view else ""
    # Type 1 in DX Image: an unknown view still needs a direction, and nearly every chest radiograph is frontal.
    dataset.PatientOrientation = list(view.orientation if view else _FRONTAL)
    if view:
        dataset.ViewCodeSequence = [_code(view.code)]


def _detector(dataset: Dataset, instance: InstanceDescription) -> None:
    """What a detector would state: geometry is given, physics is not made up."""
    spacing = format_number_as_ds(float(instance.spacing_mm))
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.DetectorType = ""
    dataset.PositionerType = ""
    dataset.ImagerPixelSpacing = [spacing, spacing]
    dataset.PixelSpacing = [spacing, spacing]
    dataset.AcquisitionContextSequence = []


def _dx_image(dataset: Dataset, instance: InstanceDescription) -> None:
    """DX Image (PS3.3 C.8.11.3): an identity window over the full range."""
    dataset.PixelIntensityRelationship = "LOG"
    dataset.PixelIntensityRelationshipSign = -1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    dataset.PresentationLUTShape = "IDENTITY"
    _window(dataset, 0.0, 2.0**instance.bits_stored - 1)


# --- slices ---------------------------------------------------------------------------------------------------


def _image_plane(dataset: Dataset, instance: InstanceDescription) -> None:
    """Frame of Reference and Image Plane (PS3.3 C.7.4.1, C.7.6.2): one transverse slice, its centre at the origin."""
    spacing = float(instance.spacing_mm)
    # No body part is known, and so not whether it is one of a pair: then Type 2C is present and empty.
    dataset.Laterality = ""
    dataset.PositionReferenceIndicator = ""
    dataset.PatientPosition = ""
    dataset.PixelSpacing = [format_number_as_ds(spacing)] * 2
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    first = [-spacing * (size - 1) / 2 for size in (dataset.Columns, dataset.Rows)]
    dataset.ImagePositionPatient = [*(format_number_as_ds(x) for x in first), "0"]
    # A single slice: nothing says how thick it is, or how far from another.
    dataset.SliceThickness = None


def _ct_image(dataset: Dataset, instance: InstanceDescription) -> None:
    """CT Image (PS3.3 C.8.2.1): black and white are the ends of the window that the generator learned with."""
    low, high = instance.hu_range
    dataset.KVP = None
    dataset.AcquisitionNumber = None
    dataset.RescaleIntercept = format_number_as_ds(float(low))
    dataset.RescaleSlope = format_number_as_ds((high - low) / (2**instance.bits_stored - 1))
    dataset.RescaleType = "HU"
    _window(dataset, low, high)


def _mr_image(dataset: Dataset, instance: InstanceDescription) -> None:
    """MR Image (PS3.3 C.8.3.1): of a research mode, since no sequence was run; what it would state stays empty."""
    dataset.ScanningSequence = "RM"
    dataset.SequenceVariant = "NONE"
    dataset.ScanOptions = ""
    dataset.MRAcquisitionType = ""
    dataset.RepetitionTime = dataset.EchoTime = None
    dataset.EchoTrainLength = None
    _window(dataset, 0.0, 2.0**instance.bits_stored - 1)


def _window(dataset: Dataset, black: float, white: float) -> None:
    """The linear window whose ends are these values (PS3.3 C.11.2.1.2.1)."""
    dataset.WindowCenter = _ds((black + white + 1) / 2)
    dataset.WindowWidth = _ds(white - black + 1)


def _ds(value: float) -> str:
    return str(int(value)) if value == int(value) else str(format_number_as_ds(value))


@dataclass(frozen=True)
class _Kind:
    uid: UID
    description: str
    modules: tuple[Callable[[Dataset, InstanceDescription], None], ...]


_KINDS: Mapping[SopClass, _Kind] = {
    "DX": _Kind(DigitalXRayImageStorageForPresentation, "chest radiograph", (_anatomy, _detector, _dx_image)),
    "CT": _Kind(CTImageStorage, "CT slice", (_image_plane, _ct_image)),
    "MR": _Kind(MRImageStorage, "MR slice", (_image_plane, _mr_image)),
}
