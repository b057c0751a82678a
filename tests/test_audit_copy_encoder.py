"""The copy encoder learns to see a scan and its changed copies as one, the same in every process that trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from scanloom.audit.copies import PEERS, Detector, Embeddings, calibrate, copy_rates, power
from scanloom.audit.intervals import clustered_share
from scanloom.audit.plants import SLIGHT
from scanloom.errors import ArtefactError
from scanloom.models.copy_encoder import (
    CopyEncoder,
    embed,
    embedding,
    load_copy_encoder,
    nt_xent,
    square_of,
    weights_of,
)
from scanloom.recipe_audit import CopyDetection
from scanloom.scans.phantoms import phantom
from scanloom.training.copy_encoder import advance, fit, initial
from scanloom.training.copy_views import changed
from tests.nih_squares import nih_squares

SIZE = 48
TINY = CopyDetection(size_px=SIZE, channels=(16, 32, 64), width=64, steps=240, batch_size=48)
Array = np.ndarray[Any, Any]


def phantoms(series: int, count: int) -> Array:
    drawn = [phantom(series, number, SIZE).pixels for number in range(count)]
    return np.stack([square_of(pixels, 8, SIZE) for pixels in drawn])


def tensor(squares_NSS: Array) -> torch.Tensor:
    return torch.from_numpy(squares_NSS)[:, None] * 2.0 - 1.0


@pytest.fixture(scope="module")
def train() -> Array:
    return phantoms(1, 240)


@pytest.fixture(scope="module")
def index(train: Array) -> Embeddings:
    with torch.random.fork_rng():
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        network = fit(TINY, tensor(train), seed=0)
        torch.set_num_threads(before)
    return Embeddings.of(embedding(network), train)


def test_the_loss_is_the_papers() -> None:
    first = functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    second = functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    both, total = torch.cat([first, second]), 0.0
    for i in range(10):
        weights = [float(torch.exp(both[i] @ both[j] / 0.2)) for j in range(10) if j != i]
        total -= float(torch.log(torch.exp(both[i] @ both[(i + 5) % 10] / 0.2) / sum(weights)))
    assert float(nt_xent(first, second, 0.2)) == pytest.approx(total / 10, rel=1e-5)
    apart = torch.eye(8)
    assert float(nt_xent(apart, apart, 0.01)) == pytest.approx(0.0, abs=1e-6)


def test_a_view_follows_from_its_position_alone(train: Array) -> None:
    images = tensor(train[:6])
    views = changed(images, range(10, 16), seed=3)
    assert views.shape == images.shape
    assert views.abs().max() <= 1.0
    assert torch.equal(changed(images[2:4], [12, 13], seed=3), views[2:4])
    assert not torch.equal(changed(images, range(20, 26), seed=3), views)
    assert not torch.equal(changed(images, range(10, 16), seed=4), views)


def test_contrast_and_brightness_are_not_seen(train: Array) -> None:
    network = CopyEncoder((8, 16), 16).eval()
    images = tensor(train[:4])
    assert embed(network, 0.3 * images + 0.2) == pytest.approx(embed(network, images), abs=1e-4)
    assert np.isfinite(embed(network, torch.zeros(1, 1, SIZE, SIZE))).all()


def test_an_embedding_does_not_depend_on_the_company(train: Array) -> None:
    network = CopyEncoder((8, 16), 16).eval()
    images = tensor(train[:70])
    together = embed(network, images)
    assert (embed(network, images[33:34]) == together[33:34]).all()
    assert np.linalg.norm(together, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert embed(network, images[:0]).shape == (0, 16)


def test_a_square_is_the_mean_over_areas() -> None:
    pixels = np.array([[0, 4095], [4095, 0]], np.uint16).repeat(4, axis=0).repeat(4, axis=1)
    assert square_of(pixels, 12, 2) == pytest.approx(np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert square_of(pixels, 12, 1) == pytest.approx(0.5)


def test_a_resumed_run_ends_where_an_unbroken_one_does(train: Array) -> None:
    images, whole, half = tensor(train), initial(TINY, SIZE, 5), initial(TINY, SIZE, 5)
    for _ in range(4):
        advance(whole, TINY, images, 5)
    for _ in range(2):
        advance(half, TINY, images, 5)
    resumed = initial(TINY, SIZE, 6)
    for name, part in resumed.parts.items():
        part.load_state_dict(half.parts[name].state_dict())
    resumed.step = half.step
    for _ in range(2):
        advance(resumed, TINY, images, 5)
    ours, theirs = whole.network.state_dict(), resumed.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_come_back_as_they_were_and_others_are_refused() -> None:
    network = CopyEncoder((8, 16), 16)
    again = load_copy_encoder(weights_of(network), (8, 16), 16, "memory")
    assert weights_of(again) == weights_of(network)
    with pytest.raises(ArtefactError, match="memory: is no copy encoder of this shape"):
        load_copy_encoder(weights_of(network), (8, 32), 16, "memory")
    with pytest.raises(ArtefactError, match="no copy encoder"):
        load_copy_encoder(b"nothing", (8, 16), 16, "memory")


def test_planted_copies_are_found_and_fresh_scans_are_not(index: Embeddings, train: Array) -> None:
    patients = [str(number) for number in range(len(train))]
    threshold = calibrate(index(phantoms(2, 300)).likeness_N, [str(n) for n in range(300)], 0.01)
    found = power(index, threshold, train, range(len(train)), patients, SLIGHT)
    assert np.mean([one.recall.value for one in found]) > 0.85
    fresh = index(phantoms(3, 300))
    assert clustered_share(fresh.likeness_N > threshold.tau, [str(n) for n in range(300)]).low <= 0.01
    exact = next(one for one in found if one.plant == "as it is")
    assert (exact.recall.value, exact.traced) == (1.0, 1.0)


def test_a_memorising_generator_is_caught_and_an_honest_one_passed(index: Embeddings, train: Array) -> None:
    owners = [str(number) for number in range(300)]
    threshold = calibrate(index(phantoms(2, 300)).likeness_N, owners, 0.01)
    held_out = index(phantoms(3, 300))
    changes = {plant.name: plant.change for plant in SLIGHT}
    mixed = np.concatenate([changes["mirrored, rotated, contrast"](train[:20]), phantoms(4, 180)])
    caught = copy_rates(threshold, index(mixed), held_out, owners)
    assert caught.excess
    assert caught.copies >= 15
    assert not copy_rates(threshold, index(phantoms(4, 200)), held_out, owners).excess


@pytest.mark.slow
def test_planted_copies_of_real_scans_are_found_at_one_percent_false_positives(nih_png: Path) -> None:
    """Over three splits by patient, since of 170 held-out scans one more or less is over half a percent."""
    settings, false, checked = CopyDetection(size_px=64, steps=600), 0, 0
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in range(3):
        scans = nih_squares(nih_png, 64, seed)
        detectors: dict[str, Detector] = {
            "encoder": Embeddings.of(embedding(fit(settings, tensor(scans.train), seed)), scans.train)
        }
        detectors |= {name: peer(scans.train) for name, peer in PEERS.items()}
        recall = {}
        for name, detector in detectors.items():
            likeness = detector(scans.calibration).likeness_N
            threshold = calibrate(likeness, scans.calibration_patients, 0.01, detector.scale)
            found = power(detector, threshold, scans.train, range(len(scans.train)), scans.train_patients, SLIGHT)
            recall[name] = min(one.recall.value for one in found)
            if name == "encoder":
                false += int((detector(scans.check).likeness_N > threshold.tau).sum())
                checked += len(scans.check)
        assert recall["encoder"] >= 0.98
        assert all(recall[peer] < 0.5 for peer in PEERS)
    torch.set_num_threads(before)
    assert checked > 450
    assert false / checked <= 0.01
