"""Joint tables: closed forms, what fitting must keep, and whole images with exact margins."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scanloom.sampling.draw import quotas
from scanloom.sampling.joint import Margin, fit, fit_pair, pair_of_correlation, whole_images

SHARES = st.floats(0.02, 1.0)


def margin(*shares: float) -> Any:
    return np.array(shares) / sum(shares)


def plackett(odds_ratio: float, p: float, q: float) -> float:
    """The first cell of the 2 x 2 table with these margins and odds ratio (Plackett 1965)."""
    if odds_ratio == 1:
        return p * q
    s = 1 + (p + q) * (odds_ratio - 1)
    return (s - math.sqrt(s**2 - 4 * odds_ratio * (odds_ratio - 1) * p * q)) / (2 * (odds_ratio - 1))


def axes(shape: tuple[int, ...]) -> Any:
    return np.stack([code.ravel() for code in np.indices(shape)], axis=1)


@settings(deadline=None)
@given(st.floats(0.05, 20), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_two_by_two_is_placketts_closed_form(odds_ratio: float, p: float, q: float) -> None:
    table, misfit = fit_pair(np.array([[odds_ratio, 1.0], [1.0, 1.0]]), margin(p, 1 - p), margin(q, 1 - q))
    assert misfit is None
    assert table[0, 0] == pytest.approx(plackett(odds_ratio, p, q), abs=1e-7)


@settings(deadline=None)
@given(st.lists(st.lists(SHARES, min_size=3, max_size=3), min_size=4, max_size=4), st.data())
def test_fitting_meets_margins_and_keeps_every_odds_ratio(rows: list[list[float]], data: st.DataObject) -> None:
    seed = np.array(rows)
    p, q = (margin(*data.draw(st.lists(SHARES, min_size=n, max_size=n))) for n in (4, 3))
    table, misfit = fit_pair(seed, p, q)
    assert misfit is None
    assert table.sum(1) == pytest.approx(p, abs=1e-8)
    assert table.sum(0) == pytest.approx(q, abs=1e-8)

    def odds(t: Any) -> Any:
        return t[:-1, :-1] * t[1:, 1:] / (t[:-1, 1:] * t[1:, :-1])

    assert odds(table) == pytest.approx(odds(seed), rel=1e-6)


def test_zeros_stay_and_what_they_forbid_is_named() -> None:
    possible, misfit = fit_pair(np.array([[1.0, 0.0], [1.0, 1.0]]), margin(0.3, 0.7), margin(0.6, 0.4))
    assert misfit is None
    assert possible == pytest.approx(np.array([[0.3, 0.0], [0.3, 0.4]]), abs=1e-8)
    _, misfit = fit_pair(np.array([[1.0, 0.0], [1.0, 1.0]]), margin(0.7, 0.3), margin(0.6, 0.4))
    assert misfit is not None
    assert misfit.difference == pytest.approx(0.1, abs=0.01)


def test_a_cell_that_zeros_force_to_zero_gets_there() -> None:
    table, misfit = fit_pair(np.array([[5.0, 7.0], [3.0, 0.0]]), margin(1, 1), margin(1, 1))
    assert misfit is None
    assert table == pytest.approx(np.array([[0.0, 0.5], [0.5, 0.0]]), abs=1e-9)


@pytest.mark.parametrize("rare", [1e-4, 1e-6])
def test_rare_values_correlate_or_are_told_not_to(rare: float) -> None:
    p, half, two, three = margin(rare, 1 - rare), margin(1, 1), np.array([0.0, 1]), np.array([0.0, 1, 2])
    assert pair_of_correlation(p, half, two, two, 0.5) is None
    assert pair_of_correlation(p, margin(1, 1, 1), two, three, 0.5) is None
    alike = pair_of_correlation(p, p, two, two, 0.5)
    assert alike is not None
    assert alike[0, 0] == pytest.approx(rare * rare + 0.5 * rare * (1 - rare), rel=1e-9)
    q = margin(rare, (1 - rare) / 2, (1 - rare) / 2)
    weak = pair_of_correlation(p, q, two, np.array([9.0, 1, 2]), -0.1 * math.sqrt(rare))
    assert weak is not None
    assert (weak.sum(1), weak.sum(0)) == (pytest.approx(p, abs=1e-8), pytest.approx(q, abs=1e-8))


def test_two_pairs_of_three_attributes_are_conditionally_independent_given_the_shared_one() -> None:
    codes = axes((2, 2, 2))
    ab, bc = np.array([[0.4, 0.1], [0.2, 0.3]]), np.array([[0.5, 0.1], [0.1, 0.3]])
    margins = [Margin(codes[:, 0] * 2 + codes[:, 1], ab.ravel()), Margin(codes[:, 1] * 2 + codes[:, 2], bc.ravel())]
    table, misfit = fit(np.ones(8), margins)
    assert misfit is None
    expected = ab[:, :, None] * bc[None, :, :] / ab.sum(0)[None, :, None]
    assert table.reshape(2, 2, 2) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("p, q, rho", [(0.3, 0.4, 0.3), (0.3, 0.4, -0.5), (0.5, 0.5, 0.9), (0.1, 0.8, 0.1)])
def test_a_correlation_of_two_values_each_is_the_closed_form(p: float, q: float, rho: float) -> None:
    table = pair_of_correlation(margin(p, 1 - p), margin(q, 1 - q), np.array([0.0, 1]), np.array([0.0, 1]), rho)
    assert table is not None
    assert table[1, 1] == pytest.approx((1 - p) * (1 - q) + rho * math.sqrt(p * (1 - p) * q * (1 - q)), abs=1e-8)


def test_numbers_correlate_as_asked_with_their_margins_kept() -> None:
    p, q = margin(2, 3, 5), margin(1, 1, 4, 4)
    u, v = np.array([30.0, 50, 80]), np.array([1.0, 2, 4, 8])
    table = pair_of_correlation(p, q, u, v, -0.45)
    assert table is not None
    assert (table.sum(1), table.sum(0)) == (pytest.approx(p, abs=1e-8), pytest.approx(q, abs=1e-8))
    mean_u, mean_v = p @ u, q @ v
    covariance = (u - mean_u) @ table @ (v - mean_v)
    spread = math.sqrt((p @ (u - mean_u) ** 2) * (q @ (v - mean_v) ** 2))
    assert covariance / spread == pytest.approx(-0.45, abs=1e-7)


def test_what_the_margins_do_not_allow_is_none() -> None:
    # With these margins at most sqrt(0.3 * 0.6 / (0.7 * 0.4)) = 0.80 (every one of the rarer with one of the other).
    assert pair_of_correlation(margin(0.3, 0.7), margin(0.4, 0.6), np.array([0.0, 1]), np.array([0.0, 1]), 0.85) is None


@settings(deadline=None)
@given(st.integers(0, 5000), st.data())
def test_whole_images_have_exact_margins_near_the_table_and_nothing_where_it_has_nothing(
    images: int, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(2, 4), min_size=2, max_size=4)))
    count = math.prod(shape)
    weights = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 3.0]), min_size=count, max_size=count)))
    assume(weights.any())
    weights = weights.reshape(shape)
    wanted = [
        np.array(quotas(weights.sum(tuple(a for a in range(len(shape)) if a != axis)).tolist(), images))
        for axis in range(len(shape))
    ]
    codes = axes(shape)
    margins = [Margin(codes[:, axis], counts / max(1, images)) for axis, counts in enumerate(wanted)]
    table, misfit = fit(weights.ravel(), margins)
    assume(misfit is None)
    whole = whole_images(table, codes, wanted)
    assume(whole is not None)
    assert whole is not None
    for axis, counts in enumerate(wanted):
        assert np.bincount(codes[:, axis], weights=whole, minlength=shape[axis]).tolist() == counts.tolist()
    assert whole[weights.ravel() == 0].sum() == 0
    # Each attribute after the first rounds by less than one image.
    assert np.abs(whole - table * images).max(initial=0) < len(shape)


def test_a_two_way_table_is_always_found_and_each_entry_rounded_up_or_down() -> None:
    rng = np.random.default_rng(5)
    for images in (3, 50, 999):
        weights = rng.gamma(0.5, size=(5, 7))
        p, q = (np.array(quotas(weights.sum(axis).tolist(), images)) for axis in (1, 0))
        table, misfit = fit_pair(weights, p / images, q / images)
        assert misfit is None
        whole = whole_images(table.ravel(), axes((5, 7)), [p, q])
        assert whole is not None
        assert np.abs(whole - table.ravel() * images).max() < 1 + 1e-6


def test_whole_images_are_the_same_for_ever() -> None:
    seed = np.array([5.0, 1, 2, 0, 3, 3, 1, 4, 2, 2, 0, 6])
    codes = axes((2, 3, 2))
    wanted = [np.array([60, 40]), np.array([30, 30, 40]), np.array([55, 45])]
    table, _ = fit(seed, [Margin(codes[:, a], counts / 100) for a, counts in enumerate(wanted)])
    whole = whole_images(table, codes, wanted)
    assert whole is not None
    assert whole.tolist() == [17, 3, 14, 0, 14, 12, 2, 8, 8, 8, 0, 14]
