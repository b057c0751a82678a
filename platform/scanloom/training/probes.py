"""What a denoiser has learned, looked at while it trains: held-out loss by timestep, samples, and copying.

Everything takes plain tensors and callables, so that it works under any ZeRO stage. Under ZeRO-3 every worker must call
the denoiser equally often: give each as many rows as the others.

Legend of shape suffixes: N samples or rows, B batch, R reference latents, M values of one latent.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from scanloom.errors import RecipeError
from scanloom.models.noise_schedule import TRAIN_TIMESTEPS, NoiseSchedule
from scanloom.sampling.noise import gaussian_noise, permutation
from scanloom.sampling.solvers import advance, trajectory

BUCKETS = 10
Conditions = Mapping[str, Tensor]
Denoise = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(latents float32 [B, C, H, W], timesteps int64 [B], conditions) -> what the denoiser predicts [B, C, H, W]."""

# Values of a block of references in float32: 64 MB.
_BLOCK_VALUES = 2**24
_TILE_PX, _CAPTION_PX, _GAP = 128, 12, 8


def bucket_names(buckets: int) -> list[str]:
    """Names of equal parts of the schedule by their timesteps, such as `t000-099`; they sort in their order."""
    edges = [TRAIN_TIMESTEPS * k // buckets for k in range(buckets + 1)]
    return [f"t{low:03d}-{high - 1:03d}" for low, high in itertools.pairwise(edges)]


def held_out_by_timestep(losses_N: Tensor, timesteps_N: Tensor) -> list[float | None]:
    """Mean loss in each of BUCKETS equal parts of the schedule, None where no row fell."""
    bucket_N = timesteps_N.cpu() * BUCKETS // TRAIN_TIMESTEPS
    sums = torch.zeros(2, BUCKETS, dtype=torch.float64)
    sums[0].index_add_(0, bucket_N, losses_N.detach().cpu().double())
    sums[1].index_add_(0, bucket_N, torch.ones(len(bucket_N), dtype=torch.float64))
    total, count = sums.tolist()
    return [t / c if c else None for t, c in zip(total, count, strict=True)]


@torch.no_grad()
def draw_samples(
    denoise: Denoise,
    schedule: NoiseSchedule,
    conditions: Conditions,
    numbers: Sequence[int],
    shape: Sequence[int],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    steps: int = 20,
    guidance: float = 1.0,
    null: Conditions | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Normalised latents float32 [N, C, H, W] on the CPU, one for each row of the conditions.

    Image k starts from the noise of (seed, numbers[k]), so that it does not depend on how images are shared out. Calls
    the denoiser `steps` times a batch, and as often again with the conditions `null` where guidance is not 1.
    """
    if guidance != 1.0 and null is None:
        raise RecipeError(f"guidance {guidance:g} needs the null condition")
    null = None if guidance == 1.0 else null
    parts = []
    for start in range(0, len(numbers), batch_size):
        rows = slice(start, start + batch_size)
        noise = np.stack([gaussian_noise(seed, number, shape) for number in numbers[rows]])
        guided = _guided(denoise, _rows(conditions, rows, device), _rows(null, rows, device), guidance)
        parts.append(_solve(guided, schedule, torch.from_numpy(noise).to(device), steps).cpu())
    return torch.cat(parts)


def sample_grid(images_N1HW: Tensor, captions: Sequence[str], *, columns: int = 8) -> bytes:
    """A PNG of images in [0, 1], each above its caption, in rows of `columns`."""
    font = ImageFont.load_default(_CAPTION_PX)
    lines = [_wrapped(caption, font) for caption in captions]
    pitch = _TILE_PX + (_CAPTION_PX + 3) * max((len(some) for some in lines), default=0) + _GAP
    columns = min(columns, len(captions))
    size = (_GAP + columns * (_TILE_PX + _GAP), _GAP + math.ceil(len(captions) / columns) * pitch)
    sheet = Image.new("L", size, 255)
    draw = ImageDraw.Draw(sheet)
    for number, (image_HW, some) in enumerate(zip(images_N1HW[:, 0], lines, strict=True)):
        left, top = _GAP + number % columns * (_TILE_PX + _GAP), _GAP + number // columns * pitch
        sheet.paste(_tile(image_HW), (left, top))
        draw.multiline_text((left, top + _TILE_PX + 1), "\n".join(some), fill=0, font=font, spacing=3)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@dataclass(frozen=True)
class CopyRate:
    """How often samples lie nearer to training latents than to held-out ones."""

    rate: float
    """Share of the samples; 0.5 without memorisation, 1 where every sample is a copy."""
    low: float
    high: float
    """Its 95 % interval."""
    distance_ratio: float
    """Median of the distance to the nearest training latent over that to the nearest held-out one; 1 without."""
    references: int
    """Latents of each kind that were compared with."""

    def metrics(self) -> dict[str, float]:
        """As a report names them."""
        return {
            "copy_rate": self.rate,
            "copy_rate_low": self.low,
            "copy_rate_high": self.high,
            "copy_distance_ratio": self.distance_ratio,
            "copy_references": self.references,
        }


def reference_rows(train: int, held_out: int, *, seed: int = 0, limit: int = 8192) -> tuple[Tensor, Tensor]:
    """Rows int64 [R] of a training and of a held-out set of these sizes: equally many, at most `limit`, by `seed`.

    All of the smaller set, and all of both where they are equal.
    """
    size = min(train, held_out, limit)
    return _subset(train, size, seed), _subset(held_out, size, seed)


@torch.no_grad()
def copy_rate(samples: Tensor, train: Tensor, held_out: Tensor, *, seed: int = 0, limit: int = 8192) -> CopyRate:
    """Whether samples [N, ...] are nearer to training latents [R, ...] than to as many held-out ones, by L2 distance.

    The share of synthetic records nearer to the training set than to a held-out set of the same distribution is 0.5
    for a generator that has memorised nothing (Platzer & Reutterer 2021); copies raise it.

    Both sets are cut to `reference_rows`, so that neither has more chances. So of a larger training set only copies of
    that part can be found. All three are in the same scale; draw the samples on conditions of those rows, of both sets
    alike, or of none.

    The interval is Wilson's (1927) on an effective number of samples, N**2 / sum of k_r**2 (Kish 1965), where k_r
    samples have reference r as their nearest: samples that share a nearest latent are one observation of which set it
    is in. In high dimensions few latents can be nearest to most samples, and a plain binomial interval would be far
    too narrow.

    A figure to choose a checkpoint by, not evidence of privacy: what it cannot see, such as copies that were changed, a
    membership attack may.
    """
    train_R, held_out_R = reference_rows(len(train), len(held_out), seed=seed, limit=limit)
    size = len(train_R)
    if size == 0 or len(samples) == 0:
        raise RecipeError("copy rate: needs at least one sample, one training latent and one held-out latent")
    flat_NM = samples.flatten(1).float()
    to_train_N, train_N = _nearest(flat_NM, train[train_R])
    to_held_out_N, held_out_N = _nearest(flat_NM, held_out[held_out_R])
    nearer_N = (to_train_N < to_held_out_N).double() + 0.5 * (to_train_N == to_held_out_N)
    nearest_N = torch.where(to_train_N < to_held_out_N, train_N, held_out_N + size)
    times_nearest = torch.bincount(nearest_N).double()
    rate = float(nearer_N.mean())
    low, high = _wilson(rate, len(samples) ** 2 / float(times_nearest.square().sum()))
    # Twice the smallest normal number: an exact copy in both sets has ratio 1.
    tiny = 2 * torch.finfo(torch.float32).tiny
    ratio = float(((to_train_N + tiny) / (to_held_out_N + tiny)).median())
    return CopyRate(rate, low, high, ratio, size)


def _solve(
    guided: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, noise_BCHW: Tensor, steps: int
) -> Tensor:
    path = trajectory("dpmpp-2m", schedule, steps)
    latents, data = noise_BCHW, torch.zeros_like(noise_BCHW)
    for timestep, row in zip(path.timesteps, path.coefficients, strict=True):
        timesteps_B = torch.full((len(latents),), int(timestep), dtype=torch.int64, device=latents.device)
        coefficients = torch.from_numpy(row).to(latents).expand(len(latents), -1)
        latents, data = advance(latents, guided(latents, timesteps_B), data, coefficients)
    return latents


def _guided(
    denoise: Denoise, conditions: Conditions, null: Conditions, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser under classifier-free guidance (Ho & Salimans 2022, eq. 6 with w = guidance - 1)."""

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        told = denoise(latents, timesteps, conditions).float()
        if not null:
            return told
        untold = denoise(latents, timesteps, null).float()
        return untold + guidance * (told - untold)

    return predict


def _rows(conditions: Conditions | None, rows: slice, device: torch.device | str) -> Conditions:
    return {name: value[rows].to(device) for name, value in (conditions or {}).items()}


def _subset(rows: int, size: int, seed: int) -> Tensor:
    return torch.from_numpy(np.sort(permutation(seed, rows, rows)[:size]))


def _nearest(samples_NM: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Distance float32 [N] to the nearest reference and its row int64 [N]."""
    rows_N = torch.zeros(len(samples_NM), dtype=torch.int64)
    least_N = torch.full((len(samples_NM),), math.inf)
    block = max(1, _BLOCK_VALUES // samples_NM.shape[1])
    for start in range(0, len(references), block):
        part_RM = references[start : start + block].flatten(1).to(samples_NM)
        # |s - r|**2 less |s|**2, which is the same for all r: enough to choose by, and a matrix product.
        value_N, row_N = (part_RM.square().sum(1) - 2.0 * samples_NM @ part_RM.T).min(1)
        nearer_N = value_N < least_N
        rows_N[nearer_N], least_N[nearer_N] = row_N[nearer_N] + start, value_N[nearer_N]
    # Once more by differences: the product has lost the digits of a small distance.
    return (samples_NM - references[rows_N].flatten(1).to(samples_NM)).norm(dim=1), rows_N


def _wilson(rate: float, count: float) -> tuple[float, float]:
    z = 1.959964
    middle, spread = rate + z * z / (2 * count), z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def _tile(image_HW: Tensor) -> Image.Image:
    grey = (image_HW.detach().cpu().float().clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy()
    scale = _TILE_PX / max(grey.shape)
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    return Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > _TILE_PX and lines[-1]:
            lines.append("")
            longer = word
        while font.getlength(longer) > _TILE_PX and len(longer) > 1:
            fits = next(n for n in range(len(longer) - 1, 0, -1) if n == 1 or font.getlength(longer[:n]) <= _TILE_PX)
            lines[-1:] = [longer[:fits], ""]
            longer = longer[fits:]
        lines[-1] = longer
    return lines
