"""DICOM files in which everything that may name a patient carries a canary, and the search that finds canaries.

A canary is a text, UID, date, time or number that stands in no other place. The search looks for all of them in raw
bytes, also as other encodings would spell them, and cell by cell in what Parquet and PNG hold compressed.
"""

from __future__ import annotations

import base64
import datetime
import io
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydicom import uid
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataset import Dataset, FileDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.sequence import Sequence

from scanloom.store import Store
from tests.made_dicom import dataset

STEM = "PHICANRY"
IDEOGRAMS = "金絲雀"
UIDS = "1.2.826.0.1.3680043.8.498.90817263."
DATE, TIME = "18871103", "112233.445566"
REAL, WHOLE, SHORT = 73519.4682, 73519468, 47806

ALLOWED = frozenset({0x00100040, 0x00101010})
"""PatientSex and PatientAge, which a recipe may name."""


def table_e_1_1() -> list[tuple[int, str]]:
    """Tag and VR of every attribute of PS3.15 Table E.1-1; repeating groups as their first."""
    lines = (Path(__file__).parent / "ps3_15_e_1_1.txt").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        if line and not line.startswith("#"):
            digits, _, name = line.partition(" ")
            tag = 0x50000022 if digits == "50xxxxxx" else int(digits.replace("x", "0"), 16)
            found.append((tag, _vr(tag, name)))
    return found


def _vr(tag: int, name: str) -> str:
    if keyword_for_tag(tag):
        return dictionary_VR(tag).split()[0]
    # Younger than pydicom's dictionary.
    return "SQ" if name.endswith("Sequence") else "DT" if name.endswith("DateTime") else "LO"


# --- planting -------------------------------------------------------------------------------------------------


def canary(tag: int, vr: str, number: int = 0) -> Any:
    """A value of that VR which can be recognised again; `number` tells two files apart."""
    mark = f"{STEM}{tag ^ number:08X}"
    values: dict[str, Any] = {
        **dict.fromkeys(("AE", "SH", "CS"), mark),
        "PN": f"{mark}^Ann={IDEOGRAMS}^{mark}={IDEOGRAMS}^Ann",
        "UR": f"https://{mark.lower()}.example/{mark}",
        **{"DA": DATE, "TM": TIME, "DT": f"{DATE}{TIME}", "AS": "117Y"},
        **{"DS": str(REAL), "IS": str(WHOLE), "US": SHORT},
        "UI": f"{UIDS}{tag}.{number}",
        **dict.fromkeys(("OB", "UN", "OW"), mark.encode()),
    }
    return values.get(vr, f"{mark} {IDEOGRAMS}")


def _plant(into: Dataset, number: int, *, depth: int) -> None:
    """Every attribute of the table; its sequences hold two plain attributes, `depth` times nested."""
    for tag, vr in table_e_1_1():
        if tag in ALLOWED or tag >> 16 == 2:
            continue
        value = _nested(number, depth) if vr == "SQ" else canary(tag, vr, number)
        into.add_new(tag, vr, value)


def _nested(number: int, depth: int) -> Sequence:
    item = Dataset()
    item.add_new(0x00104000, "LT", canary(0x00104000, "LT", number))
    item.add_new(0x00100010, "PN", canary(0x00100010, "PN", number))
    block = item.private_block(0x0013, f"{STEM} NESTED", create=True)
    block.add_new(0x02, "LO", canary(0x00130002, "LO", number))
    if depth > 1:
        item.add_new(0x0040A730, "SQ", _nested(number, depth - 1))
    return Sequence([item])


def _plant_beside_the_table(into: FileDataset, number: int) -> None:
    for group, creator in ((0x0009, "GEMS_IDEN_01"), (0x0029, "SIEMENS CSA HEADER"), (0x7FE1, f"{STEM} MAKER")):
        block = into.private_block(group, creator, create=True)
        for offset, vr in enumerate(("LO", "UT", "OB", "PN", "DA", "SQ")):
            value = _nested(number, 3) if vr == "SQ" else canary(group << 16 | offset, vr, number)
            block.add_new(offset, vr, value)
    for group in (0x6000, 0x6002, 0x601E):
        _plant_overlay(into, group, number)
    for group in (0x5000, 0x501E):
        into.add_new(group << 16 | 0x0022, "LO", canary(group << 16 | 0x0022, "LO", number))
        into.add_new(group << 16 | 0x3000, "OW", canary(group << 16 | 0x3000, "OW", number) * 4)
    meta = into.file_meta
    meta.MediaStorageSOPInstanceUID = uid.UID(canary(0x00020003, "UI", number))
    for tag, vr in ((0x00020016, "AE"), (0x00020017, "AE"), (0x00020018, "AE"), (0x00020013, "SH"), (0x00020102, "OB")):
        meta.add_new(tag, vr, canary(tag, vr, number))
    meta.PrivateInformationCreatorUID = uid.UID(canary(0x00020100, "UI", number))
    into.preamble = (STEM.encode() * 16)[:128]


