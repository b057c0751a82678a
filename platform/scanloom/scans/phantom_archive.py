"""Phantom scans as a hospital would hand them over: DICOM objects in tar shards, with patient data to remove.

The patient data are invented and say so: every name and number holds FAKE. Encodings vary as real archives do
(CR and DX, MONOCHROME1 and MONOCHROME2, 8 and 12 bits, Explicit and Implicit VR), and some files can be bad.
"""

from __future__ import annotations

import io
import tarfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from scanloom.scans.phantoms import Phantom, phantom
from scanloom.store import Store

_NAMESPACE = uuid.UUID("8f1d7c52-6a0e-5b86-9a3b-1d2f6f0f3c11")
BAD_KINDS = ("truncated", "not DICOM", "duplicate", "burned-in text", "empty")
"""What the bad files are, in turn."""
_FAKE_NAMES = ("ALDER", "BIRCH", "CEDAR", "ELDER", "FIR", "HAZEL", "LARCH", "MAPLE", "OAK", "PINE", "ROWAN", "WILLOW")


@dataclass(frozen=True)
class PhantomArchive:
    """What was written below the store: shard keys, good scans, and bad files by kind."""

    shards: tuple[str, ...]
    scans: int
    bad_files: dict[str, int]


def phantom_archive(
    store: Store,
    scans: int,
    *,
    seed: int,
    size_px: int,
    scans_per_shard: int = 128,
    bad_files: int = 0,
    wrote: Callable[[int], None] = lambda files: None,
) -> PhantomArchive:
    """Write scans `0..scans-1` of the series `seed` and `bad_files` unusable files beside them; same in, same bytes.

    A shard's key names everything that its bytes follow from: one that is there is kept. `wrote` hears the number of
    scans of each shard that is done.
    """
    shards = -(-scans // scans_per_shard)
    keys = [f"seed{seed}-{size_px}px-{scans}scans-{bad_files}bad-{n:05d}-of-{shards:05d}.tar" for n in range(shards)]
    present = {entry.key for entry in store.list()}
    for shard, key in enumerate(keys):
        indices = range(shard * scans_per_shard, min((shard + 1) * scans_per_shard, scans))
        if key not in present:
            store.write(key, _tar(_members(indices, seed, size_px, range(shard, bad_files, shards))))
        wrote(len(indices))
    kinds = Counter(BAD_KINDS[number % len(BAD_KINDS)] for number in range(bad_files))
    return PhantomArchive(tuple(keys), scans, dict(sorted(kinds.items())))


def _members(indices: range, seed: int, size_px: int, bad: range) -> list[tuple[str, bytes]]:
    good = [member(seed, index, size_px) for index in indices]
    members = list(good)
    for number in bad:
        members.insert(min(5 * number + 3, len(members)), _bad_file(number, good[number % len(good)], seed))
    return members


def member(seed: int, index: int, size_px: int) -> tuple[str, bytes]:
    """File name and DICOM Part 10 bytes of one scan; its encoding follows from the index."""
    drawn = phantom(seed, index, size_px, bits_stored=12 if index % 4 == 1 else 8)
    dataset = _dataset(drawn, seed, inverted=index % 5 == 2, digital=index % 2 == 0)
    syntax = ImplicitVRLittleEndian if index % 3 == 2 else ExplicitVRLittleEndian
    return f"FAKE-{drawn.patient:06d}/IM{drawn.scan:04d}.dcm", _part10(dataset, syntax)


def _dataset(drawn: Phantom, seed: int, *, inverted: bool, digital: bool) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID = DigitalXRayImageStorageForPresentation if digital else ComputedRadiographyImageStorage
    ds.SOPInstanceUID = _uid(seed, "instance", drawn.index)
    ds.StudyInstanceUID = _uid(seed, "study", drawn.index)
    ds.SeriesInstanceUID = _uid(seed, "series", drawn.index)
    ds.Modality = "DX" if digital else "CR"
    ds.BodyPartExamined = "CHEST"
    ds.BurnedInAnnotation = "NO"
    ds.ImageType = ["ORIGINAL", "PRIMARY", ""]
    ds.SeriesNumber = ds.InstanceNumber = 1
    ds.PatientOrientation = ["L", "F"]
    ds.ImagerPixelSpacing = [f"{drawn.spacing_mm:.4f}"] * 2
    if digital:
        _digital(ds)
    raw = drawn.raw
    for keyword in ("PatientSex", "PatientAge", "ViewPosition", "ImageComments"):
        setattr(ds, keyword, raw[keyword])
    _fake_identity(ds, drawn)
    _pixels(ds, drawn, inverted)
    return ds


def _digital(ds: Dataset) -> None:
    """What PS3.3 A.26 asks of a Digital X-Ray beyond a CR."""
    chest = Dataset()
    chest.CodeValue, chest.CodingSchemeDesignator, chest.CodeMeaning = "43799004", "SCT", "Thoracic cavity"
    ds.AnatomicRegionSequence = [chest]
    ds.PresentationIntentType = "FOR PRESENTATION"
    ds.ImageLaterality = "U"
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", -1
    ds.DetectorType = ds.PositionerType = ""
    ds.AcquisitionContextSequence = []


def _fake_identity(ds: Dataset, drawn: Phantom) -> None:
    surname = _FAKE_NAMES[drawn.patient % len(_FAKE_NAMES)]
    ds.PatientName = f"FAKE-{surname}^PHANTOM^{drawn.patient:06d}"
    ds.PatientID = f"FAKE-MRN-{drawn.patient:06d}"
    ds.PatientBirthDate = f"{2020 - drawn.age_years + drawn.scan}{1 + drawn.patient % 12:02d}15"
    ds.PatientAddress = f"{drawn.patient} FAKE STREET"
    ds.OtherPatientIDs = f"FAKE-SSN-{drawn.patient:06d}"
    ds.StudyDate = f"{2020 + drawn.scan}0{1 + drawn.index % 9}1{drawn.index % 10}"
    ds.StudyTime = f"{drawn.index % 24:02d}3000"
    ds.AccessionNumber = f"FAKE-A{drawn.index:08d}"
    ds.StudyID = f"FAKE{drawn.index:08d}"
    ds.StudyDescription = "FAKE chest radiograph of a phantom"
    ds.Manufacturer = "FAKE VENDOR"
    ds.InstitutionName = "FAKE GENERAL HOSPITAL"
    ds.ReferringPhysicianName = "FAKE-DOCTOR^PHANTOM"
    ds.OperatorsName = "FAKE-OPERATOR^PHANTOM"
    ds.StationName = "FAKE-ROOM-1"
    private = ds.private_block(0x0019, "FAKE VENDOR", create=True)
    private.add_new(0x01, "LO", f"FAKE-PRIVATE {drawn.patient:06d}")


def _pixels(ds: Dataset, drawn: Phantom, inverted: bool) -> None:
    top = (1 << drawn.bits_stored) - 1
    pixels = top - drawn.pixels if inverted else drawn.pixels
    ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    ds.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    ds.SamplesPerPixel = 1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated = 8 if drawn.bits_stored == 8 else 16
    ds.BitsStored = drawn.bits_stored
    ds.HighBit = drawn.bits_stored - 1
    ds.PixelRepresentation = 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.WindowCenter, ds.WindowWidth = str((top + 1) // 2), str(top + 1)
    ds.LossyImageCompression = "00"
    kind = np.dtype(np.uint8 if drawn.bits_stored == 8 else "<u2")
    data = pixels.astype(kind).tobytes()
    ds.add_new("PixelData", "OB" if drawn.bits_stored == 8 else "OW", data + b"\0" * (len(data) % 2))


def _uid(seed: int, kind: str, number: int) -> UID:
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, f'{seed}/{kind}/{number}').int}")


def _part10(dataset: Dataset, syntax: UID) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = syntax
    dataset.file_meta = meta
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def _bad_file(number: int, good: tuple[str, bytes], seed: int) -> tuple[str, bytes]:
    kind = BAD_KINDS[number % len(BAD_KINDS)]
    content = b""
    if kind == "truncated":
        content = good[1][: len(good[1]) * 2 // 3]
    elif kind == "not DICOM":
        content = b"FAKE reading list of the FAKE ward\n" * 40
    elif kind == "duplicate":
        content = good[1]
    elif kind == "burned-in text":
        content = _burned_in(number, seed)
    return f"FAKE-BAD/{kind.replace(' ', '-')}-{number:04d}.dcm", content


def _burned_in(number: int, seed: int) -> bytes:
    dataset = _dataset(phantom(seed, number, 64), seed, inverted=False, digital=True)
    dataset.SOPInstanceUID = _uid(seed, "burned-in", number)
    dataset.BurnedInAnnotation = "YES"
    return _part10(dataset, ExplicitVRLittleEndian)


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in _entries(members):
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _entries(members: list[tuple[str, bytes]]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for name, content in members:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        yield info, content
