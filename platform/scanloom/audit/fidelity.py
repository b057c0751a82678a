"""How alike two sets of embedded images are: Fréchet distance, KID, precision, recall, density and coverage.

Every figure stands beside what it is between two sets of real scans of different patients, equally many: no generator
can be expected to do better. Memory is bounded by blocks of distances, however many images there are.

Legend of shape suffixes: N synthetic or first, M real or second, D values of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from scanloom.audit.intervals import Estimate, blocks, clustered_share, jackknife, mean_over

Floats = NDArray[np.float64]
_BLOCK_VALUES = 2**22
_JACKKNIFE_BLOCKS = 40
NEIGHBOURS = 5
"""k of precision, recall, density and coverage (Naeem et al. 2020, section 4)."""


@dataclass(frozen=True)
class Embedded:
    """Images as vectors, with whom each is of: every synthetic image is its own group."""

    vectors_ND: NDArray[Any]
    groups: Sequence[str]

    @classmethod
    def of(cls, vectors_ND: NDArray[Any], groups: Sequence[str] | None = None) -> Self:
        if groups is not None and len(groups) != len(vectors_ND):
            raise ValueError(f"{len(vectors_ND)} embeddings, but {len(groups)} groups")
        return cls(vectors_ND, list(groups) if groups is not None else [str(n) for n in range(len(vectors_ND))])

    def __len__(self) -> int:
        return len(self.vectors_ND)

    def rows(self, chosen: NDArray[Any]) -> Embedded:
        places = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Embedded(self.vectors_ND[places], [self.groups[place] for place in places.tolist()])

    def some(self, size: int, seed: int = 0) -> Embedded:
        """At most `size` rows, drawn without repetition, in their order."""
        if len(self) <= size:
            return self
        return self.rows(np.sort(np.random.default_rng(seed).permutation(len(self))[:size]))


# --- Fréchet distance -----------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Count, mean and scatter of embeddings, gathered in pieces (Chan et al. 1983)."""

    count: int
    mean_D: Floats
    scatter_DD: Floats
    """Sum of outer products of what differs from the mean."""

    @classmethod
    def of(cls, vectors_ND: NDArray[Any]) -> Self:
        vectors = np.asarray(vectors_ND, dtype=np.float64)
        mean_D = vectors.mean(axis=0) if len(vectors) else np.zeros(vectors.shape[1])
        return cls(len(vectors), mean_D, (vectors - mean_D).T @ (vectors - mean_D))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean_D - self.mean_D
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean_D + apart * (other.count / count), self.scatter_DD + other.scatter_DD + between)

    @property
    def covariance(self) -> Floats:
        return self.scatter_DD / max(1, self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Fréchet distance of two normal distributions (Dowson & Landau 1982; Heusel et al. 2017).

    |m1 - m2|**2 + tr(C1) + tr(C2) - 2 tr((C1**.5 C2 C1**.5)**.5). Biased upwards for finite samples, the more the
    fewer: compare sets of equal sizes.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second.covariance @ root), 0.0, None)).sum()
    apart = first.mean_D - second.mean_D
    distance = apart @ apart + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * cross
    return max(0.0, float(distance))


def frechet(first: Embedded, second: Embedded) -> Estimate:
    """The Fréchet distance of two sets, with a delete-a-block jackknife interval over groups."""
    parts = []
    for one in (first, second):
        block = blocks(one.groups, _JACKKNIFE_BLOCKS)
        parts.append([Moments.of(one.vectors_ND[block == number]) for number in np.unique(block)])
    mine, theirs = (_sum(part) for part in parts)
    value = frechet_distance(mine, theirs)
    without_mine = [frechet_distance(_sum(_but(parts[0], n)), theirs) for n in range(len(parts[0]))]
    without_theirs = [frechet_distance(mine, _sum(_but(parts[1], n))) for n in range(len(parts[1]))]
    found = jackknife(value, [np.array(without_mine), np.array(without_theirs)])
    return Estimate(value, max(0.0, found.low), found.high)


def _sum(moments: Sequence[Moments]) -> Moments:
    total = moments[0]
    for other in moments[1:]:
        total = total + other
    return total


def _but(moments: Sequence[Moments], number: int) -> Sequence[Moments]:
    return [*moments[:number], *moments[number + 1 :]] or moments


# --- kernel distance ------------------------------------------------------------------------------------------


