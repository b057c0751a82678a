"""Thresholds keep what they promise, planted copies are found, and what is no copy is not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from scanloom.audit.copies import (
    CORRELATION,
    DISTANCE,
    PEERS,
    Embeddings,
    Found,
    Threshold,
    calibrate,
    copy_rates,
    most_alike,
    power,
    reproduced,
)
from scanloom.audit.plants import SLIGHT, STRONG, Plant, cropped, mirrored, shifted
from scanloom.models.copy_encoder import KEPT_VIEWS, kept_views

RANDOM = np.random.default_rng(4)
Array = np.ndarray[Any, Any]


def unit(count: int, width: int = 8) -> Array:
    vectors = RANDOM.standard_normal((count, width)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def squares(count: int, side: int = 12) -> Array:
    return RANDOM.random((count, side, side)).astype(np.float32)


def flat(images: Array) -> Array:
    """An embedding that sees every pixel."""
    rows = images.reshape(len(images), -1) - 0.5
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def test_the_threshold_is_a_patients_highest_likeness_at_the_conformal_rank() -> None:
    likeness = np.arange(1000.0)
    found = calibrate(likeness, [str(n) for n in range(1000)], 0.01)
    # k = floor(0.01 * 1001) = 10: the tenth from the top.
    assert found.tau == 990.0
    assert found.promised == pytest.approx(10 / 1001)
    # Beta(10, 991): its 95 % point lies above its mean of 1 %.
    assert 0.014 < found.at_most < 0.017


def test_too_few_patients_for_the_share_are_said_to_be_too_few() -> None:
    found = calibrate(np.array([0.2, 0.9, 0.5]), ["a", "b", "c"], 0.01)
    assert found.tau == 0.9
    assert found.promised == pytest.approx(0.25)
    assert found.at_most == pytest.approx(1 - 0.05 ** (1 / 3))
    with pytest.raises(ValueError, match="no scan of a held-out patient"):
        calibrate(np.zeros(0), [], 0.01)


def test_no_more_patients_than_promised_lie_above_a_threshold() -> None:
    above = []
    for _ in range(400):
        # Patients of one to five scans that are alike.
        sizes = RANDOM.integers(1, 6, size=150)
        patients = np.repeat(np.arange(150), sizes)
        likeness = RANDOM.standard_normal(150)[patients] + 0.3 * RANDOM.standard_normal(len(patients))
        calibration = patients < 75
        threshold = calibrate(likeness[calibration], [str(p) for p in patients[calibration]], 0.05)
        most = np.array([likeness[patients == patient].max() for patient in range(75, 150)])
        above.append((most > threshold.tau).mean())
        assert threshold.promised <= 0.05
    assert np.mean(above) == pytest.approx(3 / 76, abs=0.006)


def test_with_few_patients_a_bound_keeps_what_a_rank_only_promises_on_average() -> None:
    asked = 0.01
    by_rank: list[bool] = []
    bounded: list[bool] = []
    for _ in range(400):
        cosine = np.tanh(0.8 + 0.3 * RANDOM.standard_normal(100))
        names = [str(n) for n in range(100)]
        for kept, scale in ((by_rank, None), (bounded, CORRELATION)):
            threshold = calibrate(cosine, names, asked, scale)
            kept.append(float(norm.sf((np.arctanh(threshold.tau) - 0.8) / 0.3)) <= asked)
    assert np.mean(by_rank) < 0.75
    assert np.mean(bounded) > 0.93


def test_a_distance_has_its_scale() -> None:
    distance = -np.exp(0.2 * RANDOM.standard_normal(60))
    threshold = calibrate(distance, [str(n) for n in range(60)], 0.01, DISTANCE)
    assert threshold.extrapolated
    assert distance.max() < threshold.tau < 0.0
    for scale, value in ((CORRELATION, 0.7), (DISTANCE, -0.7)):
        assert scale.back(float(scale.normal(np.array([value]))[0])) == pytest.approx(value)


def test_a_threshold_from_training_scans_would_miss_copies() -> None:
    """The other scans of their patient make training scans more alike than held-out ones are."""
    patients = [str(n // 2) for n in range(200)]
    train = squares(200)
    train[1::2] = 0.9 * train[::2] + 0.1 * train[1::2]
    index = Embeddings.of(flat, train)
    same, other = index.among_train(patients)
    held_out = index(squares(100)).likeness_N
    assert same.min() > held_out.max()
    assert np.median(other) == pytest.approx(np.median(held_out), abs=0.05)
    alone = Embeddings.of(flat, train[::2]).among_train([str(n) for n in range(100)])
    assert (alone[0] == -math.inf).all()


def test_a_scan_and_its_mirror_image_are_looked_up() -> None:
    train = squares(40)
    index = Embeddings.of(flat, train)
    asked = np.concatenate([train[7:8], mirrored(train[21:22]), squares(1)])
    found = index(asked)
    assert found.row_N[:2].tolist() == [7, 21]
    assert found.likeness_N[:2] == pytest.approx(1.0)
    assert found.likeness_N[2] < 0.6


def test_a_scan_is_kept_in_several_poses() -> None:
    train = squares(5, 64)
    views = list(kept_views(train))
    assert len(views) == KEPT_VIEWS == len({view.tobytes() for view in views})
    assert (views[0] == train).all()
    assert (views[1] == mirrored(train)).all()
    assert all(view.shape == train.shape and view.dtype == np.float32 for view in views)


def test_looking_up_is_exact_in_blocks() -> None:
    train, asked = squares(700), squares(9000, 12)
    index = Embeddings.of(flat, train)
    vectors, both = flat(asked), np.concatenate([flat(view) for view in kept_views(train)])
    found = index.look_up(vectors)
    assert found.likeness_N[::500] == pytest.approx((vectors[::500] @ both.T).max(axis=1))
    assert found.row_N[::500].tolist() == ((vectors[::500] @ both.T).argmax(axis=1) % 700).tolist()


def test_peers_measure_what_their_papers_say() -> None:
    train, asked = squares(80), squares(30)
    asked[3] = 0.5 * train[11] + 0.2
    pairs = np.sqrt(((asked[:, None] - train[None]) ** 2).mean(axis=(2, 3)))
    found = {name: peer(train)(asked) for name, peer in PEERS.items()}
    assert found["pixel L2"].likeness_N == pytest.approx(-pairs.min(axis=1), abs=1e-5)
    assert found["pixel L2"].row_N.tolist() == pairs.argmin(axis=1).tolist()
    correlation = np.corrcoef(asked.reshape(30, -1), train.reshape(80, -1))[:30, 30:]
    assert found["Pearson"].likeness_N == pytest.approx(correlation.max(axis=1), abs=1e-4)
    assert found["Pearson"].likeness_N[3] == pytest.approx(1.0, abs=1e-4)
    usual = 0.5 * np.sort(pairs, axis=1)[:, :50].mean(axis=1)
    assert found["Carlini ratio"].likeness_N == pytest.approx(-pairs.min(axis=1) / usual, abs=1e-4)


def test_plants_do_what_they_are_called() -> None:
    images = squares(3, 64)
    assert (shifted(images, 1 / 64)[:, 1:, 1:] == images[:, :-1, :-1]).all()
    assert (mirrored(mirrored(images)) == images).all()
    assert cropped(images, 1.0) == pytest.approx(images, abs=1e-6)
    halved = cropped(images, 0.5)
    assert halved[:, 31:33, 31:33].mean() == pytest.approx(images[:, 31:33, 31:33].mean(), abs=0.05)
    for plant in (*SLIGHT, *STRONG):
        planted = plant.change(images)
        assert planted.shape == images.shape
        assert planted.dtype == np.float32
        assert planted.min() >= 0.0
        assert planted.max() <= 1.0
        assert (planted == images).all() == (plant.name == "as it is")
    assert len({plant.name for plant in (*SLIGHT, *STRONG)}) == len(SLIGHT) + len(STRONG)


def test_power_counts_what_is_found_and_whose_it_is() -> None:
    train = squares(60)
    patients = [str(n // 2) for n in range(60)]
    noise = Plant("half is noise", "strong", lambda images: np.concatenate([images[:30], squares(30)]))
    exact, half = power(
        Embeddings.of(flat, train),
        Threshold(0.9, 0.01, 0.01, 0.02, 100, 100),
        train,
        range(60),
        patients,
        [SLIGHT[0], noise],
    )
    assert (exact.recall.value, exact.traced, exact.copies) == (1.0, 1.0, 60)
    assert (half.recall.value, half.traced) == (0.5, 0.5)
    assert half.recall.low < 0.5 < half.recall.high


def test_copies_are_told_from_what_chance_gives() -> None:
    threshold = Threshold(0.9, 0.01, 0.01, 0.02, 100, 100)
    held_out, owners = Found(np.linspace(0, 0.905, 200), np.zeros(200, np.int64)), [str(n) for n in range(200)]
    copying = Found(np.full(100, 0.95), np.arange(100) % 7)
    caught = copy_rates(threshold, copying, held_out, owners)
    assert caught.excess
    assert (caught.copies, caught.copied_scans, caught.held_out_copies) == (100, 7, 2)
    honest = copy_rates(threshold, Found(np.linspace(0, 0.905, 100), np.zeros(100, np.int64)), held_out, owners)
    assert not honest.excess
    assert honest.synthetic.low < 0.01 < honest.synthetic.high


def test_scans_are_counted_by_how_often_they_were_trained_on() -> None:
    train = squares(60)
    index = Embeddings.of(flat, train)
    images = np.concatenate([train[:5], mirrored(train[10:12]), squares(20)])
    times = [64] * 5 + [1] * 5 + [4] * 2 + [1] * 48
    found = reproduced(index, Threshold(0.9, 0.01, 0.01, 0.02, 100, 100), flat(images), times)
    assert [(one.times, one.scans, one.copied) for one in found] == [(1, 53, 0), (4, 2, 2), (64, 5, 5)]
    assert found[0].likeness < 0.5
    assert found[2].likeness == pytest.approx(1.0)
    assert index.nearest_images(flat(images[:1])).argmax() == 0


def test_the_most_alike_pairs_name_each_scan_once() -> None:
    found = Found(np.array([0.1, 0.9, 0.8, 0.7]), np.array([0, 5, 5, 2]))
    assert most_alike(found, 2) == [(1, 5, 0.9), (3, 2, 0.7)]
    assert len(most_alike(found, 10)) == 3
