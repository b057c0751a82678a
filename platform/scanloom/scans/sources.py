"""Where scans come from: tar shards of DICOM objects, image folders with a table, and phantoms.

A source is cut into units, each a pure piece of work: the same unit gives the same scans and the same refusals. Every
file of a unit comes out once, as a scan or as the typed reason why not. Order is by object key, then by place in the
archive, so that (unit, ordinal) names a file without naming anybody.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError
from scanloom.recipe import DicomTarSource, ImageFolderSource, PhantomSource, Source, nearest
from scanloom.scans.archive import archive_names, read_archive
from scanloom.scans.decode import MAX_FILE_BYTES, ScanImage, dicom_image, file_image, read_dataset, require_image
from scanloom.scans.deidentify import (
    Pseudonyms,
    Subject,
    require_harmless_sources,
    require_shareable_pixels,
    subject_of_header,
    subject_of_row,
)
from scanloom.scans.phantoms import phantom
from scanloom.scans.quarantine import reject
from scanloom.store import ObjectInfo, Store

LOG = logging.getLogger("scanloom.scans")
ARCHIVES = (".tar", ".tar.gz", ".tgz")

# A recipe written for DICOM keywords (or plain names) reads NIH's table unchanged. The table of 2017 says Gender, the
# later one Sex.
_NIH_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "PatientSex": ("Patient Gender", "Patient Sex"),
    "PatientAge": ("Patient Age",),
    "ViewPosition": ("View Position",),
    "ImageComments": ("Finding Labels",),
}
_NIH_NAMES = {"sex": "PatientSex", "age": "PatientAge", "view": "ViewPosition", "findings": "ImageComments"}
# NIH names two pairs of numbers `OriginalImage[Width,Height]` and `OriginalImagePixelSpacing[x,y]`: the commas cut
# each name in two.
_NIH_GEOMETRY = ("OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TableRow(_Record):
    """What the table says of one file, as text; nothing here is de-identified yet."""

    file: str
    patient: str
    study: str
    texts: Mapping[str, str]
    geometry: tuple[str, ...] = ()


class SourceFile(_Record):
    """One object of the source: an archive, or an image with the table's rows for it (exactly one, if all is well)."""

    key: str
    bytes: int
    rows: tuple[TableRow, ...] = ()


class Unit(_Record):
    """The smallest piece of work of a source; `name` says its kind and number and nothing else."""

    index: int
    name: str
    files: tuple[SourceFile, ...] = ()
    first: int = 0
    count: int = 0
    """Phantoms: the scans numbered first .. first + count - 1."""


@dataclass(frozen=True)
class Context:
    """What reading a unit needs beside the source."""

    schema: AttributeSchema
    pseudonyms: Pseudonyms
    seed: int
    size_px: int


@dataclass(frozen=True)
class Scan:
    """One de-identified scan at its own size."""

    subject: Subject
    image: ScanImage


Found = tuple[int, Scan | ScanError]
"""Ordinal in the unit, and the scan or the reason why there is none."""


def list_units(source: Source, schema: AttributeSchema) -> list[Unit]:
    """Every unit of a source, in order.

    Raises RecipeError for an empty prefix, a table that lacks a column, or an attribute that the source cannot give.
    """
    if isinstance(source, DicomTarSource):
        require_harmless_sources(schema)
        return _archive_units(source)
    if isinstance(source, ImageFolderSource):
        return _folder_units(source, schema)
    return _phantom_units(source, schema)


def read_unit(source: Source, unit: Unit, context: Context) -> Iterator[Found]:
    """Every file of the unit, once, in order. Raises StoreError where the source itself cannot be read."""
    if isinstance(source, PhantomSource):
        return _phantoms(unit, context)
    if isinstance(source, ImageFolderSource):
        return _images(source, unit, context)
    return _archived(source, unit, context)


