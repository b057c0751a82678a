"""A cohort's joint table from a CSV or Parquet file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError
from scanloom.recipe import nearest
from scanloom.sampling.cell import Cell, Scales, parse_cell
from scanloom.store import Store

SHARE, COUNT = "share", "count"


def read_cells(uri: str, schema: AttributeSchema, images: int, scales: Scales) -> list[Cell]:
    """The cells of a table at a URI, each with its share or count.

    Raises RecipeError naming file and row for what is no table of a cohort: columns that are no attributes, values
    that the schema does not have, counts that do not add up to `images`. StoreError where the file cannot be read.
    """
    folder, _, name = uri.rpartition("/")
    data = Store(folder or ("/" if uri.startswith("/") else ".")).read(name)
    where = f"cohort table {uri}"
    rows = _csv_rows(data, where) if uri.endswith(".csv") else _parquet_rows(data, where)
    if not rows:
        raise RecipeError(f"{where}: has no rows; give it one a cell")
    weight = _weight_column(tuple(rows[0][1]), schema, where)
    cells = [_cell(schema, row, weight, f"{where}, {place}", scales) for place, row in rows]
    total = sum(cell.share for cell in cells)
    if weight == COUNT and total != images:
        raise RecipeError(
            f"{where}: its counts add up to {total:.0f}, generate.images is {images}; make them equal, or name the "
            "column 'share'"
        )
    return cells


Rows = list[tuple[str, Mapping[str, Any]]]
"""Where a row stands, and its values by column; None where it has none."""


def _csv_rows(data: bytes, where: str) -> Rows:
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        columns = [name.strip() for name in next(reader, [])]
        rows: Rows = []
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(columns):
                raise RecipeError(
                    f"{where}, line {reader.line_num}: has {len(cells)} cells under {len(columns)} columns"
                )
            values = (cell.strip() or None for cell in cells)
            rows.append((f"line {reader.line_num}", dict(zip(columns, values, strict=True))))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: is not UTF-8 text; save it as UTF-8") from error
    except csv.Error as error:
        raise RecipeError(f"{where}: is no proper CSV ({error}); mend its quotes") from error
    _require_distinct(columns, where)
    return rows


def _parquet_rows(data: bytes, where: str) -> Rows:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        _require_distinct(file.schema_arrow.names, where)
        rows = file.read().to_pylist()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: has text that is not UTF-8; save it as UTF-8") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise RecipeError(f"{where}: is no Parquet file; check the URI") from error
    return [(f"row {number}", {name: _plain(v) for name, v in row.items()}) for number, row in enumerate(rows)]


def _plain(value: Any) -> Any:
    """pandas writes NaN where it has nothing, and DuckDB's sums are decimals."""
    value = float(value) if isinstance(value, Decimal) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _require_distinct(columns: list[str], where: str) -> None:
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise RecipeError(f"{where}: has column {twice[0]!r} twice")


def _weight_column(columns: tuple[str, ...], schema: AttributeSchema, where: str) -> str:
    found = [name for name in (SHARE, COUNT) if name in columns]
    if len(found) != 1:
        raise RecipeError(f"{where}: has {len(found)} of the columns 'share' and 'count'; give it one of them")
    known = (*schema.names, *found)
    for name in columns:
        if name not in known:
            raise RecipeError(f"{where}: column {name!r} is no attribute{nearest(name, known)}")
    return found[0]


def _cell(schema: AttributeSchema, row: Mapping[str, Any], weight: str, where: str, scales: Scales) -> Cell:
    share = row[weight]
    try:
        share = float(share) if isinstance(share, str) else share
    except ValueError:
        raise RecipeError(f"{where}: {weight} {share!r} is no number") from None
    cell = parse_cell(schema, {**row, weight: share}, weight, where, scales)
    if weight == COUNT and cell.share != int(cell.share):
        raise RecipeError(f"{where}: count {share!r} is no whole number; or name the column 'share'")
    return cell
