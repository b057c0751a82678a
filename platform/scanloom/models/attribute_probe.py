"""The attribute probe: a small network that says of an image what it shows, and the artefact that holds it.

probe.json          the card: what is read, how well, and from where on an image disagrees (models.probe_card)
probe.safetensors   the network's weights
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from scanloom.artefact import open_artefact
from scanloom.attributes import Attributes, AttributeSchema
from scanloom.errors import ArtefactError
from scanloom.models.probe_card import CARD, WEIGHTS, ProbeCard, outputs_of, said_by
from scanloom.recipe import CategoryAttribute, NumberAttribute
from scanloom.shards.reader import read_file

_GROUPS = 8
_GRID = 4
READ_ROWS = 8
"""Images of a call of the network: always so many, so that what is read of one does not depend on the others."""


class ProbeNetwork(nn.Module):
    """Convolutions that halve the image until it is a grid, and one linear layer over all of it."""

    def __init__(self, channels: Sequence[int], outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((1, *channels), channels, strict=False):
            groups = math.gcd(_GROUPS, after)
            layers += [
                nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(groups, after), nn.SiLU(),
                nn.Conv2d(after, after, 3, stride=2, padding=1), nn.GroupNorm(groups, after), nn.SiLU(),
            ]  # fmt: skip
        self.features = nn.Sequential(*layers)
        # Where in the image it is matters: a grid, not one mean.
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(_GRID), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(channels[-1] * _GRID**2, outputs),
        )  # fmt: skip

    def forward(self, images_B1SS: Tensor) -> Tensor:
        """Logits, and numbers in their scale, [B, O], of squares in [-1, 1] of the probe's size."""
        read: Tensor = self.head(self.features(images_B1SS))
        return read


class Probe:
    """A trained probe on one device."""

    def __init__(self, card: ProbeCard, digest: str, network: ProbeNetwork, device: str = "cpu") -> None:
        self.card = card
        self.digest = digest
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)

    @torch.inference_mode()
    def read(self, pixels_NHW: NDArray[Any], bits_stored: int) -> NDArray[np.float32]:
        """Outputs [N, O] in the order of the card: likelihoods in [0, 1], and numbers in their units.

        From unsigned pixels below 2**bits_stored, of any size.
        """
        parts = []
        for start in range(0, len(pixels_NHW), READ_ROWS):
            part = pixels_NHW[start : start + READ_ROWS].astype(np.float32) / (2**bits_stored - 1) * 2.0 - 1.0
            images = torch.from_numpy(part).to(self._device)[:, None]
            filled = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, READ_ROWS - len(part)))
            raw = self._network(resampled(filled, self.card.size_px))
            parts.append(told(self.card, raw)[: len(part)].cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, len(self.card.outputs)), np.float32)


def resampled(images_B1HW: Tensor, size_px: int) -> Tensor:
    """Squares [B, 1, size_px, size_px] by the mean over areas."""
    if images_B1HW.shape[-2:] == (size_px, size_px):
        return images_B1HW
    return functional.adaptive_avg_pool2d(images_B1HW, size_px)


def told(card: ProbeCard, raw_BO: Tensor) -> Tensor:
    """What a network's raw outputs [B, O] say: likelihoods of values and labels, numbers in their units."""
    parts = []
    for name, part in _parts(card.attributes, raw_BO):
        declaration = card.attributes[name]
        if isinstance(declaration, NumberAttribute):
            mean, deviation = card.scales[name]
            parts.append(part * deviation + mean)
        else:
            parts.append(part.softmax(1) if isinstance(declaration, CategoryAttribute) else part.sigmoid())
    return torch.cat(parts, dim=1)


def targets(
    schema: AttributeSchema, rows: Sequence[Attributes], scales: Mapping[str, tuple[float, float]]
) -> NDArray[np.float32]:
    """What the network should say of these rows, float32 [N, O]: 0 or 1, numbers in their scale, NaN for unknown."""
    outputs = outputs_of(schema)
    wanted = said_by(outputs, rows)
    for column, output in enumerate(outputs):
        if output.value is None:
            mean, deviation = scales[output.attribute]
            wanted[:, column] = (wanted[:, column] - mean) / deviation
    return wanted.astype(np.float32)


def probe_loss(schema: AttributeSchema, raw_BO: Tensor, targets_BO: Tensor) -> Tensor:
    """Mean over attributes of cross-entropy (category, labels) or squared error (number), unknown ones left out."""
    losses = []
    for (name, raw), (_, wanted) in zip(_parts(schema, raw_BO), _parts(schema, targets_BO), strict=True):
        known = ~wanted.isnan().any(1)
        declaration = schema[name]
        clean = wanted.nan_to_num()
        if isinstance(declaration, NumberAttribute):
            each = (raw - clean).square().mean(1)
        elif isinstance(declaration, CategoryAttribute):
            each = functional.cross_entropy(raw, clean, reduction="none")
        else:
            each = functional.binary_cross_entropy_with_logits(raw, clean, reduction="none").mean(1)
        losses.append((each * known).sum() / known.sum().clamp(min=1))
    return torch.stack(losses).mean()


def load_probe(uri: str, device: str = "cpu") -> Probe:
    """The probe artefact at a URI. Raises ArtefactError where it is missing, damaged or does not fit this code."""
    artefact = open_artefact(uri, "probe")
    try:
        card = ProbeCard.model_validate_json(read_file(artefact.store, artefact.entry(CARD)))
        network = ProbeNetwork(card.channels, len(card.outputs))
        network.load_state_dict(load(read_file(artefact.store, artefact.entry(WEIGHTS))))
    except (ValidationError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{uri}: a part of the probe cannot be read: {reason[:200]}; make it again") from error
    return Probe(card, artefact.digest, network, device)


def _parts(schema: AttributeSchema, values_BO: Tensor) -> Iterable[tuple[str, Tensor]]:
    names = [output.attribute for output in outputs_of(schema)]
    sizes = [names.count(name) for name in schema.names]
    return zip(schema.names, values_BO.split(sizes, dim=1), strict=True)
