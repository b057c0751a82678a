"""Joint tables from what is known of their margins, and whole images from joint tables.

Nothing here knows of attributes: a joint table is a vector of its cells, a margin a number of each cell's group and
what the groups are to sum to.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ROUNDS = 5000
_REFITS = 3
# Of what a cell was halfway through the rounds; one that falls like one over the rounds has half of it left.
_FALLING = 0.75
_BISECTIONS = 40
_LARGEST_BETA = 16.0
_LARGEST_EXPONENT = 600.0
# What floating point leaves of a share of 0.
_LARGEST_NEGATIVE = 1e-12
# Of an image: what floating point leaves where a number is whole.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Margin:
    """A group for each cell [cells], and what each group's cells are to sum to [groups]."""

    group: Ints
    target: Floats

    def sums(self, table: Floats) -> Floats:
        """What the groups sum to. `bincount` adds in the order of cells, so that every machine gets the same bits."""
        sums: Floats = np.bincount(self.group, weights=table, minlength=len(self.target)).astype(np.float64)
        return sums


@dataclass(frozen=True)
class Misfit:
    """The margin and group that is furthest from its target after fitting, and by how much."""

    margin: int
    group: int
    difference: float


def fit(seed: Floats, margins: Sequence[Margin], tolerance: float = 1e-9) -> tuple[Floats, Misfit | None]:
    """The table nearest to the seed (least Kullback-Leibler divergence) that has these margins.

    Iterative proportional fitting (Deming & Stephan 1940): the seed's odds ratios and zeros stay. With the Misfit
    where there is none to `tolerance`, because zeros of the seed or margins at odds with each other are in the way.

    Where zeros force a cell of the table to be 0 too, it falls like one over the rounds only, and never gets there:
    cells that still fall are then taken out, which counts if the margins are met without them.
    """
    table, misfit, falling = _fitted(seed, margins, tolerance)
    without = seed
    for _ in range(_REFITS):
        if misfit is None or not falling.any():
            break
        without = np.where(falling, 0.0, without)
        refitted, still, falling = _fitted(without, margins, tolerance)
        if still is None:
            return refitted, None
    return table, misfit


def _fitted(
    seed: Floats, margins: Sequence[Margin], tolerance: float
) -> tuple[Floats, Misfit | None, NDArray[np.bool_]]:
    """The table, how it misses its margins, and which of its cells still fall."""
    table = halfway = seed.astype(np.float64)
    misfit = None
    for done in range(_ROUNDS):
        if done == _ROUNDS // 2:
            halfway = table
        for margin in margins:
            sums = margin.sums(table)
            factors = np.divide(margin.target, sums, out=np.zeros_like(sums), where=sums > 0)
            table = table * factors[margin.group]
        misfit = _worst(table, margins)
        if misfit.difference <= tolerance:
            return table, None, np.zeros(len(table), dtype=np.bool_)
    return table, misfit, (table > 0) & (table < _FALLING * halfway)


def _worst(table: Floats, margins: Sequence[Margin]) -> Misfit:
    differences = [np.abs(margin.sums(table) - margin.target) for margin in margins]
    number = max(range(len(margins)), key=lambda place: differences[place].max())
    group = int(differences[number].argmax())
    return Misfit(number, group, float(differences[number][group]))


def pair_of_correlation(p: Floats, q: Floats, u: Floats, v: Floats, correlation: float) -> Floats | None:
    """The joint table [len(p), len(q)] of margins p and q whose scores u and v correlate so; None where none does.

    Of all such tables the one of the form a_i b_j exp(beta u_i v_j), which for two values each is the only one and
    has a closed form. Of each, two scores at least that have a share must differ.
    """
    u, v = _standard(p, u), _standard(q, v)
    if len(p) == len(q) == 2:
        return _two_by_two(p, q, correlation * math.copysign(1.0, (u[1] - u[0]) * (v[1] - v[0])))
    product = np.outer(u, v)
    spread = float(product.max() - product.min())

    def table(beta: float) -> Floats:
        exponent = beta * product
        return fit_pair(np.exp(exponent - exponent.max()), p, q)[0]

    def correlates(beta: float) -> float:
        return float(u @ table(beta) @ v)

    # Rare values have large scores, and what is further below the largest exponent is 0 in double precision.
    end = min(1.0, 1.0 / spread) if spread > _LARGEST_EXPONENT else 1.0
    while abs(correlates(math.copysign(end, correlation))) < abs(correlation):
        end *= 2
        # There nothing moves any more: this is as strongly as these margins can correlate.
        if end > _LARGEST_BETA or end * spread > max(_LARGEST_EXPONENT, _LARGEST_BETA):
            return None
    low, high = sorted((0.0, math.copysign(end, correlation)))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if correlates(middle) < correlation else (low, middle)
    return table((low + high) / 2)


def _two_by_two(p: Floats, q: Floats, correlation: float) -> Floats | None:
    first = p[0] * q[0] + correlation * math.sqrt(p[0] * p[1] * q[0] * q[1])
    table = np.array([[first, p[0] - first], [q[0] - first, p[1] - (q[0] - first)]])
    return None if table.min() < -_LARGEST_NEGATIVE else np.maximum(table, 0.0)


