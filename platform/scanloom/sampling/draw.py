"""From a cohort's tables to the attributes of every single image: exact quotas, shuffled.

What is kept is small, four bytes an image and table and four an image and number, so that every engine of a million
images can hold the whole draw; the rows of a shard are made of it when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scanloom.attributes import AttributeSchema
from scanloom.recipe import NumberAttribute
from scanloom.sampling.cell import Cell, CohortTables, Span
from scanloom.sampling.noise import Stream, permutation, uniforms

CELL_PREFIX = "cell#"
"""Columns `cell#0`, `cell#1`, ... hold each image's cell of each table; no attribute may be named so."""
_CHUNK = 1 << 16


def quotas(shares: Sequence[float | Fraction], total: int) -> list[int]:
    """Integers in proportion to `shares` that sum to `total`: largest remainders, ties to the earlier one.

    Shares count as the decimals that they are written as, so that 0.1 and 0.2 tie where a person says they do.
    """
    exact = [share if isinstance(share, Fraction) else Fraction(str(share)) for share in shares]
    unit = math.lcm(*(share.denominator for share in exact))
    weights = [share.numerator * (unit // share.denominator) for share in exact]
    whole = sum(weights)
    counts, remainders = zip(*(divmod(weight * total, whole) for weight in weights), strict=True)
    filled = list(counts)
    by_remainder = sorted(range(len(filled)), key=lambda place: (-remainders[place], place))
    for place in by_remainder[: total - sum(filled)]:
        filled[place] += 1
    return filled


@dataclass(frozen=True)
class Drawn:
    """The attributes of every image of a cohort."""

    cohort: CohortTables
    schema: AttributeSchema
    images: int
    cells: tuple[NDArray[np.int32], ...]
    """Per table, each image's cell [images]."""
    numbers: Mapping[str, NDArray[np.float32]]
    """Per number attribute that a table has, each image's value [images]; any value where it is unknown."""

    def rows(self, start: int, stop: int) -> pa.Table:
        """A row an image of [start, stop): the schema's attribute columns, then `cell#n` int32, its cell of table n."""
        stop = max(start, min(stop, self.images))
        fields = {field.name: field.type for field in self.schema.arrow_fields()}
        columns: dict[str, pa.Array] = {name: pa.nulls(stop - start, kind) for name, kind in fields.items()}
        places: dict[str, pa.Array] = {}
        for number, (table, cells) in enumerate(zip(self.cohort.tables, self.cells, strict=True)):
            cell_of = cells[start:stop]
            places[f"{CELL_PREFIX}{number}"] = pa.array(cell_of)
            for name in _names(table):
                values = [cell.values.get(name) for cell in table]
                if name in self.numbers:
                    unknown = np.array([value is None for value in values])
                    columns[name] = pa.array(self.numbers[name][start:stop], fields[name], mask=unknown[cell_of])
                else:
                    plain = [list(value) if isinstance(value, tuple) else value for value in values]
                    columns[name] = pa.array(plain, fields[name]).take(places[f"{CELL_PREFIX}{number}"])
        return pa.table(columns | places)


def draw(cohort: CohortTables, schema: AttributeSchema, images: int, seed: int) -> Drawn:
    """The attributes of so many images, shuffled; the same arguments give the same ones.

    Numbers of a span are uniform over those that it means.
    """
    cells = []
    numbers: dict[str, NDArray[np.float32]] = {}
    for number, table in enumerate(cohort.tables):
        counts = quotas([cell.share for cell in table], images)
        cell_of = np.repeat(np.arange(len(table), dtype=np.int32), counts)[permutation(seed, number, images)]
        cells.append(cell_of)
        for name in _names(table):
            if isinstance(schema[name], NumberAttribute):
                uniform = uniforms(seed, schema.names.index(name), images, Stream.NUMBERS)
                numbers[name] = _numbers([cell.values.get(name) for cell in table], cell_of, uniform)
    return Drawn(cohort, schema, images, tuple(cells), numbers)


def _names(table: Sequence[Cell]) -> list[str]:
    return sorted({name for cell in table for name in cell.values})


def _numbers(values: Sequence[object], cell_of: NDArray[np.int32], uniform: NDArray[np.float64]) -> NDArray[np.float32]:
    """A number of its cell's value or span per image; 0 where the cell has none."""
    spans = [v if isinstance(v, Span) else Span(low=v, high=v) if isinstance(v, float) else _NOTHING for v in values]
    low, high = (np.array([getattr(span, end) for span in spans]) for end in ("low", "high"))
    grid, numbers = np.array([span.grid for span in spans]), np.array([span.numbers for span in spans])
    first = np.rint(low / np.where(grid, grid, 1.0))
    stored = np.empty(len(cell_of), dtype=np.float32)
    # In pieces, so that a million images need no temporaries of a million.
    for start in range(0, len(cell_of), _CHUNK):
        cell, u = cell_of[start : start + _CHUNK], uniform[start : start + _CHUNK]
        multiples = (first[cell] + np.floor(u * numbers[cell])) * grid[cell]
        # The ends are single-precision numbers, so that rounding to single precision stays between them.
        stored[start : start + _CHUNK] = np.where(grid[cell], multiples, low[cell] + u * (high[cell] - low[cell]))
    return stored


_NOTHING = Span(low=0.0, high=0.0)
