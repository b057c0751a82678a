"""How well a probe reads held-out scans, and from where on an image disagrees with what was asked for.

A limit is a split-conformal quantile: of n held-out scans of which a request is true it is the k-th lowest agreement,
k = floor(t (n + 1)), so that another real scan of that kind falls below it with a chance of t at most (Vovk et al.
2005; Angelopoulos & Bates 2023, section 1). Where a scan meets several checks of one attribute, as it does of labels,
t is lowered until all of them together refuse no more than the stated share; a rare label keeps k = 1 as long as that
alone is within the share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from scanloom.attributes import Attributes, AttributeSchema
from scanloom.models.probe_card import Check, Output, ProbeCard, Reading
from scanloom.recipe import LabelsAttribute

Z = 1.959964
"""Of a two-sided 95 % interval of the normal distribution."""
_SHARES = tuple(step / 20 for step in range(20, 0, -1))


def readings(
    card: ProbeCard, outputs_NO: NDArray[np.float32], rows: Sequence[Attributes], medians: Mapping[str, float]
) -> tuple[Reading, ...]:
    """How well each output is read on held-out scans; `medians` are the train split's, by number attribute."""
    return tuple(
        _reading(output, read_N.astype(np.float64), [row[output.attribute] for row in rows], medians)
        for output, read_N in zip(card.outputs, outputs_NO.T, strict=True)
    )


def checks(card: ProbeCard, outputs_NO: NDArray[np.float32], rows: Sequence[Attributes]) -> tuple[Check, ...]:
    """Every check that the card's readings allow, with its limit, and those that they do not, with the reason."""
    readable = {reading.name for reading in card.readings if reading.better_than_chance}
    found: list[Check] = []
    for name in card.attributes.names:
        asked = [
            _Asked(check, card, outputs_NO, rows, readable=check.reading in readable)
            for check in _possible(card.attributes, name)
        ]
        known = sum(row[name] is not None for row in rows)
        found += _limited(asked, known, card.false_reject_share)
    return tuple(found)


def auc(scores_N: NDArray[np.float64], positive_N: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Area under the ROC curve and its 95 % interval (DeLong et al. 1988, by the ranks of Sun & Xu 2014).

    Both kinds must be there. Of a perfect separation, where DeLong's variance is 0, the interval is that of as many
    successes as the rarer kind has scans (Clopper & Pearson 1934).
    """
    ours, others = scores_N[positive_N], scores_N[~positive_N]
    ranks = rankdata(np.concatenate([ours, others]))
    above_M = (ranks[: len(ours)] - rankdata(ours)) / len(others)
    below_N = 1.0 - (ranks[len(ours) :] - rankdata(others)) / len(ours)
    area = float(above_M.mean())
    if len(ours) < 2 or len(others) < 2:
        return area, 0.0, 1.0
    if area in (0.0, 1.0):
        bound = 0.025 ** (1.0 / min(len(ours), len(others)))
        return (area, bound, 1.0) if area else (area, 0.0, 1.0 - bound)
    half = Z * math.sqrt(above_M.var(ddof=1) / len(ours) + below_N.var(ddof=1) / len(others))
    return area, max(0.0, area - half), min(1.0, area + half)


def _reading(
    output: Output, read_N: NDArray[np.float64], truth: Sequence[object], medians: Mapping[str, float]
) -> Reading:
    known = np.array([value is not None for value in truth], dtype=bool)
    read, values = read_N[known], [value for value in truth if value is not None]
    if output.value is None:
        return _number(output, read, np.array(values, dtype=np.float64), medians.get(output.attribute))
    has = np.array([output.value in v if isinstance(v, tuple) else v == output.value for v in values], dtype=bool)
    with_it, scans = int(has.sum()), len(has)
    area, low, high, better = None, None, None, False
    if 0 < with_it < scans:
        area, low, high = auc(read, has)
        # The spread of the area where nothing is read (Mann & Whitney 1947), which is right for a few scans as well.
        spread = math.sqrt((scans + 1) / (12.0 * with_it * (scans - with_it)))
        better = area - 0.5 > Z * spread and low > 0.5
    return Reading(
        name=output.name, figure="auc", estimate=area, low=low, high=high, chance=0.5,
        scans=scans, with_it=with_it, better_than_chance=better,
    )  # fmt: skip


def _number(output: Output, read: NDArray[np.float64], truth: NDArray[np.float64], median: float | None) -> Reading:
    error, mean, low, high, chance, better = np.abs(read - truth), None, None, None, None, False
    if len(error) > 1 and median is not None:
        blind = np.abs(truth - median)
        mean, half, gain = float(error.mean()), _half_width(error), blind - error
        low, high, chance = max(0.0, mean - half), mean + half, float(blind.mean())
        better = float(gain.mean()) > _half_width(gain)
    return Reading(
        name=output.name, figure="mae", estimate=mean, low=low, high=high, chance=chance,
        scans=len(error), with_it=len(error), better_than_chance=better,
    )  # fmt: skip


def _half_width(values: NDArray[np.float64]) -> float:
    return Z * float(values.std(ddof=1)) / math.sqrt(len(values))


class _Asked:
    """A check, and how much each held-out scan of which it is true agrees with it."""

    def __init__(
        self, check: Check, card: ProbeCard, outputs_NO: NDArray[np.float32], rows: Sequence[Attributes], *,
        readable: bool,
    ) -> None:  # fmt: skip
        self.places = np.array([place for place, row in enumerate(rows) if check.concerns(row)], dtype=np.int64)
        self.agreement = np.array(
            [card.agreement(check, outputs_NO[place], rows[place]) for place in self.places], dtype=np.float64
        )
        self.readable = readable
        self.check = check.model_copy(update={"scans": len(self.places)})

    def limit(self, rank: int) -> float | None:
        return float(np.sort(self.agreement)[rank - 1]) if self.readable and rank else None

    def rank(self, share: float, most: float) -> int:
        """Which of the lowest agreements is the limit, where this check may refuse `share`, and never over `most`."""
        within, fewest = (math.floor(part * (len(self.agreement) + 1) + 1e-9) for part in (share, most))
        return max(within, min(fewest, 1))

    def refused(self, rank: int) -> set[int]:
        """Scans that count as refused: the one that sets the limit too, as for any scan that is yet to come."""
        limit = self.limit(rank)
        return set() if limit is None else set(self.places[self.agreement <= limit].tolist())

    def limited(self, rank: int) -> Check:
        limit = self.limit(rank)
        if limit is None:
            why = "too few held-out scans" if self.readable else "no better than chance"
            return self.check.model_copy(update={"reason": why})
        rejected = float((self.agreement < limit).mean())
        return self.check.model_copy(update={"limit": limit, "rejected_share": rejected})


def _limited(asked: Sequence[_Asked], known: int, share: float) -> list[Check]:
    """The checks of one attribute, each at the largest share at which all together keep to the stated one."""
    for part in (share * step for step in _SHARES):
        ranks = [one.rank(part, share) for one in asked]
        together = set[int]().union(*(one.refused(rank) for one, rank in zip(asked, ranks, strict=True)))
        if len(together) <= share * (known + 1):
            return [one.limited(rank) for one, rank in zip(asked, ranks, strict=True)]
    return [one.limited(0) for one in asked]


def _possible(schema: AttributeSchema, name: str) -> list[Check]:
    declaration = schema[name]
    values: Sequence[str | None] = getattr(declaration, "values", (None,))
    states = (True, False) if isinstance(declaration, LabelsAttribute) else (True,)
    return [
        Check(attribute=name, value=value, present=present, scans=0, limit=None, rejected_share=None)
        for value in values
        for present in states
    ]
