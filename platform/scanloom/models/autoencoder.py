"""The autoencoder between pixels and latents: diffusers' AutoencoderKL on one grey channel, or on three.

Pretrained ones were made for colour: they are given a grey scan three times, and the mean of what they paint is grey.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scanloom.errors import ArtefactError
from scanloom.recipe import Autoencoder


def build_autoencoder(config: Autoencoder, size_px: int, seed: int) -> AutoencoderKL:
    """A freshly initialised autoencoder; each level after the first halves height and width."""
    levels = len(config.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=math.gcd(16, *config.channels),
            sample_size=size_px,
            mid_block_add_attention=False,
        )


def load_autoencoder(folder: Path, where: str | None = None) -> AutoencoderKL:
    """The autoencoder of a diffusers folder, in evaluation mode. Raises ArtefactError where it is not one.

    `where` names it in errors, where the folder is a copy.
    """
    where = where or str(folder)
    try:
        model = AutoencoderKL.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{where}: not a diffusers autoencoder: {' '.join(str(error).split())[:200]}") from error
    channels = (model.config.in_channels, model.config.out_channels)
    if channels not in ((1, 1), (3, 3)):
        raise ArtefactError(f"{where}: takes {channels[0]} channels and makes {channels[1]}; expected 1 or 3 of both")
    return model.eval().requires_grad_(False)


def latent_shape(autoencoder: AutoencoderKL, size_px: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents of a square scan of `size_px`."""
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    return autoencoder.config.latent_channels, size_px // factor, size_px // factor


def moments(autoencoder: AutoencoderKL, pixels_B1HW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, C, h, w] float32 of the posterior of pixels in [-1, 1]."""
    posterior = autoencoder.encode(pixels_B1HW.expand(-1, autoencoder.config.in_channels, -1, -1)).latent_dist
    return posterior.mean.float(), posterior.logvar.float()


def normalise(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents shifted and scaled to about zero mean and unit variance, as the denoiser sees them."""
    config = autoencoder.config
    normalised: Tensor = (latents - (config.shift_factor or 0.0)) * config.scaling_factor
    return normalised


def decode(autoencoder: AutoencoderKL, normalised_BCHW: Tensor) -> Tensor:
    """Images [B, 1, H, W] float32 in [0, 1] of normalised latents."""
    config = autoencoder.config
    latents = normalised_BCHW / config.scaling_factor + (config.shift_factor or 0.0)
    pixels: Tensor = autoencoder.decode(latents.to(autoencoder.dtype)).sample
    grey_B1HW = pixels.float() if pixels.shape[1] == 1 else pixels.float().mean(1, keepdim=True)
    return (grey_B1HW * 0.5 + 0.5).clamp(0.0, 1.0)
