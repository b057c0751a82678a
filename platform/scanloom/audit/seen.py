"""What is kept of images that were looked at: their embedding, spectrum and grey levels; pixels only of samples.

So memory grows by about 2 KB an image, whatever its size.

Legend of shape suffixes: N images, M of them in the sample, V views, D values of an embedding, K radii, L grey levels,
S pixels of a square's side, O outputs of a probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scanloom.artefact import Artefact
from scanloom.attributes import Attributes, AttributeSchema
from scanloom.audit.appearance import LEVELS, Curves, grey_levels, radial_power
from scanloom.audit.fidelity import Embedded
from scanloom.audit.scans import Row, in_batches, owner_of, pixels_of, spread, spread_count, squares
from scanloom.models.attribute_probe import Probe
from scanloom.models.copy_encoder import EMBED_ROWS, kept_views

TRAIN = "train"
_SAMPLE = 512

Embed = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Seen:
    """What is kept of some images, in the order of their ids."""

    views_NVD: NDArray[np.float32]
    """Embeddings of training scans as they are and in the other views that they are looked up by; of others V is 1."""
    spectra_NK: NDArray[np.float64]
    levels_NL: NDArray[np.float64]
    ids: list[str]
    owners: list[str]
    """Patients; of synthetic images their own ids."""
    attributes: list[Attributes]
    sample_MSS: NDArray[np.float32]
    sample: list[int]
    """Which of the images the sample's are."""
    read_NO: NDArray[np.float32]
    """What a probe reads; no columns without one."""

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Embeddings [N, D] of images as they are."""
        return self.views_NVD[:, 0]

    @property
    def embedded(self) -> Embedded:
        return Embedded.of(self.vectors, self.owners)

    def curves(self, rows_NK: NDArray[np.float64]) -> Curves:
        return Curves(rows_NK, self.owners)

    def of(self, chosen: NDArray[np.bool_]) -> Seen:
        """The part of it that is chosen."""
        places = np.flatnonzero(chosen).tolist()
        number = {place: number for number, place in enumerate(places)}
        kept = [place in number for place in self.sample]
        return Seen(
            self.views_NVD[chosen], self.spectra_NK[chosen], self.levels_NL[chosen],
            [self.ids[place] for place in places], [self.owners[place] for place in places],
            [self.attributes[place] for place in places],
            self.sample_MSS[kept], [number[place] for place in self.sample if place in number],
            self.read_NO[chosen],
        )  # fmt: skip


def see(
    artefact: Artefact, folder: str, schema: AttributeSchema, embed: Embed, size_px: int, most: int,
    probe: Probe | None = None, sample: int = _SAMPLE,
) -> Seen:  # fmt: skip
    """At most `most` images of an artefact's folder, spread over all of it; ArtefactError for a damaged shard."""
    kept_every = max(1, math.ceil(spread_count(artefact, folder, most) / sample))
    parts: list[Seen] = []
    first = 0
    for batch in in_batches(spread(artefact, folder, most), EMBED_ROWS):
        shown = squares(batch, folder, size_px)
        views = kept_views(shown) if folder == TRAIN else [shown]
        kept = np.arange(-first % kept_every, len(batch), kept_every)
        parts.append(Seen(
            np.stack([embed(view) for view in views], axis=1), radial_power(shown), grey_levels(shown),
            [row["id"] for row in batch], [owner_of(row, folder) for row in batch],
            [schema.from_row(row) for row in batch], shown[kept], (first + kept).tolist(),
            _read(probe, batch, folder),
        ))  # fmt: skip
        first += len(batch)
    return _joined(parts) if parts else _nothing(embed, size_px)


def _joined(parts: Sequence[Seen]) -> Seen:
    told: dict[str, Any] = {}
    for name in (field.name for field in fields(Seen)):
        values = [getattr(part, name) for part in parts]
        is_array = isinstance(values[0], np.ndarray)
        told[name] = np.concatenate(values) if is_array else list(chain.from_iterable(values))
    return Seen(**told)


def _nothing(embed: Embed, size_px: int) -> Seen:
    empty, unread = np.zeros((0, size_px, size_px), np.float32), np.zeros((0, 0), np.float32)
    spectra, levels = np.zeros((0, size_px // 2 - 1)), np.zeros((0, LEVELS))
    return Seen(embed(empty)[:, None], spectra, levels, [], [], [], empty, [], unread)


def _read(probe: Probe | None, batch: Sequence[Row], folder: str) -> NDArray[np.float32]:
    if probe is None:
        return np.zeros((len(batch), 0), np.float32)
    # Scans of a corpus may differ in their type; each is read by itself, with the same result.
    pixels, bits = zip(*(pixels_of(row, folder) for row in batch), strict=True)
    if len({(one.shape, depth) for one, depth in zip(pixels, bits, strict=True)}) == 1:
        return probe.read(np.stack(pixels), bits[0])
    return np.concatenate([probe.read(one[None], depth) for one, depth in zip(pixels, bits, strict=True)])
