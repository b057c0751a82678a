"""The cardiothoracic probe against the truth of phantoms that it was not fitted on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from scanloom.audit.cardiothoracic import Probe, auc, cardiothoracic_ratio, damaged, fit_probe
from scanloom.scans import phantoms
from scanloom.scans.phantom_patients import Draws, draw_anatomy, draw_exam
from scanloom.scans.phantoms import Phantom, phantom

UNSEEN = 20_000


@pytest.fixture(scope="module")
def probe() -> Probe:
    return fit_probe()


@pytest.fixture(scope="module")
def unseen() -> list[Phantom]:
    return [phantom(UNSEEN, index, 64) for index in range(300)]


def _judge(probe: Probe, pictures: npt.NDArray[np.float64], scans: list[Phantom]) -> tuple[float, float]:
    """Mean absolute error of the ratio, and AUC for cardiomegaly."""
    ratios = np.array([probe.ratio(picture) for picture in pictures])
    assert not np.isnan(ratios).any()
    truth = np.array([scan.truth.cardiothoracic_ratio for scan in scans])
    large = np.array(["Cardiomegaly" in scan.findings for scan in scans])
    return float(np.abs(ratios - truth).mean()), auc(ratios[large], ratios[~large])


def _pictures(scans: list[Phantom]) -> npt.NDArray[np.float64]:
    return np.stack([scan.pixels / 255.0 for scan in scans])


def test_the_stated_error_is_the_error_on_unseen_phantoms(probe: Probe, unseen: list[Phantom]) -> None:
    error, separation = _judge(probe, _pictures(unseen), unseen)
    assert error == pytest.approx(probe.held_out.ratio_mae, abs=0.006)
    assert probe.held_out.ratio_mae < 0.03
    assert min(separation, probe.held_out.cardiomegaly_auc) >= 0.97


@pytest.mark.parametrize(("blur_px", "noise"), [(1.5, 0.0), (0.0, 0.05), (1.2, 0.03)])
def test_autoencoder_like_blur_and_noise_do_not_mislead(
    probe: Probe, unseen: list[Phantom], blur_px: float, noise: float
) -> None:
    error, separation = _judge(probe, damaged(_pictures(unseen), blur_px, noise, seed=1), unseen)
    assert error < 0.03
    assert separation >= 0.97


def test_exposure_and_contrast_do_not_change_the_ratio(probe: Probe, unseen: list[Phantom]) -> None:
    for scan in unseen[:20]:
        assert probe.ratio(0.3 + 0.4 * scan.pixels / 255.0) == pytest.approx(probe.ratio(scan.pixels), abs=1e-3)


@pytest.mark.parametrize("size_px", [96, 256])
def test_larger_pictures_are_measured_as_well(probe: Probe, size_px: int) -> None:
    scans = [phantom(UNSEEN, index, size_px, bits_stored=12) for index in range(24)]
    errors = [abs(probe.ratio(scan.pixels) - scan.truth.cardiothoracic_ratio) for scan in scans]
    assert np.mean(errors) < 0.03


def test_widening_only_the_heart_widens_the_measure_by_as_much(probe: Probe) -> None:
    # All else equal: a probe that reads age, view or findings instead of the heart would stay flat.
    slopes = []
    truth = np.linspace(0.42, 0.66, 5)
    for patient in range(20):
        anatomy, draws = draw_anatomy(Draws(UNSEEN, 2 * patient)), Draws(UNSEEN, 2 * patient + 1)
        exam, grain = draw_exam(draws, anatomy, 0), draws.grain(64)
        measured = []
        for ratio in truth:
            density, _ = phantoms._render(anatomy, replace(exam, heart_ratio=float(ratio)), 64)
            measured.append(probe.ratio(phantoms._expose(density, exam, grain)))
        slopes.append(np.polyfit(truth, measured, 1)[0])
    assert 0.75 < np.mean(slopes) < 1.15
    assert min(slopes) > 0.3


def test_borders_lie_within_a_pixel_of_the_drawn_ones(probe: Probe, unseen: list[Phantom]) -> None:
    misses = []
    for scan in unseen:
        found, truth = probe.borders(scan.pixels), scan.truth
        assert found is not None
        misses.append((64 * found.heart_left - truth.heart_left_px, 64 * found.thorax_left - truth.thorax_left_px))
    assert (np.abs(misses).mean(axis=0) < 1.0).all()


def test_what_is_no_frontal_chest_is_not_measured(unseen: list[Phantom]) -> None:
    chest = unseen[0].pixels
    noise = np.random.Generator(np.random.Philox(key=5)).random((64, 64))
    for picture in (np.zeros((64, 64)), np.full((64, 64), 128, np.uint8), noise, chest[::-1], 255 - chest, chest.T):
        assert math.isnan(cardiothoracic_ratio(picture))


def test_fitting_again_gives_the_same_probe(probe: Probe) -> None:
    again = fit_probe.__wrapped__()
    assert np.array_equal(again.weights, probe.weights)


def test_auc_has_its_closed_forms() -> None:
    assert auc([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert auc([1.0, 2.0], [3.0, 4.0]) == 0.0
    assert auc([1.0, 1.0, 1.0], [1.0, 1.0]) == 0.5
    assert auc([1.0, 3.0], [2.0]) == 0.5
    assert auc([2.0, 3.0], [1.0, 2.0]) == pytest.approx(3.5 / 4)


def test_auc_of_two_gaussians_is_the_normal_distribution_of_their_distance() -> None:
    generator = np.random.Generator(np.random.Philox(key=1))
    high, low = generator.normal(1.0, 1.0, 20_000), generator.normal(0.0, 1.0, 20_000)
    assert auc(high, low) == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.006)


def test_auc_of_nothing_is_nan_and_of_nan_is_refused() -> None:
    assert math.isnan(auc([], [1.0]))
    with pytest.raises(ValueError, match="could not be measured"):
        auc([1.0, math.nan], [0.0])
