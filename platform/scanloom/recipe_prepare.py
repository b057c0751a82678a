"""The `prepare` section of a recipe: where scans come from, how they are read, and what becomes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from scanloom.section import Count, Fraction, Positive, Section


class DicomSource(Section):
    """DICOM objects under a prefix of a store, as they are or inside .tar, .tar.gz, .tgz or .zip archives."""

    kind: Literal["dicom"] = "dicom"
    uri: str
    files_per_unit: Count = 256
    """Loose objects that are read as one piece of work; an archive is always a piece of its own."""


class DicomWebSource(Section):
    """The studies of a PACS that speaks DICOMweb: QIDO-RS finds the series, WADO-RS fetches their instances.

    The value of an Authorization header, if the server wants one, comes from SCANLOOM_DICOMWEB_AUTHORIZATION.
    """

    kind: Literal["dicomweb"] = "dicomweb"
    uri: Annotated[str, Field(pattern=r"^https?://")]
    """The service's root, such as https://pacs.example/dicom-web."""
    query: Mapping[str, str] = {}
    """QIDO-RS filters on series by DICOM keyword, such as {Modality: CR, StudyDate: 20200101-20201231}."""


class ImageFolderSource(Section):
    """PNG, JPEG or TIFF files under a prefix and a CSV with one row a file."""

    kind: Literal["image-folder"] = "image-folder"
    uri: str
    table: str
    """URI of the CSV."""
    preset: Literal["nih-cxr14", "chexpert", "generic"] = "generic"
    file_column: str = "file"
    patient_column: str = "patient"
    study_column: str = ""
    """Empty: every file is a study of its own."""
    uncertain: Literal["absent", "present", "unknown"] = "unknown"
    """chexpert: what a finding marked -1 counts as; unknown makes all the findings of that image unknown."""
    files_per_unit: Count = 256


class ParquetSource(Section):
    """Parquet files under a prefix, one row an image, encoded as PNG, JPEG or TIFF or as a DICOM file."""

    kind: Literal["parquet"] = "parquet"
    uri: str
    image_column: str = "image"
    """Binary, or Hugging Face's struct of `bytes` and `path`."""
    patient_column: str = "patient"
    study_column: str = ""


class NiftiSource(Section):
    """The slices of NIfTI volumes (.nii, .nii.gz) under a prefix and a CSV with one row a volume."""

    kind: Literal["nifti"] = "nifti"
    uri: str
    table: str
    """URI of the CSV."""
    file_column: str = "file"
    patient_column: str = "patient"
    study_column: str = ""
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    every: Count = 1
    """Take each n-th slice."""
    value_unit: str = ""
    """What the voxel values are in, such as HU."""


class PhantomSource(Section):
    """Procedural chest phantoms: nobody's scans, with known ground truth."""

    kind: Literal["phantoms"] = "phantoms"
    scans: Count = 1024
    scans_per_unit: Count = 256


Source = Annotated[
    DicomSource | DicomWebSource | ImageFolderSource | ParquetSource | NiftiSource | PhantomSource,
    Field(discriminator="kind"),
]


class HeaderWindow(Section):
    """What the header asks for: its VOI LUT, else its window number `index`, else its whole range of values."""

    kind: Literal["header"] = "header"
    index: Annotated[int, Field(ge=0)] = 0


class FixedWindow(Section):
    """The same window for every scan, in modality values: HU for CT. Image files, which have none, keep theirs."""

    kind: Literal["fixed"] = "fixed"
    center: float
    width: Positive


class FullWindow(Section):
    """From the smallest value of the frame to its largest, padding left out."""

    kind: Literal["full"] = "full"


Window = Annotated[HeaderWindow | FixedWindow | FullWindow, Field(discriminator="kind")]


class Decode(Section):
    """From stored values to pixels."""

    window: Window = HeaderWindow()
    colour: Literal["refuse", "luminance"] = "refuse"
    """A colour image whose channels are equal is gray and always read; others are refused or read by their luma."""
    repair: bool = True
    """Read files with one of two small faults and flag them: no transfer syntax named, or at most 1 % of the pixel
    bytes missing at the end."""


class Split(Section):
    """Shares of patients; the holdout share never trains anything."""

    train: Fraction = 0.8
    validation: Fraction = 0.1
    holdout: Fraction = 0.1

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.train + self.validation + self.holdout
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            raise ValueError(f"split shares sum to {total:g}, not to 1")
        return self


class Prepare(Section):
    source: Source
    size_px: Annotated[int, Field(ge=16, le=2048, multiple_of=8)] = 64
    resize: Literal["letterbox", "crop"] = "letterbox"
    decode: Decode = Decode()
    burned_in_text: Literal["quarantine", "flag", "ignore"] = "quarantine"
    """What happens to a scan in whose pixels lines of text are seen, whatever its header says of them."""
    near_duplicate_bits: Annotated[int, Field(ge=0, le=32)] = 16
    """Two patients' scans whose 256-bit fingerprints differ in at most this many bits are reported as alike."""
    split: Split = Split()
    max_rejected_share: Fraction = 0.5
    """A run that quarantines a larger share of its scans stops with the table of reasons."""
    workers: Count = 2
