"""Parquet files of images: one row an image, encoded as PNG, JPEG, TIFF or as a DICOM file, and what is known of it.

A row has no name that stays when a file is moved or written anew, so that an image is known by the SHA-256 of its
bytes: the same image twice is a duplicate, in whatever rows it stands.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError
from scanloom.recipe import Decode, LabelsAttribute, ParquetSource, nearest
from scanloom.scans.decode import MAX_FILE_BYTES, file_image, frames, read_instance, require_image
from scanloom.scans.deidentify import require_shareable_pixels, subject_of_row
from scanloom.scans.image import ScanImage
from scanloom.scans.isolation import Fence
from scanloom.scans.quarantine import reject
from scanloom.scans.ranged import RangedFile
from scanloom.scans.scan import Context, Found, Scan, SourceFile
from scanloom.store import ObjectInfo, Store

BATCH_BYTES = 32 << 20
"""Rows are read in batches of about this size, whatever the size of the file's row groups."""
_READ_AHEAD = 1 << 20
_MAGIC = b"PAR1"
_BROKEN = (pa.ArrowException, OSError, UnicodeError, OverflowError)
_DICOM = slice(128, 132)


@dataclass(frozen=True)
class _Row:
    """A row as text, but for its image: bytes, a struct of them, or None; `texts` by attribute source."""

    image: object
    patient: str
    study: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class _Attribute:
    """Where an attribute's text stands: `separator` joins a list, `none` stands for an empty one, `classes` are the
    names of whole numbers as the `datasets` library keeps them beside a column.
    """

    column: str
    separator: str = "|"
    none: str = ""
    classes: tuple[str, ...] = ()

    def text(self, value: object) -> str:
        if isinstance(value, list):
            return self.separator.join(filter(None, map(self._single, value))) if value else self.none
        return self._single(value)

    def _single(self, value: object) -> str:
        if self.classes and isinstance(value, int):
            return self.classes[value] if 0 <= value < len(self.classes) else ""
        return cell_text(value)


# --- planning -------------------------------------------------------------------------------------------------


def list_files(source: ParquetSource, schema: AttributeSchema) -> list[SourceFile]:
    """Every object under the prefix, by key, each alone.

    Raises RecipeError for an empty prefix, and where the first file that can be read lacks a column or holds it in a
    type that says no text; StoreError where the source cannot be read.
    """
    store = Store(source.uri)
    objects = store.list()
    if not objects:
        raise RecipeError(f"{store.uri}: no objects under this prefix; check prepare.source.uri")
    uri, found = _first_schema(store, objects)
    _require_columns(source, schema, found, uri)
    return [SourceFile(o.key, o.bytes, o.version, alone=True) for o in objects]


def _first_schema(store: Store, objects: Iterable[ObjectInfo]) -> tuple[str, pa.Schema]:
    for object_ in objects:
        try:
            return store.uri_of(object_.key), _open(store, object_.key, object_.bytes).schema_arrow
        except ScanError:
            continue
    raise RecipeError(f"{store.uri}: none of the objects is a readable Parquet file; check prepare.source.uri")


def _require_columns(source: ParquetSource, schema: AttributeSchema, found: pa.Schema, where: str) -> None:
    """RecipeError unless the file has every column that is read, in a type that can be read."""
    image = _column_type(found, source.image_column, where)
    if pt.is_struct(image):
        place = image.get_field_index("bytes")
        image = image.field(place).type if place >= 0 else pa.null()
    if not (pt.is_binary(image) or pt.is_large_binary(image)):
        raise RecipeError(
            f"{where}: column {source.image_column!r} holds no image bytes; expected binary or a struct "
            "with a binary field 'bytes'"
        )
    singles = {source.patient_column, source.study_column} - {""}
    if source.patient_column in {d.source or d.name for d in schema.declarations}:
        raise RecipeError(f"attribute source {source.patient_column!r}: names the patient, so it is not kept")
    for column in sorted(singles | {d.source or d.name for d in schema.declarations}):
        kind = _column_type(found, column, where)
        item = kind.value_type if pt.is_list(kind) or pt.is_large_list(kind) else kind
        if not _is_text(item) or (item is not kind and column in singles):
            raise RecipeError(
                f"{where}: column {column!r} is nested or binary; expected text, numbers or, for an "
                "attribute, a list of text"
            )


def _column_type(found: pa.Schema, column: str, where: str) -> Any:
    if found.names.count(column) > 1:
        raise RecipeError(f"{where}: column {column!r} is there twice; rename one of them")
    if column not in found.names:
        raise RecipeError(f"{where}: no column {column!r}{nearest(column, found.names)}")
    return found.field(column).type


def _is_text(kind: Any) -> bool:
    if pt.is_dictionary(kind):
        kind = kind.value_type
    plain = (pt.is_string, pt.is_large_string, pt.is_integer, pt.is_floating, pt.is_boolean, pt.is_decimal, pt.is_null)
    return any(is_kind(kind) for is_kind in plain)


# --- reading --------------------------------------------------------------------------------------------------


def read_files(source: ParquetSource, files: Sequence[SourceFile], context: Context) -> Iterator[Found]:
    """The scan of each row of the file (a member is a row), or why there is none.

    A damaged file ends with a refusal at the row where it broke. Raises StoreError where the source cannot be read.
    """
    member = 0
    with ExitStack() as stack:
        rows = _rows(source, files[0], context.schema)
        if context.fence is not None:
            # Arrow can die of a file as codecs can of an image; then the image must not take the file with it.
            rows = stack.enter_context(Fence()).run(_rows, source, files[0], context.schema)
        try:
            for row in rows:
                for frame, scan in _scans(row, context):
                    yield member, frame, scan
                member += 1
        except ScanError as error:
            yield member, None, error


