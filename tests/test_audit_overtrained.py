"""Small generators of real chest X-rays: one trained for too long on 64 scans is caught, one of many scans told apart.

And of scans that a training saw 1, 4, 16 and 64 times those that it saw most often are nearest to what it makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor
from torch.nn import functional

from scanloom.artefact import Artefact, publish
from scanloom.audit.bundle import KeyFile
from scanloom.audit.intervals import Estimate
from scanloom.audit.membership import STEP_TIMESTEPS, TIMESTEPS, attacks, losses, step_errors
from scanloom.audit.policy import read_policy
from scanloom.audit.release import Request, release
from scanloom.errors import ReleaseRefused
from scanloom.models.autoencoder import build_autoencoder
from scanloom.models.conditioner import features
from scanloom.models.noise_schedule import noise_schedule
from scanloom.recipe import AttributeUnet, Autoencoder, Finetune
from scanloom.recipe_audit import Audit, CopyDetection
from scanloom.recipe_train import Canaries
from scanloom.store import Store
from scanloom.training.latents import AttributeConditions, Latents
from scanloom.training.probes import draw_samples
from scanloom.training.views import times_trained
from tests.audited import Audited, audited, encoder_weights, publish_dataset
from tests.nih_corpus import SCHEMA, Scan, dealt, nih_scans, publish_nih
from tests.released import put
from tests.trained_generator import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SIZE, BLOCK, IMAGES = 32, 4, 96
AUDIT = Audit(copies=CopyDetection(size_px=SIZE, steps=400), membership=None, utility=None)
DENOISER = AttributeUnet(channels=(64, 128), attention_head_dim=16, condition_dim=32)
FINETUNE = Finetune(denoiser=DENOISER, steps=800, batch_size=32, learning_rate=2e-3)
SCHEDULE = noise_schedule("v_prediction")
POLICY = b"""
name: hospital
target: research
licences:
  - {of: chests, terms: CC0-1.0, allows: [research]}
