"""The CSV table of a source: its rows by the file they are of, and the files of the source with their rows.

What is kept of a row is what the schema asks for; equal texts are held once, so that a million rows take a few hundred
megabytes. A table that cannot be read without guessing is an error that names the line and never its content.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from scanloom.errors import RecipeError
from scanloom.recipe import nearest
from scanloom.scans.scan import SourceFile, TableRow
from scanloom.store import ObjectInfo, Store

LOG = logging.getLogger("scanloom.scans")

Cells = Sequence[str]
RowParser = Callable[[Cells], TableRow]
RowsByFile = Mapping[str, tuple[TableRow, ...]]


@dataclass(frozen=True)
class Header:
    """The names of a table's columns, in order."""

    table: str
    names: tuple[str, ...]

    def __contains__(self, column: str) -> bool:
        return column in self.names

    def place(self, column: str) -> int:
        """Where the column stands. RecipeError where it is missing, which names the nearest, or there twice."""
        if column not in self.names:
            raise RecipeError(
                f"table {self.table}: no column {column!r}{nearest(column, [n for n in self.names if n])}"
            )
        if self.names.count(column) > 1:
            raise RecipeError(f"table {self.table}: column {column!r} is there twice; rename one of them")
        return self.names.index(column)


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; `attributes` by attribute source. Empty `study`: the table has none."""

    file: str
    patient: str
    study: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    geometry: tuple[str, ...] = ()


def row_parser(header: Header, columns: Columns) -> RowParser:
    """The parser of rows whose cells are taken as they are.

    Raises RecipeError for a column that the table lacks, and for an attribute that is the file's or the patient's name.
    """
    for source, column in columns.attributes.items():
        if column in (columns.file, columns.patient):
            raise RecipeError(f"attribute source {source!r}: names the file or the patient, so it is not kept")
    file, patient = header.place(columns.file), header.place(columns.patient)
    study = header.place(columns.study) if columns.study else None
    texts = {source: header.place(column) for source, column in columns.attributes.items()}
    geometry = [header.place(column) for column in columns.geometry]
    seen: dict[tuple[str, ...], Mapping[str, str]] = {}

    def parse(cells: Cells) -> TableRow:
        found = tuple(cells[place] for place in texts.values())
        return TableRow(
            file=cells[file],
            patient=cells[patient],
            study="" if study is None else cells[study],
            texts=seen.setdefault(found, dict(zip(texts, found, strict=True))),
            geometry=tuple(cells[place] for place in geometry),
        )

    return parse


def read_rows(uri: str, parser_of: Callable[[Header], RowParser]) -> RowsByFile:
    """The distinct rows of the table, by the file they are of.

    Cells come stripped, and empty where a row is short. Raises RecipeError for a table without header, one that is
    neither UTF-8 nor UTF-16, faulty quotes, and a row with more cells than the header names; StoreError where it
    cannot be read.
    """
    table = Store(uri).uri
    lines = _lines(table)
    names = next(lines, (0, []))[1]
    if not any(names):
        raise RecipeError(f"table {table}: has no header line; its first line must name the columns")
    parse = parser_of(Header(table, tuple(names)))
    rows: dict[str, tuple[TableRow, ...]] = {}
    for number, cells in lines:
        row = parse(_as_wide(cells, len(names), f"table {table}, line {number}"))
        if row not in rows.get(row.file, ()):
            rows[row.file] = (*rows.get(row.file, ()), row)
    return rows


def with_rows(
    objects: Iterable[ObjectInfo], rows: RowsByFile, *, parts: int = 1, alone: bool = False
) -> list[SourceFile]:
    """The objects with the rows of the table for them.

    A row is for the object whose key it names, else for the one whose last `parts` parts of the key it names. One
    that names several objects so fits none of them for sure: each is given the row twice, which makes it ambiguous.
    """
    named = [(object_, _row_name(object_.key, rows, parts)) for object_ in objects]
    times = Counter(name for _, name in named if name)
    if len(times) < len(rows):
        LOG.info("table: %d of its %d files are not under the prefix", len(rows) - len(times), len(rows))
    return [
        SourceFile(o.key, o.bytes, o.version, alone, rows=rows.get(name, ()) * (1 if o.key == name else times[name]))
        for o, name in named
    ]


def _row_name(key: str, rows: RowsByFile, parts: int) -> str:
    """The name by which the table has the object, empty where it does not."""
    if key in rows:
        return key
    short = "/".join(key.split("/")[-parts:])
    return rows[short][0].file if short in rows else ""


def _as_wide(cells: list[str], width: int, where: str) -> list[str]:
    if any(cells[width:]):
        # A comma that is not quoted has moved every cell after it.
        raise RecipeError(f"{where}: more cells than the header has columns; quote the cell that holds a comma")
    return cells + [""] * (width - len(cells))


def _lines(table: str) -> Iterator[tuple[int, list[str]]]:
    """Number and stripped cells of every line that is not blank."""
    data = _content(table)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(data), encoding=encoding, newline=""), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except UnicodeError:
        # Its text quotes the table.
        raise RecipeError(f"table {table}: is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise RecipeError(f"table {table}, line {reader.line_num}: {error}; correct its quotes") from None


def _content(table: str) -> bytes:
    folder, _, name = table.rpartition("/")
    if folder in ("s3:/", "s3:"):
        raise RecipeError(f"table {table}: names a bucket, not a CSV in it")
    return Store(folder or "/").read(name)
