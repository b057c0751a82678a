"""One object of a source as far as its header tells: what it is, whose, and whether a corpus would have it.

Of loose DICOM objects and image files the first bytes alone are fetched. Archives have to be streamed, the instances of
a PACS fetched, and sources whose headers say little (volumes, Parquet rows, phantoms) are read as a corpus reads them.
What a header says is told in the terms of the standard; any other text becomes `other`.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image, UnidentifiedImageError
from pydicom import uid
from pydicom.filereader import read_partial
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag

from scanloom.attributes import AttributeSchema
from scanloom.errors import ScanError
from scanloom.recipe import DicomSource, DicomWebSource, ImageFolderSource, LabelsAttribute, NumberAttribute, Source
from scanloom.scans.archive import read_archive
from scanloom.scans.decode import MAX_FILE_BYTES, MAX_PIXELS, Instance, read_instance, require_image
from scanloom.scans.deidentify import Subject, require_shareable_pixels, subject_of_header, subject_of_row
from scanloom.scans.functional_groups import FrameHeader
from scanloom.scans.pacs import Pacs
from scanloom.scans.part10 import quiet
from scanloom.scans.quarantine import reject
from scanloom.scans.ranged import RangedFile
from scanloom.scans.scan import Context, Scan, SourceFile
from scanloom.scans.sources import read_unit
from scanloom.scans.transfer_syntax import DECODERS, NATIVE, PixelSource
from scanloom.scans.units import Unit
from scanloom.store import Store

HEAD_BYTES = 256 << 10
"""Headers are rarely longer; where one is, the whole object is fetched."""
OTHER, UNSAID = "other", "not said"

# PS3.3 C.7.3.1.1.1, with those retired terms that archives are full of.
MODALITIES = frozenset(
    {
        "ANN", "AR", "ASMT", "AU", "BDUS", "BI", "BMD", "CFM", "CR", "CT", "CTPROTOCOL", "DG", "DMS", "DOC",
        "DX", "ECG", "EEG", "EMG", "EOG", "EPS", "ES", "FID", "GM", "HC", "HD", "IO", "IOL", "IVOCT", "IVUS",
        "KER", "KO", "LEN", "LP", "LS", "M3D", "MG", "MR", "MS", "NM", "OAM", "OCT", "OP", "OPM", "OPT",
        "OPTBSV", "OPTENF", "OPV", "OSS", "OT", "PA", "PLAN", "POS", "PR", "PT", "PX", "REG", "RESP", "RF",
        "RG", "RTDOSE", "RTIMAGE", "RTINTENT", "RTPLAN", "RTRAD", "RTRECORD", "RTSEGANN", "RTSTRUCT", "RWV",
        "SEG", "SM", "SMR", "SR", "SRF", "ST", "STAIN", "TEXTUREMAP", "TG", "US", "VA", "XA", "XAPROTOCOL",
        "XC",
    }
)  # fmt: skip
_PHOTOMETRIC = frozenset(
    {
        "MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT",
        "YBR_RCT", "HSV", "ARGB", "CMYK", "XYB", "PALETTE COLOR",
    }
)  # fmt: skip
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_PIXEL_VRS = (b"OB", b"OW", b"OF", b"OD", b"UN")
_UNDEFINED = 0xFFFFFFFF
_LARGEST_SIDE = 0xFFFF
_MODE_BITS = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I": 32, "F": 32}
_GRAY_MODES = frozenset({"1", "L", "LA", *_MODE_BITS})


@dataclass(frozen=True)
class Glimpse:
    """What is known of one object, or of one frame where a source has to be decoded for it.

    `terms` are the standard's words by topic, `shape` rows x columns. Where `subject` is None, `refused` is the code.
    `withheld` has per attribute the texts that the schema does not name.
    """

    member: int
    frame: int | None = None
    frames: int = 1
    terms: Mapping[str, str] = field(default_factory=dict)
    shape: tuple[int, int] | None = None
    subject: Subject | None = None
    withheld: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: str = ""


def glimpses(source: Source, unit: Unit, context: Context) -> Iterator[Glimpse]:
    """Every object of the unit, in order. Raises StoreError where the source cannot be read."""
    match source:
        case DicomSource() | DicomWebSource():
            return _dicom_glimpses(source, unit, context)
        case ImageFolderSource():
            return (_of_image(Store(source.uri), n, file, context) for n, file in enumerate(unit.files))
        case _:
            return _read_glimpses(source, unit, context)


def is_header_enough(source: Source) -> bool:
    """Whether glimpses of this source decode no pixels."""
    return isinstance(source, DicomSource | DicomWebSource | ImageFolderSource)


def whole_files(
    source: DicomSource | DicomWebSource, file: SourceFile, members: Container[int] | None = None
) -> Iterator[tuple[int, bytes | ScanError]]:
    """The files of an archive or the instances of a series, or those of these numbers."""
    if isinstance(source, DicomSource):
        for member, content in read_archive(Store(source.uri), file.key, file.bytes):
            if members is None or member in members:
                yield member, content
        return
    pacs = Pacs(source.uri)
    _, study, _, series = file.key.split("/")
    instances = pacs.instances(study, series)
    if not instances:
        yield 0, reject("empty-series")
    for member, instance in enumerate(instances):
        if members is None or member in members:
            try:
                yield member, pacs.instance(study, series, instance)
            except ScanError as error:
                yield member, error


def unnamed(schema: AttributeSchema, texts: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Per attribute the texts (by attribute source) that are none of its values: what a corpus would withhold."""
    found = {}
    for declaration in schema.declarations:
        text = texts.get(declaration.source or declaration.name, "").strip()
        if isinstance(declaration, NumberAttribute) or not text:
            continue
        if isinstance(declaration, LabelsAttribute):
            parts = {part.strip() for part in text.split(declaration.separator)} - {"", declaration.none}
            unknown = tuple(sorted(parts - set(declaration.values)))
        else:
            unknown = () if declaration.aliases.get(text, text) in declaration.values else (text,)
        if unknown:
            found[declaration.name] = unknown
    return found


