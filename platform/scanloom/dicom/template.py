"""DICOM files from a segmented template: pydicom's writer runs once for a kind of image, not once for an image.

In Explicit VR Little Endian the bytes of a top-level element depend on that element alone (PS3.5 7.1.2). So pydicom
encodes the runs of elements that images of one kind share, and only the few that differ are encoded here. The result
equals what pydicom writes for `synthetic.build`, byte for byte; the tests hold it to that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from scanloom.dicom.encapsulated import items
from scanloom.dicom.synthetic import InstanceDescription, Pixels, header, individual, pixel_data, require_fit

_PREAMBLE = b"\0" * 128 + b"DICM"
_GROUP_LENGTH_HEAD = b"\x02\x00\x00\x00UL\x04\x00"
_PIXEL_DATA_TAG = b"\xe0\x7f\x10\x00"
_UNDEFINED_LENGTH = b"\xff\xff\xff\xff"
_SEQUENCE_END = b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"


def render(pixels: Pixels, instance: InstanceDescription) -> bytes:
    """A complete DICOM file (PS3.10) in the transfer syntax of `instance`.

    `pixels`: [rows, columns], uint8 for 8 bits stored and uint16 for more, bright is dense.
    Raises ArtefactError where they do not fit `instance.bits_stored`.
    """
    return b"".join(pieces(pixels, instance))


def pieces(pixels: Pixels, instance: InstanceDescription) -> tuple[bytes | memoryview, ...]:
    """What `render` joins, so that who joins many files copies their pixels once."""
    require_fit(pixels, instance.bits_stored)
    rows, columns = pixels.shape
    template = _template(instance.shared(), rows, columns)
    values = individual(instance)
    values["MediaStorageSOPInstanceUID"] = values["SOPInstanceUID"]
    meta = _filled(template.meta, values)
    body = _filled(template.body, values)
    # The group length counts what follows it (PS3.10 7.1), and the instance UID has no fixed length.
    meta_length = len(meta).to_bytes(4, "little")
    head = b"".join((_PREAMBLE, _GROUP_LENGTH_HEAD, meta_length, meta, body, template.pixel_data_head))
    if instance.transfer_syntax == "native":
        return (head, *pixel_data(pixels))
    return (head, items(pixels, instance.bits_stored, instance.transfer_syntax), _SEQUENCE_END)


@dataclass(frozen=True)
class _Slot:
    """An element whose value differs from image to image; its VR has a 2-byte length field."""

    keyword: str
    head: bytes
    """Tag and VR."""
    pad: bytes
    """What makes the length even: NUL for UI, space for text (PS3.5 6.2)."""

    def encode(self, value: str) -> bytes:
        data = value.encode()
        if len(data) % 2:
            data += self.pad
        return self.head + len(data).to_bytes(2, "little") + data


@dataclass(frozen=True)
class _Template:
    meta: tuple[bytes | _Slot, ...]
    """File meta information without its group length."""
    body: tuple[bytes | _Slot, ...]
    """The dataset up to Pixel Data."""
    pixel_data_head: bytes


@lru_cache(maxsize=128)
def _template(shared: InstanceDescription, rows: int, columns: int) -> _Template:
    dataset = header(shared, rows=rows, columns=columns)
    slots = individual(shared).keys()
    return _Template(
        meta=tuple(_segments(dataset.file_meta, {"MediaStorageSOPInstanceUID"})),
        body=tuple(_segments(dataset, slots)),
        pixel_data_head=_pixel_data_head(shared, rows * columns),
    )


def _segments(dataset: Dataset, slots: Collection[str]) -> list[bytes | _Slot]:
    segments: list[bytes | _Slot] = []
    run = Dataset()
    for element in dataset:
        if element.keyword in slots:
            segments += [_encoded(run), _slot(element)]
            run = Dataset()
        else:
            run.add(element)
    return [*segments, _encoded(run)]


def _slot(element: DataElement) -> _Slot:
    tag = element.tag.group.to_bytes(2, "little") + element.tag.element.to_bytes(2, "little")
    return _Slot(element.keyword, tag + element.VR.encode(), b"\0" if element.VR == "UI" else b" ")


def _encoded(run: Dataset) -> bytes:
    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = False, True
    # A run need not hold the element that names the character set.
    write_dataset(file, run, parent_encoding="utf8")
    return file.getvalue()


def _pixel_data_head(shared: InstanceDescription, pixels: int) -> bytes:
    if shared.transfer_syntax != "native":
        return _PIXEL_DATA_TAG + b"OB\0\0" + _UNDEFINED_LENGTH
    vr, length = (b"OB", pixels + pixels % 2) if shared.bits_stored == 8 else (b"OW", 2 * pixels)
    return _PIXEL_DATA_TAG + vr + b"\0\0" + length.to_bytes(4, "little")


def _filled(segments: Sequence[bytes | _Slot], values: Mapping[str, str]) -> bytes:
    return b"".join(s if isinstance(s, bytes) else s.encode(values[s.keyword]) for s in segments)
