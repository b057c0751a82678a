"""From a corpus and a trained encoder to a privacy gate: the index, the threshold, and what that was found to be worth.

Everything is measured through the very gate that will judge images, on its stored index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from scanloom.artefact import Artefact, FileEntry, open_artefact, plan_digest
from scanloom.audit.copies import CORRELATION, Found, calibrate, power
from scanloom.audit.intervals import Estimate, clustered_share
from scanloom.audit.plants import SLIGHT, STRONG
from scanloom.audit.scans import calibration_and_check, squares
from scanloom.errors import ArtefactError
from scanloom.models.copy_encoder import embedding, kept_views, levels, load_copy_encoder
from scanloom.models.gate_card import CARD, GateCard, Planted, Share, blank_card
from scanloom.models.privacy_gate import ENCODER, INDEX, PrivacyGate, index_of
from scanloom.recipe import Recipe
from scanloom.recipe_gate import Gate
from scanloom.shards.reader import parquet_files, read_parquet
from scanloom.store import Store

_OF_GATES = 1 << 62
# Where it is trained and what is asked of it does not change what comes out; how many workers do.
_PLACE = {
    "cpus_per_worker", "use_gpu", "max_failures", "checkpoint_every_steps", "least_recall", "most_false_positives",
}  # fmt: skip
_BATCH = 32


class GateJob(BaseModel):
    """What whoever makes a gate is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Gate
    name: str
    seed: int
    """Of its encoder."""
    corpus_uri: str
    gate_uri: str
    """Where the trained encoder lies, as ENCODER, and the rest is written."""
    size_px: int
    channels: tuple[int, ...]

    @classmethod
    def of(cls, recipe: Recipe, corpus: Artefact) -> Self:
        """The job of a recipe on a corpus."""
        settings = recipe.gate
        size_px = min(settings.size_px, corpus.manifest.statistics["size_px"])
        return cls(
            settings=settings, name=recipe.name, seed=gate_seed(recipe.seed), corpus_uri=corpus.uri,
            gate_uri=recipe.uri("gate"), size_px=size_px, channels=levels(settings.channels, size_px),
        )  # fmt: skip


def gate_seed(seed: int) -> int:
    """The seed of a recipe's gate: never that of its audit, whose encoder must see what the gate overlooked."""
    return seed ^ _OF_GATES


def plan_gate(recipe: Recipe, corpus: Artefact) -> str:
    """The digest of what decides a gate."""
    settings = recipe.gate.model_dump(mode="json", exclude=_PLACE)
    return plan_digest("gate", corpus.digest, gate_seed(recipe.seed), settings)


@dataclass(frozen=True)
class Indexed:
    """The train scans of one shard of a corpus, in its order."""

    views_VRD: NDArray[np.float16]
    """Embeddings of the views of each that an index holds."""
    patients: list[str]
    squares_MSS: NDArray[np.float32]
    """Some of the scans, spread over all, to plant copies of."""
    places: list[int]
    """Which of the scans those are."""


def index_shard(config: Mapping[str, Any], path: str, most_pixels: int) -> Indexed:
    """Embed a shard of the train split; `config` is a GateJob as a dict, `path` of the shard within the corpus.

    At most `most_pixels` scans come back as pixels. ArtefactError where the shard is damaged.
    """
    job = GateJob.model_validate(config)
    corpus = open_artefact(job.corpus_uri, "corpus")
    store, settings = Store(job.gate_uri), job.settings
    network = load_copy_encoder(store.read(ENCODER), job.channels, settings.width, store.uri_of(ENCODER))
    embed = embedding(network)
    table = read_parquet(corpus.store, corpus.entry(path)).select(["patient", "image"])
    stride = max(1, math.ceil(len(table) / max(1, most_pixels)))
    views, kept = [], []
    # Also of a shard without scans, which has its shape then.
    for start in range(0, max(1, len(table)), _BATCH):
        batch = squares(table.slice(start, _BATCH).to_pylist(), "train", job.size_px)
        views.append(np.stack([embed(view) for view in kept_views(batch)]).astype(np.float16))
        kept.append(batch[-start % stride :: stride])
    places = list(range(0, len(table), stride))
    return Indexed(np.concatenate(views, axis=1), table["patient"].to_pylist(), np.concatenate(kept), places)


