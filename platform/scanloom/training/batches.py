"""The batch of any position of a run, made from latents in memory, ahead of its use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scanloom.models.autoencoder import normalise
from scanloom.models.noise_schedule import NoiseSchedule
from scanloom.recipe import Finetune
from scanloom.training.draws import draw, rows_at
from scanloom.training.latents import Latents
from scanloom.training.objectives import add_noise, loss_weight, target, timesteps


@dataclass(frozen=True)
class Batch:
    """Inputs of one micro-batch of B rows."""

    noisy_BCHW: Tensor
    timesteps_B: Tensor
    condition: Mapping[str, Tensor]
    """What the family's forward takes."""
    target_BCHW: Tensor
    weight_B: Tensor

    def map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor moved."""
        condition = {name: move(value) for name, value in self.condition.items()}
        return Batch(
            move(self.noisy_BCHW), move(self.timesteps_B), condition, move(self.target_BCHW), move(self.weight_B)
        )


class Batches:
    """Makes the batch of any positions of the run."""

    def __init__(
        self,
        recipe: Finetune,
        seed: int,
        latents: Latents,
        vae: AutoencoderKL,
        schedule: NoiseSchedule,
        attributes: int,
    ) -> None:
        self._recipe = recipe
        self._seed = seed
        self.latents = latents
        self._vae = vae
        self._schedule = schedule
        self._alphas_T, self._sigmas_T = schedule.alphas_T.float(), schedule.sigmas_T.float()
        self._attributes = attributes

    def clean(self, rows: Tensor) -> Tensor:
        """Normalised means [B, C, H, W] of latents."""
        return normalise(self._vae, self.latents.mean_NCHW[rows].float())

    def at(self, where: Sequence[int], *, training: bool = True) -> Batch:
        """The batch at these positions; without training all is told and timesteps are uniform."""
        recipe, latents = self._recipe, self.latents
        rows = torch.from_numpy(rows_at(where, len(latents), self._seed))
        d = draw(where, tuple(latents.mean_NCHW.shape[1:]), self._attributes + 2, self._seed)
        logvar = latents.logvar_NCHW[rows].float()
        clean = normalise(self._vae, latents.mean_NCHW[rows].float() + torch.exp(0.5 * logvar) * d.posterior_BCHW)
        density = recipe.timestep_density if training else "uniform"
        at_B = timesteps(d.uniform_BU[:, 0], len(self._alphas_T), density)
        alphas_B, sigmas_B = self._alphas_T[at_B], self._sigmas_T[at_B]
        drop_all_B = (d.uniform_BU[:, 1] < recipe.condition_dropout) & training
        drop_BA = (d.uniform_BU[:, 2:] < recipe.attribute_dropout) & training
        kind = self._schedule.prediction_type
        return Batch(
            noisy_BCHW=add_noise(clean, d.noise_BCHW, alphas_B, sigmas_B),
            timesteps_B=at_B,
            condition=latents.conditions.batch(rows, drop_all_B, drop_BA),
            target_BCHW=target(kind, clean, d.noise_BCHW, alphas_B, sigmas_B),
            weight_B=loss_weight(kind, alphas_B, sigmas_B, recipe.min_snr_gamma),
        )


class Ahead:
    """Makes the batches of the next step in a thread while this one trains.

    They are functions of the step alone, so that it does not matter who makes them and when.
    """

    def __init__(self, make: Callable[[int], list[Batch]], steps: int) -> None:
        self._make = make
        self._steps = steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def at(self, step: int) -> list[Batch]:
        """The batches of a step; raises what making them raised."""
        asked, ready = self._next or (-1, Future())
        made = ready.result() if asked == step else self._make(step)
        if step + 1 < self._steps:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return made
