"""What an image must be to enter a dataset, judged on the very pixels that would be stored.

A judge looks at images beside what was asked of them. The dataset's own are `Appearance` (blank and saturated images)
and `Agreement` (a probe reads the attributes); a privacy gate is one more, see `sampling.gate`. The first judge that
objects decides the reason; later ones do not look at that image. torch-free, apart from what reads for an `Agreement`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from scanloom.attributes import Attributes
from scanloom.models.probe_card import ProbeCard
from scanloom.recipe import Quality

Reason = Literal["not-numbers", "blank", "saturated", "disagrees", "gate", "infeasible"]
"""Why a draw is not in the dataset; or, of an image, `infeasible`: its attempts are used up or its cell given up."""
REASONS: tuple[Reason, ...] = get_args(Reason)

WHITE_FROM, BLACK_TO = 0.99, 0.01
"""Levels that count as white and as black, as shares of full range."""
_LOW, _HIGH = 0.02, 0.98


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one image."""

    reason: Reason | None = None
    """None: it passes."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What was measured, by name, and beside it the limit, as `least` or `most`."""


PASSES = Verdict()


class Judge(Protocol):
    """Says of each image whether it may enter; the same image gets the same verdict whoever shares the call."""

    def __call__(self, pixels_NHW: NDArray[Any], requested: Sequence[Attributes], /) -> Sequence[Verdict]:
        """A verdict per image, from pixels as they are to be stored and what was asked of each."""
        ...


def verdicts(judges: Sequence[Judge], pixels_NHW: NDArray[Any], requested: Sequence[Attributes]) -> list[Verdict]:
    """Per image the first objection, in the order of the judges, or PASSES."""
    found = [PASSES] * len(pixels_NHW)
    for judge in judges:
        left = [place for place, verdict in enumerate(found) if verdict.reason is None]
        if left:
            told = judge(pixels_NHW[left], [requested[place] for place in left])
            for place, verdict in zip(left, told, strict=True):
                found[place] = verdict
    return found


@dataclass(frozen=True)
class Appearance:
    """The judge of blank and saturated images."""

    quality: Quality
    bits_stored: int

    def __call__(self, pixels_NHW: NDArray[Any], requested: Sequence[Attributes]) -> list[Verdict]:
        return [self._verdict(pixels) for pixels in pixels_NHW]

    def _verdict(self, pixels_HW: NDArray[Any]) -> Verdict:
        quality, seen = self.quality, levels(pixels_HW, self.bits_stored)
        if seen.contrast < quality.least_contrast:
            return Verdict("blank", {"contrast": seen.contrast, "least": quality.least_contrast})
        if seen.white > quality.most_white:
            return Verdict("saturated", {"white": seen.white, "most": quality.most_white})
        if seen.black > quality.most_black:
            return Verdict("saturated", {"black": seen.black, "most": quality.most_black})
        return PASSES


@dataclass(frozen=True)
class Levels:
    """How an image uses its range; shares from 0 to 1."""

    contrast: float
    """98th less 2nd percentile of the pixels, as a share of full range."""
    white: float
    """Share of the pixels from WHITE_FROM up."""
    black: float
    """Share of the pixels up to BLACK_TO."""


def levels(pixels_HW: NDArray[Any], bits_stored: int) -> Levels:
    """The levels of unsigned pixels below 2**bits_stored."""
    top = 2**bits_stored - 1
    share = np.cumsum(np.bincount(pixels_HW.ravel(), minlength=top + 1)) / pixels_HW.size
    low, high = np.searchsorted(share, (_LOW, _HIGH))
    white = 1.0 - share[int(np.ceil(WHITE_FROM * top)) - 1]
    return Levels(float(high - low) / top, float(white), float(share[int(BLACK_TO * top)]))


@dataclass(frozen=True)
class Agreement:
    """The judge of images that do not show what was asked for, as a probe reads them.

    `read` gives the probe's outputs float32 [N, O] in the order of `card.outputs`. What was not asked for (unknown),
    and what the card has no limit for, is not looked at.
    """

    card: ProbeCard
    read: Callable[[NDArray[Any]], NDArray[np.float32]]

    def __call__(self, pixels_NHW: NDArray[Any], requested: Sequence[Attributes]) -> list[Verdict]:
        told = self.read(pixels_NHW)
        return [self._verdict(outputs, asked) for outputs, asked in zip(told, requested, strict=True)]

    def _verdict(self, outputs_O: NDArray[np.float32], asked: Attributes) -> Verdict:
        for check in self.card.checks:
            if check.limit is not None and check.concerns(asked):
                agreement = self.card.agreement(check, outputs_O, asked)
                if agreement < check.limit:
                    return Verdict("disagrees", {check.name: agreement, "least": check.limit})
        return PASSES