def locate(source: Source, unit: Unit, ordinal: int) -> str:
    """The name in the source of one file of a unit, for whoever may read the source: names can identify patients."""
    if isinstance(source, PhantomSource):
        return f"phantom {unit.first + ordinal}"
    if isinstance(source, ImageFolderSource):
        return Store(source.uri).uri_of(unit.files[ordinal].key)
    file = unit.files[0]
    names = archive_names(Store(source.uri), file.key, file.bytes) if file.key.endswith(ARCHIVES) else []
    return f"{Store(source.uri).uri_of(file.key)} {names[ordinal] if ordinal < len(names) else ''}".strip()


# --- DICOM in tar shards --------------------------------------------------------------------------------------


def _archive_units(source: DicomTarSource) -> list[Unit]:
    found = Store(source.uri).list()
    if not any(file.key.endswith(ARCHIVES) for file in found):
        raise RecipeError(
            f"{Store(source.uri).uri}: no .tar or .tar.gz object under this prefix; check prepare.source.uri"
        )
    return [
        Unit(index=i, name=f"tar-{i:06d}", files=(SourceFile(key=file.key, bytes=file.bytes),))
        for i, file in enumerate(found)
    ]


def _archived(source: DicomTarSource, unit: Unit, context: Context) -> Iterator[Found]:
    file = unit.files[0]
    if not file.key.endswith(ARCHIVES):
        yield 0, reject("not-an-archive")
        return
    for ordinal, content in read_archive(Store(source.uri), file.key, file.bytes):
        yield ordinal, content if isinstance(content, ScanError) else _dicom_scan(content, context)


def _dicom_scan(content: bytes, context: Context) -> Scan | ScanError:
    try:
        dataset = read_dataset(content)
        require_image(dataset)
        require_shareable_pixels(dataset)
        subject = subject_of_header(dataset, context.schema, context.pseudonyms)
        return Scan(subject, dicom_image(dataset))
    except ScanError as error:
        return error


# --- image folder and table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """Names of the table's columns; `attributes` by attribute source."""

    file: str
    patient: str
    study: str
    attributes: Mapping[str, str]
    geometry: tuple[str, ...]


def _folder_units(source: ImageFolderSource, schema: AttributeSchema) -> list[Unit]:
    table = Store(source.table)
    images = [f for f in Store(source.uri).list() if Store(source.uri).uri_of(f.key) != table.uri]
    if not images:
        raise RecipeError(f"{Store(source.uri).uri}: no objects under this prefix; check prepare.source.uri")
    rows = _rows_by_file(table, source, schema)
    files = [SourceFile(key=file.key, bytes=file.bytes, rows=_rows_of(file, rows)) for file in images]
    without_file = len(rows.keys() - {row.file for file in files for row in file.rows})
    if without_file:
        LOG.info("table: %d of its %d files are not under the prefix", without_file, len(rows))
    slices = [files[start : start + source.files_per_unit] for start in range(0, len(files), source.files_per_unit)]
    return [Unit(index=i, name=f"images-{i:06d}", files=tuple(part)) for i, part in enumerate(slices)]


def _rows_of(file: ObjectInfo, rows: Mapping[str, tuple[TableRow, ...]]) -> tuple[TableRow, ...]:
    return rows.get(file.key) or rows.get(PurePosixPath(file.key).name, ())


def _rows_by_file(table: Store, source: ImageFolderSource, schema: AttributeSchema) -> dict[str, tuple[TableRow, ...]]:
    """The distinct rows of the table, by the file they are of."""
    folder, name = Store(str(PurePosixPath(table.uri).parent)), PurePosixPath(table.uri).name
    if table.uri.startswith("s3://"):
        folder = Store(table.uri.rpartition("/")[0])
    text = io.StringIO(folder.read(name).decode("utf-8-sig", errors="replace"), newline="")
    reader = csv.DictReader(text)
    columns = _columns(source, schema, reader.fieldnames or ())
    rows: dict[str, tuple[TableRow, ...]] = {}
    for line in reader:
        row = _table_row(line, columns)
        if row not in rows.get(row.file, ()):
            rows[row.file] = (*rows.get(row.file, ()), row)
    return rows


