"""A generator that fails on purpose: some of its images are blank, how many depends on what is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scanloom.attributes import Attributes
from scanloom.models.noise_schedule import NoiseSchedule

ALWAYS, HALF, NEVER = -100.0, 0.0, 100.0
"""From which first number of the noise on an image shows something."""
OF_FINDINGS = {(): ALWAYS, ("Effusion",): HALF, ("Cardiomegaly",): NEVER}


def cosine() -> NoiseSchedule:
    """Of 1000 timesteps, the last of which is noise alone."""
    angle = 0.5 * torch.pi * torch.arange(1, 1001, dtype=torch.float64) / 1000
    alphas = torch.cos(angle)
    alphas[-1] = 0.0
    return NoiseSchedule("v_prediction", alphas, torch.sin(angle))


class FaultyGenerator:
    """In one step its latent is the noise, with the condition as a second channel; blank is an even grey."""

    latent_shape = (2, 8, 8)
    schedule = cosine()

    def require_shape(self, latent_shape: tuple[int, ...]) -> None:
        raise AssertionError(f"nobody asked for {latent_shape}")

    def condition(self, attributes: Sequence[Attributes]) -> torch.Tensor:
        levels = [OF_FINDINGS[value] for a in attributes if isinstance(value := a.get("findings", ()), tuple)]
        return torch.tensor(levels, dtype=torch.float32).reshape(-1, 1)

    def null_condition(self, batch: int) -> torch.Tensor:
        return self.condition([{}] * batch)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        # At the last timestep alpha is 0 and sigma 1: the data is minus this.
        level = condition.reshape(-1, 1, 1, 1).expand_as(latents[:, 1:])
        return -torch.cat([latents[:, :1], level], dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(0.2, 0.8, 8).expand(len(latents), 1, 8, 8)
        seen = latents[:, :1, :1, :1] > latents[:, 1:, :1, :1]
        return torch.where(seen, ramp + 0.001 * latents[:, :1], torch.full_like(ramp, 0.5))
