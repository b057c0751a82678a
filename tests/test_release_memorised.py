"""A generator that returns its training scans, changed a little, is refused release; one that does not may leave.

On real chest X-rays: the corpus has a train, a holdout and a validation split; scans of patients in none of them are
what an honest generator would make at its best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from scanloom.artefact import Artefact
from scanloom.audit.bundle import KeyFile, check
from scanloom.audit.policy import read_policy
from scanloom.audit.release import Request, release
from scanloom.errors import ReleaseRefused
from scanloom.recipe_audit import Audit, CopyDetection
from scanloom.store import Store
from tests.audited import Audited, audited, encoder_weights, publish_dataset
from tests.memorising_generator import drawn
from tests.nih_corpus import Scan, dealt, nih_scans, publish_nih
from tests.released import generator

pytestmark = pytest.mark.slow
SIZE = 64
SETTINGS = Audit(copies=CopyDetection(size_px=SIZE, steps=600), membership=None, utility=None)
POLICY = b"""
name: hospital
target: research
licences:
  - {of: chests, terms: CC0-1.0, allows: [research]}
copies: {most_copy_rate: 0.05}
"""


@dataclass(frozen=True)
class Place:
    """A corpus, its encoder, and scans of patients that it does not hold."""

    folder: Path
    corpus: Artefact
    generator: Artefact
    encoder: bytes
    train: torch.Tensor
    fresh: list[Scan]

    def audited(self, name: str, image: Callable[[int], Any], images: int) -> Audited:
        dataset = publish_dataset(f"{self.folder}/{name}", self.generator, self.corpus, image, images)
        return audited(dataset, self.corpus, SETTINGS, self.encoder)

    def released(self, made: Audited) -> Artefact:
        target = Store(f"{made.dataset.uri}-bundle")
        key = KeyFile(Ed25519PrivateKey.generate())
        bundle = release(Request(made.dataset, made.audit.uri, read_policy(POLICY, "policy.yaml"), POLICY, target), key)
        assert check(bundle.store, key.public_key).problems == ()
        return bundle


@pytest.fixture(scope="module")
def place(nih_png: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("memorised")
    train, holdout, validation, fresh = dealt(nih_scans(nih_png, SIZE), (0.5, 0.16, 0.16, 0.18))
    corpus = publish_nih(
        f"{folder}/corpus", {"train": train, "holdout": holdout, "validation": validation}
    )  # fmt: skip
    of = generator(f"{folder}/generator", corpus)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    encoder = encoder_weights(corpus, SETTINGS)
    torch.set_num_threads(before)
    squares = torch.from_numpy(np.stack([scan.pixels_SS for scan in train])).float() / 255.0
    return Place(folder, corpus, of, encoder, squares, fresh)


def test_a_generator_that_returns_changed_training_scans_is_refused_release(place: Place) -> None:
    images = drawn(place.train, 120)
    made = place.audited("memorised", lambda n: images[n], 120)
    assert made.copies.excess
    assert (made.copies.synthetic_rate.value or 0.0) > 0.95
    with pytest.raises(
        ReleaseRefused, match=r"copies\.more than among held-out patients: yes, the policy's limit is no"
    ):
        place.released(made)


def test_a_generator_that_does_so_now_and_then_is_refused_too(place: Place) -> None:
    images = drawn(place.train, 120)
    made = place.audited("mixed", lambda n: images[n] if n % 6 == 0 else place.fresh[n].pixels_SS, 120)
    assert made.copies.excess
    assert 18 <= made.copies.synthetic_copies <= 23
    with pytest.raises(
        ReleaseRefused, match=r"copies\.more than among held-out patients: yes, the policy's limit is no"
    ):
        place.released(made)


def test_images_of_nobody_in_the_corpus_may_leave(place: Place) -> None:
    made = place.audited("honest", lambda n: place.fresh[n].pixels_SS, 120)
    assert not made.copies.excess
    assert made.copies.synthetic_copies <= 2
    assert made.copies.lowest_slight_recall >= 0.95
    place.released(made)
