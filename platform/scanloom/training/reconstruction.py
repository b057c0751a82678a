"""The autoencoder's training: reconstruction, a little KL, and a patch discriminator towards the end.

The recipe of latent diffusion (Rombach et al. 2022, appendix G) without its pretrained perceptual loss: an L1 loss on
pixels and on their finite differences keeps edges, and the discriminator (Isola et al. 2017; hinge loss, Lim & Ye
2017) puts back the texture that L1 averages away.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed
from diffusers import AutoencoderKL
from monai.networks.nets import PatchDiscriminator
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional

from scanloom.artefact import FileEntry
from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.autoencoder import build_autoencoder, latent_shape, moments
from scanloom.recipe import Autoencoder
from scanloom.shards.writer import png_pixels
from scanloom.store import Store
from scanloom.training.draws import draw, positions, rows_at

HELD_OUT_ROWS = 128
EVALUATION_BATCH = 16
REPORT_EVERY_STEPS = 20
CHECKPOINT = "autoencoder.pt"


class AutoencoderJob(BaseModel):
    """What a worker is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Autoencoder
    seed: int
    size_px: int
    autoencoder_uri: str


class Reconstruction(nn.Module):
    """Encode, sample, decode as one forward pass, which data parallelism needs."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels_B1HW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction [B, 1, H, W], posterior mean and log-variance [B, C, h, w]."""
        posterior = self.vae.encode(pixels_B1HW).latent_dist
        latents = posterior.mean + posterior.std * noise_BCHW.to(posterior.mean.dtype)
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


@dataclass
class State:
    """The networks and optimizers of a run."""

    model: nn.Module
    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    step: int = 0

    @property
    def vae(self) -> AutoencoderKL:
        vae: AutoencoderKL = _bare(self.model).vae
        return vae


def train_autoencoder(config: dict[str, Any]) -> None:
    """Train an autoencoder and write it, in diffusers layout under `vae/`, into the store.

    `config` is an AutoencoderJob as a dict; the Ray Train datasets `train` and `validation` hold corpus rows. The
    last report carries the written files as `files`, with PSNR (dB) and L1 (share of the full range) on held-out
    scans. Raises RecipeError when the loss is no longer finite.
    """
    job = AutoencoderJob.model_validate(config)
    recipe = job.recipe
    torch.set_num_threads(recipe.cpus_per_worker)
    device = ray.train.torch.get_device()
    scans = _stream("train", job.size_px)[: recipe.max_scans]
    held_out = _stream("validation", job.size_px)[:HELD_OUT_ROWS]
    state = _initial(job)
    metrics = _restore(state)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    started, resumed_at = time.monotonic(), state.step
    while state.step < recipe.steps:
        where = positions(state.step, recipe.batch_size, rank, workers)
        pixels = _pixels(scans[torch.from_numpy(rows_at(where, len(scans), job.seed))]).to(device)
        noise = draw(where, latent_shape(state.vae, job.size_px), 1, job.seed).posterior_BCHW.to(device)
        loss = _train_step(state, recipe, pixels, noise)
        state.step += 1
        saving = state.step % recipe.checkpoint_every_steps == 0 or state.step == recipe.steps
        if not saving and state.step % REPORT_EVERY_STEPS:
            continue
        mean_loss = _mean_over_workers(loss)
        if not math.isfinite(mean_loss):
            raise RecipeError(f"autoencoder loss is {mean_loss} at step {state.step}; lower autoencoder.learning_rate")
        rate = (state.step - resumed_at) * recipe.batch_size / (time.monotonic() - started)
        metrics = {"step": state.step, "loss": mean_loss, "images_per_s": rate}
        if saving:
            metrics |= reconstruction_error(state.vae, held_out)
        if saving and state.step < recipe.steps:
            _report_checkpoint(state, metrics, rank)
        elif not saving:
            ray.train.report(metrics)
    # Also where a resumed run finds all its steps done: what it had written may be gone.
    files = [entry.model_dump() for entry in _release(job, state, scans, rank)]
    _report_checkpoint(state, metrics | {"files": files}, rank)


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, scans_NHW: Tensor) -> dict[str, float]:
    """PSNR in dB and mean absolute error as a share of the full range, of scans in [-1, 1] through the latents."""
    squared, absolute = [], []
    for part in scans_NHW.split(EVALUATION_BATCH):
        pixels = _pixels(part).to(vae.device)
        error = (vae.decode(moments(vae, pixels)[0]).sample.clamp(-1, 1) - pixels) / 2
        squared.append(error.square().flatten(1).mean(1))
        absolute.append(error.abs().flatten(1).mean(1))
    return {
        "psnr_db": float(-10 * torch.log10(torch.cat(squared).mean())),
        "l1": float(torch.cat(absolute).mean()),
    }


def _initial(job: AutoencoderJob) -> State:
    recipe = job.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        discriminator: nn.Module = PatchDiscriminator(
            spatial_dims=2, in_channels=1, channels=32, num_layers_d=2, norm=("GROUP", {"num_groups": 8})
        )
    model = ray.train.torch.prepare_model(Reconstruction(build_autoencoder(recipe, job.size_px, job.seed)))
    discriminator = ray.train.torch.prepare_model(discriminator)
    return State(
        model,
        discriminator,
        torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.AdamW(discriminator.parameters(), recipe.learning_rate / 2, betas=(0.5, 0.9), weight_decay=0.0),
    )


