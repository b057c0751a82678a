"""What the denoiser is trained to predict, and how much each timestep counts.

A noisy latent is alpha x + sigma n, with the alphas and sigmas of models.noise_schedule.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from scanloom.models.noise_schedule import PredictionType

TimestepDensity = Literal["uniform", "logit-normal"]


def timesteps(uniform_B: Tensor, count: int, density: TimestepDensity) -> Tensor:
    """Timesteps int64 [B] in [0, count) of uniform numbers in [0, 1).

    logit-normal: sigmoid of a standard normal number, which favours the middle (Esser et al. 2024, section 3.1).
    """
    if density == "logit-normal":
        uniform_B = torch.special.ndtri(uniform_B.double()).sigmoid()
    return (uniform_B * count).long().clamp_max(count - 1)


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, alphas_B: Tensor, sigmas_B: Tensor) -> Tensor:
    """alpha x + sigma n (Ho et al. 2020, eq. 4; for flow Lipman et al. 2023, eq. 22)."""
    return _column(alphas_B) * latents_BCHW + _column(sigmas_B) * noise_BCHW


def target(
    prediction_type: PredictionType, latents_BCHW: Tensor, noise_BCHW: Tensor, alphas_B: Tensor, sigmas_B: Tensor
) -> Tensor:
    """n for epsilon; alpha n - sigma x for v (Salimans & Ho 2022, section 4); n - x for flow (Liu et al. 2023)."""
    if prediction_type == "epsilon":
        return noise_BCHW
    if prediction_type == "flow":
        return noise_BCHW - latents_BCHW
    return _column(alphas_B) * noise_BCHW - _column(sigmas_B) * latents_BCHW


def loss_weight(prediction_type: PredictionType, alphas_B: Tensor, sigmas_B: Tensor, gamma: float | None) -> Tensor:
    """Min-SNR weight [B] (Hang et al. 2023, section 3.4); ones without gamma.

    The paper weighs the squared error of the clean latent by min(SNR, gamma), SNR = (alpha / sigma)**2. A prediction's
    squared error e is one of the clean latent of e / SNR for epsilon and of sigma**2 e for v and for flow.
    """
    if gamma is None:
        return torch.ones_like(alphas_B)
    snr = alphas_B.square() / sigmas_B.square().clamp_min(1e-12)
    clipped = snr.clamp_max(gamma)
    return clipped / snr.clamp_min(1e-12) if prediction_type == "epsilon" else clipped * sigmas_B.square()


def _column(scale_B: Tensor) -> Tensor:
    return scale_B.view(-1, 1, 1, 1)
