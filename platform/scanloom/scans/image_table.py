"""Image folder and table: PNG, JPEG or TIFF files under a prefix and a CSV with one row a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError
from scanloom.recipe import Decode, ImageFolderSource
from scanloom.scans.chexpert import PATH_PARTS, chexpert_rows
from scanloom.scans.decode import MAX_FILE_BYTES, file_image
from scanloom.scans.deidentify import subject_of_row
from scanloom.scans.image import Geometry, ScanImage
from scanloom.scans.quarantine import reject
from scanloom.scans.scan import Context, Found, Scan, SourceFile
from scanloom.scans.table import Columns, Header, RowParser, read_rows, row_parser, with_rows
from scanloom.store import Store

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


def list_files(source: ImageFolderSource, schema: AttributeSchema) -> list[SourceFile]:
    """Every object under the prefix but the table itself, by key, with the table's rows for it.

    Raises RecipeError for an empty prefix, a table that cannot be read, or a column that it lacks.
    """
    store, table = Store(source.uri), Store(source.table)
    objects = [o for o in store.list() if store.uri_of(o.key) != table.uri]
    if not objects:
        raise RecipeError(f"{store.uri}: no objects under this prefix; check prepare.source.uri")
    rows = read_rows(source.table, lambda header: _parser(source, schema, header))
    return with_rows(objects, rows, parts=PATH_PARTS if source.preset == "chexpert" else 1)


def read_files(source: ImageFolderSource, files: Sequence[SourceFile], context: Context) -> Iterator[Found]:
    """The scan of each file, or why there is none. Raises StoreError where the source cannot be read."""
    store = Store(source.uri)
    for member, file in enumerate(files):
        try:
            yield member, None, _scan(store, file, context)
        except ScanError as error:
            yield member, None, error


def names(source: ImageFolderSource, files: Sequence[SourceFile]) -> list[str]:
    """The source's name of every member."""
    return [Store(source.uri).uri_of(file.key) for file in files]


def _parser(source: ImageFolderSource, schema: AttributeSchema, header: Header) -> RowParser:
    if source.preset == "chexpert":
        return chexpert_rows(header, schema, source.uncertain)
    if source.preset == "nih-cxr14":
        return row_parser(header, _nih_columns(schema, header))
    wanted = {(d.source or d.name): (d.source or d.name) for d in schema.declarations}
    return row_parser(header, Columns(source.file_column, source.patient_column, source.study_column, wanted))


def _nih_columns(schema: AttributeSchema, header: Header) -> Columns:
    attributes = {}
    for declaration in schema.declarations:
        wanted = declaration.source or declaration.name
        known = _NIH_COLUMNS.get(_NIH_NAMES.get(wanted, wanted), ())
        attributes[wanted] = next((name for name in (*known, wanted) if name in header), wanted)
    study = "Follow-up #" if "Follow-up #" in header else ""
    geometry = _NIH_GEOMETRY if all(name in header for name in _NIH_GEOMETRY) else ()
    return Columns("Image Index", "Patient ID", study, attributes, geometry)


def _scan(store: Store, file: SourceFile, context: Context) -> Scan:
    if file.bytes > MAX_FILE_BYTES:
        raise reject("too-large")
    image = _image(store.read(file.key), context)
    if len(file.rows) != 1:
        raise reject("ambiguous-table-row" if file.rows else "no-table-row")
    row = file.rows[0]
    subject = subject_of_row(row.file, row.patient, row.study, row.texts, context.schema, context.pseudonyms)
    spacing = _nih_spacing(row.geometry, image.pixels.shape)
    return Scan(subject, image if spacing is None else replace(image, geometry=Geometry(spacing)))


def _image(content: bytes, context: Context) -> ScanImage:
    if context.fence is None:
        return file_image(content, context.decode)
    (image,) = context.fence.run(_one_image, content, context.decode)
    return cast(ScanImage, image)


def _one_image(content: bytes, rules: Decode) -> Iterator[ScanImage]:
    yield file_image(content, rules)


def _nih_spacing(geometry: tuple[str, ...], shape: tuple[int, ...]) -> tuple[float, float] | None:
    """Spacing of NIH's PNG pixels: the original's, stretched as the original was to make it square."""
    try:
        width, height, across, down = (float(text) for text in geometry)
    except ValueError:
        return None
    spacing = down * height / shape[0], across * width / shape[1]
    return spacing if min(spacing) > 0 and max(spacing) < float("inf") else None
