"""Noise: a stable stream per (seed, index), and really normal."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scanloom.sampling.noise import Stream, bits, gaussian_noise, permutation, uniforms


def test_noise_of_an_image_never_changes_with_versions() -> None:
    # Frozen on purpose: another value would change every image ever planned.
    assert gaussian_noise(7, 3, (4,)).tolist() == pytest.approx(FROZEN_NOISE, abs=1e-7)
    assert bits(7, 3, 2, Stream.ORDER).tolist() == FROZEN_BITS


FROZEN_NOISE = [1.0904802083969116, -0.647793710231781, 0.3562438488006592, 1.4683510065078735]
FROZEN_BITS = [3845544696532098304, 9931676275916508706]


def test_noise_is_standard_normal() -> None:
    sample = np.sort(gaussian_noise(11, 0, (200_000,)).astype(np.float64))
    normal = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in sample])
    distance = np.abs(normal - (np.arange(len(sample)) + 0.5) / len(sample)).max()
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded by chance once in a thousand.
    assert distance < 1.95 / math.sqrt(len(sample))
    assert abs(np.mean(sample**4) - 3.0) < 0.1


def test_images_pixels_and_seeds_do_not_repeat_or_correlate_each_others_noise() -> None:
    shape = (4, 32, 32)
    first, next_image, next_seed = (gaussian_noise(*key, shape).ravel() for key in ((1, 0), (1, 1), (2, 0)))
    halves = first[:2048], first[2048:]
    for a, b in ((first, next_image), (first, next_seed), (next_image, next_seed), halves):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))


def test_attempts_at_one_image_start_from_noise_of_their_own_and_the_first_is_the_images() -> None:
    attempts = [gaussian_noise(1, 7, (4, 32, 32), attempt).ravel() for attempt in range(4)]
    assert np.array_equal(attempts[0], gaussian_noise(1, 7, (4, 32, 32)).ravel())
    correlation = np.corrcoef(attempts) - np.eye(4)
    assert np.abs(correlation).max() < 4 / math.sqrt(4096)
    # However much of one attempt is drawn, it never runs into the next.
    long = set(bits(1, 7, 100_000, Stream.NOISE, 0).tolist())
    assert not long & set(bits(1, 7, 1000, Stream.NOISE, 1).tolist())


def test_shape_of_noise_is_the_shape_asked_for_also_when_odd() -> None:
    assert gaussian_noise(0, 0, (3, 5, 7)).shape == (3, 5, 7)
    assert gaussian_noise(0, 0, (3, 5, 7)).dtype == np.float32


def test_largest_seed_and_index_are_distinct_from_small_ones() -> None:
    big = 2**63 - 1
    assert not np.array_equal(gaussian_noise(big, 0, (8,)), gaussian_noise(0, big, (8,)))


def test_streams_of_one_seed_and_index_differ() -> None:
    drawn = [tuple(bits(1, 2, 4, stream)) for stream in Stream]
    assert len(set(drawn)) == len(Stream)


def test_uniforms_fill_zero_to_one_evenly() -> None:
    sample = uniforms(5, 1, 100_000, Stream.NUMBERS)
    assert sample.min() >= 0.0
    assert sample.max() < 1.0
    counts = np.histogram(sample, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 10_000).max() < 5 * math.sqrt(9_000)


def test_permutation_holds_every_place_once_and_moves_most() -> None:
    order = permutation(3, 0, 10_000)
    assert np.array_equal(np.sort(order), np.arange(10_000))
    assert np.count_nonzero(order == np.arange(10_000)) < 10
    assert not np.array_equal(order, permutation(4, 0, 10_000))
