"""Perceptual fingerprints of scans, and the pairs of other patients' scans that are nearly the same picture.

A fingerprint keeps the signs of a scan's lowest spatial frequencies: those of the ranks of its area-averaged pixels,
so that a window, gamma or brightness, which keep the order of the pixels, hardly move it. After the "pHash" of
Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8 | np.uint16]
Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
Fingerprints = npt.NDArray[np.uint8]

BITS = 256
GRID = 32
LEAST_BAR = 0.03
"""Black bars narrower than this share of a side count as the scan's own margin."""
MOST_PAIRS = 1_000_000
"""Pairs that `alike` yields at most."""
LARGE = 256
"""Fingerprints with one key beyond which they are told apart by a second key."""
MOST_COMPARISONS = 3_000_000_000
"""Comparisons, about, that are spent on fingerprints which two keys do not tell apart."""
_CHUNK = 1 << 18
_KEY_BITS = 32


# --- one scan -------------------------------------------------------------------------------------------------


def fingerprint(pixels: Pixels) -> bytes:
    """The 256 bits of a scan, HxW u8 or u16, as 32 bytes; those of a scan without contrast are all zero.

    Scans that differ in size, depth, contrast, noise or black bars have fingerprints that differ in few bits.
    """
    waves = _cosines()
    spectrum = waves @ _ranks(_averages(_without_bars(pixels))) @ waves.T
    # Rounded: which side of zero a coefficient that is zero falls on is the arithmetic's accident.
    return np.packbits(np.round(spectrum.ravel()[_lowest()], 6) > 0).tobytes()


def _without_bars(pixels: Pixels) -> Pixels:
    """The scan without the black bars that lie evenly on both sides of it."""
    black = int(pixels.max(initial=0)) // 64
    for axis in (1, 0):
        edges = (pixels[:1], pixels[-1:]) if axis else (pixels[:, :1], pixels[:, -1:])
        if any(edge.max(initial=0) > black for edge in edges):
            continue
        seen = np.flatnonzero(pixels.max(axis=axis, initial=0) > black)
        side = pixels.shape[1 - axis]
        first, last = (int(seen[0]), side - 1 - int(seen[-1])) if len(seen) else (0, 0)
        bar = min(first, last)
        # A scan's own black margins are seldom even; cut, they would come and go with its brightness.
        if bar >= LEAST_BAR * side and max(first, last) <= bar + 1 + side // 256:
            pixels = pixels[bar : side - bar] if axis else pixels[:, bar : side - bar]
    return pixels


