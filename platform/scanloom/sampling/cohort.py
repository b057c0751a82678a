"""Cohorts: who is to be generated, from shares in a recipe to the attributes of every single image.

A cohort is one or more joint tables that are drawn independently of each other: one table for cells and for as-corpus,
one an attribute for marginals. A table's cells get exact integer quotas, so that a dataset holds what was ordered and
not only on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from scanloom.attributes import AttributeSchema, Envelope, Value
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import (
    AttributeDeclaration,
    CellsCohort,
    Cohort,
    LabelsAttribute,
    MarginalsCohort,
    NumberAttribute,
)
from scanloom.sampling.noise import Stream, permutation, uniforms

CELL_PREFIX = "cell#"
"""Columns `cell#0`, `cell#1`, ... hold each image's cell of each table; no attribute may be named so."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Span(_Record):
    """Numbers from low to high, both included."""

    low: float
    high: float


class Cell(_Record):
    """One kind of image: attribute -> value, span of numbers or None (unknown); `share` is relative."""

    values: Mapping[str, str | float | tuple[str, ...] | Span | None]
    share: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CohortTables(_Record):
    """A cohort with nothing left to look up: independent joint tables over disjoint attributes."""

    tables: tuple[tuple[Cell, ...], ...]


def resolve(
    cohort: Cohort, schema: AttributeSchema, envelope: Envelope, corpus_cells: Sequence[Mapping[str, Any]]
) -> CohortTables:
    """The tables of a recipe's cohort. `corpus_cells`: attribute -> value or [low, high], plus `count`.

    Raises RecipeError for a cohort that says nothing or something malformed, ArtefactError naming the envelope where
    it asks for what the generator has not seen.
    """
    if isinstance(cohort, CellsCohort):
        tables = [[_cell(schema, cell, "share", f"cohort cell {n}") for n, cell in enumerate(cohort.cells, 1)]]
    elif isinstance(cohort, MarginalsCohort):
        tables = [_marginal(schema, name, shares) for name, shares in cohort.marginals.items()]
    else:
        cells = (_cell(schema, cell, "count", "the corpus's table") for cell in corpus_cells)
        tables = [[_clipped(cell, envelope) for cell in cells]]
    for table in tables:
        if not any(cell.share for cell in table):
            raise RecipeError("generate.cohort: the shares of a table sum to 0; give at least one cell a share")
        for cell in table:
            _require_seen(cell, envelope)
    if not tables:
        raise RecipeError("generate.cohort: no marginals; name at least one attribute")
    return CohortTables(tables=tuple(tuple(table) for table in tables))


