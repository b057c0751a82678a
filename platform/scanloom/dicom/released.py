"""A DICOM file as it leaves with a release: it says that no identity is in it, and which audit that rests on.

The statement is put between the bytes of the file, which all stay as they are, so that pixels and everything else are
those of the file that was audited, bit for bit.
"""

from __future__ import annotations

import io
from functools import lru_cache

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_partial
from pydicom.filewriter import write_dataset
from pydicom.tag import BaseTag, Tag

from scanloom.dicom.checks import claims_identity_removed
from scanloom.dicom.synthetic import identity_removed
from scanloom.errors import ArtefactError

_PLACE = Tag("PatientIdentityRemoved")


def released(file: bytes, audit: str) -> bytes:
    """The file with the statement that it passed this audit.

    `file`: PS3.10, explicit VR little endian or encapsulated, as scanloom writes it. Equals what `synthetic.build`
    gives for a description that names the audit. ArtefactError where the file makes such a statement already.
    """
    opened = io.BytesIO(file)
    head = read_partial(opened, stop_when=_past_place)
    # Where nothing follows, the reader stands at the end.
    end = opened.tell()
    if claims_identity_removed(head) or _holds_statement(file[end:]):
        raise ArtefactError("a DICOM file says already that identity was removed, which only a release may say")
    if head.original_encoding != (False, True):
        raise ArtefactError("a DICOM file is not in explicit VR little endian; scanloom writes no other")
    return b"".join((file[:end], _statement(audit), file[end:]))


def _past_place(tag: BaseTag, vr: str | None, length: int) -> bool:
    return bool(tag >= _PLACE)


def _holds_statement(rest: bytes) -> bool:
    group, element = int.from_bytes(rest[:2], "little"), int.from_bytes(rest[2:4], "little")
    return group == _PLACE.group and _PLACE.element <= element <= _PLACE.element + 2


@lru_cache(maxsize=8)
def _statement(audit: str) -> bytes:
    sink = DicomBytesIO()
    sink.is_little_endian, sink.is_implicit_VR = True, False
    told = Dataset()
    told.update(identity_removed(audit))
    write_dataset(sink, told)
    return sink.getvalue()