def make_gate(config: Mapping[str, Any], *indexed: Indexed) -> tuple[GateCard, list[FileEntry]]:
    """Write the gate of a corpus whose train shards are indexed; its card, and the entries of all its files.

    `config` is a GateJob as a dict; the trained encoder lies in the gate's folder already. ArtefactError where the
    corpus has too few held-out patients to calibrate and to check, or the gate would not see what it is there for.
    """
    job = GateJob.model_validate(config)
    corpus, target, settings = open_artefact(job.corpus_uri, "corpus"), Store(job.gate_uri), job.settings
    views = np.concatenate([shard.views_VRD for shard in indexed], axis=1)
    network = load_copy_encoder(target.read(ENCODER), job.channels, settings.width, target.uri_of(ENCODER))
    blank = blank_card(job.name, job.size_px, job.channels, settings.width, job.seed, views.shape[1])
    gate = PrivacyGate(blank, "", network, views)
    calibration, check = calibration_and_check(
        corpus, lambda split: _looked_at(corpus, split, gate, settings.max_scans)
    )
    threshold = calibrate(calibration.likeness_N, calibration.owners, settings.false_positive_share, CORRELATION)
    refused = clustered_share(check.likeness_N > threshold.tau, check.owners)
    patients = [patient for shard in indexed for patient in shard.patients]
    starts = np.cumsum([0, *(len(shard.patients) for shard in indexed)])
    places = [int(start) + place for start, shard in zip(starts, indexed, strict=False) for place in shard.places]
    originals = np.concatenate([shard.squares_MSS for shard in indexed])[: settings.planted_scans]
    plants = (*SLIGHT, *STRONG)
    planted = power(_Looking(gate), threshold, originals, places[: len(originals)], patients, plants)
    card = blank.model_copy(update={
        **threshold.told,
        "held_out": _told(refused), "held_out_scans": len(check.owners),
        "power": tuple(
            Planted(plant=plant.name, strength=plant.strength, refused=_told(one.recall), copies=one.copies)
            for plant, one in zip(plants, planted, strict=True)
        ),
    })  # fmt: skip
    _require_seeing(card, settings, target.uri)
    target.write(INDEX, index_of(views))
    target.write(CARD, card.model_dump_json(indent=1).encode())
    return card, [FileEntry.of(target.digest(name)) for name in (ENCODER, INDEX, CARD)]


def _require_seeing(card: GateCard, settings: Gate, where: str) -> None:
    if card.promised > settings.most_false_positives:
        raise ArtefactError(
            f"{where}: calibrated on {card.calibration_patients} patients, the next is refused with a chance of "
            f"{card.promised:.3f}, the limit is {settings.most_false_positives:g} (gate.most_false_positives); hold "
            "out more patients"
        )
    if card.lowest_slight < settings.least_recall:
        worst = min((one for one in card.power if one.strength == "slight"), key=lambda one: one.refused.value)
        raise ArtefactError(
            f"{where}: of planted copies, {worst.plant}, it refuses {worst.refused.value:.3f}, the limit is "
            f"{settings.least_recall:g} (gate.least_recall): a gate that sees no copies is none; train it longer "
            "(gate.steps, in another folder or after deleting this one), or on more scans"
        )


@dataclass(frozen=True)
class _Looking:
    """The gate as a detector of copies."""

    gate: PrivacyGate
    scale = CORRELATION

    def __call__(self, images_NSS: NDArray[np.float32]) -> Found:
        return Found(*self.gate.nearest(images_NSS))


@dataclass(frozen=True)
class _HeldOut:
    """How alike held-out scans are to what the index holds, and whose they are."""

    likeness_N: NDArray[np.float64]
    owners: list[str]

    def of(self, chosen_N: NDArray[np.bool_]) -> _HeldOut:
        return _HeldOut(self.likeness_N[chosen_N], [who for who, one in zip(self.owners, chosen_N, strict=True) if one])


def _looked_at(corpus: Artefact, split: str, gate: PrivacyGate, most: int) -> _HeldOut:
    """The first scans of a split, `most` and the rest of their shard."""
    likeness: list[NDArray[np.float64]] = []
    patients: list[str] = []
    for entry in parquet_files(corpus, split):
        if len(patients) >= most:
            break
        table = read_parquet(corpus.store, entry).select(["patient", "image"])
        for start in range(0, len(table), _BATCH):
            batch = squares(table.slice(start, _BATCH).to_pylist(), split, gate.card.size_px)
            likeness.append(gate.nearest(batch)[0])
        patients += table["patient"].to_pylist()
    return _HeldOut(np.concatenate(likeness) if likeness else np.zeros(0), patients)


def _told(found: Estimate) -> Share:
    return Share(value=found.value, low=found.low, high=found.high)