def names(source: ParquetSource, files: Sequence[SourceFile]) -> list[str]:
    """The source's name of every member: the file and the number of its row, from 0."""
    store, file = Store(source.uri), files[0]
    try:
        rows = _open(store, file.key, file.bytes).metadata.num_rows
    except ScanError:
        rows = 0
    return [f"{store.uri_of(file.key)} row {row}" for row in range(rows)] or [store.uri_of(file.key)]


def _open(store: Store, key: str, size: int) -> Any:
    """The opened file; ScanError empty-file, not-parquet or broken-parquet."""
    if not size:
        raise reject("empty-file")
    stream = RangedFile(store, key, size)
    if stream.read(len(_MAGIC)) != _MAGIC:
        raise reject("not-parquet")
    try:
        return pq.ParquetFile(stream, buffer_size=_READ_AHEAD, page_checksum_verification=True)
    except _BROKEN:
        raise reject("broken-parquet") from None


def _readable(source: ParquetSource, schema: AttributeSchema, found: pa.Schema, where: str) -> dict[str, _Attribute]:
    """The attributes by their source. ScanError parquet-columns where this file is not like the first one."""
    try:
        _require_columns(source, schema, found, where)
    except RecipeError:
        raise reject("parquet-columns") from None
    attributes = {}
    for declaration in schema.declarations:
        column = declaration.source or declaration.name
        classes = class_names(found, column)
        if isinstance(declaration, LabelsAttribute):
            attributes[column] = _Attribute(column, declaration.separator, declaration.none, classes)
        else:
            attributes[column] = _Attribute(column, classes=classes)
    return attributes


def class_names(found: pa.Schema, column: str) -> tuple[str, ...]:
    """The names that Hugging Face's `datasets` gives a column's numbers (a ClassLabel, alone or in a list)."""
    try:
        feature = json.loads((found.metadata or {})[b"huggingface"])["info"]["features"][column]
        while isinstance(feature, list) or "feature" in feature:
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else ()
    except (KeyError, IndexError, TypeError, ValueError):
        return ()


def _rows(source: ParquetSource, file: SourceFile, schema: AttributeSchema) -> Iterator[_Row]:
    """The rows in order. Raises ScanError: empty-file, not-parquet, parquet-columns, no-rows, broken-parquet."""
    store = Store(source.uri)
    opened = _open(store, file.key, file.bytes)
    attributes = _readable(source, schema, opened.schema_arrow, store.uri_of(file.key))
    if not opened.metadata.num_rows:
        raise reject("no-rows")
    columns = {source.image_column, source.patient_column, source.study_column, *attributes} - {""}
    for cells in _cells(opened, sorted(columns)):
        yield _Row(
            image=cells[source.image_column],
            patient=cell_text(cells[source.patient_column]),
            study=cell_text(cells[source.study_column]) if source.study_column else "",
            texts={name: attribute.text(cells[attribute.column]) for name, attribute in attributes.items()},
        )


def _cells(opened: Any, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    try:
        for group in range(opened.num_row_groups):
            size = _batch_rows(opened.metadata.row_group(group))
            for batch in opened.iter_batches(size, [group], columns, use_threads=False):
                # Row by row: a batch as Python objects would be held a second time.
                for place in range(batch.num_rows):
                    yield batch.slice(place, 1).to_pylist()[0]
    except _BROKEN:
        raise reject("broken-parquet") from None


def _batch_rows(group: Any) -> int:
    """Rows of this row group that take about BATCH_BYTES."""
    return max(1, min(1024, BATCH_BYTES * int(group.num_rows) // max(1, int(group.total_byte_size))))


def _scans(row: _Row, context: Context) -> Iterator[tuple[int | None, Scan | ScanError]]:
    """The scan of one row, or those of its frames."""
    try:
        data = _image_bytes(row.image)
        # What a row says of itself may change when it is written anew; its image does not.
        instance = hashlib.sha256(data).hexdigest()
        subject = subject_of_row(instance, row.patient, row.study, row.texts, context.schema, context.pseudonyms)
        read = _images if context.fence is None else partial(context.fence.run, _images)
        for frame, image in read(data, context.decode):
            if isinstance(image, ScanError):
                yield frame, image
            else:
                yield frame, Scan(subject.of_frame(frame, context.pseudonyms), image)
    except ScanError as error:
        yield None, error


def _images(data: bytes, rules: Decode) -> Iterator[tuple[int | None, ScanImage | ScanError]]:
    """The image, or the frames of a DICOM file: its header is asked for the pixels, and whether they may be used."""
    if data[_DICOM] != b"DICM":
        yield None, file_image(data, rules)
        return
    instance = read_instance(data, rules)
    require_image(instance)
    require_shareable_pixels(instance.dataset)
    for number, image in enumerate(frames(instance, rules)):
        yield None if instance.frames == 1 else number, image


def _image_bytes(cell: object) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes) or not data:
        raise reject("empty-file")
    if len(data) > MAX_FILE_BYTES:
        raise reject("too-large")
    return data


def cell_text(value: object) -> str:
    """A cell as a table would spell it: null is empty, 63.0 is 63 (a column with gaps turns whole numbers into it)."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value).strip()