def _train_step(state: State, recipe: Autoencoder, pixels: Tensor, noise: Tensor) -> Tensor:
    adversarial = recipe.adversarial_weight > 0 and state.step >= recipe.adversarial_from_step
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.learning_rate * _rate_factor(recipe, state.step)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        reconstructed, mean, logvar = state.model(pixels, noise)
        mean, logvar, reconstructed = mean.float(), logvar.float(), reconstructed.float()
        loss: Tensor = _reconstruction_loss(reconstructed, pixels)
        loss = loss + recipe.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        total = loss
        if adversarial:
            # The bare discriminator: this pass must not touch its gradients' reduction.
            verdict = _bare(state.discriminator).requires_grad_(False)(reconstructed)[-1]
            total = loss - recipe.adversarial_weight * verdict.float().mean()
    _update(state.optimizer, state.model, total)
    if adversarial:
        _bare(state.discriminator).requires_grad_(True)
        _discriminate(state, recipe, pixels, reconstructed.detach())
    return loss.detach()


def _discriminate(state: State, recipe: Autoencoder, real: Tensor, fake: Tensor) -> None:
    with torch.autocast(real.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        verdict_real, verdict_fake = state.discriminator(torch.cat([real, fake]))[-1].float().chunk(2)
    _update(
        state.discriminator_optimizer,
        state.discriminator,
        functional.relu(1.0 - verdict_real).mean() + functional.relu(1.0 + verdict_fake).mean(),
    )


def _update(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _reconstruction_loss(reconstructed: Tensor, pixels: Tensor) -> Tensor:
    error = reconstructed - pixels
    loss: Tensor = error.abs().mean() + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    return loss


def _rate_factor(recipe: Autoencoder, step: int) -> float:
    warm = min(1.0, (step + 1) / max(1, recipe.steps // 20))
    return warm * (0.05 + 0.475 * (1.0 + math.cos(math.pi * step / recipe.steps)))


def _stream(split: str, size_px: int) -> Tensor:
    """Scans [N, H, W] float16 in [-1, 1] of a split, in the order of their ids."""
    shard = ray.train.get_dataset_shard(split)
    if shard is None:
        raise ArtefactError(f"training was given no {split!r} scans")
    batches: Iterable[Any] = shard.iter_batches(batch_size=1024, batch_format="pyarrow")
    tables: list[pa.Table] = [batch for batch in batches if batch.num_rows]
    if not tables:
        raise ArtefactError(f"the corpus holds no {split} scans; prepare more, or change prepare.split")
    table = pa.concat_tables(tables).sort_by("id")
    scans = np.stack([_full_range(png_pixels(image["bytes"])) for image in table["image"].to_pylist()])
    if scans.shape[1:] != (size_px, size_px):
        raise ArtefactError(f"the corpus holds scans of {scans.shape[1:]}, expected {size_px} x {size_px}")
    return torch.from_numpy(scans)


def _full_range(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float16 in [-1, 1]."""
    return (pixels / (np.iinfo(pixels.dtype).max / 2.0) - 1.0).astype(np.float16)


def _pixels(scans_BHW: Tensor) -> Tensor:
    return scans_BHW[:, None].float()


def _mean_over_workers(value: Tensor) -> float:
    value = value.detach().float().clone()
    torch.distributed.all_reduce(value)
    return float(value) / torch.distributed.get_world_size()


def _bare(model: nn.Module) -> Any:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _release(job: AutoencoderJob, state: State, scans: Tensor, rank: int) -> list[FileEntry]:
    if rank != 0:
        return []
    vae = state.vae
    with torch.no_grad():
        parts = scans[:512].split(EVALUATION_BATCH)
        mean = torch.cat([moments(vae, _pixels(part).to(vae.device))[0] for part in parts])
    vae.register_to_config(scaling_factor=float(1.0 / mean.std()), shift_factor=float(mean.mean()))
    with tempfile.TemporaryDirectory(prefix="scanloom-autoencoder-") as folder:
        vae.save_pretrained(Path(folder) / "vae")
        stored = Store(job.autoencoder_uri).put_folder(Path(folder))
    return [FileEntry.of(file) for file in stored]


def _report_checkpoint(state: State, metrics: dict[str, Any], rank: int) -> None:
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory(prefix="scanloom-checkpoint-") as folder:
        saved = {name: part.state_dict() for name, part in _parts(state).items()} | {"metrics": metrics}
        torch.save(saved, Path(folder) / CHECKPOINT)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _restore(state: State) -> dict[str, Any]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {}
    with checkpoint.as_directory() as folder:
        saved = torch.load(Path(folder) / CHECKPOINT, map_location="cpu", weights_only=True)
    for name, part in _parts(state).items():
        part.load_state_dict(saved[name])
    metrics: dict[str, Any] = saved["metrics"]
    state.step = metrics["step"]
    return metrics


def _parts(state: State) -> dict[str, Any]:
    return {
        "model": _bare(state.model),
        "discriminator": _bare(state.discriminator),
        "optimizer": state.optimizer,
        "discriminator_optimizer": state.discriminator_optimizer,
    }
