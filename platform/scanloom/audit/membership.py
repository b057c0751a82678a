"""Whether a denoiser betrays what it was trained on: an attack that knows a scan, and asks how well it is denoised.

What was trained on is denoised with less loss (Carlini et al. 2023, section 5.3; Matsumoto et al. 2023). Members are
training scans, the others scans of held-out patients; each timestep is an attack of its own, and the mean over all is
one more.

Legend of shape suffixes: N images, B of a batch, T timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scanloom.audit.intervals import Estimate, auc, percentile, sensitivity
from scanloom.audit.intervals import multiplicities as resamples
from scanloom.models.noise_schedule import NoiseSchedule
from scanloom.sampling.noise import gaussian_noise
from scanloom.training.objectives import add_noise, target
from scanloom.training.probes import Conditions, Denoise

TIMESTEPS = (50, 100, 200, 300, 400, 600, 800)
FALSE_POSITIVES = 0.01
_BATCH = 32
_REPLICATES = 200


@torch.no_grad()
def losses(
    denoise: Denoise,
    schedule: NoiseSchedule,
    latents_NCHW: Tensor,
    conditions: Conditions,
    *,
    seed: int,
    timesteps: Sequence[int] = TIMESTEPS,
    noises: int = 1,
    device: torch.device | str = "cpu",
) -> NDArray[np.float64]:
    """Mean squared error [N, T] of what the denoiser predicts of each latent at each timestep, over `noises` draws.

    Every latent gets the same noise, so that no image is easier by chance.
    """
    out = np.zeros((len(latents_NCHW), len(timesteps)))
    shape = latents_NCHW.shape[1:]
    for draw in range(noises):
        for column, timestep in enumerate(timesteps):
            noise_CHW = torch.from_numpy(gaussian_noise(seed, draw * len(timesteps) + column, shape)).to(device)
            for start in range(0, len(latents_NCHW), _BATCH):
                rows = slice(start, start + _BATCH)
                latents = latents_NCHW[rows].float().to(device)
                noise = noise_CHW.expand_as(latents)
                times_B = torch.full((len(latents),), timestep, dtype=torch.int64, device=device)
                alphas, sigmas = (
                    table[timestep].float().to(device).expand(len(latents))
                    for table in (schedule.alphas_T, schedule.sigmas_T)
                )
                told = denoise(
                    add_noise(latents, noise, alphas, sigmas), times_B,
                    {name: value[rows].to(device) for name, value in conditions.items()},
                ).float()  # fmt: skip
                wanted = target(schedule.prediction_type, latents, noise, alphas, sigmas)
                out[rows, column] += (told - wanted).square().flatten(1).mean(1).cpu().double().numpy() / noises
    return out


@dataclass(frozen=True)
class Attack:
    """How well loss tells members from others."""

    name: str
    """The timestep, or `mean`."""
    auc: Estimate
    """0.5 where nothing is betrayed."""
    tpr: Estimate
    """Share of members found where at most one in a hundred others is taken for one; 0.01 where nothing is."""


def attacks(
    members_NT: NDArray[np.float64],
    others_NT: NDArray[np.float64],
    member_patients: Sequence[str],
    other_patients: Sequence[str],
    timesteps: Sequence[int] = TIMESTEPS,
) -> tuple[Attack, ...]:
    """The attack at each timestep, then by the mean of losses, each in units of the others' spread; by patients."""
    centre, spread = others_NT.mean(axis=0), np.maximum(others_NT.std(axis=0), 1e-12)
    scores = [-(losses_NT - centre) / spread for losses_NT in (members_NT, others_NT)]
    columns = [(f"timestep {timestep}", *(score[:, k] for score in scores)) for k, timestep in enumerate(timesteps)]
    columns.append(("mean", *(score.mean(axis=1) for score in scores)))
    groups = (member_patients, other_patients)
    return tuple(
        Attack(name, _area(ours, theirs, groups), sensitivity(ours, theirs, FALSE_POSITIVES, groups=groups))
        for name, ours, theirs in columns
    )


def _area(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], groups: tuple[Sequence[str], Sequence[str]]
) -> Estimate:
    """DeLong's interval where every patient has one scan, else that of a bootstrap over patients."""
    plain = auc(ours, theirs)
    if all(len(set(names)) == len(names) for names in groups):
        return plain
    above = (ours[:, None] > theirs[None, :]) + 0.5 * (ours[:, None] == theirs[None, :])
    mine, other = (resamples(names, _REPLICATES, seed) for seed, names in enumerate(groups))
    found = np.einsum("rm,mn,rn->r", mine, above, other, optimize=True) / (mine.sum(1) * other.sum(1))
    return percentile(plain.value, found)