# --- DICOM ----------------------------------------------------------------------------------------------------


def _dicom_glimpses(source: DicomSource | DicomWebSource, unit: Unit, context: Context) -> Iterator[Glimpse]:
    if unit.files[0].alone:
        for member, content in whole_files(source, unit.files[0]):
            yield _of_dicom(member, content, context)
        return
    store = Store(source.uri)
    for member, file in enumerate(unit.files):
        content = _header(store, file)
        short = isinstance(content, bytes) and len(content) < file.bytes
        yield _of_dicom(member, content, context, short=short)


def _of_dicom(member: int, content: bytes | ScanError, context: Context, *, short: bool = False) -> Glimpse:
    try:
        if isinstance(content, ScanError):
            raise content
        instance = read_instance(content, context.decode)
    except ScanError as error:
        return Glimpse(member, refused=error.code)
    terms, shape = _terms(instance)
    try:
        require_image(instance)
        require_shareable_pixels(instance.dataset)
        subject = subject_of_header(instance.dataset, context.schema, context.pseudonyms)
        texts = {name: _text(instance, name) for name in (d.source or d.name for d in context.schema.declarations)}
        if not short:
            # Tells the frames apart and decodes none.
            PixelSource(instance.dataset, instance.syntax, instance.pixel)
        elif instance.syntax not in NATIVE and instance.syntax not in DECODERS:
            raise reject("unsupported-syntax", "TransferSyntaxUID")
    except ScanError as error:
        return Glimpse(member, terms=terms, shape=shape, refused=error.code)
    return Glimpse(
        member, frames=instance.frames, terms=terms, shape=shape, subject=subject,
        withheld=unnamed(context.schema, texts),
    )  # fmt: skip


def _header(store: Store, file: SourceFile) -> bytes | ScanError:
    """The object with empty pixel data, without having fetched it; whole where it is small, odd or cut."""
    if file.bytes > MAX_FILE_BYTES:
        return reject("too-large")
    if file.bytes > HEAD_BYTES:
        short = without_pixels(store.read_range(file.key, 0, HEAD_BYTES), file.bytes)
        if short is not None:
            return short
    return store.read(file.key)


def without_pixels(head: bytes, size: int) -> bytes | None:
    """A file of DICOM, of which these are the first bytes and this is the size, with empty pixel data.

    None where its pixel data do not begin in `head` (or are deflated), or do not end in the file.
    """
    stream = io.BytesIO(head)
    try:
        with quiet():
            read_partial(stream, stop_when=_at_pixels, force=True)
    except Exception:  # noqa: BLE001 - a parser meets junk with any exception
        return None
    place = stream.tell()
    order: Literal["little", "big"] = "little" if head[place : place + 2] == b"\xe0\x7f" else "big"
    number = int.from_bytes(head[place : place + 2], order) << 16 | int.from_bytes(head[place + 2 : place + 4], order)
    start = place + (8 if head[place + 4 : place + 6] in _PIXEL_VRS else 4)
    length = int.from_bytes(head[start : start + 4], order)
    if number not in _PIXEL_TAGS or start + 4 > len(head) or (length != _UNDEFINED and start + 4 + length > size):
        return None
    return head[:start] + bytes(4)


def _at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
    return int(tag) in _PIXEL_TAGS


