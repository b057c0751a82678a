"""What was asked for beside what a probe reads in the images, by cell, with the probe's own error on real scans.

A probe errs: on held-out scans, of which the truth is known, its readings are compared with that truth in the same way,
so that a gap of the images can be told from a gap of the probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scanloom.attributes import Attributes
from scanloom.audit.intervals import Estimate, clustered_share, mean_over
from scanloom.audit.report import Interval, Reading
from scanloom.models.probe_card import Output, ProbeCard
from scanloom.recipe import CategoryAttribute

ALL = "all"
LEAST_IMAGES = 30
"""Of fewer a cell is marked as small."""


def readings(
    card: ProbeCard, read_NO: NDArray[np.floating[Any]], asked: Sequence[Attributes], ids: Sequence[str],
    held_out_read_MO: NDArray[np.floating[Any]], truth: Sequence[Attributes],
) -> tuple[Reading, ...]:  # fmt: skip
    """Per cell and output that the probe reads better than chance: share, or mean of a number, asked and achieved.

    A cell is all images, or those of which one value of a category was asked. What was not asked of an image (unknown)
    counts for nothing. Categories and labels count as read from a likelihood of one half.
    """
    usable = {reading.name for reading in card.readings if reading.better_than_chance}
    found = []
    for cell, wanted in _cells(card):
        inside = np.array([_within(row, wanted) for row in asked], dtype=bool)
        real = np.array([_within(row, wanted) for row in truth], dtype=bool)
        for column, output in enumerate(card.outputs):
            if output.name not in usable or (wanted and output.attribute == wanted[0]):
                continue
            wished, got, kept = _told(output, read_NO[:, column], asked, inside)
            if not kept:
                continue
            true, seen, scans = _told(output, held_out_read_MO[:, column], truth, real)
            owners = [ids[place] for place in kept]
            found.append(Reading(
                name=output.name, cell=cell, asked=Interval.of(_mean(wished, owners, output)),
                achieved=Interval.of(_mean(got, owners, output)),
                held_out_truth=float(true.mean()) if scans else None,
                held_out_read=float(seen.mean()) if scans else None,
                share=output.value is not None, images=len(kept),
                small=len(kept) < LEAST_IMAGES,
            ))  # fmt: skip
    return tuple(found)


def _cells(card: ProbeCard) -> Iterator[tuple[str, tuple[str, str] | None]]:
    yield ALL, None
    for declaration in card.attributes.declarations:
        if isinstance(declaration, CategoryAttribute):
            yield from ((f"{declaration.name}={value}", (declaration.name, value)) for value in declaration.values)


def _within(row: Attributes, wanted: tuple[str, str] | None) -> bool:
    return wanted is None or row.get(wanted[0]) == wanted[1]


def _told(
    output: Output, read_N: NDArray[np.floating[Any]], rows: Sequence[Attributes], inside_N: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int]]:
    """What is known of the rows within a cell, what is read of them, and which they are."""
    kept = [n for n, row in enumerate(rows) if inside_N[n] and row.get(output.attribute) is not None]
    known = []
    for place in kept:
        value = rows[place][output.attribute]
        if isinstance(value, float):
            known.append(value)
        else:
            known.append(float(output.value in value if isinstance(value, tuple) else output.value == value))
    read = read_N[kept].astype(np.float64)
    return np.array(known), read if output.value is None else (read >= 0.5).astype(np.float64), kept


def _mean(values_N: NDArray[np.float64], owners: Sequence[str], output: Output) -> Estimate:
    if not len(values_N):
        return Estimate(math.nan, math.nan, math.nan)
    return mean_over(values_N, owners) if output.value is None else clustered_share(values_N > 0, owners)
