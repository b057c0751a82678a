"""How sure a figure is: 95 % intervals of shares, of means over patients, and of attacks.

Scans of one patient are alike, so that they say less than as many scans of different patients: where `groups` names
patients, patients are resampled, not scans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from scanloom.training.calibration import Z
from scanloom.training.calibration import auc as delong

ALPHA = 0.05
REPLICATES = 400
Floats = NDArray[np.float64]
Groups = Sequence[str] | NDArray[np.int64]
"""Whose each row is: names, or numbers."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def share(hits: int, trials: int) -> Estimate:
    """A share of independent trials with its exact interval (Clopper & Pearson 1934); 0 to 1 where there are none."""
    if not 0 <= hits <= trials:
        raise ValueError(f"share: {hits} hits of {trials} trials")
    if trials == 0:
        return Estimate(math.nan, 0.0, 1.0)
    low = float(beta.ppf(ALPHA / 2, hits, trials - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - ALPHA / 2, hits + 1, trials - hits)) if hits < trials else 1.0
    return Estimate(hits / trials, low, high)


def clustered_share(hits_N: NDArray[np.bool_], groups: Groups) -> Estimate:
    """A share of scans whose patients are independent: exact on the number of scans that they are worth.

    That is N / (1 + (m - 1) rho) with the intraclass correlation rho of the hits, by analysis of variance, and the mean
    size m of a group, weighted by size (Kish 1965; Donner 1986), never fewer than there are patients, so that patients
    of one scan each count in full.
    """
    if len(hits_N) == 0:
        return share(0, 0)
    _, group_N = np.unique(np.asarray(groups), return_inverse=True)
    worth = _effective(hits_N.astype(np.float64), group_N)
    value = float(hits_N.mean())
    hits = value * worth
    low = float(beta.ppf(ALPHA / 2, hits, worth - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(1 - ALPHA / 2, hits + 1, worth - hits)) if hits < worth else 1.0
    return Estimate(value, low, high)


def _effective(values_N: Floats, group_N: NDArray[np.int64]) -> float:
    sizes = np.bincount(group_N).astype(np.float64)
    scans, patients = len(values_N), len(sizes)
    if patients == scans or patients < 2:
        return float(patients)
    means = np.bincount(group_N, values_N) / sizes
    between = float((sizes * (means - values_N.mean()) ** 2).sum()) / (patients - 1)
    within = float(((values_N - means[group_N]) ** 2).sum()) / (scans - patients)
    usual = (scans - float((sizes**2).sum()) / scans) / (patients - 1)
    spread = between + (usual - 1.0) * within
    # Where all are alike nothing is known of the correlation: the most careful guess.
    rho = min(1.0, max(0.0, (between - within) / spread)) if spread > 0 else 1.0
    return max(float(patients), scans / (1.0 + (float((sizes**2).sum()) / scans - 1.0) * rho))


def multiplicities(groups: Groups, replicates: int = REPLICATES, seed: int = 0) -> Floats:
    """How often each row is in each bootstrap sample of groups, float64 [replicates, N] (Field & Welsh 2007)."""
    _, group_N = np.unique(np.asarray(groups), return_inverse=True)
    count = int(group_N.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=replicates)
    return drawn[:, group_N].astype(np.float64)


def mean_over(values_N: NDArray[Any], groups: Groups, seed: int = 0) -> Estimate:
    """The mean of rows with the percentile interval of a bootstrap over groups; of a single group without an end."""
    values = np.asarray(values_N, dtype=np.float64)
    if len(values) == 0:
        return Estimate(math.nan, -math.inf, math.inf)
    if len(np.unique(np.asarray(groups))) < 2:
        return Estimate(float(values.mean()), -math.inf, math.inf)
    weights = multiplicities(groups, seed=seed)
    return percentile(float(values.mean()), weights @ values / weights.sum(axis=1))


def percentile(value: float, replicates: Sequence[float] | Floats) -> Estimate:
    """The percentile interval (Efron 1979); stretched to hold the estimate itself."""
    low, high = np.quantile(np.asarray(replicates, dtype=np.float64), [ALPHA / 2, 1 - ALPHA / 2])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def jackknife(value: float, left_out: Sequence[Floats]) -> Estimate:
    """The interval from what a statistic is without each group, per independent sample (Efron & Stein 1981).

    For statistics that resampling with repetition would bias, as distances of distributions are: points that are there
    twice are nearer to each other than any two of the population. Sound for groups that are small parts of a sample.
    """
    variance = 0.0
    for values in left_out:
        if len(values) > 1:
            variance += (len(values) - 1) / len(values) * float(((values - values.mean()) ** 2).sum())
    half = Z * math.sqrt(variance)
    return Estimate(value, value - half, value + half)


def auc(members: Sequence[float] | Floats, others: Sequence[float] | Floats) -> Estimate:
    """The chance that a member's score is above another's, ties half, with DeLong's interval (1988)."""
    scores = np.concatenate([np.asarray(members, np.float64), np.asarray(others, np.float64)])
    if not len(members) or not len(others):
        return Estimate(math.nan, 0.0, 1.0)
    if np.isnan(scores).any():
        raise ValueError("auc: a score is nan; leave out what could not be measured, and say how many")
    return Estimate(*delong(scores, np.arange(len(scores)) < len(members)))


def sensitivity(
    members: Floats, others: Floats, false_positives: float = 0.01, *,
    groups: tuple[Sequence[str], Sequence[str]] | None = None, seed: int = 0,
) -> Estimate:  # fmt: skip
    """Share of members that score above a threshold which at most `false_positives` of the others reach.

    Its interval is that of a bootstrap of both samples, so that it holds the threshold's own uncertainty; or, at 0 and
    1, where every resample is alike, at least the exact one of a share. `groups` names the patients of both.
    """
    if not len(members) or not len(others):
        return Estimate(math.nan, 0.0, 1.0)
    value = float((members > _threshold(others, None, false_positives)).mean())
    named = groups or ([str(n) for n in range(len(members))], [str(n) for n in range(len(others))])
    mine, theirs = multiplicities(named[0], seed=seed), multiplicities(named[1], seed=seed + 1)
    found = [
        float(m @ (members > _threshold(others, o, false_positives)) / m.sum())
        for m, o in zip(mine, theirs, strict=True)
    ]
    resampled, exact = percentile(value, found), share(round(value * len(members)), len(members))
    return Estimate(value, min(resampled.low, exact.low), max(resampled.high, exact.high))


def _threshold(others: Floats, weights: Floats | None, false_positives: float) -> float:
    """The least score of the others above which lies at most that share of their weight."""
    order = np.argsort(others)[::-1]
    weight = np.ones(len(others)) if weights is None else weights[order]
    # Weight strictly above each score, ties counted together.
    scores = others[order]
    above = np.concatenate([[0.0], np.cumsum(weight)[:-1]])
    above = above[np.searchsorted(-scores, -scores, side="left")]
    allowed = scores[above <= false_positives * weight.sum() + 1e-9]
    return float(allowed[-1])


def blocks(groups: Sequence[str], most: int, seed: int = 0) -> NDArray[np.int64]:
    """The block int64 [N] of each row: groups dealt out at random to at most `most` blocks of about equal numbers."""
    _, group_N = np.unique(np.asarray(groups), return_inverse=True)
    count = int(group_N.max()) + 1
    dealt = np.random.default_rng(seed).permutation(count) % min(most, count)
    return np.asarray(dealt[group_N], dtype=np.int64)