def quotas(shares: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to `shares` that sum to `total`: largest remainders, ties to the earlier one.

    Shares count as the decimals that they are written as, so that 0.1 and 0.2 tie where a person says they do.
    """
    exact = [Fraction(str(share)) for share in shares]
    whole = sum(exact)
    ideal = [share * total / whole for share in exact]
    counts = [math.floor(ideal_count) for ideal_count in ideal]
    by_remainder = sorted(range(len(shares)), key=lambda place: (counts[place] - ideal[place], place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


def draw(cohort: CohortTables, schema: AttributeSchema, images: int, seed: int) -> pa.Table:
    """One row an image, shuffled: the schema's attribute columns, then `cell#n` int32, the image's cell of table n.

    Numbers of a span are uniform over its whole units, or over all of it where it holds none. The same arguments give
    the same table.
    """
    columns: dict[str, pa.Array] = {name: pa.nulls(images, f.type) for name, f in _fields(schema).items()}
    cells: dict[str, pa.Array] = {}
    for number, table in enumerate(cohort.tables):
        counts = quotas([cell.share for cell in table], images)
        cell_of = np.repeat(np.arange(len(table), dtype=np.int32), counts)[permutation(seed, number, images)]
        cells[f"{CELL_PREFIX}{number}"] = pa.array(cell_of)
        for name in sorted({name for cell in table for name in cell.values}):
            columns[name] = _column(schema, name, table, cell_of, seed)
    return pa.table(columns | cells)


def _fields(schema: AttributeSchema) -> dict[str, pa.Field]:
    return {field.name: field for field in schema.arrow_fields()}


def _column(
    schema: AttributeSchema, name: str, table: Sequence[Cell], cell_of: NDArray[np.int32], seed: int
) -> pa.Array:
    values = [cell.values.get(name) for cell in table]
    if not isinstance(schema[name], NumberAttribute):
        plain = [list(v) if isinstance(v, tuple) else v for v in values]
        return pa.array(plain, _fields(schema)[name].type).take(pa.array(cell_of))
    spans = [v if isinstance(v, Span) else Span(low=v, high=v) for v in values if isinstance(v, (Span, float))]
    known = np.array([v is not None for v in values])
    rank = (np.cumsum(known) - 1)[cell_of]
    drawn = _numbers(spans, rank, uniforms(seed, schema.names.index(name), len(cell_of), Stream.NUMBERS))
    return pa.array(drawn, pa.float32(), mask=~known[cell_of])


def _numbers(spans: Sequence[Span], place: NDArray[np.int64], uniform: NDArray[np.float64]) -> NDArray[np.float32]:
    """A number of `spans[place[i]]` per image; images without a span (place -1) get any."""
    if not spans:
        return np.zeros(len(place), dtype=np.float32)
    low, high = (np.array([getattr(span, end) for span in spans])[place] for end in ("low", "high"))
    units = np.floor(high) - np.ceil(low) + 1
    whole = np.ceil(low) + np.floor(uniform * units)
    drawn = np.where((units > 0) & (low < high), whole, low + uniform * (high - low))
    # The ends are single-precision numbers, so that rounding to single precision stays between them.
    stored: NDArray[np.float32] = drawn.astype(np.float32)
    return stored


def _cell(schema: AttributeSchema, raw: Mapping[str, Any], share_key: str, where: str) -> Cell:
    values = {name: _value(schema[name], value, where) for name, value in raw.items() if name != share_key}
    return Cell(values=values, share=_share(raw.get(share_key, 1), where))


def _marginal(schema: AttributeSchema, name: str, shares: Mapping[str, Any]) -> list[Cell]:
    where = f"cohort marginal of {name}"
    declaration = schema[name]
    if not isinstance(declaration, NumberAttribute):
        return [_single(declaration, key, share, where) for key, share in shares.items()]
    if "uniform" not in shares:
        return [_single(declaration, _number(key, where), share, where) for key, share in shares.items()]
    if len(shares) > 1:
        raise RecipeError(f"{where}: 'uniform' stands alone; found {', '.join(shares)}")
    return [_single(declaration, shares["uniform"], 1, where)]


def _single(declaration: AttributeDeclaration, value: object, share: object, where: str) -> Cell:
    return Cell(values={declaration.name: _value(declaration, value, where)}, share=_share(share, where))


def _share(share: object, where: str) -> float:
    if isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share < math.inf:
        return float(share)
    raise RecipeError(f"{where}: share {share!r}; expected a number of 0 or more")


def _number(key: str, where: str) -> float:
    try:
        return float(key)
    except ValueError:
        raise RecipeError(f'{where}: {key!r}; expected a number, or {{"uniform": [low, high]}}') from None


def _value(declaration: AttributeDeclaration, value: object, where: str) -> Value | Span:
    """What a recipe says of one attribute: `unknown` and null are None, labels may be joined by `+`, or `none`."""
    if value is None or (value == "unknown" and "unknown" not in getattr(declaration, "values", ())):
        return None
    try:
        if isinstance(declaration, NumberAttribute) and isinstance(value, (list, tuple)):
            return _span(declaration, value)
        if isinstance(declaration, LabelsAttribute) and isinstance(value, str):
            return _checked(declaration, _labels(declaration, value))
        return _checked(declaration, value)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _labels(declaration: LabelsAttribute, text: str) -> list[str]:
    if text in declaration.values:
        return [text]
    return [] if text == "none" else text.split("+")


def _span(declaration: AttributeDeclaration, ends: Sequence[object]) -> Span:
    if len(ends) != 2:
        raise RecipeError(f"{declaration.name}={list(ends)!r}: expected a number or [low, high]")
    low, high = (_checked(declaration, end) for end in ends)
    if not (isinstance(low, float) and isinstance(high, float) and low <= high):
        raise RecipeError(f"{declaration.name}={list(ends)!r}: low is over high")
    return Span(low=low, high=high)


def _checked(declaration: AttributeDeclaration, value: object) -> Value:
    return AttributeSchema(declarations=(declaration,)).check({declaration.name: value})[declaration.name]


def _ends(value: Value | Span) -> Iterable[Value]:
    return (value.low, value.high) if isinstance(value, Span) else (value,)


def _require_seen(cell: Cell, envelope: Envelope) -> None:
    for name, value in cell.values.items():
        for end in _ends(value):
            try:
                envelope.require({name: end})
            except ArtefactError as error:
                raise ArtefactError(f"generate.cohort: {error}; ask for what lies within, or train on more") from error


def _clipped(cell: Cell, envelope: Envelope) -> Cell:
    """The cell with its spans cut to what was seen: a decade's bin reaches beyond the youngest and oldest scan."""
    values = dict(cell.values)
    for name, value in values.items():
        seen = envelope.ranges.get(name)
        if isinstance(value, Span) and seen and value.low <= seen.high and value.high >= seen.low:
            values[name] = Span(low=max(value.low, seen.low), high=min(value.high, seen.high))
    return Cell(values=values, share=cell.share)