def _averages(pixels: Pixels) -> Floats:
    """32x32 area averages: sums of whole numbers, equal on every machine."""
    for axis, side in enumerate(pixels.shape):
        if side < GRID:
            pixels = np.repeat(pixels, -(-GRID // max(1, side)), axis=axis)
    rows, columns = pixels.shape
    if rows % GRID == 0 and columns % GRID == 0:
        bands = pixels.reshape(GRID, rows // GRID, columns).sum(axis=1, dtype=np.uint32)
        blocks = bands.reshape(GRID, GRID, columns // GRID).sum(axis=2, dtype=np.int64)
        return np.asarray(blocks / (rows // GRID * (columns // GRID)))
    sums: npt.NDArray[Any] = pixels
    areas = np.ones((1, 1))
    for axis, side in enumerate(pixels.shape):
        edges = np.arange(GRID + 1) * side // GRID
        sums = np.add.reduceat(sums, edges[:-1], axis=axis, dtype=np.int64)
        areas = areas * np.expand_dims(np.diff(edges), 1 - axis)
    return np.asarray(sums / areas)


def _ranks(values: Floats) -> Floats:
    """Each value's rank, -0.5 to 0.5, equal values sharing the mean of theirs."""
    order = np.argsort(values, axis=None)
    ascending = values.ravel()[order]
    first = np.flatnonzero(np.concatenate(([True], ascending[1:] != ascending[:-1])))
    counts = np.diff(first, append=values.size)
    ranks = np.empty(values.size)
    ranks[order] = np.repeat((first + 0.5 * (counts - 1)) / values.size - 0.5, counts)
    return ranks.reshape(values.shape)


@lru_cache(maxsize=1)
def _cosines() -> Floats:
    """The orthonormal DCT-II of 32 values as a matrix; its rows are frequencies."""
    k, n = np.arange(GRID)[:, None], np.arange(GRID)[None, :]
    waves = np.sqrt(2.0 / GRID) * np.cos(np.pi * k * (2 * n + 1) / (2 * GRID))
    waves[0] /= np.sqrt(2.0)
    return np.asarray(waves)


@lru_cache(maxsize=1)
def _lowest() -> Whole:
    """Places of the 256 lowest frequencies in the flat spectrum, without the mean."""
    down, across = np.divmod(np.arange(GRID * GRID), GRID)
    order = np.lexsort((down, np.maximum(down, across), down + across))
    return np.asarray(order[1 : BITS + 1])


# --- pairs ----------------------------------------------------------------------------------------------------


def alike(
    fingerprints: Fingerprints, groups: npt.NDArray[np.integer[Any]], max_bits: int
) -> Iterator[tuple[int, int, int]]:
    """Pairs (i, j, bits) of fingerprints [N, 32] that differ in at most `max_bits` and whose groups [N] differ.

    Two fingerprints within d bits agree wholly in one of d + 1 bands, so only those are compared: every pair is
    found, but for three limits that keep a corpus of near-blank scans from becoming quadratic. Of equal fingerprints
    each is paired with the first one of another group only, and the first of them stands for all of them in other
    pairs. Where more still agree in a band and in a band of the remaining bits than can be compared in about a minute,
    each is compared with some of them. After 1,000,000 pairs it stops. Each pair comes once, with i < j; time grows
    steeply beyond 16 bits.
    """
    if len(fingerprints) != len(groups) or fingerprints.shape[1:] != (BITS // 8,):
        raise ValueError(f"fingerprints {fingerprints.shape} for groups {groups.shape}, expected [N, 32] and [N]")
    clusters = _Clusters(np.ascontiguousarray(fingerprints), np.asarray(groups))
    left = MOST_PAIRS
    for pairs in (clusters.equal(), _near(clusters, max_bits)):
        yield from zip(*pairs[:left].T.tolist(), strict=True)
        left -= len(pairs[:left])


class _Clusters:
    """The distinct fingerprints [M, 32], and two scans that stand for each."""

    def __init__(self, fingerprints: Fingerprints, groups: npt.NDArray[Any]) -> None:
        order = np.lexsort(fingerprints.view(np.uint64).T)
        ordered = fingerprints[order].view(np.uint64)
        new = np.ones(len(order), dtype=np.bool_)
        new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        cluster = np.cumsum(new) - 1
        first = order[new]
        strange = groups[order] != groups[first][cluster]
        other = np.full(len(first), -1, dtype=np.int64)
        # Written from the last to the first: the first scan of another group stays.
        other[cluster[strange][::-1]] = order[strange][::-1]
        self._order, self._cluster, self._strange = order, cluster, strange
        self.groups, self.first, self.other = groups, first, other
        self.fingerprints = fingerprints[first]

    def equal(self) -> Whole:
        """Rows (i, j, 0): every scan with the first scan of another group that has its fingerprint."""
        own = self._order
        partner = np.where(self._strange, self.first[self._cluster], self.other[self._cluster])
        return _distinct(own[partner >= 0], partner[partner >= 0], np.zeros(int((partner >= 0).sum()), dtype=np.int64))

    def between(self, one: Whole, another: Whole, bits: Whole) -> Whole:
        """Rows (i, j, bits) for pairs of clusters, by scans of two groups; none where both have one and the same."""
        first, second = self.first[one], self.first[another]
        same = self.groups[first] == self.groups[second]
        by_second = same & (self.other[another] >= 0)
        by_first = same & ~by_second & (self.other[one] >= 0)
        second = np.where(by_second, self.other[another], second)
        first = np.where(by_first, self.other[one], first)
        kept = ~same | by_second | by_first
        return _distinct(first[kept], second[kept], bits[kept])


def _distinct(one: Whole, another: Whole, bits: Whole) -> Whole:
    rows = np.stack([np.minimum(one, another), np.maximum(one, another), bits], axis=1)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    repeated = (rows[1:, :2] == rows[:-1, :2]).all(axis=1)
    return np.asarray(rows[np.concatenate([np.ones(min(len(rows), 1), dtype=np.bool_), ~repeated])])


def _near(clusters: _Clusters, max_bits: int) -> Whole:
    """Rows (i, j, bits) of pairs of different fingerprints, up to some more than MOST_PAIRS of them."""
    kept, fresh, waiting = np.zeros((0, 3), dtype=np.int64), [], 0
    for one, another, bits in _candidates(clusters.fingerprints, max_bits):
        fresh.append(clusters.between(one, another, bits))
        waiting += len(fresh[-1])
        # Pairs come once per band that they share; sorted in bulk, since that costs more than finding them.
        if waiting > MOST_PAIRS:
            kept, fresh, waiting = _distinct(*np.concatenate([kept, *fresh]).T), [], 0
            if len(kept) >= MOST_PAIRS:
                return kept
    return _distinct(*np.concatenate([kept, *fresh]).T)


def _candidates(fingerprints: Fingerprints, max_bits: int) -> Iterator[tuple[Whole, Whole, Whole]]:
    """Pairs within max_bits of the distinct fingerprints, the same pair in every band that it shares."""
    if max_bits < 1 or len(fingerprints) < 2:
        return
    columns = np.ascontiguousarray(fingerprints.T)
    words = fingerprints.view(np.uint64)
    order = _by_balance(columns)
    for band in _bands(order, max_bits):
        yield from _sharing(columns, words, band, order[~np.isin(order, band)], max_bits)


def _by_balance(columns: Fingerprints) -> Whole:
    """The bits from those that tell scans apart best to those that nearly all have alike."""
    step = max(1, columns.shape[1] // 65536)
    share = np.unpackbits(columns[:, ::step], axis=0).mean(axis=1)
    return np.argsort(np.abs(share - 0.5), kind="stable")


def _bands(bits: Whole, max_bits: int) -> list[Whole]:
    """max_bits + 1 bands that share the telling bits evenly, each at most a key wide."""
    return [bits[band :: max_bits + 1][:_KEY_BITS] for band in range(min(max_bits + 1, len(bits)))]


def _keys(columns: Fingerprints, bits: Whole) -> npt.NDArray[np.uint64]:
    keys = np.zeros(columns.shape[1], dtype=np.uint64)
    for bit in bits.tolist():
        keys = (keys << np.uint64(1)) | ((columns[bit >> 3] >> np.uint8(7 - (bit & 7))) & np.uint8(1))
    return keys


def _sharing(
    columns: Fingerprints, words: npt.NDArray[np.uint64], band: Whole, rest: Whole, max_bits: int
) -> Iterator[tuple[Whole, Whole, Whole]]:
    """Pairs within max_bits that agree in a band; where too many agree, those that agree in a band of the rest."""
    keys = _keys(columns, band)
    order = np.argsort(keys, kind="stable")
    ends, sizes = _runs(keys[order])
    small = sizes <= LARGE
    yield from _within(order, np.where(small, ends, 0), words, max_bits, LARGE)
    crowded = order[~small]
    if not len(crowded):
        return
    most = max(LARGE // 8, MOST_COMPARISONS // (len(crowded) * (max_bits + 1) ** 2))
    for again in _bands(rest, max_bits):
        both = (keys[crowded] << np.uint64(_KEY_BITS)) | _keys(columns[:, crowded], again)
        inner = np.argsort(both, kind="stable")
        ends, _ = _runs(both[inner])
        yield from _within(crowded[inner], ends, words, max_bits, most)


def _runs(keys: npt.NDArray[np.uint64]) -> tuple[Whole, Whole]:
    """For each of the sorted keys: where its run of equal keys ends, and how long that run is."""
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    lengths = np.diff(np.append(starts, len(keys)))
    return np.repeat(starts + lengths, lengths), np.repeat(lengths, lengths)


def _within(
    order: Whole, ends: Whole, words: npt.NDArray[np.uint64], max_bits: int, most: int
) -> Iterator[tuple[Whole, Whole, Whole]]:
    """Pairs within max_bits of members of one run that stand at most `most` apart in it."""
    ordered = np.ascontiguousarray(words[order].T)
    place = np.arange(len(order))
    for apart in range(1, min(most, len(order)) + 1):
        place = place[place + apart < ends[place]]
        if not len(place):
            return
        for start in range(0, len(place), _CHUNK):
            at, bits = place[start : start + _CHUNK], np.zeros(1, dtype=np.int64)
            for word in ordered:
                # Most pairs are told apart by their first words.
                bits = bits + np.bitwise_count(word[at] ^ word[at + apart])
                near = bits <= max_bits
                at, bits = at[near], bits[near]
            if len(at):
                yield order[at], order[at + apart], bits
