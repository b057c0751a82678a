"""The privacy gate: what tells, of any image, how alike it is to the nearest scan that a generator learned from.

gate.json             the card: from where on an image counts as a copy, and how well that was found to work
encoder.safetensors   the copy encoder's weights
index.safetensors     `views` float16 [V, R, D]: the embeddings of V views of each of all R training scans

As confidential as the corpus: embeddings of scans tell anyone who has somebody's scan whether it is among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor
from torch.nn import functional

from scanloom.artefact import open_artefact
from scanloom.errors import ArtefactError
from scanloom.models.copy_encoder import CopyEncoder, load_copy_encoder, square_of
from scanloom.models.gate_card import CARD, GateCard
from scanloom.shards.reader import read_file

ENCODER, INDEX = "encoder.safetensors", "index.safetensors"
LOOK_ROWS = 8
"""Images of a look: always so many, so that what is seen of one does not depend on the others. A lone image costs as
much as eight; more than eight at once are hardly cheaper by the image."""
_CPU_BLOCK = 4096


class PrivacyGate:
    """A gate on one device."""

    def __init__(
        self, card: GateCard, digest: str, network: CopyEncoder, views_VRD: NDArray[np.float16], device: str = "cpu"
    ) -> None:
        self.card = card
        self.digest = digest
        self._device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self._device)
        self._scans = views_VRD.shape[1]
        rows = torch.from_numpy(views_VRD).flatten(0, 1).to(self._device, torch.float32)
        # What rounding to float16 took from a copy's likeness of 1 is thereby back, but for 1e-7.
        self._index_DR = functional.normalize(rows, dim=1).T.contiguous()
        # What a CPU's caches hold; a GPU is best asked once.
        self._block = _CPU_BLOCK if self._device.type == "cpu" else len(rows)

    def likeness(self, pixels_NHW: NDArray[Any], bits_stored: int) -> NDArray[np.float64]:
        """[N] in [-1, 1]: how alike each image is to the training scan that is nearest to it.

        From unsigned pixels below 2**bits_stored, of any size.
        """
        found = np.zeros(len(pixels_NHW))
        for start in range(0, len(found), LOOK_ROWS):
            part = pixels_NHW[start : start + LOOK_ROWS]
            squares = np.stack([square_of(pixels, bits_stored, self.card.size_px) for pixels in part])
            best = torch.stack([cosine_BK.amax(1) for cosine_BK in self._cosines(squares)]).amax(0)
            found[start : start + len(part)] = best[: len(part)].cpu().numpy()
        return found

    def nearest(self, squares_NSS: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Of squares in [0, 1] of the gate's size the likeness [N] to the nearest scan, and which one [N] that is."""
        likeness, row = np.zeros(len(squares_NSS)), np.zeros(len(squares_NSS), dtype=np.int64)
        for start in range(0, len(squares_NSS), LOOK_ROWS):
            part = squares_NSS[start : start + LOOK_ROWS]
            best, where = torch.cat(list(self._cosines(part)), dim=1).max(1)
            likeness[start : start + len(part)] = best[: len(part)].cpu().numpy()
            row[start : start + len(part)] = where[: len(part)].cpu().numpy()
        return likeness, row % self._scans

    @torch.inference_mode()
    def _cosines(self, squares_NSS: NDArray[np.float32]) -> Iterator[Tensor]:
        """Of at most LOOK_ROWS squares, filled up to so many, the cosines with a block of the index after the other."""
        squares = torch.from_numpy(squares_NSS)[:, None] * 2.0 - 1.0
        filled = functional.pad(squares, (0, 0, 0, 0, 0, 0, 0, LOOK_ROWS - len(squares)))
        vectors_BD: Tensor = self._network(filled.to(self._device))
        for start in range(0, self._index_DR.shape[1], self._block):
            yield vectors_BD @ self._index_DR[:, start : start + self._block]


def index_of(views_VRD: NDArray[np.float16]) -> bytes:
    """Embeddings of training scans as INDEX holds them."""
    return save({"views": views_VRD})


def load_gate(uri: str, device: str = "cpu") -> PrivacyGate:
    """The gate artefact at a URI. Raises ArtefactError where it is missing, damaged or does not fit this code."""
    artefact = open_artefact(uri, "gate")
    try:
        card = GateCard.model_validate_json(read_file(artefact.store, artefact.entry(CARD)))
        views: NDArray[np.float16] = load(read_file(artefact.store, artefact.entry(INDEX)))["views"]
    except (ValidationError, SafetensorError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{uri}: a part of the gate cannot be read: {reason[:200]}; make it again") from error
    if views.ndim != 3 or views.shape[1:] != (card.train_scans, card.width):
        raise ArtefactError(f"{uri}: its index is not of the {card.train_scans} scans of its card; make it again")
    weights = read_file(artefact.store, artefact.entry(ENCODER))
    network = load_copy_encoder(weights, card.channels, card.width, artefact.store.uri_of(ENCODER))
    return PrivacyGate(card, artefact.digest, network, views, device)
