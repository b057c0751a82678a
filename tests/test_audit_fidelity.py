"""Distances and neighbourhoods against closed forms: normal distributions, identical sets, modes that are missing."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from scanloom.audit.fidelity import (
    Compared,
    Embedded,
    Moments,
    expected_coverage,
    fidelity,
    frechet,
    frechet_distance,
    kid,
    manifolds,
    squared_distances,
    squared_radii,
)
from scanloom.audit.intervals import clustered_share

RANDOM = np.random.default_rng(1)


def normal(count: int, width: int = 6, mean: float = 0.0, deviation: float = 1.0) -> Embedded:
    return Embedded.of(mean + deviation * RANDOM.standard_normal((count, width)))


def cube(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)


def exact(mean: float, covariance: np.ndarray[Any, Any]) -> Moments:
    return Moments(2, np.full(len(covariance), mean), covariance)


def test_the_distance_of_two_normal_distributions_is_the_closed_form() -> None:
    # Of commuting covariances: |m1 - m2|**2 + sum (s1 - s2)**2.
    first, second = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    assert frechet_distance(exact(0.0, first), exact(2.0, second)) == pytest.approx(12.0 + 1.0 + 0.0 + 4.0)
    turn = np.linalg.qr(RANDOM.standard_normal((3, 3)))[0]
    turned = frechet_distance(exact(0.0, turn @ first @ turn.T), exact(0.0, turn @ second @ turn.T))
    assert turned == pytest.approx(5.0)
    singular = np.diag([1.0, 0.0, 0.0])
    assert frechet_distance(exact(0.0, singular), exact(0.0, singular)) == pytest.approx(0.0, abs=1e-9)


def test_covariances_that_do_not_commute_have_the_trace_of_the_matrix_root() -> None:
    from scipy.linalg import sqrtm

    a, b = (m @ m.T for m in RANDOM.standard_normal((2, 5, 5)))
    expected = np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b)).real
    assert frechet_distance(exact(0.0, a), exact(0.0, b)) == pytest.approx(expected)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    vectors = RANDOM.standard_normal((100, 4)) + 1e4
    parts = Moments.of(vectors[:1]) + Moments.of(vectors[1:60]) + Moments.of(vectors[60:])
    assert parts.covariance == pytest.approx(np.cov(vectors.T), abs=1e-6)
    assert parts.mean_D == pytest.approx(vectors.mean(axis=0))


def test_frechet_and_kid_hold_the_truth_of_shifted_distributions() -> None:
    found = frechet(normal(3000, mean=1.0), normal(3000))
    assert found.low < 6.0 < found.high
    assert found.high - found.low < 1.5
    same = kid(normal(1500), normal(1500))
    assert same.low < 0.0 < same.high
    assert kid(normal(400, mean=0.5), normal(400)).low > 0.0


def test_kid_is_the_mean_over_all_pairs_and_its_interval_leaves_out_patients() -> None:
    x, y = RANDOM.standard_normal((7, 3)), RANDOM.standard_normal((9, 3)) + 0.5
    groups = ["a", "a", "b", "c", "c", "c", "d"]

    def plain(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
        within = [(cube(v, v).sum() - np.trace(cube(v, v))) / (len(v) * (len(v) - 1)) for v in (x, y)]
        return float(sum(within) - 2 * cube(x, y).mean())

    found = kid(Embedded.of(x, groups), Embedded.of(y))
    assert found.value == pytest.approx(plain(x, y))
    without = np.array([plain(x[[g != left for g in groups]], y) for left in "abcd"])
    others = np.array([plain(x, np.delete(y, row, axis=0)) for row in range(9)])
    variance = sum((len(v) - 1) / len(v) * ((v - v.mean()) ** 2).sum() for v in (without, others))
    assert found.high - found.value == pytest.approx(1.959964 * np.sqrt(variance))
    with pytest.raises(ValueError, match="three groups"):
        kid(Embedded.of(x, ["a"] * 7), Embedded.of(y))


def test_identical_sets_are_in_each_others_neighbourhoods() -> None:
    one = normal(200)
    found = manifolds(one, one)
    assert (found.precision.value, found.recall.value, found.coverage.value) == (1.0, 1.0, 1.0)
    # Each point is in its own ball and, by its own radius, in those of about k others.
    assert 1.0 < found.density.value < 1.4


def test_samples_of_one_distribution_have_density_one_and_the_expected_coverage() -> None:
    found = [manifolds(normal(300, 3), normal(200, 3)) for _ in range(20)]
    assert np.mean([one.density.value for one in found]) == pytest.approx(1.0, abs=0.05)
    assert np.mean([one.coverage.value for one in found]) == pytest.approx(expected_coverage(300, 200), abs=0.01)
    # One synthetic image is as likely in a ball as any other point is the nearest: one in a thousand.
    assert expected_coverage(1, 1000, 1) == pytest.approx(1 / 1000, rel=0.01)


def test_a_missing_mode_is_missed_by_recall_and_coverage_not_by_precision() -> None:
    modes = RANDOM.standard_normal((400, 4)) + np.repeat(np.array([[0.0], [30.0]]), 200, axis=0)
    real, half = Embedded.of(modes), Embedded.of(RANDOM.standard_normal((200, 4)))
    found = manifolds(half, real)
    assert found.recall.value < 0.51
    assert found.coverage.value < 0.51
    assert found.precision.value > 0.95
    assert manifolds(half, Embedded.of(modes[200:])).recall.value == 0.0
    one_point = Embedded.of(1e-3 * RANDOM.standard_normal((200, 4)))
    assert manifolds(one_point, Embedded.of(RANDOM.standard_normal((200, 4)))).recall.value < 0.02
    apart = manifolds(normal(100, mean=50.0), normal(100))
    assert (apart.precision.value, apart.recall.value, apart.density.value, apart.coverage.value) == (0, 0, 0, 0)


def test_outliers_of_the_real_set_do_not_raise_density() -> None:
    real = np.concatenate([RANDOM.standard_normal((200, 4)), 40.0 * RANDOM.standard_normal((8, 4))])
    found = manifolds(Embedded.of(20.0 * RANDOM.standard_normal((200, 4))), Embedded.of(real))
    assert found.density.value < 0.5


def test_a_few_images_that_all_lie_inside_prove_little() -> None:
    few = Embedded.of(1e-3 * RANDOM.standard_normal((7, 4)))
    found = manifolds(few, normal(200, 4))
    assert (found.precision.value, found.recall.value) == (1.0, 0.0)
    # 7 of 7 and 0 of 200: Clopper & Pearson.
    assert found.precision.low == pytest.approx(0.025 ** (1 / 7))
    assert found.recall.high == pytest.approx(1 - 0.025 ** (1 / 200))
    assert found.density.low < found.density.value < found.density.high
    held = 0
    for _ in range(200):
        hits = RANDOM.random(30) < 0.95
        share = clustered_share(hits, [str(n) for n in range(30)])
        held += share.low <= 0.95 <= share.high
    assert held / 200 > 0.94


def test_radii_are_those_of_all_pairs() -> None:
    vectors = RANDOM.standard_normal((50, 3)) + 100.0
    pairs = ((vectors[:, None] - vectors[None]) ** 2).sum(-1)
    assert squared_radii(vectors, 5) == pytest.approx(np.sort(pairs, axis=1)[:, 5])


def test_memory_is_bounded_by_blocks_of_distances() -> None:
    many = RANDOM.standard_normal((30_000, 8)).astype(np.float32)
    few = many[:2_000]
    tracemalloc.start()
    nearest = np.concatenate([distance.min(axis=1) for _, distance in squared_distances(many, few)])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert nearest[:2_000] == pytest.approx(0.0, abs=1e-6)
    # All pairs at once would be 480 MB.
    assert most < 200e6


def overlap(one: Compared) -> bool:
    return one.synthetic.low <= one.baseline.high and one.baseline.low <= one.synthetic.high


def test_every_figure_stands_beside_that_of_equally_many_real_scans() -> None:
    patients = [str(n // 2) for n in range(300)]
    train = Embedded.of(RANDOM.standard_normal((300, 4)), patients)
    held_out = Embedded.of(RANDOM.standard_normal((200, 4)), patients[:200])
    found = fidelity(normal(900, 4, mean=1.0), train, held_out)
    assert {compared.images for compared in found.values()} == {300}
    assert not overlap(found["frechet"])
    assert found["kid"].baseline.low < 0.0 < found["kid"].baseline.high
    assert found["kid"].synthetic.low > 0.0
    good = fidelity(normal(300, 4), train, held_out)
    assert all(map(overlap, good.values()))


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="needs over 5 of each"):
        manifolds(normal(5), normal(50))
    with pytest.raises(ValueError, match="4 embeddings, but 3 groups"):
        Embedded.of(np.zeros((4, 2)), ["a", "b", "c"])
