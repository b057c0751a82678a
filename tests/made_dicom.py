"""DICOM files as a hospital's archive holds them, made for tests: every identifier carries the canary PHITEST."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

KEY = "0123456789abcdef" * 4
CANARY = "PHITEST"
UID_ROOT = "1.2.826.0.1.3680043.8.498."

LOSSLESS = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "big-endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg-lossless": JPEGLosslessSV1,
    "jpeg-ls": JPEGLSLossless,
    "jpeg-2000": JPEG2000Lossless,
    "htj2k": HTJ2KLossless,
}


def radiograph(bits: int = 12, shape: tuple[int, int] = (48, 40), seed: int = 0) -> npt.NDArray[Any]:
    """Smooth unsigned pixels over the full range of `bits`, different for each seed."""
    rows, columns = (np.linspace(0, 1, n) for n in shape)
    wave = 0.5 + 0.25 * np.sin(7 * np.add.outer(rows * (1 + seed % 5), columns) + seed) + 0.25 * rows[:, None]
    wave = (wave - wave.min()) / (wave.max() - wave.min())
    return np.asarray(np.rint(wave * ((1 << bits) - 1)), dtype=np.uint8 if bits <= 8 else np.uint16)


def dataset(pixels: npt.NDArray[Any], *, bits_stored: int | None = None, **elements: Any) -> FileDataset:
    """A CR object, native; `elements` by keyword set, or with None remove, what the header says."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(ExplicitVRLittleEndian)
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    allocated = 8 * pixels.dtype.itemsize
    header: dict[str, Any] = {
        "SOPClassUID": ComputedRadiographyImageStorage,
        "SOPInstanceUID": generate_uid(UID_ROOT),
        "StudyInstanceUID": generate_uid(UID_ROOT),
        "SeriesInstanceUID": generate_uid(UID_ROOT),
        "StudyDate": "20120301",
        "Modality": "CR",
        "InstitutionName": f"{CANARY} General Hospital",
        "PatientName": f"{CANARY}^Person",
        "PatientID": "MRN-1",
        "PatientBirthDate": "19500915",
        "PatientSex": "F",
        "PatientAge": "061Y",
        "ViewPosition": "PA",
        "ImageComments": "Effusion|Mass",
        "BurnedInAnnotation": "NO",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": allocated,
        "BitsStored": bits_stored or allocated,
        "HighBit": (bits_stored or allocated) - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
    }
    for keyword, value in (header | elements).items():
        if value is not None:
            setattr(made, keyword, value)
    if "PixelData" in made:
        made["PixelData"].VR = "OB" if allocated == 8 else "OW"
    private = made.private_block(0x0011, f"{CANARY} PRIVATE", create=True)
    private.add_new(0x01, "LO", f"{CANARY} private note")
    meta.MediaStorageSOPClassUID = header["SOPClassUID"]
    meta.MediaStorageSOPInstanceUID = UID(str(made.get("SOPInstanceUID", "1.2.3")))
    return made


def written(made: FileDataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """The Part 10 file of a native dataset, its pixels encoded for the transfer syntax."""
    if syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        made.compress(syntax, generate_instance_uid=False)
    elif syntax in (JPEGLosslessSV1, HTJ2KLossless):
        return wrapped(made, _encoded(made, syntax), syntax)
    elif syntax == ExplicitVRBigEndian and made.BitsAllocated == 16:
        made.PixelData = np.frombuffer(made.PixelData, np.uint16).byteswap().tobytes()
    return _saved(made, syntax)


def wrapped(made: FileDataset, frame: bytes, syntax: str) -> bytes:
    """The Part 10 file of a dataset whose one frame is these already encoded bytes."""
    made.PixelData = encapsulate([frame])
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    return _saved(made, syntax)


def _saved(made: FileDataset, syntax: str) -> bytes:
    made.file_meta.TransferSyntaxUID = UID(syntax)
    made.set_original_encoding(syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
    sink = io.BytesIO()
    made.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def _encoded(made: FileDataset, syntax: str) -> bytes:
    kind = np.uint8 if made.BitsAllocated == 8 else np.uint16
    pixels = np.frombuffer(made.PixelData, kind).reshape(made.Rows, made.Columns)
    if syntax == JPEGLosslessSV1:
        return bytes(imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=made.BitsStored))
    return bytes(imagecodecs.htj2k_encode(pixels))


def file(pixels: npt.NDArray[Any] | None = None, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A complete file of one CR object."""
    shown = radiograph() if pixels is None else pixels
    if shown.dtype == np.uint16 and "bits_stored" not in elements:
        elements["bits_stored"] = 12
    return written(dataset(shown, **elements), syntax)


def tar(members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode: str = "w") -> bytes:
    """A tar (mode `w` or `w:gz`) of these files in order."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items() if isinstance(members, Mapping) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return sink.getvalue()
