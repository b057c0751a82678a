"""Intervals against closed forms, and that they hold the truth as often as they say, of patients with several scans."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scanloom.audit.intervals import (
    Estimate,
    auc,
    blocks,
    clustered_share,
    jackknife,
    mean_over,
    multiplicities,
    sensitivity,
    share,
)

RANDOM = np.random.default_rng(0)


def holds(found: Estimate, truth: float) -> bool:
    return found.low <= truth <= found.high


def test_a_share_has_the_exact_interval() -> None:
    # 0 of n: 1 - 0.025 ** (1 / n); the rule of three is its neighbour.
    assert share(0, 100).low == 0.0
    assert share(0, 100).high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert share(100, 100).low == pytest.approx(0.025 ** (1 / 100))
    # Table of Clopper & Pearson's limits: 5 of 10.
    assert (share(5, 10).low, share(5, 10).high) == pytest.approx((0.18709, 0.81291), abs=1e-5)
    assert (share(0, 0).low, share(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 hits of 2 trials"):
        share(3, 2)


def test_a_share_of_patients_of_one_scan_each_is_the_plain_one() -> None:
    hits = np.array([True] * 3 + [False] * 47)
    assert clustered_share(hits, [str(n) for n in range(50)]) == share(3, 50)


def test_scans_that_agree_within_a_patient_count_as_one() -> None:
    patients = [str(n // 5) for n in range(200)]
    per_patient = np.repeat(RANDOM.random(40) < 0.3, 5)
    found, naive = clustered_share(per_patient, patients), share(int(per_patient.sum()), 200)
    assert found.value == naive.value
    assert found.high - found.low > 1.9 * (naive.high - naive.low)
    # Nothing is known of how alike they are where all are alike: the patients alone count.
    assert clustered_share(np.zeros(200, bool), patients).high == pytest.approx(share(0, 40).high)
    independent = np.tile([True, False, False, False, False], 40)
    assert clustered_share(independent, patients).high == pytest.approx(share(40, 200).high)


def test_clustered_shares_hold_the_truth() -> None:
    held = 0
    for _ in range(300):
        rates = np.repeat(RANDOM.beta(0.6, 2.4, size=30), 4)
        hits = RANDOM.random(120) < rates
        held += holds(clustered_share(hits, [str(n // 4) for n in range(120)]), 0.2)
    assert held / 300 > 0.92


def test_a_mean_over_patients_holds_the_truth_where_one_over_scans_does_not() -> None:
    over_patients = over_scans = 0
    for number in range(300):
        values = np.repeat(RANDOM.standard_normal(40), 5) + 0.1 * RANDOM.standard_normal(200)
        over_patients += holds(mean_over(values, [str(n // 5) for n in range(200)], seed=number), 0.0)
        over_scans += holds(mean_over(values, [str(n) for n in range(200)], seed=number), 0.0)
    assert over_patients / 300 > 0.9
    assert over_scans / 300 < 0.7


def test_groups_are_resampled_as_wholes() -> None:
    weights = multiplicities(["a", "b", "a", "c"], replicates=50)
    assert weights.shape == (50, 4)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 0] + weights[:, 1] + weights[:, 3] == 3).all()


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = RANDOM.standard_normal(60)
    left_out = (values.sum() - values) / 59
    found = jackknife(float(values.mean()), [left_out])
    assert found.high - found.value == pytest.approx(1.959964 * values.std(ddof=1) / math.sqrt(60))


def test_blocks_keep_patients_together() -> None:
    patients = [str(n // 3) for n in range(90)]
    dealt = blocks(patients, 10)
    assert sorted(np.unique(dealt)) == list(range(10))
    assert all(len(set(dealt[start : start + 3])) == 1 for start in range(0, 90, 3))
    assert len(np.unique(blocks(["a", "b"], 10))) == 2


def test_an_attack_is_measured_as_in_closed_form() -> None:
    random = np.random.default_rng(5)
    members, others = random.standard_normal(4000) + 1.0, random.standard_normal(4000)
    area = auc(members, others)
    # Phi(1 / sqrt 2) of two normal distributions one deviation apart.
    assert holds(area, 0.5 * math.erfc(-0.5))
    assert area.high - area.low < 0.03
    # Phi(1 - z) with z the 99th percentile: 9.2 %.
    assert holds(sensitivity(members, others, 0.01), 0.0924)
    nothing = sensitivity(random.standard_normal(4000), others, 0.01)
    assert holds(nothing, 0.01)
    assert sensitivity(np.full(50, 9.0), others, 0.01).low == pytest.approx(0.025 ** (1 / 50))


def test_ties_reach_the_threshold_together() -> None:
    members, others = np.array([1.0, 1.0, 2.0]), np.array([0.0] * 98 + [1.0, 1.0])
    # Nobody scores above 1; two of a hundred score above 0, which is over one percent.
    assert sensitivity(members, others, 0.01).value == pytest.approx(1 / 3)
    assert sensitivity(members, others, 0.02).value == pytest.approx(1.0)


def test_nothing_known_is_the_whole_range() -> None:
    nobody = np.zeros(0)
    assert (sensitivity(nobody, nobody).low, sensitivity(nobody, nobody).high) == (0.0, 1.0)
    assert (auc(nobody, np.ones(3)).low, auc(nobody, np.ones(3)).high) == (0.0, 1.0)
    one = mean_over(np.array([1.0, 2.0]), ["a", "a"])
    assert (one.value, one.low, one.high) == (1.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="a score is nan"):
        auc([math.nan], [1.0])
