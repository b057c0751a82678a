"""The changed views of a scan that a copy encoder learns to see as one: what a copy may have suffered.

Shift, mirror, rotation, crop and elastic bending in one resampling; then blur, contrast, brightness and noise. All of a
view follows from (seed, position), see `training.draws`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from scanloom.training.draws import draw

SHIFT = 0.1
"""Most that a view is moved, as a share of the side."""
ROTATION_DEGREES = 12.0
ZOOM = (0.85, 1.05)
"""Share of the side that a view shows."""
BEND = 0.02
"""Most that elastic bending moves a point, as a share of the side."""
BLUR_SHARE = 0.012
"""Largest deviation of the blur, as a share of the side."""
CONTRAST, BRIGHTNESS, GAMMA = 0.3, 0.2, 0.3
NOISE = 0.08
"""Largest deviation of the noise, where the image spans [-1, 1]."""
_KNOTS = 5
_BLURS = 4
_PLAIN = 10
UNIFORMS = _PLAIN + 2 * _KNOTS**2


def changed(images_B1SS: Tensor, where: Sequence[int], seed: int) -> Tensor:
    """A changed view [B, 1, S, S] of each image in [-1, 1]; `where` numbers the views of a run."""
    size = images_B1SS.shape[-1]
    drawn = draw(where, (1, size, size), UNIFORMS, seed)
    u = drawn.uniform_BU.to(images_B1SS)
    view = _bent(images_B1SS, u)
    view = _blurred(view, (u[:, 6] * _BLURS).long(), size)
    unit = ((view + 1.0) / 2.0).clamp(0.0, 1.0)
    gamma = torch.exp(GAMMA * (2.0 * u[:, 7] - 1.0)).reshape(-1, 1, 1, 1)
    contrast = (1.0 + CONTRAST * (2.0 * u[:, 8] - 1.0)).reshape(-1, 1, 1, 1)
    brightness = (BRIGHTNESS * (2.0 * u[:, 9] - 1.0)).reshape(-1, 1, 1, 1)
    view = (2.0 * unit.clamp(min=1e-4).pow(gamma) - 1.0) * contrast + brightness
    noise = drawn.noise_BCHW.to(view) * (NOISE * u[:, 5].square()).reshape(-1, 1, 1, 1)
    return (view + noise).clamp(-1.0, 1.0)


def _bent(images_B1SS: Tensor, u: Tensor) -> Tensor:
    """Mirrored with a chance of a half, rotated, zoomed, shifted and bent, in one bilinear resampling."""
    rows, size = len(images_B1SS), images_B1SS.shape[-1]
    mirror = torch.where(u[:, 0] < 0.5, -1.0, 1.0)
    angle = math.radians(ROTATION_DEGREES) * (2.0 * u[:, 1] - 1.0)
    scale = ZOOM[0] + (ZOOM[1] - ZOOM[0]) * u[:, 2]
    # The grid's coordinates span 2.
    across, down = (2.0 * SHIFT * (2.0 * u[:, k] - 1.0) for k in (3, 4))
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cosine * mirror, -sine, across, sine * mirror, cosine, down], dim=1).reshape(rows, 2, 3)
    grid = functional.affine_grid(affine, [rows, 1, size, size], align_corners=False)
    knots = 2.0 * u[:, _PLAIN:].reshape(rows, 2, _KNOTS, _KNOTS) - 1.0
    field = functional.interpolate(knots, (size, size), mode="bicubic", align_corners=True)
    grid = grid + 2.0 * BEND * field.permute(0, 2, 3, 1)
    return functional.grid_sample(images_B1SS, grid, padding_mode="border", align_corners=False)


def _blurred(images_B1SS: Tensor, degrees_B: Tensor, size: int) -> Tensor:
    """Gaussian blur of 0 to _BLURS - 1 degrees; a kernel a degree, so that a batch takes few convolutions."""
    out = images_B1SS.clone()
    for degree in range(1, _BLURS):
        chosen = degrees_B == degree
        if chosen.any():
            out[chosen] = blurred(images_B1SS[chosen], BLUR_SHARE * size * degree / (_BLURS - 1))
    return out


def blurred(images_B1SS: Tensor, deviation_px: float) -> Tensor:
    """A Gaussian blur with edges continued."""
    reach = max(1, math.ceil(3.0 * deviation_px))
    offsets = torch.arange(-reach, reach + 1, dtype=images_B1SS.dtype, device=images_B1SS.device)
    kernel = torch.exp(-0.5 * (offsets / deviation_px) ** 2)
    kernel = kernel / kernel.sum()
    padded = functional.pad(images_B1SS, (reach,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel.reshape(1, 1, 1, -1)), kernel.reshape(1, 1, -1, 1))
