"""The copy encoder: a small network under which a scan and a changed copy of it lie close together, others apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from scanloom.errors import ArtefactError

_LEAST_PX = 4
_GROUPS = 8
_GRID = 4
_POSES = (
    (0.0, 1.0, 0.0, 0.0),
    (5.0, 1.0, 0.0, 0.0),
    (-5.0, 1.0, 0.0, 0.0),
    (0.0, 0.93, 0.0, 0.0),
    (0.0, 1.0, 0.04, 0.04),
    (0.0, 1.0, -0.04, 0.04),
    (0.0, 1.0, 0.04, -0.04),
    (0.0, 1.0, -0.04, -0.04),
)
"""Degrees, share of the side that is shown, and shifts across and down as shares of it: about half of what the encoder
learned to overlook."""
KEPT_VIEWS = 2 * len(_POSES)
EMBED_ROWS = 32
"""Images of a call of the network: always so many, so that the embedding of one does not depend on the others."""


def levels(channels: Sequence[int], size_px: int) -> tuple[int, ...]:
    """The channels of the levels that leave enough of a square of this side."""
    return tuple(channels)[: max(2, int(math.log2(size_px / _LEAST_PX)))]


class CopyEncoder(nn.Module):
    """Convolutions that halve the image, and one linear layer over a grid of what is left of it.

    Every image is brought to mean 0 and deviation 1 first, so that contrast and brightness are not seen at all.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.width = width
        self.smooth: Tensor
        self.register_buffer(
            "smooth", torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).reshape(1, 1, 1, 5) / 16.0, persistent=False
        )
        layers: list[nn.Module] = []
        for level, (before, after) in enumerate(zip((1, *channels), channels, strict=False)):
            groups = math.gcd(_GROUPS, after)
            # Averaged before it is thinned out: what a stride alone keeps would change with every shift by a pixel.
            first = (
                [nn.AvgPool2d(2), nn.Conv2d(before, after, 3, padding=1)]
                if level
                else [nn.Conv2d(before, after, 5, stride=2, padding=2)]
            )
            layers += [*first, nn.GroupNorm(groups, after), nn.SiLU()]
            if level:
                layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(groups, after), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        # Where in the image it is tells one chest from another: a grid, not one mean.
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(_GRID), nn.Flatten(), nn.Linear(channels[-1] * _GRID**2, width)
        )  # fmt: skip

    def forward(self, images_B1SS: Tensor) -> Tensor:
        """Unit vectors float32 [B, width] of squares of any scale and offset."""
        seen = images_B1SS - images_B1SS.mean((1, 2, 3), keepdim=True)
        seen = seen / seen.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-6)
        # Detail finer than the first stride would change with every shift by a pixel.
        padded = functional.pad(seen, (2, 2, 2, 2), mode="replicate")
        seen = functional.conv2d(functional.conv2d(padded, self.smooth), self.smooth.mT)
        return functional.normalize(self.head(self.features(seen)), dim=1)


def nt_xent(first_BD: Tensor, second_BD: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross-entropy of two views of B scans (Chen et al. 2020, eq. 1), a scalar.

    Each of the 2 B unit vectors has to find its other view among all others.
    """
    both = torch.cat([first_BD, second_BD])
    logits = both @ both.T / temperature
    logits.fill_diagonal_(-torch.inf)
    rows = len(first_BD)
    partner = torch.arange(2 * rows, device=both.device).roll(rows)
    return functional.cross_entropy(logits, partner)


@torch.inference_mode()
def embed(network: CopyEncoder, images_N1SS: Tensor) -> NDArray[np.float32]:
    """Unit vectors [N, width] of squares, on the network's device, a fixed number of rows at a time."""
    device = next(network.parameters()).device
    parts: list[NDArray[Any]] = []
    for start in range(0, len(images_N1SS), EMBED_ROWS):
        part = images_N1SS[start : start + EMBED_ROWS].float().to(device)
        filled = functional.pad(part, (0, 0, 0, 0, 0, 0, 0, EMBED_ROWS - len(part)))
        parts.append(network(filled)[: len(part)].cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, network.width), np.float32)


def square_of(pixels_HW: NDArray[Any], bits_stored: int, size_px: int) -> NDArray[np.float32]:
    """Unsigned pixels below 2**bits_stored as a square [S, S] in [0, 1], by the mean over areas."""
    image = torch.from_numpy(pixels_HW.astype(np.float32) / (2**bits_stored - 1))
    square: NDArray[np.float32] = functional.adaptive_avg_pool2d(image[None, None], size_px)[0, 0].numpy()
    return square


def embedding(network: CopyEncoder) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """A function of squares [N, S, S] in [0, 1] that gives unit vectors [N, width]."""
    network.eval().requires_grad_(False)
    return lambda squares_NSS: embed(network, torch.from_numpy(squares_NSS)[:, None] * 2.0 - 1.0)


def kept_views(squares_NSS: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """What of training scans [N, S, S] an index holds, KEPT_VIEWS times [N, S, S]: first as they are, then mirrored.

    A copy that was shifted, turned or cropped is nearer to one of them than to the scan itself, while other scans come
    no nearer: what it takes to see a copy is done once, not at every look.
    """
    images_N1SS = torch.from_numpy(squares_NSS)[:, None]
    for degrees, zoom, across, down in _POSES:
        for mirror in (1.0, -1.0):
            angle = math.radians(degrees)
            cosine, sine = zoom * math.cos(angle), zoom * math.sin(angle)
            # The grid's coordinates span 2.
            affine = torch.tensor([[cosine * mirror, -sine, 2.0 * across], [sine * mirror, cosine, 2.0 * down]])
            if (degrees, zoom, across, down) == _POSES[0]:
                view = images_N1SS if mirror > 0 else images_N1SS.flip(-1)
            else:
                shape = list(images_N1SS.shape)
                grid = functional.affine_grid(affine.expand(shape[0], 2, 3), shape, align_corners=False)
                view = functional.grid_sample(images_N1SS, grid, padding_mode="border", align_corners=False)
            yield np.ascontiguousarray(view[:, 0].numpy())


def weights_of(network: CopyEncoder) -> bytes:
    """The network as a safetensors file."""
    return save({name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()})


def load_copy_encoder(weights: bytes, channels: Sequence[int], width: int, where: str) -> CopyEncoder:
    """The network in a file that `weights_of` made. ArtefactError naming `where` for one of another shape."""
    network = CopyEncoder(channels, width)
    try:
        network.load_state_dict(load(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ArtefactError(f"{where}: is no copy encoder of this shape; make it again") from error
    return network
