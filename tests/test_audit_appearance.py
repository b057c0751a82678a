"""Likeness, spectra and grey levels against closed forms and a peer."""

from __future__ import annotations

from typing import Any

import monai.metrics
import numpy as np
import pytest
import torch

from scanloom.audit.appearance import (
    Curves,
    grey_levels,
    level_distance,
    likeness,
    ms_ssim,
    pairs_within,
    radial_power,
    scales_of,
    spectral_distance,
)
from scanloom.scans.phantoms import phantom

SIZE = 128
METRICS: Any = monai.metrics  # Exported by names that checkers do not see.
PHANTOMS = np.stack([phantom(3, number, SIZE).pixels / 255.0 for number in range(12)])
RANDOM = np.random.default_rng(2)


def alone(rows: np.ndarray[Any, Any]) -> Curves:
    return Curves(rows, [str(number) for number in range(len(rows))])


def test_equal_images_are_alike_and_noise_is_not() -> None:
    assert ms_ssim(PHANTOMS[0], PHANTOMS[0]) == pytest.approx(1.0)
    assert ms_ssim(RANDOM.random((64, 64)), RANDOM.random((64, 64))) < 0.2
    assert ms_ssim(PHANTOMS[0], 1.0 - PHANTOMS[0]) == 0.0


@pytest.mark.parametrize("first, second", [(0, 1), (2, 3), (4, 9)])
def test_likeness_is_that_of_monai(first: int, second: int) -> None:
    one, other = PHANTOMS[first], PHANTOMS[second]
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363])
    peer = METRICS.MultiScaleSSIMMetric(
        spatial_dims=2, data_range=1.0, kernel_size=11, kernel_sigma=1.5, weights=tuple(weights / weights.sum())
    )
    theirs = peer(torch.from_numpy(one)[None, None].float(), torch.from_numpy(other)[None, None].float())
    assert scales_of(SIZE) == 4
    assert ms_ssim(one, other) == pytest.approx(float(theirs), abs=2e-3)


def test_one_scale_is_plain_ssim() -> None:
    one, other = PHANTOMS[0, :20, 30:50], PHANTOMS[1, :20, 30:50]
    peer = METRICS.SSIMMetric(spatial_dims=2, data_range=1.0, win_size=11, kernel_sigma=1.5)
    theirs = peer(torch.from_numpy(one)[None, None].float(), torch.from_numpy(other)[None, None].float())
    assert ms_ssim(one, other) == pytest.approx(float(theirs), abs=2e-3)
    with pytest.raises(ValueError, match="needs at least 11"):
        ms_ssim(one[:8], other[:8])


def test_pairs_are_of_one_cell_and_two_patients_and_share_no_image() -> None:
    cells = ["a", "b"] * 20
    patients = [str(number // 4) for number in range(40)]
    pairs = pairs_within(cells, patients, most=1000)
    assert len(pairs) >= 18
    assert len(set(pairs.ravel().tolist())) == pairs.size
    assert all(cells[a] == cells[b] and patients[a] != patients[b] for a, b in pairs.tolist())
    assert len(pairs_within(cells, patients, most=3)) == 3
    assert pairs_within(["a"] * 4, ["p"] * 4, most=9).shape == (0, 2)


def test_a_collapsed_set_is_more_alike() -> None:
    each = [str(number) for number in range(12)]
    varied = likeness(PHANTOMS, pairs_within(["all"] * 12, each, 6))
    same = np.repeat(PHANTOMS[:1], 12, axis=0) + 0.01 * RANDOM.standard_normal(PHANTOMS.shape)
    assert likeness(same, pairs_within(["all"] * 12, each, 6)).low > varied.high


def test_a_wave_has_its_power_at_its_frequency() -> None:
    across = np.cos(2 * np.pi * 9 * np.arange(64) / 64)[None, :].repeat(64, axis=0)
    spectrum = radial_power(np.stack([across, across.T]))
    assert spectrum.shape == (2, 31)
    assert (spectrum.argmax(axis=1) == 9 - 1).all()
    assert spectrum[0] == pytest.approx(spectrum[1])


def test_white_noise_has_its_variance_at_every_frequency() -> None:
    noise = 0.3 * RANDOM.standard_normal((200, 32, 48))
    assert radial_power(noise).mean(axis=0)[1:] == pytest.approx(0.09, rel=0.1)


def test_twice_the_amplitude_is_six_decibels() -> None:
    spectrum = radial_power(PHANTOMS)
    found = spectral_distance(alone(4.0 * spectrum), alone(spectrum))
    assert found.value == pytest.approx(6.0206, abs=1e-3)
    assert found.low < found.value < found.high
    assert spectral_distance(alone(spectrum), alone(spectrum)).low == 0.0


def test_blur_shows_in_the_spectrum() -> None:
    blurred = (PHANTOMS + np.roll(PHANTOMS, 1, axis=1) + np.roll(PHANTOMS, 1, axis=2)) / 3.0
    real, other = alone(radial_power(PHANTOMS[:6])), alone(radial_power(PHANTOMS[6:]))
    soft = alone(radial_power(blurred[6:]))
    assert spectral_distance(soft, real).low > spectral_distance(other, real).high


def test_a_shift_of_all_levels_is_its_own_distance() -> None:
    dark = 0.25 + 0.5 * RANDOM.random((6, 32, 32))
    found = level_distance(alone(grey_levels(dark + 0.125)), alone(grey_levels(dark)))
    assert found.value == pytest.approx(0.125, abs=0.01)
    assert grey_levels(np.zeros((1, 4, 4)))[0] == pytest.approx(1.0)
    assert grey_levels(np.ones((1, 4, 4)))[0, :-1] == pytest.approx(0.0)


def test_chance_alone_is_told_from_a_difference() -> None:
    def levels(mean: float) -> Curves:
        return alone(grey_levels(np.clip(mean + 0.1 * RANDOM.standard_normal((40, 8, 8)), 0, 1)))

    assert level_distance(levels(0.5), levels(0.5)).low == pytest.approx(0.0, abs=0.003)
    assert level_distance(levels(0.6), levels(0.5)).low > 0.05
