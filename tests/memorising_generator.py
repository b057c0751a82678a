"""A generator that hands out what it was trained on, changed a little: what a release must never hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scanloom.attributes import Attributes
from scanloom.sampling.engine import Engine, ImageRequest
from tests.faulty_generator import cosine


class MemorisingGenerator:
    """In one step its latent is the noise, by which its decoder picks a known image and how it is changed.

    That is mirrored, turned by up to 4 degrees, shifted by up to 2 % of the side, darkened or lightened, and given a
    little noise.
    """

    latent_shape = (2, 4, 4)
    schedule = cosine()

    def __init__(self, known_RSS: Tensor) -> None:
        """`known_RSS`: images in [0, 1]."""
        self._known = known_RSS

    def require_shape(self, latent_shape: tuple[int, ...]) -> None:
        raise AssertionError(f"nobody asked for {latent_shape}")

    def condition(self, attributes: Sequence[Attributes]) -> Tensor:
        return torch.zeros(len(attributes), 1)

    def null_condition(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1)

    def denoise(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        # At the last timestep alpha is 0 and sigma 1: the data is minus this.
        return -latents

    def decode(self, latents: Tensor) -> Tensor:
        rows, side = len(latents), self._known.shape[-1]
        # Uniform numbers in [0, 1) of standard normal ones.
        u = 0.5 + 0.5 * torch.erf(latents.flatten(1) / math.sqrt(2.0))
        picked = self._known[(u[:, 0] * len(self._known)).long().clamp_max(len(self._known) - 1)][:, None]
        angle = math.radians(4.0) * (2.0 * u[:, 1] - 1.0)
        across, down = (0.04 * (2.0 * u[:, k] - 1.0) for k in (2, 3))
        mirror = torch.where(u[:, 4] < 0.5, -1.0, 1.0)
        cosine, sine = angle.cos(), angle.sin()
        affine = torch.stack([cosine * mirror, -sine, across, sine * mirror, cosine, down], dim=1).reshape(rows, 2, 3)
        grid = functional.affine_grid(affine, [rows, 1, side, side], align_corners=False)
        moved = functional.grid_sample(picked, grid, padding_mode="border", align_corners=False)
        darker = moved.clamp(min=1e-4).pow(torch.exp(0.3 * (2.0 * u[:, 5] - 1.0)).reshape(-1, 1, 1, 1))
        noise = functional.interpolate(latents[:, 1:], side, mode="bilinear", align_corners=False)
        return (darker + 0.01 * noise).clamp(0.0, 1.0)


def drawn(known_RSS: Tensor, images: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """So many images of it, through the engine, uint8 [N, S, S]."""
    engine = Engine(MemorisingGenerator(known_RSS), slots=8)
    requests = [ImageRequest(index=n, seed=5, attributes={}, steps=1) for n in range(images)]
    finished = {done.request.index: done.image[0] for done in engine.run(requests)}
    return np.stack([np.round(finished[n] * 255).astype(np.uint8) for n in range(images)])
