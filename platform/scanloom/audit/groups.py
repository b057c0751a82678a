"""Groups of people whose figures are told apart: values of categories, bands of numbers, and all of these crossed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from scanloom.attributes import Attributes, AttributeSchema
from scanloom.audit.intervals import ALPHA
from scanloom.audit.report import Gap, Interval
from scanloom.errors import RecipeError
from scanloom.recipe import CategoryAttribute, NumberAttribute, nearest

ALL = "all"
LEAST_IMAGES = 30
"""Of fewer a cell is marked as small."""
_YEARS = (18.0, 40.0, 65.0)
_DEFAULT_AXES = 3
_BANDS = 3


@dataclass(frozen=True)
class Axis:
    """An attribute by which people are told apart."""

    attribute: str
    names: tuple[str, ...]
    """Of its values or bands, as a cell is called."""
    values: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    """Of a number: where one band ends and the next begins."""

    def place(self, row: Attributes) -> int:
        """Which of the names a row has; -1 where that is not known."""
        value = row.get(self.attribute)
        if isinstance(value, float):
            return int(np.searchsorted(self.edges, value, side="right"))
        return self.values.index(value) if isinstance(value, str) and value in self.values else -1


@dataclass(frozen=True)
class Cell:
    """A part of the images: those that have one value on each of some axes."""

    name: str
    wanted: Mapping[int, int]
    """Axis -> its value; none: all images."""


EVERYONE = Cell(ALL, {})


@dataclass(frozen=True)
class Grouping:
    """The axes by which people are told apart, and the cells that follow."""

    axes: tuple[Axis, ...]

    @classmethod
    def of(
        cls, schema: AttributeSchema, rows: Sequence[Attributes], names: Sequence[str] | None = None,
        where: str = "audit.fairness.groups",
    ) -> Grouping:  # fmt: skip
        """By the named attributes, or the first three that can be; `rows` decide the bands of numbers that are no ages.

        RecipeError for a name that is none of them.
        """
        able = [d for d in schema.declarations if isinstance(d, (CategoryAttribute, NumberAttribute))]
        known = {declaration.name: declaration for declaration in able}
        for name in names or ():
            if name not in known:
                raise RecipeError(f"{where}: {name!r} is no category or number{nearest(name, known)}")
        chosen = list(known)[:_DEFAULT_AXES] if names is None else names
        return cls(tuple(_axis(known[name], rows) for name in chosen))

    def codes(self, rows: Sequence[Attributes]) -> NDArray[np.int64]:
        """Place of every row on every axis, int64 [N, A]; -1 where it is not known."""
        told = [[axis.place(row) for axis in self.axes] for row in rows]
        return np.array(told, dtype=np.int64).reshape(len(rows), len(self.axes))

    def singles(self) -> list[Cell]:
        """A cell for every value of every axis."""
        return [
            Cell(name, {number: place})
            for number, axis in enumerate(self.axes)
            for place, name in enumerate(axis.names)
        ]

    def crossed(self, *codes_NA: NDArray[np.int64]) -> list[Cell]:
        """A cell for every combination of values of all axes that some of the rows have; none of a single axis."""
        if len(self.axes) < 2:
            return []
        there = {tuple(row) for codes in codes_NA for row in np.unique(codes, axis=0).tolist()}
        return [
            Cell(", ".join(self.axes[n].names[place] for n, place in enumerate(places)), dict(enumerate(places)))
            for places in itertools.product(*(range(len(axis.names)) for axis in self.axes))
            if places in there
        ]

    def attributes(self, cell: Cell) -> set[str]:
        """Those that decide who is in a cell."""
        return {self.axes[number].attribute for number in cell.wanted}


def within(cell: Cell, codes_NA: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows are in a cell."""
    inside = np.ones(len(codes_NA), dtype=bool)
    for axis, place in cell.wanted.items():
        inside &= codes_NA[:, axis] == place
    return inside


def _axis(declaration: CategoryAttribute | NumberAttribute, rows: Sequence[Attributes]) -> Axis:
    name = declaration.name
    if isinstance(declaration, CategoryAttribute):
        return Axis(name, tuple(f"{name}={value}" for value in declaration.values), declaration.values)
    if declaration.unit == "years":
        edges: tuple[float, ...] = _YEARS
    else:
        known = [value for row in rows if isinstance(value := row.get(name), float)]
        cuts = np.quantile(known, np.arange(1, _BANDS) / _BANDS) if known else np.zeros(0)
        edges = tuple(sorted({float(f"{cut:.3g}") for cut in cuts}))
    ends = [f"{edge:g}" for edge in edges]
    if not ends:
        return Axis(name, (f"{name} known",))
    between = [f"{name} {low} to under {high}" for low, high in itertools.pairwise(ends)]
    return Axis(name, (f"{name} under {ends[0]}", *between, f"{name} {ends[-1]} and over"), edges=edges)


# --- how far apart --------------------------------------------------------------------------------------------


def widest_gap(
    figure: str, of: str, cells: Mapping[str, Interval], *, low_is_worse: bool | None = None,
    real: Mapping[str, Interval] | None = None,
) -> Gap | None:  # fmt: skip
    """The gap of the two cells that lie furthest apart; None where fewer than two are known.

    `low_is_worse` None: the one further from 0 is. `real` holds the same figure of real scans, for the same two cells.
    The interval is that of a difference by those of its parts (MOVER: Zou & Donner 2008), widened to hold for all pairs
    of cells at once (Bonferroni), of parts that are taken to be independent.
    """
    known = {name: one for name, one in cells.items() if one.value is not None}
    if len(known) < 2:
        return None
    order = sorted(known, key=lambda name: _value(known[name]))
    lowest, highest = order[0], order[-1]
    if low_is_worse is None:
        low_is_worse = abs(_value(known[lowest])) > abs(_value(known[highest]))
    worst, best = (lowest, highest) if low_is_worse else (highest, lowest)
    pairs = len(known) * (len(known) - 1) // 2
    beside = None
    if real is not None and {lowest, highest} <= set(real):
        beside = difference(real[highest], real[lowest])
    return Gap(
        figure=figure, of=of, worst=worst, best=best,
        gap=difference(known[highest], known[lowest], pairs), baseline=beside,
    )  # fmt: skip


def difference(first: Interval, second: Interval, at_once: int = 1) -> Interval:
    """first - second, of independent figures, with an interval that holds for so many at once."""
    if first.value is None or second.value is None:
        return Interval(value=None, low=None, high=None)
    value = first.value - second.value
    wider = NormalDist().inv_cdf(1.0 - ALPHA / (2 * at_once)) / NormalDist().inv_cdf(1.0 - ALPHA / 2)

    def reach(*ends: tuple[float | None, float | None]) -> float | None:
        if any(end is None for pair in ends for end in pair):
            return None
        return wider * float(np.sqrt(sum((float(a or 0.0) - float(b or 0.0)) ** 2 for a, b in ends)))

    down = reach((first.value, first.low), (second.high, second.value))
    up = reach((first.high, first.value), (second.value, second.low))
    return Interval(value=value, low=None if down is None else value - down, high=None if up is None else value + up)


def _value(one: Interval) -> float:
    assert one.value is not None
    return one.value
