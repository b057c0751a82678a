"""What the denoiser is trained to predict, and how much each timestep counts.

With alpha = sqrt(alphas_cumprod[t]) and sigma = sqrt(1 - alphas_cumprod[t]), a noisy latent is alpha x + sigma n.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["v_prediction", "epsilon"]


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, alphas_cumprod_B: Tensor) -> Tensor:
    """alpha x + sigma n (Ho et al. 2020, eq. 4)."""
    alpha, sigma = _scales(alphas_cumprod_B)
    return alpha * latents_BCHW + sigma * noise_BCHW


def target(
    prediction_type: PredictionType, latents_BCHW: Tensor, noise_BCHW: Tensor, alphas_cumprod_B: Tensor
) -> Tensor:
    """n for epsilon; alpha n - sigma x for v (Salimans & Ho 2022, section 4)."""
    if prediction_type == "epsilon":
        return noise_BCHW
    alpha, sigma = _scales(alphas_cumprod_B)
    return alpha * noise_BCHW - sigma * latents_BCHW


def loss_weight(prediction_type: PredictionType, alphas_cumprod_B: Tensor, gamma: float | None) -> Tensor:
    """Min-SNR weight [B] (Hang et al. 2023, section 3.4); ones without gamma.

    min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v.
    """
    if gamma is None:
        return torch.ones_like(alphas_cumprod_B)
    snr = alphas_cumprod_B / (1.0 - alphas_cumprod_B).clamp_min(1e-12)
    clipped = snr.clamp_max(gamma)
    return clipped / snr.clamp_min(1e-12) if prediction_type == "epsilon" else clipped / (snr + 1.0)


def _scales(alphas_cumprod_B: Tensor) -> tuple[Tensor, Tensor]:
    column = alphas_cumprod_B.view(-1, 1, 1, 1)
    return column.sqrt(), (1.0 - column).sqrt()
