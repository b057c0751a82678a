"""Fidelity as others see it: a given network, and radiomic features, both beside the audit's own encoder.

What the audit's encoder is blind to, another may see. Each looks at images of the dataset, of the train split and of
held-out patients, and says the same figures of them as `fidelity` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from scanloom.artefact import Artefact, open_artefact
from scanloom.audit.fidelity import Embedded, fidelity
from scanloom.audit.intervals import Estimate
from scanloom.audit.radiomics import Radiomics
from scanloom.audit.report import Beside, GivenFidelity, Interval
from scanloom.audit.scans import held_out_splits, in_batches, owner_of, spread, squares
from scanloom.errors import ArtefactError
from scanloom.models.backbone import load_backbone
from scanloom.recipe_audit import Fidelity
from scanloom.sampling.dataset import IMAGES

FRD = "FRD"
_BATCH = 32


class Looker(Protocol):
    """Maps squares [N, S, S] in [0, 1] to vectors [N, D]."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def size_px(self) -> int: ...
    def __call__(self, squares_NSS: NDArray[np.float32]) -> NDArray[np.float32]: ...


class GivenJob(BaseModel):
    """What whoever looks is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Fidelity
    corpus_uri: str
    dataset_uri: str


def look_again(config: Mapping[str, Any]) -> tuple[GivenFidelity, ...]:
    """Fidelity as what the recipe gives sees it; `config` is a GivenJob as a dict.

    Pixels of one batch are in memory at a time. RecipeError where radiomics are not installed, ArtefactError where a
    network cannot be read, or there are too few images or patients.
    """
    job = GivenJob.model_validate(config)
    settings = job.settings
    device = "cuda" if settings.use_gpu else "cpu"
    corpus, dataset = open_artefact(job.corpus_uri, "corpus"), open_artefact(job.dataset_uri, "dataset")
    found = []
    if settings.backbone is not None:
        backbone = load_backbone(settings.backbone, device)
        found.append(_told(backbone, _seen(backbone, corpus, dataset, settings.images), dataset.uri))
    if settings.radiomics:
        radiomics = Radiomics(corpus.manifest.statistics["size_px"])
        seen = _seen(radiomics, corpus, dataset, settings.radiomics_images)
        told = _told(radiomics, _by(radiomics.scale(seen[2].vectors_ND), seen), dataset.uri)
        found.append(told.model_copy(update={"figures": {FRD: _logarithm(told.figures["frechet"]), **told.figures}}))
    return tuple(found)


def _seen(looker: Looker, corpus: Artefact, dataset: Artefact, most: int) -> tuple[Embedded, Embedded, Embedded]:
    """Images, train scans and held-out scans as vectors, at most so many of each."""
    held_out = held_out_splits(corpus)
    sources: Sequence[tuple[Artefact, list[str]]] = [(dataset, [IMAGES]), (corpus, ["train"]), (corpus, held_out)]
    images, train, others = (_embedded(looker, artefact, folders, most) for artefact, folders in sources)
    return images, train, others


def _embedded(looker: Looker, artefact: Artefact, folders: Sequence[str], most: int) -> Embedded:
    vectors: list[NDArray[np.float32]] = []
    owners: list[str] = []
    for folder in folders:
        for batch in in_batches(spread(artefact, folder, max(1, most // len(folders))), _BATCH):
            vectors.append(looker(squares(batch, folder, looker.size_px)))
            owners += [owner_of(row, folder) for row in batch]
    return Embedded.of(np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float32), owners)


def _by(
    scale: Callable[[NDArray[Any]], NDArray[np.float64]], seen: tuple[Embedded, Embedded, Embedded]
) -> tuple[Embedded, Embedded, Embedded]:
    images, train, held_out = (Embedded(scale(one.vectors_ND), one.groups) for one in seen)
    return images, train, held_out


def _told(looker: Looker, seen: tuple[Embedded, Embedded, Embedded], where: str) -> GivenFidelity:
    try:
        figures = fidelity(*seen)
    except ValueError as error:
        raise ArtefactError(f"{where}: too few images or patients for {looker.name} to compare: {error}") from error
    return GivenFidelity(
        backbone=looker.name, digest=looker.digest, figures={name: Beside.of(one) for name, one in figures.items()}
    )


def _logarithm(distance: Beside) -> Beside:
    """Of a Fréchet distance (Konz et al. 2026, as their code has it)."""
    ends = [_log(one) for one in (distance.synthetic, distance.baseline)]
    return Beside(synthetic=ends[0], baseline=ends[1], images=distance.images)


def _log(one: Interval) -> Interval:
    value, low, high = (math.log(end) if end is not None and end > 0 else -math.inf for end in
                        (one.value, one.low, one.high))  # fmt: skip
    return Interval.of(Estimate(value, low, high))