copies: {most_copy_rate: 0.05, least_recall: 0.9}
"""


@dataclass(frozen=True)
class Parts:
    """Real scans by patient."""

    train: list[Scan]
    holdout: list[Scan]
    validation: list[Scan]


@pytest.fixture(scope="module")
def parts(nih_png: Path) -> Parts:
    return Parts(*dealt(nih_scans(nih_png, SIZE), (0.6, 0.2, 0.2)))


class Trained:
    """A denoiser of some scans; its latents are their pixels, blocks of BLOCK x BLOCK of them as channels."""

    def __init__(self, scans: Sequence[Scan]) -> None:
        blocks = blocks_of(scans)
        self.vae = build_autoencoder(Autoencoder(channels=(8, 8)), SIZE, 0)
        self.vae.register_to_config(scaling_factor=float(1.0 / blocks.std()), shift_factor=0.0)
        self.latents = Latents(blocks.half(), torch.full_like(blocks, -20.0).half(), conditions_of(scans))
        self.denoiser = train(self.latents, self.vae, SCHEMA, DENOISER, FINETUNE, SCHEDULE)

    def denoise(self, noisy: Tensor, times: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        answer: Tensor = self.denoiser(noisy, times, told)
        return answer

    def sampled(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """IMAGES images uint8 [N, S, S], asked for as its scans are, in a random order."""
        count, shape = len(self.latents), tuple(self.latents.mean_NCHW.shape[1:])
        rows = torch.from_numpy(np.random.default_rng(0).permutation(count)).repeat(2)[:IMAGES]
        asked = self.latents.conditions.batch(rows, torch.zeros(IMAGES, dtype=torch.bool))
        drawn = draw_samples(self.denoise, SCHEDULE, asked, range(IMAGES), shape, seed=1)
        images = functional.pixel_shuffle(drawn / self.vae.config.scaling_factor, BLOCK)[:, 0].clamp(-1.0, 1.0)
        return ((images + 1.0) * 127.5).round().to(torch.uint8).numpy()

    def betrays(self, members: Sequence[Scan], others: Sequence[Scan]) -> dict[str, Estimate]:
        """The area under the curve of each attack that tells members from others."""
        found: dict[str, Estimate] = {}
        for kind, error, times in (
            ("loss", partial(losses, seed=3), TIMESTEPS),
            ("t-error", step_errors, STEP_TIMESTEPS),
        ):
            ours, theirs = (
                error(
                    self.denoise, SCHEDULE, blocks_of(scans) * self.vae.config.scaling_factor,
                    conditions_of(scans).batch(torch.arange(len(scans)), torch.zeros(len(scans), dtype=torch.bool)),
                )
                for scans in (members, others)
            )  # fmt: skip
            patients = ([scan.patient for scan in members], [scan.patient for scan in others])
            found |= {f"{kind}, {one.name}": one.auc for one in attacks(ours, theirs, *patients, times)}
        return found


def blocks_of(scans: Sequence[Scan]) -> Tensor:
    pixels = torch.from_numpy(np.stack([scan.pixels_SS for scan in scans])).float()[:, None] / 127.5 - 1.0
    return functional.pixel_unshuffle(pixels, BLOCK)


def conditions_of(scans: Sequence[Scan]) -> AttributeConditions:
    told = torch.from_numpy(features(SCHEMA, [scan.attributes for scan in scans]))
    return AttributeConditions(told, len(SCHEMA.declarations))


def looked_at(
    folder: Path, parts: Parts, scans: Sequence[Scan], trained: Trained, canaries: Canaries | None = None
) -> Audited:
    """The audit of what a generator of these scans makes."""
    corpus = publish_nih(
        f"{folder}/corpus", {"train": scans, "holdout": parts.holdout, "validation": parts.validation}
    )  # fmt: skip
    images = trained.sampled()
    generator = publish_generator(f"{folder}/generator", corpus, canaries)
    dataset = publish_dataset(f"{folder}/dataset", generator, corpus, lambda n: images[n], IMAGES)
    return audited(dataset, corpus, AUDIT, encoder_weights(corpus, AUDIT))


def name_of(number: int) -> str:
    """The id of a train scan of `publish_nih`."""
    return f"train-{number:06d}"


def publish_generator(uri: str, corpus: Artefact, canaries: Canaries | None) -> Artefact:
    store = Store(uri)
    recipe = {"encode": {"canaries": canaries.model_dump(mode="json")}} if canaries else {}
    files = put(store, {"generator.json": b"{}"})
    return publish(store, kind="generator", name="tiny", recipe=recipe, inputs=[corpus], files=files, statistics={})


def released(made: Audited) -> Artefact:
    key = KeyFile(Ed25519PrivateKey.generate())
    target = Store(f"{made.dataset.uri}-bundle")
    return release(Request(made.dataset, made.audit.uri, read_policy(POLICY, "p.yaml"), POLICY, target), key)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_generator_overtrained_on_64_scans_is_caught_and_refused_release(parts: Parts, tmp_path: Path) -> None:
    scans = list({scan.patient: scan for scan in parts.train}.values())[:64]
    trained = Trained(scans)
    made = looked_at(tmp_path, parts, scans, trained)
    copies = made.copies
    assert copies.excess
    assert (copies.synthetic_rate.low or 0.0) > 0.2
    assert (copies.held_out_rate.high or 1.0) < 0.06
    with pytest.raises(
        ReleaseRefused, match=r"copies\.more than among held-out patients: yes, the policy's limit is no"
    ):
        released(made)
    betrayed = trained.betrays(scans, parts.holdout)
    assert betrayed["loss, mean"].low > 0.9


def test_a_generator_trained_on_many_scans_is_told_apart(parts: Parts, tmp_path: Path) -> None:
    trained = Trained(parts.train)
    made = looked_at(tmp_path, parts, parts.train, trained)
    assert not made.copies.excess
    assert made.copies.synthetic_copies <= 2
    assert made.copies.lowest_slight_recall > 0.9
    betrayed = trained.betrays(parts.train, parts.holdout)
    assert betrayed["loss, mean"].high < 0.9


def test_the_more_often_a_scan_is_seen_the_nearer_the_images_come(parts: Parts, tmp_path: Path) -> None:
    canaries = Canaries(share=0.04, times=(4, 16, 64))
    numbered = [(scan, times_trained(canaries, name_of(number))) for number, scan in enumerate(parts.train)]
    trained = Trained([scan for scan, times in numbered for _ in range(times)])
    made = looked_at(tmp_path, parts, parts.train, trained, canaries)
    told = {one.times: one for one in made.copies.canaries}
    assert list(told) == [1, 4, 16, 64]
    assert all(one.scans >= 3 for one in told.values())
    assert told[1].likeness < told[16].likeness < told[64].likeness
    assert told[64].copied >= told[64].scans / 2
    assert told[1].copied <= 0.01 * told[1].scans
    assert made.copies.excess