def kid(first: Embedded, second: Embedded) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / D + 1)**3 (Bińkowski et al. 2018), which may be below 0.

    With a jackknife interval that leaves out one group at a time, exact from sums by row and group. ValueError where
    all of a set are of one group.
    """
    within_first, rows_first = _kernel_sums(first)
    within_second, rows_second = _kernel_sums(second)
    across_first, across_second = _cross_sums(first.vectors_ND, second.vectors_ND)
    total = float(across_first.sum())
    sizes = len(first), len(second)

    def mmd(sum_first: Floats, n: Floats, sum_second: Floats, m: Floats, sum_across: Floats) -> Floats:
        return np.asarray(
            sum_first / (n * (n - 1)) + sum_second / (m * (m - 1)) - 2.0 * sum_across / (n * m), dtype=np.float64
        )

    n, m = (np.float64(size) for size in sizes)
    own, other = np.float64(rows_first.sum()), np.float64(rows_second.sum())
    value = float(mmd(np.asarray(own), np.asarray(n), np.asarray(other), np.asarray(m), np.asarray(total)))
    size_first, lost_first, crossed_first = _by_group(first, rows_first, within_first, across_first)
    size_second, lost_second, crossed_second = _by_group(second, rows_second, within_second, across_second)
    without_first = mmd(own - lost_first, n - size_first, np.asarray(other), np.asarray(m), total - crossed_first)
    without_second = mmd(np.asarray(own), np.asarray(n), other - lost_second, m - size_second, total - crossed_second)
    return jackknife(value, [without_first, without_second])


def _by_group(one: Embedded, rows_N: Floats, within_G: Floats, across_N: Floats) -> tuple[Floats, Floats, Floats]:
    """Per group its size, what its absence takes from the sum within the set, and from the sum across."""
    _, group_N = np.unique(np.asarray(one.groups), return_inverse=True)
    sizes = np.bincount(group_N).astype(np.float64)
    if len(sizes) < 2 or len(one) - sizes.max() < 2:
        raise ValueError("kid: needs images of at least three groups")
    return sizes, 2.0 * _by(group_N, rows_N) - within_G, _by(group_N, across_N)


def _by(group_N: NDArray[np.int64], values_N: Floats) -> Floats:
    """Sums by group."""
    return np.bincount(group_N, values_N).astype(np.float64)


def _kernel(first_ND: Floats, second_MD: Floats) -> Floats:
    return np.asarray((first_ND @ second_MD.T / first_ND.shape[1] + 1.0) ** 3, dtype=np.float64)


def _kernel_sums(one: Embedded) -> tuple[Floats, Floats]:
    """Per group the kernel's sum over ordered pairs of different rows within it; per row the sum over all others."""
    vectors = np.asarray(one.vectors_ND, dtype=np.float64)
    _, group_N = np.unique(np.asarray(one.groups), return_inverse=True)
    rows_N = np.zeros(len(vectors))
    same_N = np.zeros(len(vectors))
    for rows in chunks(len(vectors), len(vectors)):
        kernel = _kernel(vectors[rows], vectors)
        kernel[np.arange(len(kernel)), np.arange(len(vectors))[rows]] = 0.0
        rows_N[rows] = kernel.sum(axis=1)
        same_N[rows] = np.where(group_N[rows][:, None] == group_N[None, :], kernel, 0.0).sum(axis=1)
    return _by(group_N, same_N), rows_N


def _cross_sums(first_ND: NDArray[Any], second_MD: NDArray[Any]) -> tuple[Floats, Floats]:
    first, second = np.asarray(first_ND, np.float64), np.asarray(second_MD, np.float64)
    over_second, over_first = np.zeros(len(first)), np.zeros(len(second))
    for rows in chunks(len(first), len(second)):
        kernel = _kernel(first[rows], second)
        over_second[rows] = kernel.sum(axis=1)
        over_first += kernel.sum(axis=0)
    return over_second, over_first


# --- manifolds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifolds:
    """How two sets lie in each other's neighbourhoods, each with its interval."""

    precision: Estimate
    """Share of synthetic images within a real one's neighbourhood (Kynkäänniemi et al. 2019)."""
    recall: Estimate
    """Share of real images within a synthetic one's neighbourhood."""
    density: Estimate
    """Mean number of real neighbourhoods that a synthetic image lies in, over k (Naeem et al. 2020); 1 is expected."""
    coverage: Estimate
    """Share of real images in whose neighbourhood a synthetic one lies; see `expected_coverage`."""


