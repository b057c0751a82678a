"""Why a file of a source is not in the corpus: one documented code a reason (docs/quarantine.md).

A reason is a fixed sentence per code, so that nothing a scan says can reach the quarantine table, a log or a screen.
"""

from __future__ import annotations

from collections.abc import Mapping

from scanloom.errors import ScanError

CODES: Mapping[str, str] = {
    # the file as a whole
    "empty-file": "the file has no bytes",
    "too-large": "the file or its image is larger than what is read",
    "not-dicom": "the file is not a DICOM Part 10 file",
    "unreadable-dicom": "the DICOM header cannot be parsed",
    "truncated": "the file ends before its content does",
    "not-an-archive": "the object is named as an archive, but is no .tar, .tar.gz or .zip",
    "broken-archive": "the archive is damaged or cut off from here on; its members before this one were read",
    "empty-archive": "the archive holds no files",
    "archive-bomb": "the archive inflates or branches out of all proportion; from here on it is not read",
    "archive-encrypted": "the member is encrypted",
    "archive-compression": "the member is compressed by another method than deflate",
    "archive-link": "the member is a link or a device, not a file",
    "archive-sparse": "the member is stored as a sparse file, with its zeros left out",
    "broken-member": "the member is damaged; the archive's other members were read",
    "packed-file": "the file is itself an archive or compressed",
    "not-an-image-file": "the file is not a PNG, JPEG or TIFF image",
    "not-parquet": "the object under the prefix is not a Parquet file",
    "broken-parquet": "the Parquet file is damaged or cut off from here on; its rows before this one were read",
    "parquet-columns": "the Parquet file lacks a column that the first one has, or holds it in another type",
    "no-rows": "the Parquet file has no rows",
    "not-nifti": "the file is no NIfTI volume in one file (.nii or .nii.gz)",
    "unreadable-nifti": "the NIfTI header contradicts itself",
    "not-delivered": "the server lists the instance but does not give it",
    "empty-series": "the server lists no instance for the series",
    # what it holds
    "not-an-image": "the object is no scan: a report, waveform, plan, dose, segmentation, directory or the like",
    "no-pixels": "the image object holds no pixel data",
    "for-processing": "raw detector data, not meant for viewing; its FOR PRESENTATION sibling is the scan",
    "several-pages": "the image file has several pages, and only one can be the scan",
    "several-volumes": "the file holds several volumes (time points, directions or vectors); only one is read",
    "no-orientation": "the volume does not say how it lies in the patient, so left and right could be swapped",
    "colour": "the image is in colour, which the recipe refuses",
    "unsupported-pixels": "the pixel format is not one that is read, or the header contradicts itself",
    "unsupported-syntax": "the transfer syntax is not named, or there is no decoder for it",
    "undecodable-pixels": "the pixel data cannot be decoded",
    "reader-died": "reading the file ended the process that read it, or ate its memory",
    "reader-failed": "reading the file ended in an error that nobody foresaw",
    "reader-hung": "reading the file came to no end",
    "blank-image": "every pixel has the same value once shown through its window",
    # who it is of, and whether it may be used
    "no-patient-id": "there is no patient identifier, so the scan cannot be assigned to a split",
    "no-instance-uid": "there is no SOP Instance UID, so a duplicate could not be recognised",
    "burned-in-text": "the pixels carry burned-in annotation",
    "burned-in-unknown": "ultrasound or secondary capture that does not say that it is free of burned-in text",
    "text-seen": "lines of text are seen in the pixels, and the recipe quarantines such scans",
    "recognizable-face": "the pixels show features by which a person can be recognised",
    "duplicate": "the same instance is already in the corpus; the first in unit and member order is kept",
    # what is said of it
    "attribute-out-of-range": "a number lies outside the range that the recipe declares",
    "attribute-not-a-number": "text stands where the recipe declares a number",
    "no-table-row": "the table has no row for this file",
    "ambiguous-table-row": "the table has several rows for this file that differ, or one row for several files",
}
"""Code -> the reason that the quarantine table gives."""


def reject(code: str, tag: str = "") -> ScanError:
    """The error to raise for a scan that cannot be used; `tag` is the DICOM keyword or column at fault."""
    return ScanError(code, tag, CODES[code])
