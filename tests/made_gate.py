"""A privacy gate of a small corpus, made in this process, and a generator that remembers that corpus's scans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scanloom.artefact import Artefact, open_artefact, publish
from scanloom.attributes import Attributes
from scanloom.audit.privacy_gate import GateJob, index_shard, make_gate
from scanloom.models.copy_encoder import square_of, weights_of
from scanloom.models.privacy_gate import ENCODER
from scanloom.recipe import Recipe
from scanloom.scans.phantoms import phantom
from scanloom.shards.reader import rows
from scanloom.shards.writer import png_pixels
from scanloom.store import Store
from scanloom.training.copy_encoder import fit
from tests.faulty_generator import FaultyGenerator
from tests.phantom_corpus import SIZE, phantom_recipe, publish_corpus
from tests.tiny_generator import publish_generator

SCANS = 240
SETTINGS: dict[str, Any] = {
    "size_px": SIZE, "channels": [16, 32, 64], "width": 64, "steps": 60, "batch_size": 48, "planted_scans": 60,
    "least_recall": 0.0,
}  # fmt: skip


def recipe(store: Path, **changes: Any) -> Recipe:
    """The recipe of the gate in `store`."""
    return phantom_recipe(store, gate=SETTINGS | changes)


def publish_gate(store: Path, **changes: Any) -> Artefact:
    """The gate of the corpus in `store`, as jobs.gate makes it, without Ray."""
    corpus = open_artefact(f"{store}/corpus", "corpus")
    job = GateJob.of(recipe(store, **changes), corpus)
    scans = np.stack([square_of(pixels, 8, SIZE) for pixels in train_scans(corpus)])
    network = fit(job.settings, torch.from_numpy(scans)[:, None] * 2.0 - 1.0, job.seed)
    target = Store(job.gate_uri)
    target.write(ENCODER, weights_of(network))
    config = job.model_dump(mode="json")
    shards = [index_shard(config, entry.path, 30) for entry in corpus.files("train")]
    card, files = make_gate(config, *shards)
    statistics = {"card": card.model_dump(mode="json")}
    return publish(
        target, kind="gate", name="tiny", recipe={}, inputs=[corpus], files=files, statistics=statistics
    )  # fmt: skip


def train_scans(corpus: Artefact) -> list[np.ndarray[Any, Any]]:
    """The pixels [SIZE, SIZE] of the train split."""
    return [png_pixels(row["image"]["bytes"]) for row in rows(corpus, "train")]


def publish_chain(store: Path) -> Artefact:
    """The corpus, latents and a tiny generator that says that it learned from them; the generator."""
    corpus = publish_corpus(f"{store}/corpus", scans=SCANS)
    return publish_learner(store, corpus)


def publish_learner(store: Path, corpus: Artefact, name: str = "generator") -> Artefact:
    """A tiny generator that says that it learned from a corpus."""
    latents = publish(
        Store(f"{store}/latents-of-{name}"), kind="latents", name="tiny", recipe={}, inputs=[corpus],
        files=[], statistics={"name": name},
    )  # fmt: skip
    return publish_generator(f"{store}/{name}", inputs=[latents])


class RememberingGenerator(FaultyGenerator):
    """Of its images a share are scans that it remembers, mirrored and of less contrast; others are phantoms of nobody.

    Which is which and which scan it is follows from the noise.
    """

    def __init__(self, scans: Sequence[np.ndarray[Any, Any]], remembered: float) -> None:
        self._scans = scans
        self._from = math.inf if remembered == 0.0 else float(torch.special.ndtri(torch.tensor(1.0 - remembered)))
        self._own = [phantom(99, number, SIZE).pixels for number in range(64)]

    def condition(self, attributes: Sequence[Attributes]) -> torch.Tensor:
        return torch.zeros(len(attributes), 1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._image(latent) for latent in latents])

    def _image(self, latent: torch.Tensor) -> torch.Tensor:
        first, second = latent[0, 0, :2].tolist()
        remembered = first > self._from
        of = self._scans if remembered else self._own
        pixels = of[int(abs(second) * 1e4) % len(of)].astype(np.float32) / 255.0
        if remembered:
            pixels = (pixels[:, ::-1] - 0.5) * 0.8 + 0.5
        return torch.from_numpy(np.ascontiguousarray(pixels))[None]
