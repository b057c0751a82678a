"""What the corpus has: its joint table of attributes, asked for what was seen together and how often.

The table counts scans by combination of attributes, numbers in bins. A bin holds its low end, and its high end only
where no other bin begins there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from scanloom.sampling.cell import Cell, Scales, Span, Wanted, count, split

Values = tuple[Wanted, ...]
Weighted = tuple[Cell, float]
# What floating point leaves of nothing.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Coverage:
    """How much of a cohort the corpus has: combinations that no scan has are unseen."""

    unseen: float
    """Share of the images, as expected before numbers are drawn."""
    unseen_by_cell: tuple[tuple[float, ...], ...]
    """Per table and cell, of the images of that cell."""
    scans: tuple[tuple[float, ...], ...]
    """Per table and cell, about how many scans have its values."""
    example: Mapping[str, Wanted]
    """A combination of which none, or only a part, was seen; empty where all was."""


class CorpusTable:
    """The joint table of a corpus, a cell's `share` is its number of scans; and how finely its numbers are written."""

    def __init__(self, cells: Sequence[Cell], scales: Scales | None = None) -> None:
        self.cells = tuple(cells)
        self.scales = scales or {}
        self._low_ends: dict[str, set[float]] = defaultdict(set)
        for cell in cells:
            for name, value in cell.values.items():
                if isinstance(value, Span):
                    self._low_ends[name].add(value.low)
        self._by_values: dict[tuple[str, ...], dict[Values, list[Cell]]] = {}
        self._projected: dict[tuple[str, ...], tuple[Values, ...]] = {}

    @property
    def scans(self) -> int:
        return round(sum(cell.share for cell in self.cells))

    def edges(self, name: str) -> tuple[float, ...]:
        """Where the bins of a number begin, ascending."""
        return tuple(sorted(self._low_ends[name]))

    def having(self, wanted: Mapping[str, Wanted]) -> list[tuple[Cell, float]]:
        """The cells that have these values, and about how many of their scans: those of a bin by the part of it."""
        known = {name: value for name, value in wanted.items() if value is not None}
        found = []
        for cell in self._indexed(tuple(known)).get(_discrete(tuple(known.values())), ()):
            parts = (self._overlap(name, value, cell.values.get(name))[1] for name, value in known.items())
            if scans := cell.share * math.prod(parts):
                found.append((cell, scans))
        return found

    def scans_in(self, wanted: Mapping[str, Wanted]) -> float:
        """About how many scans have these values."""
        return math.fsum(scans for _, scans in self.having(wanted))

    def trimmed(self, cell: Cell) -> Cell:
        """The cell with its spans ending before the next bin begins."""
        values = {n: split(v, self.edges(n))[0] if isinstance(v, Span) else v for n, v in cell.values.items()}
        return Cell(values=values, share=cell.share)

    def crosstab(self, axes: Sequence[Sequence[Cell]]) -> NDArray[np.float64]:
        """Scans per combination of one cell of each axis (cells of one attribute), [len(axis), ...].

        Scans that have no value of an axis, or one that no cell of it names, count nowhere.
        """
        names = [next(iter(axis[0].values)) for axis in axes]
        table = np.zeros([len(axis) for axis in axes])
        matches: dict[tuple[str, Wanted], list[tuple[int, float]]] = {}
        for cell in self.cells:
            choices = []
            for name, axis in zip(names, axes, strict=True):
                key = name, cell.values.get(name)
                if key not in matches:
                    parts = [self._overlap(name, wanted.values[name], key[1])[1] for wanted in axis]
                    matches[key] = [(place, part) for place, part in enumerate(parts) if part]
                choices.append(matches[key])
            for chosen in product(*choices):
                table[tuple(place for place, _ in chosen)] += cell.share * math.prod(part for _, part in chosen)
        return table

    def coverage(self, tables: Sequence[Sequence[Cell]]) -> Coverage:
        """How much of a cohort of independent tables the corpus has.

        Unknown attributes of a cell ask for nothing. Labels are compared as sets, not one by one.
        """
        weighted = [_normalised(table) for table in tables]
        seen = self._seen(weighted)
        unseen = max(0.0, 1.0 - math.fsum(seen[0]))
        if unseen < _NOTHING:
            return self.has_all(tables)
        by_cell = tuple(
            tuple(max(0.0, 1.0 - part / weight) if weight else 0.0 for part, (_, weight) in zip(*pair, strict=True))
            for pair in zip(seen, weighted, strict=True)
        )
        return Coverage(unseen, by_cell, self._scans(tables), self._example(weighted))

    def has_all(self, tables: Sequence[Sequence[Cell]]) -> Coverage:
        """The coverage of a cohort that asks for what the corpus has by its nature.

        Its spans may end where the next bin begins, which `coverage` would take as asking for that too.
        """
        return Coverage(0.0, tuple(tuple(0.0 for _ in table) for table in tables), self._scans(tables), {})

    def _scans(self, tables: Sequence[Sequence[Cell]]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(self.scans_in(cell.values) for cell in table) for table in tables)

    def _example(self, tables: list[list[Weighted]]) -> dict[str, Wanted]:
        # The method of conditional expectations: of each table in turn the cell with which most is unseen.
        for number, table in enumerate(tables):
            seen = self._seen(tables)[number]
            worst = min(
                (place for place, (_, weight) in enumerate(table) if weight),
                key=lambda place: seen[place] / table[place][1],
            )
            tables = [*tables[:number], [(table[worst][0], 1.0)], *tables[number + 1 :]]
        return {name: value for ((cell, _),) in tables for name, value in cell.known.items()}

    def _seen(self, tables: Sequence[Sequence[Weighted]]) -> list[list[float]]:
        """Per table and cell, the share of all images that are of this cell and of a combination that was seen."""
        seen = [[0.0] * len(table) for table in tables]
        for choice in product(*(self._patterns(table) for table in tables)):
            widths = np.cumsum([0, *(len(pattern.names) for pattern in choice)])
            for box in self._projections(tuple(name for pattern in choice for name in pattern.names)):
                parts = [p.of(box[widths[i] : widths[i + 1]]) for i, p in enumerate(choice)]
                if not all(parts):
                    continue
                totals = [math.fsum(part for _, part in found) for found in parts]
                for number, found in enumerate(parts):
                    others = math.prod(total for place, total in enumerate(totals) if place != number)
                    for place, part in found:
                        seen[number][place] += part * others
        return seen

    def _patterns(self, table: Sequence[Weighted]) -> list[_Pattern]:
        """The table's cells, grouped by which attributes they know."""
        grouped: dict[tuple[str, ...], list[tuple[int, Cell, float]]] = {}
        for place, (cell, weight) in enumerate(table):
            if weight:
                grouped.setdefault(tuple(cell.known), []).append((place, cell, weight))
        return [_Pattern(self, names, cells) for names, cells in grouped.items()]

    def _indexed(self, names: tuple[str, ...]) -> dict[Values, list[Cell]]:
        """The cells by their values of these attributes, numbers apart."""
        if names not in self._by_values:
            index: dict[Values, list[Cell]] = {}
            for cell in self.cells:
                index.setdefault(_discrete(tuple(cell.values.get(name) for name in names)), []).append(cell)
            self._by_values[names] = index
        return self._by_values[names]

    def _projections(self, names: tuple[str, ...]) -> tuple[Values, ...]:
        """The distinct combinations of these attributes that the corpus has with none of them unknown."""
        if names not in self._projected:
            found = dict.fromkeys(tuple(cell.values.get(name) for name in names) for cell in self.cells if cell.share)
            self._projected[names] = tuple(box for box in found if None not in box)
        return self._projected[names]

    def _overlap(self, name: str, wanted: Wanted, has: Wanted) -> tuple[float, float]:
        """Of what is wanted the part that a bin covers, and of the bin the part that is wanted, both 0 to 1."""
        if isinstance(has, float):
            has = Span(low=has, high=has)
        if not isinstance(has, Span):
            return (1.0, 1.0) if wanted == has else (0.0, 0.0)
        if isinstance(wanted, float):
            wanted = Span(low=wanted, high=wanted)
        if not isinstance(wanted, Span):
            return 0.0, 0.0
        closed = has.low == has.high or has.high not in self._low_ends[name]
        if wanted.low == wanted.high:
            inside = has.low <= wanted.low < has.high or (closed and wanted.low == has.high)
            return float(inside), float(inside)
        low, high = max(wanted.low, has.low), min(wanted.high, has.high)
        if wanted.grid:
            common = count(low, high, wanted.grid, closed or high < has.high)
            return common / wanted.numbers, common / max(1, count(has.low, has.high, wanted.grid, closed))
        length = max(0.0, high - low)
        return length / (wanted.high - wanted.low), length / (has.high - has.low) if has.high > has.low else 0.0