def _columns(source: ImageFolderSource, schema: AttributeSchema, header: Sequence[str]) -> _Columns:
    nih = source.preset == "nih-cxr14"
    file, patient = ("Image Index", "Patient ID") if nih else (source.file_column, source.patient_column)
    study = "Follow-up #" if nih and "Follow-up #" in header else ""
    for column in (file, patient):
        _require_column(column, header, source)
    attributes = {}
    for declaration in schema.declarations:
        wanted = declaration.source or declaration.name
        known = _NIH_COLUMNS.get(_NIH_NAMES.get(wanted, wanted), ()) if nih else ()
        column = next((name for name in (*known, wanted) if name in header), wanted)
        _require_column(column, header, source)
        attributes[wanted] = column
    geometry = _NIH_GEOMETRY if nih and set(_NIH_GEOMETRY) <= set(header) else ()
    return _Columns(file, patient, study, attributes, geometry)


def _require_column(column: str, header: Sequence[str], source: ImageFolderSource) -> None:
    if column not in header:
        raise RecipeError(f"table {source.table}: no column {column!r}{nearest(column, [h for h in header if h])}")


def _table_row(line: Mapping[str, str | None], columns: _Columns) -> TableRow:
    return TableRow(
        file=(line.get(columns.file) or "").strip(),
        patient=(line.get(columns.patient) or "").strip(),
        study=(line.get(columns.study) or "").strip() if columns.study else "",
        texts={source: (line.get(column) or "").strip() for source, column in columns.attributes.items()},
        geometry=tuple((line.get(column) or "").strip() for column in columns.geometry),
    )


def _images(source: ImageFolderSource, unit: Unit, context: Context) -> Iterator[Found]:
    store = Store(source.uri)
    for ordinal, file in enumerate(unit.files):
        try:
            yield ordinal, _image_scan(store, file, context)
        except ScanError as error:
            yield ordinal, error


def _image_scan(store: Store, file: SourceFile, context: Context) -> Scan:
    if file.bytes > MAX_FILE_BYTES:
        raise reject("too-large")
    image = file_image(store.read(file.key))
    if len(file.rows) != 1:
        raise reject("ambiguous-table-row" if file.rows else "no-table-row")
    row = file.rows[0]
    subject = subject_of_row(row.file, row.patient, row.study, row.texts, context.schema, context.pseudonyms)
    return Scan(subject, ScanImage(image.pixels, _table_spacing(row.geometry, image.pixels.shape)))


def _table_spacing(geometry: tuple[str, ...], shape: tuple[int, ...]) -> tuple[float, float] | None:
    """Spacing of NIH's PNG pixels: the original's, stretched as the original was to make it square."""
    try:
        width, height, across, down = (float(text) for text in geometry)
    except ValueError:
        return None
    spacing = down * height / shape[0], across * width / shape[1]
    return spacing if min(spacing) > 0 else None


# --- phantoms -------------------------------------------------------------------------------------------------


def _phantom_units(source: PhantomSource, schema: AttributeSchema) -> list[Unit]:
    known = phantom(0, 0, 16).raw
    for declaration in schema.declarations:
        wanted = declaration.source or declaration.name
        if wanted not in known:
            raise RecipeError(f"attribute {declaration.name!r}: phantoms have no {wanted!r}{nearest(wanted, known)}")
    starts = range(0, source.scans, source.scans_per_unit)
    return [
        Unit(index=i, name=f"phantoms-{i:06d}", first=first, count=min(source.scans_per_unit, source.scans - first))
        for i, first in enumerate(starts)
    ]


def _phantoms(unit: Unit, context: Context) -> Iterator[Found]:
    for ordinal in range(unit.count):
        drawn = phantom(context.seed, unit.first + ordinal, context.size_px)
        patient = f"{context.seed}-{drawn.patient}"
        subject = subject_of_row(
            f"{context.seed}-{drawn.index}", patient, str(drawn.scan), drawn.raw, context.schema, context.pseudonyms
        )
        yield ordinal, Scan(subject, ScanImage(drawn.pixels, (drawn.spacing_mm, drawn.spacing_mm)))
