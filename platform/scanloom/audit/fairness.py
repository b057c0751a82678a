"""What was asked for beside what a probe reads in the images, and how alike they are to real scans: group by group.

A probe errs: on held-out scans, of which the truth is known, its readings are compared with that truth in the same way,
so that a gap of the images can be told from a gap of the probe. Groups are values of categories and bands of numbers,
and all of these crossed; small ones are marked, not hidden.

Legend of shape suffixes: N images, M held-out scans, O outputs of a probe, A axes, D values of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scanloom.attributes import Attributes
from scanloom.audit.fidelity import Embedded, Figure, fidelity
from scanloom.audit.groups import EVERYONE, LEAST_IMAGES, Cell, Grouping, difference, widest_gap, within
from scanloom.audit.intervals import Estimate, clustered_share, mean_over
from scanloom.audit.report import Beside, Gap, Interval, Reading, Subgroup
from scanloom.models.probe_card import ProbeCard, said_by
from scanloom.training.calibration import Z

Floats = NDArray[np.float64]
COMPOSITION = "share of images"
FIGURES: tuple[Figure, ...] = ("kid", "precision", "recall", "density", "coverage")
"""Of a cell; no Fréchet distance, whose bias depends on how many images there are."""
_FEWEST = 7
"""Neighbourhoods reach to the fifth nearest other image."""


@dataclass(frozen=True)
class Group:
    """Images or scans with what is known of them."""

    attributes: Sequence[Attributes]
    owners: Sequence[str]
    """Patients; of synthetic images their own ids."""
    read_NO: NDArray[np.floating[Any]]
    """What a probe reads."""


# --- asked and read -------------------------------------------------------------------------------------------


_Column = tuple[Floats, Floats, NDArray[np.int64]]
"""What is known of rows, what is read of them, and whose they are."""


class _Told:
    """What a group shows by its attributes and by the probe, float64 [N, O] both; NaN where it is not known."""

    def __init__(self, card: ProbeCard, grouping: Grouping, group: Group) -> None:
        self.owners_N = np.unique(np.asarray(group.owners, dtype=str), return_inverse=True)[1]
        self.codes_NA = grouping.codes(group.attributes)
        self.wanted_NO = said_by(card.outputs, group.attributes)
        share = np.array([output.value is not None for output in card.outputs])
        read = np.asarray(group.read_NO, dtype=np.float64).reshape(len(group.attributes), len(card.outputs))
        self.read_NO = np.where(share, read >= 0.5, read)
        self.read_codes_NA = _read_codes(card, grouping, read)

    def column(self, column: int, inside_N: NDArray[np.bool_]) -> _Column:
        """Of the rows of a cell of which it is known."""
        kept = inside_N & ~np.isnan(self.wanted_NO[:, column])
        return self.wanted_NO[kept, column], self.read_NO[kept, column], self.owners_N[kept]

    def members(self, cell: Cell) -> _Column:
        """Of all rows, whether they are in a cell and whether they are read as in it, 0 or 1."""
        known, read = within(cell, self.codes_NA), within(cell, self.read_codes_NA)
        return known.astype(np.float64), read.astype(np.float64), self.owners_N


def readings(card: ProbeCard, grouping: Grouping, images: Group, held_out: Group) -> tuple[Reading, ...]:
    """Per cell and output that the probe reads better than chance: share, or mean of a number, asked and achieved.

    What was not asked of an image (unknown) counts for nothing. Categories and labels count as read from a likelihood
    of one half. Of crossed cells there is also the share of all images that was asked to be in it and is read as in it,
    where the probe reads all that decides it.
    """
    usable = {reading.name for reading in card.readings if reading.better_than_chance}
    asked, real = _Told(card, grouping, images), _Told(card, grouping, held_out)
    crossed = grouping.crossed(asked.codes_NA, real.codes_NA)
    found: list[Reading] = []
    for cell in (EVERYONE, *grouping.singles(), *crossed):
        inside, truly = within(cell, asked.codes_NA), within(cell, real.codes_NA)
        own = grouping.attributes(cell)
        for column, output in enumerate(card.outputs):
            if output.name in usable and output.attribute not in own:
                told, share = asked.column(column, inside), output.value is not None
                if rows := len(told[0]):
                    there = real.column(column, truly)
                    found.append(_reading(output.name, cell, told, there, share=share, images=rows))
    if all(_reads(card, usable, axis.attribute) for axis in grouping.axes):
        for cell in crossed:
            told, there = asked.members(cell), real.members(cell)
            found.append(_reading(COMPOSITION, cell, told, there, share=True, images=int(told[0].sum())))
    return tuple(found)


def _reading(name: str, cell: Cell, asked: _Column, real: _Column, *, share: bool, images: int) -> Reading:
    (wished, got, owners), (true, seen, patients) = asked, real
    mean: Callable[[Floats, NDArray[np.int64]], Estimate] = (
        (lambda values, groups: clustered_share(values > 0, groups)) if share else mean_over
    )
    return Reading(
        name=name, cell=cell.name, asked=Interval.of(mean(wished, owners)), achieved=Interval.of(mean(got, owners)),
        held_out_truth=float(true.mean()) if len(true) else None,
        held_out_read=float(seen.mean()) if len(true) else None, excess=_excess(got - wished, owners, share),
        held_out_excess=_excess(seen - true, patients, share) if len(true) else None,
        share=share, images=images, small=images < LEAST_IMAGES,
    )  # fmt: skip


def _excess(difference_N: Floats, owners_N: NDArray[np.int64], share: bool) -> Interval:
    """Mean of what images differ by, with the interval over groups that a sum of their totals has (Kish 1965)."""
    value = float(difference_N.mean())
    totals = np.bincount(np.unique(owners_N, return_inverse=True)[1], difference_N - value)
    if len(totals) < 2:
        return Interval(value=value, low=None, high=None)
    # Where no image differs another may: the spread that one would make.
    spread = max(float((totals**2).sum()), float(share)) * len(totals) / (len(totals) - 1)
    half = Z * math.sqrt(spread) / len(difference_N)
    return Interval(value=value, low=value - half, high=value + half)


def _read_codes(card: ProbeCard, grouping: Grouping, read_NO: Floats) -> NDArray[np.int64]:
    """Place of every image on every axis as the probe reads it, int64 [N, A]: the likeliest value or the band."""
    codes = np.full((len(read_NO), len(grouping.axes)), -1, dtype=np.int64)
    for number, axis in enumerate(grouping.axes):
        columns = [place for place, output in enumerate(card.outputs) if output.attribute == axis.attribute]
        if len(columns) == 1 and card.outputs[columns[0]].value is None:
            codes[:, number] = np.searchsorted(axis.edges, read_NO[:, columns[0]], side="right")
        elif columns:
            codes[:, number] = read_NO[:, columns].argmax(axis=1)
    return codes


def _reads(card: ProbeCard, usable: set[str], attribute: str) -> bool:
    names = [output.name for output in card.outputs if output.attribute == attribute]
    return bool(names) and all(name in usable for name in names)


# --- likeness -------------------------------------------------------------------------------------------------


def subgroups(
    grouping: Grouping, images: Embedded, asked: Sequence[Attributes], train: Embedded, learned: Sequence[Attributes],
    held_out: Embedded, truth: Sequence[Attributes],
) -> tuple[Subgroup, ...]:  # fmt: skip
    """How alike the images of each cell are to held-out scans of that cell, beside equally many training scans of it.

    A cell with too few of them for any figure is there without figures.
    """
    codes = [grouping.codes(rows) for rows in (asked, learned, truth)]
    found = []
    for cell in (*grouping.singles(), *grouping.crossed(*codes)):
        parts = [one.rows(within(cell, code)) for one, code in zip((images, train, held_out), codes, strict=True)]
        if not any(len(part) for part in parts):
            continue
        patients = len(set(parts[2].groups))
        enough = all(len(part) >= _FEWEST and len(set(part.groups)) >= 3 for part in parts)
        told = fidelity(parts[0], parts[1], parts[2], figures=FIGURES) if enough else {}
        found.append(Subgroup(
            cell=cell.name, images=len(parts[0]), held_out_scans=len(parts[2]),
            figures={name: Beside.of(one) for name, one in told.items()},
            small=min(len(parts[0]), len(parts[1]), patients) < LEAST_IMAGES,
        ))  # fmt: skip
    return tuple(found)


# --- gaps -----------------------------------------------------------------------------------------------------


def gaps(grouping: Grouping, told: Sequence[Reading], alike: Sequence[Subgroup]) -> tuple[Gap, ...]:
    """How far the groups of each category lie apart: in what is read beyond what was asked, and in likeness.

    Cells that are small do not count, or the gap would be theirs by chance. Likeness counts less that of real scans of
    the cell, so that a cell that is hard to be like is not taken for one that is treated badly.
    """
    found: list[Gap | None] = []
    for axis in grouping.axes:
        for name in dict.fromkeys(one.name for one in told):
            cells = {one.cell: one for one in told if one.name == name and one.cell in axis.names and not one.small}
            excess = {cell: one.excess for cell, one in cells.items() if one.excess is not None}
            real = {cell: one.held_out_excess for cell, one in cells.items() if one.held_out_excess is not None}
            found.append(widest_gap(f"{name}: read less asked", axis.attribute, excess, real=real))
        for figure in ("kid", "coverage"):
            beyond: Mapping[str, Interval] = {
                one.cell: difference(one.figures[figure].synthetic, one.figures[figure].baseline)
                for one in alike
                if one.cell in axis.names and not one.small and figure in one.figures
            }
            found.append(widest_gap(
                f"{figure}, less that of real scans", axis.attribute, beyond, low_is_worse=figure == "coverage"
            ))  # fmt: skip
    return tuple(gap for gap in found if gap is not None)