class _Pattern:
    """Cells that know the same attributes, found by the values of those that are no numbers."""

    def __init__(self, corpus: CorpusTable, names: tuple[str, ...], cells: Iterable[tuple[int, Cell, float]]) -> None:
        self.names = names
        self._corpus = corpus
        self._cells: dict[Values, list[tuple[int, Cell, float]]] = {}
        for place, cell, weight in cells:
            self._cells.setdefault(_discrete(tuple(cell.values[name] for name in names)), []).append(
                (place, cell, weight)
            )
        self._found: dict[Values, list[tuple[int, float]]] = {}

    def of(self, box: Values) -> list[tuple[int, float]]:
        """(cell, its weight by the part of it that lies in the box) of the cells that reach into it."""
        if box not in self._found:
            self._found[box] = [
                (place, part)
                for place, cell, weight in self._cells.get(_discrete(box), ())
                if (part := weight * self._part(cell, box))
            ]
        return self._found[box]

    def _part(self, cell: Cell, box: Values) -> float:
        overlap = self._corpus._overlap
        return math.prod(overlap(n, cell.values[n], has)[0] for n, has in zip(self.names, box, strict=True))


def _discrete(values: Values) -> Values:
    """The values with numbers and spans left out."""
    return tuple(None if isinstance(value, (float, Span)) else value for value in values)


def _normalised(table: Sequence[Cell]) -> list[Weighted]:
    whole = math.fsum(cell.share for cell in table)
    return [(cell, cell.share / whole) for cell in table]


def merged(cells: Iterable[Cell]) -> list[Cell]:
    """Cells that say the same, added up, in the order in which they came."""
    shares: dict[tuple[tuple[str, Wanted], ...], float] = {}
    for cell in cells:
        said = tuple(cell.values.items())
        shares[said] = shares.get(said, 0.0) + cell.share
    return [Cell(values=dict(said), share=share) for said, share in shares.items()]