def _plant_overlay(into: Dataset, group: int, number: int) -> None:
    rows, columns = into.Rows, into.Columns
    bits = (STEM.encode() * (rows * columns // 64 + 1))[: rows * columns // 8]
    for element, vr, value in (
        *((0x0010, "US", rows), (0x0011, "US", columns), (0x0040, "CS", "G"), (0x0050, "SS", [1, 1])),
        *((0x0022, "LO", canary(group, "LO", number)), (0x0100, "US", 1), (0x0102, "US", 0), (0x3000, "OW", bits)),
        *((0x4000, "LT", canary(group, "LT", number)), (0x1500, "LO", canary(group, "LO", number))),
    ):
        into.add_new(group << 16 | element, vr, value)


def full_of_canaries(stored: np.ndarray[Any, np.dtype[np.uint16]], sop_class: str, modality: str, number: int) -> bytes:
    """A file of that class with 12 bits stored, whose pixels also carry a canary in the four bits above."""
    hidden = np.resize(np.frombuffer(STEM.encode(), np.uint8), stored.shape).astype(np.uint16)
    made = dataset(stored | (hidden << 12), bits_stored=12, SOPClassUID=sop_class, Modality=modality)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _plant(made, number, depth=3)
        made.add_new(0x04000561, "SQ", _nested(number, 3))
        deepest = made[0x04000561].value[0][0x0040A730].value[0][0x0040A730].value[0]
        _plant(deepest, number, depth=1)
        _plant_beside_the_table(made, number)
        made.SpecificCharacterSet = "ISO_IR 192"
        made.ImageComments = f"Effusion|{canary(0x00204000, 'SH', number)}|{IDEOGRAMS}"
        return whole_file(made)


def whole_file(made: FileDataset) -> bytes:
    """The file of a native dataset, also one that pydicom would not write, such as with command elements in it."""
    sink = DicomBytesIO()
    sink.is_little_endian, sink.is_implicit_VR = True, False
    sink.write((made.preamble or bytes(128)) + b"DICM")
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    write_file_meta_info(sink, made.file_meta, enforce_standard=False)
    write_dataset(sink, made)
    return sink.getvalue()


# --- finding --------------------------------------------------------------------------------------------------


def _spellings(text: str) -> Iterator[bytes]:
    for codec in ("utf-8", "utf-16-le", "utf-16-be", "iso2022_jp", "gb18030", "unicode_escape"):
        if (encoded := text.encode(codec, "ignore")).strip():
            yield encoded
    yield text.encode().hex().encode()
    for shift in range(3):
        # What of the text is left in base64 wherever it begins.
        yield base64.b64encode(bytes(shift) + text.encode())[4:10]


_TEXTS = [STEM, IDEOGRAMS, UIDS, DATE, f"{DATE[:4]}-{DATE[4:6]}-{DATE[6:]}", TIME, "11:22:33.44", str(REAL), str(WHOLE)]
_CANARY = re.compile(
    b"|".join(re.escape(spelling) for text in _TEXTS for spelling in sorted({*_spellings(text)})), re.IGNORECASE
)


def canaries_in(data: bytes | str) -> list[bytes]:
    """Every canary in these bytes, as it stands there."""
    return _CANARY.findall(data.encode() if isinstance(data, str) else data)


def canaries_below(store: Store) -> dict[str, list[Any]]:
    """Object -> the canaries in its key and content, of all objects that hold one."""
    found = {o.key: canaries_in(o.key) + canaries_of_object(store.read(o.key)) for o in store.list()}
    return {key: canaries for key, canaries in found.items() if canaries}


def canaries_of_object(data: bytes) -> list[Any]:
    """The canaries in an object, and in the cells and pixels that it holds compressed."""
    found: list[Any] = list(canaries_in(data))
    if data[:4] == b"PAR1":
        found += canaries_of_table(pq.read_table(pa.BufferReader(data)))
    return found


def canaries_of_table(table: pa.Table) -> list[Any]:
    """The canaries in a table's schema and cells."""
    found: list[Any] = list(canaries_in(repr(table.schema) + repr(table.schema.metadata)))
    for column in table.columns:
        for cell in column.to_pylist():
            found += _canaries_of_value(cell)
    return found


def _canaries_of_value(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [c for key, inner in value.items() for c in canaries_in(str(key)) + _canaries_of_value(inner)]
    if isinstance(value, list | tuple):
        return [c for inner in value for c in _canaries_of_value(inner)]
    if isinstance(value, bytes) and value.startswith(b"\x89PNG"):
        return canaries_in(value) + _canaries_of_png(value)
    if isinstance(value, bytes | str):
        return list(canaries_in(value))
    if isinstance(value, datetime.date):
        return [value] if value.strftime("%Y%m%d") == DATE else []
    numeric = isinstance(value, int | float) and any(math.isclose(value, c, rel_tol=1e-6) for c in (REAL, WHOLE, SHORT))
    return [value] if numeric else []


def _canaries_of_png(data: bytes) -> list[bytes]:
    with Image.open(io.BytesIO(data)) as image:
        return canaries_in(np.asarray(image).tobytes()) + canaries_in(repr(image.info))