def fit_pair(seed: Floats, p: Floats, q: Floats) -> tuple[Floats, Misfit | None]:
    """The seed [len(p), len(q)] fitted to the margins p of its rows and q of its columns."""
    rows, columns = (axis.ravel() for axis in np.indices(seed.shape))
    table, misfit = fit(seed.ravel(), [Margin(rows, p), Margin(columns, q)])
    return table.reshape(seed.shape), misfit


def _standard(share: Floats, score: Floats) -> Floats:
    centred = score - share @ score
    spread: Floats = centred / math.sqrt(share @ centred**2)
    return spread


def whole_images(table: Floats, codes: Ints, quotas: Sequence[Ints]) -> Ints | None:
    """Whole numbers of images per cell, near the table's and with exactly these margins; None where there are none.

    `codes` [cells, attributes] is each cell's value of each attribute, `quotas` per attribute the images of each value.
    Attribute by attribute, what is decided so far is the rows of a two-way table whose columns are the next one's
    values; of a two-way table each entry can be rounded up or down so that all sums stay (Bacharach 1966). With many
    zeros and few images a first choice can leave nothing for the last attribute; then another one begins.
    """
    places = list(range(len(quotas)))
    orders = (places[start:] + places[:start] for start in places)
    tried = (_one_by_one(table, codes[:, order], [quotas[place] for place in order]) for order in orders)
    return next((images for images in tried if images is not None), None)


def _one_by_one(table: Floats, codes: Ints, quotas: Sequence[Ints]) -> Ints | None:
    decided, images = np.zeros(len(table), dtype=np.int64), np.array([int(quotas[0].sum())])
    for place, wanted in enumerate(quotas):
        alive = (images[decided] > 0) & (table > 0)
        pairs, edge = np.unique(decided * len(wanted) + codes[:, place], return_inverse=True)
        weight: Floats = np.bincount(edge, weights=np.where(alive, table, 0.0)).astype(np.float64)
        row, column = pairs // len(wanted), pairs % len(wanted)
        fitted, _ = fit(weight, [Margin(row, images.astype(float)), Margin(column, wanted.astype(float))], _ROUNDING)
        rounded = _rounded(fitted, row, column, images, wanted)
        if rounded is None:
            return None
        decided, images = edge, rounded
    return images[decided]


def _rounded(table: Floats, row: Ints, column: Ints, of_row: Ints, of_column: Ints) -> Ints | None:
    """Whole entries with these sums of rows and columns, on the table's support: up or down where that suffices."""
    flow = _Transport(np.floor(table + _ROUNDING).astype(np.int64), table > 0, row, column, of_row, of_column)
    remainders = table - flow.images
    for edge in np.argsort(-remainders, kind="stable"):
        if table[edge] > 0:
            flow.raise_if_wanted(int(edge))
    while (short := flow.short_row()) is not None:
        if not flow.augment(short):
            return None
    return flow.images if flow.is_met() else None


class _Transport:
    """Entries of a two-way table on their way to given sums of rows and columns."""

    def __init__(
        self, images: Ints, support: NDArray[np.bool_], row: Ints, column: Ints, of_row: Ints, of_column: Ints
    ) -> None:
        self.images = images
        self._row, self._column = row.tolist(), column.tolist()
        self._rows_lack = of_row - np.bincount(row, weights=images, minlength=len(of_row)).astype(np.int64)
        self._columns_lack = of_column - np.bincount(column, weights=images, minlength=len(of_column)).astype(np.int64)
        self._of_row: list[list[int]] = [[] for _ in of_row]
        self._of_column: list[list[int]] = [[] for _ in of_column]
        for edge in np.flatnonzero(support).tolist():
            self._of_row[self._row[edge]].append(edge)
            self._of_column[self._column[edge]].append(edge)

    def raise_if_wanted(self, edge: int) -> None:
        row, column = self._row[edge], self._column[edge]
        if self._rows_lack[row] > 0 and self._columns_lack[column] > 0:
            self.images[edge] += 1
            self._settle(row, column)

    def short_row(self) -> int | None:
        short = np.flatnonzero(self._rows_lack > 0)
        return int(short[0]) if len(short) else None

    def is_met(self) -> bool:
        return not (self._rows_lack.any() or self._columns_lack.any())

    def augment(self, start: int) -> bool:
        """Give a row one image more, by the shortest way of up and down to a column that lacks one; False: no way."""
        came_by: dict[int, list[int]] = {start: []}
        waiting = deque([start])
        while waiting:
            row = waiting.popleft()
            for up in self._of_row[row]:
                column = self._column[up]
                if self._columns_lack[column] > 0:
                    self._follow([*came_by[row], up])
                    self._settle(start, column)
                    return True
                for down in self._of_column[column]:
                    if self.images[down] > 0 and self._row[down] not in came_by:
                        came_by[self._row[down]] = [*came_by[row], up, down]
                        waiting.append(self._row[down])
        return False

    def _follow(self, way: Sequence[int]) -> None:
        for place, edge in enumerate(way):
            self.images[edge] += 1 if place % 2 == 0 else -1

    def _settle(self, row: int, column: int) -> None:
        self._rows_lack[row] -= 1
        self._columns_lack[column] -= 1
