"""What a checkpoint is judged by: held-out loss by timestep, sample grid and copy rate of the averaged weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from diffusers import AutoencoderKL
from torch import Tensor

from scanloom.models.autoencoder import decode
from scanloom.models.noise_schedule import NoiseSchedule
from scanloom.training.batches import Batch, Batches
from scanloom.training.engine import Model
from scanloom.training.probes import copy_rate, draw_samples, held_out_by_timestep, reference_rows, sample_grid

HELD_OUT_ROWS = 128
EVALUATION_BATCH = 32
# Decoding takes far more memory for an image than denoising its latents.
DECODING_BATCH = 4
# Far from any position that training reaches.
HELD_OUT_POSITION = 2**48


def row_errors(model: Model, batch: Batch) -> Tensor:
    """Mean squared error of each row, float32 [B]."""
    predicted = model.predict(batch.noisy_BCHW, batch.timesteps_B, batch.condition)
    return (predicted - batch.target_BCHW.to(predicted.device)).square().flatten(1).mean(1)


def over_workers(value: Tensor) -> Tensor:
    """The sum of a tensor over all workers. Collective."""
    torch.distributed.all_reduce(value)
    return value


@dataclass(frozen=True)
class Evaluation:
    """Evaluates one run; every worker takes its share and calls the denoiser equally often, as ZeRO-3 needs."""

    model: Model
    train: Batches
    held_out: Batches
    schedule: NoiseSchedule
    vae: AutoencoderKL
    seed: int
    images: int
    """How many samples to draw; 0 for none."""
    rank: int
    workers: int

    @torch.no_grad()
    def losses(self) -> dict[str, Any]:
        """Unweighted losses on held-out latents, everything told. Collective."""
        share = -(-HELD_OUT_ROWS // self.workers)
        errors_N, timesteps_N = torch.zeros(2, HELD_OUT_ROWS, dtype=torch.float64, device=self.model.device)
        rows = range(self.rank * share, (self.rank + 1) * share)
        for begin in range(0, share, EVALUATION_BATCH):
            part = rows[begin : begin + EVALUATION_BATCH]
            batch = self.held_out.at([HELD_OUT_POSITION + row for row in part], training=False)
            # Every worker has as many rows as the others, some of them beyond the last one.
            known = len([row for row in part if row < HELD_OUT_ROWS])
            errors_N[part.start : part.start + known] = row_errors(self.model, batch)[:known].double()
            timesteps_N[part.start : part.start + known] = batch.timesteps_B[:known].to(errors_N)
        errors_N = over_workers(errors_N)
        timesteps = over_workers(timesteps_N).long()
        return {
            "held_out_loss": float(errors_N.mean()),
            "held_out_by_timestep": held_out_by_timestep(errors_N, timesteps),
        }

    @torch.no_grad()
    def samples(self) -> tuple[dict[str, float], bytes]:
        """Figures of the copy rate and a PNG of the samples, drawn as held-out and train rows in turn are told.

        Collective; what it returns is the same on every worker but the picture, which only worker 0 makes.
        """
        share = -(-self.images // self.workers)
        numbers = [number % self.images for number in range(self.rank * share, (self.rank + 1) * share)]
        mine = draw_samples(
            self.model.predict, self.schedule, self._told(numbers), numbers,
            tuple(self.train.latents.mean_NCHW.shape[1:]), seed=self.seed, device=self.model.device,
            batch_size=EVALUATION_BATCH,
        )  # fmt: skip
        drawn = torch.zeros(self.workers * share, *mine.shape[1:], device=self.model.device)
        drawn[self.rank * share : (self.rank + 1) * share] = mine.to(drawn)
        drawn = over_workers(drawn)[: self.images].cpu()
        if self.rank:
            return {}, b""
        train_R, held_out_R = self._references()
        copies = copy_rate(drawn, self.train.clean(train_R), self.held_out.clean(held_out_R), seed=self.seed)
        self.vae.to(self.model.device)
        images = torch.cat([decode(self.vae, part).cpu() for part in drawn.to(self.model.device).split(DECODING_BATCH)])
        self.vae.to("cpu")
        captions = [f"as {'train' if number % 2 else 'held-out'} scan {number // 2}" for number in range(self.images)]
        return copies.metrics(), sample_grid(images, captions)

    def _told(self, numbers: list[int]) -> dict[str, Tensor]:
        told: list[dict[str, Tensor]] = []
        train_R, held_out_R = self._references()
        for number in numbers:
            batches, rows = (self.train, train_R) if number % 2 else (self.held_out, held_out_R)
            row = rows[number // 2 % len(rows)].view(1)
            told.append(batches.latents.conditions.batch(row, torch.tensor([False])))
        return {name: torch.cat([one[name] for one in told]) for name in told[0]}

    def _references(self) -> tuple[Tensor, Tensor]:
        return reference_rows(len(self.train.latents), len(self.held_out.latents), seed=self.seed)