def _terms(instance: Instance) -> tuple[dict[str, str], tuple[int, int] | None]:
    """The terms and the shape, as far as the header can be read."""
    terms: dict[str, str] = {}
    try:
        header = FrameHeader(instance.dataset)
        terms["transfer syntax"] = _uid_name(instance.syntax)
        terms["modality"] = _known(header.term("Modality").upper(), MODALITIES)
        terms["SOP class"] = _uid_name(header.term("SOPClassUID"))
        rows, columns = header.whole("Rows") or 0, header.whole("Columns") or 0
        if not (0 < rows <= _LARGEST_SIDE and 0 < columns <= _LARGEST_SIDE):
            return terms, None
        frames = header.whole("NumberOfFrames") or 1
        terms["frames of a file"] = "1" if frames == 1 else "2 to 99" if frames < 100 else "100 or more"
        terms["photometric interpretation"] = _known(header.term("PhotometricInterpretation"), _PHOTOMETRIC)
        terms["bits stored"] = f"{_bits(header, 'BitsStored')} in {_bits(header, 'BitsAllocated')}"
    except ScanError:
        return terms, None
    return terms, (rows, columns)


def _uid_name(text: str) -> str:
    """A UID that is not of the standard may hold anything."""
    name = uid.UID(text).name
    return name if name != text else OTHER if text else UNSAID


def _known(term: str, terms: frozenset[str]) -> str:
    return term if term in terms else OTHER if term else UNSAID


def _bits(header: FrameHeader, keyword: str) -> str:
    bits = header.whole(keyword)
    return str(bits) if bits is not None and 1 <= bits <= 64 else "?"


def _text(instance: Instance, keyword: str) -> str:
    value = FrameHeader(instance.dataset).value(keyword)
    parts = value if isinstance(value, MultiValue) else () if value is None else (value,)
    return "\\".join(map(str, parts)).strip("\0 ")


# --- image files ----------------------------------------------------------------------------------------------


def _of_image(store: Store, member: int, file: SourceFile, context: Context) -> Glimpse:
    terms: dict[str, str] = {}
    shape = None
    try:
        terms, shape = _image_header(store, file)
        if len(file.rows) != 1:
            raise reject("ambiguous-table-row" if file.rows else "no-table-row")
        row = file.rows[0]
        subject = subject_of_row(row.file, row.patient, row.study, row.texts, context.schema, context.pseudonyms)
    except ScanError as error:
        return Glimpse(member, terms=terms, shape=shape, refused=error.code)
    return Glimpse(member, terms=terms, shape=shape, subject=subject, withheld=unnamed(context.schema, row.texts))


def _image_header(store: Store, file: SourceFile) -> tuple[dict[str, str], tuple[int, int]]:
    """Raises ScanError: empty-file, too-large, not-an-image-file, several-pages."""
    if not file.bytes or file.bytes > MAX_FILE_BYTES:
        raise reject("empty-file" if not file.bytes else "too-large")
    # Pillow reads as little as the format allows.
    stream = io.BufferedReader(RangedFile(store, file.key, file.bytes), HEAD_BYTES)
    try:
        with Image.open(stream, formats=("PNG", "JPEG", "TIFF")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise reject("too-large")
            # Counting the pages of a TIFF walks through all of them.
            if getattr(image, "is_animated", False):
                raise reject("several-pages")
            terms = {
                "file format": str(image.format),
                "bits stored": str(_MODE_BITS.get(image.mode, 8)),
                "photometric interpretation": "gray" if image.mode in _GRAY_MODES else "colour",
            }
            return terms, (image.height, image.width)
    except UnidentifiedImageError:
        raise reject("not-an-image-file") from None
    except Image.DecompressionBombError:
        raise reject("too-large") from None
    except (OSError, SyntaxError, ValueError):
        raise reject("undecodable-pixels") from None


# --- sources without headers of their own ---------------------------------------------------------------------


def _read_glimpses(source: Source, unit: Unit, context: Context) -> Iterator[Glimpse]:
    for member, frame, found in read_unit(source, unit, context):
        if isinstance(found, Scan):
            yield Glimpse(
                member, frame, terms={"bits of the image": str(found.image.bits_stored)},
                shape=(found.image.pixels.shape[0], found.image.pixels.shape[1]), subject=found.subject,
                withheld=_withheld(found.subject, context.schema),
            )  # fmt: skip
        else:
            yield Glimpse(member, frame, refused=found.code)


def _withheld(subject: Subject, schema: AttributeSchema) -> dict[str, tuple[str, ...]]:
    """The attributes that were withheld; their texts are gone."""
    sources = {source for source, action in subject.actions if action == "withheld"}
    return {d.name: ("",) for d in schema.declarations if (d.source or d.name) in sources}