def manifolds(synthetic: Embedded, real: Embedded, k: int = NEIGHBOURS) -> Manifolds:
    """Precision, recall, density and coverage with neighbourhoods that reach to the k-th nearest of the same set.

    The intervals are over synthetic images (precision, density) or real patients (recall, coverage), each against the
    other set as it is: those of shares are exact, so that a few images that all lie inside prove little.
    """
    if min(len(synthetic), len(real)) <= k:
        raise ValueError(f"manifolds: {len(synthetic)} and {len(real)} images; needs over {k} of each")
    real_radius_M, synthetic_radius_N = squared_radii(real.vectors_ND, k), squared_radii(synthetic.vectors_ND, k)
    balls_N = np.zeros(len(synthetic))
    recalled_M, covered_M = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, distance in squared_distances(synthetic.vectors_ND, real.vectors_ND):
        inside = distance <= real_radius_M[None, :]
        balls_N[rows] = inside.sum(axis=1)
        covered_M |= inside.any(axis=0)
        recalled_M |= (distance <= synthetic_radius_N[rows][:, None]).any(axis=0)
    return Manifolds(
        precision=clustered_share(balls_N > 0, synthetic.groups),
        recall=clustered_share(recalled_M, real.groups),
        density=_at_least_one_image_wide(mean_over(balls_N / k, synthetic.groups), len(synthetic)),
        coverage=clustered_share(covered_M, real.groups),
    )


def _at_least_one_image_wide(found: Estimate, images: int) -> Estimate:
    """What an image in no neighbourhood, or in twice as many, would change: also where all are in equally many."""
    one = found.value / images
    return Estimate(found.value, min(found.low, found.value - one), max(found.high, found.value + one))


def expected_coverage(synthetic: int, real: int, k: int = NEIGHBOURS) -> float:
    """Coverage between two samples of one distribution: 1 - prod (real - j) / (real + synthetic - j), j = 1 to k.

    Naeem et al. 2020, appendix B.
    """
    j = np.arange(1, k + 1)
    return float(1.0 - np.prod((real - j) / (real + synthetic - j)))


def squared_radii(vectors_ND: NDArray[Any], k: int) -> Floats:
    """Squared distance float64 [N] of each vector to its k-th nearest other one."""
    out = np.zeros(len(vectors_ND))
    for rows, distance in squared_distances(vectors_ND, vectors_ND):
        distance[np.arange(len(distance)), np.arange(len(vectors_ND))[rows]] = np.inf
        out[rows] = np.partition(distance, k - 1, axis=1)[:, k - 1]
    return out


def squared_distances(first_ND: NDArray[Any], second_MD: NDArray[Any]) -> Iterator[tuple[slice, Floats]]:
    """Squared distances [n, M] of the first set's rows to the second's, a block of rows at a time."""
    second = np.asarray(second_MD, dtype=np.float64)
    centre = second.mean(axis=0)
    second = second - centre
    lengths = (second**2).sum(axis=1)
    for rows in chunks(len(first_ND), len(second)):
        part = np.asarray(first_ND[rows], dtype=np.float64) - centre
        yield rows, np.clip((part**2).sum(axis=1)[:, None] + lengths[None, :] - 2.0 * part @ second.T, 0.0, None)


def chunks(rows: int, width: int) -> Iterator[slice]:
    """The rows in turn, so many at a time that a matrix of them by `width` stays small."""
    step = max(1, _BLOCK_VALUES // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


# --- all of it ------------------------------------------------------------------------------------------------

Figure = Literal["frechet", "kid", "precision", "recall", "density", "coverage"]
FIGURES: tuple[Figure, ...] = get_args(Figure)


@dataclass(frozen=True)
class Compared:
    """A figure of synthetic against held-out real scans, and of other real scans against the same."""

    synthetic: Estimate
    baseline: Estimate
    images: int
    """In each of the sets that are compared with the held-out one."""


def fidelity(
    synthetic: Embedded, train: Embedded, held_out: Embedded, seed: int = 0, figures: Sequence[Figure] = FIGURES
) -> Mapping[Figure, Compared]:
    """Every figure of synthetic images against held-out patients, beside that of equally many training scans."""
    size = min(len(synthetic), len(train))
    ours, theirs = synthetic.some(size, seed), train.some(size, seed)
    distances: Mapping[Figure, Callable[[Embedded, Embedded], Estimate]] = {"frechet": frechet, "kid": kid}
    told: dict[Figure, Compared] = {
        name: Compared(of(ours, held_out), of(theirs, held_out), size)
        for name, of in distances.items()
        if name in figures
    }
    mine, real = manifolds(ours, held_out), manifolds(theirs, held_out)
    told["precision"] = Compared(mine.precision, real.precision, size)
    told["recall"] = Compared(mine.recall, real.recall, size)
    told["density"] = Compared(mine.density, real.density, size)
    told["coverage"] = Compared(mine.coverage, real.coverage, size)
    return {name: one for name, one in told.items() if name in figures}
