"""What DCMTK and GDCM make of the acceptance corpus: digests of the stored values of each frame, in a JSON beside this.

The corpus is pydicom's own test files and those of the package pydicom-data. Rewrite the JSON where dcmconv, dcmdjpeg,
dcmdjpls, dcmdrle (Debian: dcmtk) and gdcmconv (Debian: libgdcm-tools) are installed:

    python -m tests.reference_pixels

Both tools write each file as native pixel data in Explicit VR Little Endian; the values are then taken out of these
bytes here, by the layout that their own headers declare, with nothing of scanloom's decoder. Where the two differ, the
values are DCMTK's, and the file is listed under `differ`: GDCM 3.0 mixes up the planes of 16 and 32-bit RGB in RLE.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID

REFERENCE = Path(__file__).with_suffix(".json")

# The tools show no way to write stored values of JPEG without their colour conversion but +cn.
_DCMTK: Mapping[str, tuple[str, ...]] = {
    "1.2.840.10008.1.2.4.50": ("dcmdjpeg", "+cn"),
    "1.2.840.10008.1.2.4.51": ("dcmdjpeg", "+cn"),
    "1.2.840.10008.1.2.4.57": ("dcmdjpeg", "+cn"),
    "1.2.840.10008.1.2.4.70": ("dcmdjpeg", "+cn"),
    "1.2.840.10008.1.2.4.80": ("dcmdjpls",),
    "1.2.840.10008.1.2.4.81": ("dcmdjpls",),
    "1.2.840.10008.1.2.5": ("dcmdrle",),
    "1.2.840.10008.1.2": ("dcmconv", "+te"),
    "1.2.840.10008.1.2.1": ("dcmconv", "+te"),
    "1.2.840.10008.1.2.1.99": ("dcmconv", "+te"),
    "1.2.840.10008.1.2.2": ("dcmconv", "+te"),
}
_GDCM = ("gdcmconv", "--raw")


def corpus() -> dict[str, Path]:
    """The files of the acceptance corpus by the name they have in these tests."""
    installed = Path(pydicom.__file__).parent / "data"
    extra = importlib.util.find_spec("data_store")
    assert extra is not None, "pip install pydicom-data"
    roots = (installed / "charset_files", installed / "test_files", Path(str(extra.origin)).parent / "data")
    files = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in (".dcm", ""):
                files[f"{root.name}/{path.relative_to(root).as_posix()}"] = path
    return files


def digest(values: npt.NDArray[Any]) -> str:
    """Of one frame of integers, HxW or HxWx3, whatever their type."""
    shape = ",".join(map(str, values.shape)).encode()
    return hashlib.sha256(shape + values.astype("<i8").tobytes()).hexdigest()[:12]


def _native_frames(made: Dataset) -> list[npt.NDArray[Any]]:
    """The stored values of a native little endian object, frame by frame (PS3.5 8.1.1)."""
    frames, samples = int(made.get("NumberOfFrames") or 1), int(made.SamplesPerPixel)
    rows, columns, allocated = int(made.Rows), int(made.Columns), int(made.BitsAllocated)
    data = made.PixelData
    if allocated == 1:
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        return list(bits[: frames * rows * columns].reshape(frames, rows, columns))
    words = np.frombuffer(data, f"<u{allocated // 8}", len(data) * 8 // allocated).astype(np.int64)
    words = (words >> (int(made.HighBit) + 1 - int(made.BitsStored))) & ((1 << int(made.BitsStored)) - 1)
    if made.PixelRepresentation == 1:
        words = np.where(words >> (int(made.BitsStored) - 1) == 1, words - (1 << int(made.BitsStored)), words)
    if made.PhotometricInterpretation == "YBR_FULL_422" and len(words) < frames * rows * columns * 3:
        pairs = words[: frames * rows * columns * 2].reshape(frames, rows, columns // 2, 4)
        return list(pairs[..., [0, 2, 3, 1, 2, 3]].reshape(frames, rows, columns, 3))
    words = words[: frames * rows * columns * samples]
    if samples == 1:
        return list(words.reshape(frames, rows, columns))
    if made.get("PlanarConfiguration") == 1:
        return list(words.reshape(frames, samples, rows, columns).transpose(0, 2, 3, 1))
    return list(words.reshape(frames, rows, columns, samples))


def _converted(command: tuple[str, ...], path: Path) -> list[str] | None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "native.dcm"
        ended = subprocess.run([*command, str(path), str(target)], capture_output=True, check=False, timeout=60)
        if ended.returncode or not target.exists():
            return None
        made = pydicom.dcmread(target, force=True)
        # badVR.dcm has 1A frames, nested_priv_SQ.dcm pixels but no size.
        if not {"PixelData", "Rows"} <= set(made.dir()) or not str(made.get("NumberOfFrames", 1)).isdigit():
            return None
        return [digest(frame) for frame in _native_frames(made)]


def _version(tool: str, *arguments: str) -> str:
    text = subprocess.run([tool, *arguments], capture_output=True, check=False, text=True).stdout
    return next(word.strip("v") for word in text.split() if word.strip("v")[:1].isdigit())


def _reference(path: Path) -> tuple[list[str] | None, str]:
    """Digests, and who agrees on them: both, dcmtk, gdcm, or differ."""
    made = pydicom.dcmread(path, force=True, stop_before_pixels=True)
    syntax = str(made.file_meta.get("TransferSyntaxUID", UID("1.2.840.10008.1.2")))
    dcmtk = _converted(_DCMTK[syntax], path) if syntax in _DCMTK else None
    gdcm = _converted(_GDCM, path)
    if dcmtk is not None and gdcm is not None:
        return dcmtk, "both" if dcmtk == gdcm else "differ"
    return dcmtk or gdcm, "dcmtk" if dcmtk is not None else "gdcm"


def main() -> None:
    files: dict[str, Any] = {}
    for name, path in corpus().items():
        digests, agreement = _reference(path)
        if digests:
            files[name] = {"by": agreement, "frames": digests}
    versions = f'"dcmtk": "{_version("dcmconv", "--version")}", "gdcm": "{_version("gdcmconv", "--version")}"'
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(files.items()))
    REFERENCE.write_text(f'{{{versions}, "files": {{\n{lines}\n}}}}\n', "utf-8")


if __name__ == "__main__":
    main()
