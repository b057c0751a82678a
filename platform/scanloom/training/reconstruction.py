"""The autoencoder's training, from nothing or given weights: reconstruction, some KL, later a patch discriminator.

The recipe of latent diffusion (Rombach et al. 2022, appendix G) without its pretrained perceptual loss: an L1 loss on
pixels and on their finite differences keeps edges, and the discriminator (Isola et al. 2017; hinge loss, Lim & Ye
2017) puts back the texture that L1 averages away.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed
from diffusers import AutoencoderKL
from monai.metrics.regression import compute_ssim_and_cs
from monai.networks.nets import PatchDiscriminator
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional

from scanloom.artefact import Artefact, FileEntry, plan_digest
from scanloom.errors import ArtefactError, RecipeError
from scanloom.heap import keep_freed_memory
from scanloom.models.autoencoder import build_autoencoder, latent_shape, load_autoencoder, moments
from scanloom.recipe import Autoencoder, Recipe
from scanloom.recipe_denoiser import TextDenoiser
from scanloom.shards.writer import png_pixels
from scanloom.store import Store
from scanloom.training.data_parallel import bare, mean_over_workers, report_checkpoint, restore
from scanloom.training.draws import draw, positions, rows_at
from scanloom.training.given_weights import autoencoder_digest, fetch_autoencoder
from scanloom.training.views import full_range

HELD_OUT_ROWS = 128
EVALUATION_BATCH = 16
REPORT_EVERY_STEPS = 20
CHECKPOINT = "autoencoder.pt"
SSIM_WINDOW_PX = 11
# Where it is trained does not change what comes out.
_PLACE = {"workers", "cpus_per_worker", "use_gpu", "max_failures", "checkpoint_every_steps"}


class AutoencoderJob(BaseModel):
    """What a worker is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Autoencoder
    seed: int
    size_px: int
    autoencoder_uri: str

    @classmethod
    def of(cls, recipe: Recipe, corpus: Artefact) -> Self:
        """The job of a recipe on a corpus."""
        size_px = corpus.manifest.statistics["size_px"]
        uri = recipe.uri("autoencoder")
        return cls(recipe=recipe.autoencoder, seed=recipe.seed, size_px=size_px, autoencoder_uri=uri)


def plan_autoencoder(recipe: Recipe, corpus: Artefact) -> tuple[str | None, str]:
    """From where an autoencoder is taken as it is (None: it is trained), and the digest of what decides it."""
    section, denoiser = recipe.autoencoder, recipe.finetune.denoiser
    given = section.path
    if given is None and section.start_from is None and isinstance(denoiser, TextDenoiser):
        given = denoiser.weights
    started = section.start_from and autoencoder_digest(section.start_from)
    told = section.model_dump(mode="json", exclude=_PLACE)
    return given, plan_digest("autoencoder", corpus.digest, recipe.seed, told, given, started)


class Reconstruction(nn.Module):
    """Encode, sample, decode as one forward pass, which data parallelism needs."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels_B1HW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction [B, 1, H, W], posterior mean and log-variance [B, C, h, w], float32."""
        mean, logvar = moments(self.vae, pixels_B1HW)
        return _grey(self.vae, mean + torch.exp(0.5 * logvar) * noise_BCHW), mean, logvar


@dataclass
class State:
    """The networks and optimizers of a run."""

    model: nn.Module
    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    step: int = 0

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.model, self.discriminator

    @property
    def vae(self) -> AutoencoderKL:
        vae: AutoencoderKL = bare(self.model).vae
        return vae


def train_autoencoder(config: dict[str, Any]) -> dict[str, Any]:
    """Train an autoencoder and write it, in diffusers layout under `vae/`, into the store.

    `config` is an AutoencoderJob as a dict; the Ray Train datasets `train` and `validation` hold corpus rows. Returns
    the last metrics, with `reconstruction_error` of held-out scans, what it was of given weights under names with
    `start_` before them, and from worker 0 the written files as `files`; or as `refused` that the loss, the error or
    a weight is no longer finite, before a checkpoint is overwritten.
    """
    try:
        return _train(AutoencoderJob.model_validate(config))
    except RecipeError as error:
        return {"refused": str(error)}


def _train(job: AutoencoderJob) -> dict[str, Any]:
    recipe = job.recipe
    torch.set_num_threads(recipe.cpus_per_worker)
    if not recipe.use_gpu:
        keep_freed_memory()
    device = ray.train.torch.get_device()
    scans = _stream("train", job.size_px)[: recipe.max_scans]
    held_out = _stream("validation", job.size_px)[:HELD_OUT_ROWS]
    state = _initial(job)
    before = _start_error(state.vae, held_out) if recipe.start_from else {}
    metrics = restore(CHECKPOINT, _parts(state))
    state.step = metrics.get("step", 0)
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
        mean_loss = mean_over_workers(loss)
        _require_finite({"loss": mean_loss}, state, recipe)
        rate = (state.step - resumed_at) * recipe.batch_size / (time.monotonic() - started)
        metrics = before | {"step": state.step, "loss": mean_loss, "images_per_s": rate}
        if saving:
            metrics |= reconstruction_error(state.vae, held_out)
            _require_finite(metrics, state, recipe)
            report_checkpoint(CHECKPOINT, _parts(state), metrics, rank)
        else:
            ray.train.report(metrics)
    # Also where a resumed run finds all its steps done: what it had written may be gone.
    return metrics | {"files": [entry.model_dump() for entry in _release(job, state, scans, rank)]}


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, scans_NHW: Tensor) -> dict[str, float]:
    """How far scans in [-1, 1] are from what comes back of them through the latents' means.

    `psnr_db` in dB, `l1` as a share of the full range, and `ssim`, the mean structural similarity (Wang et al. 2004,
    with its Gaussian window of 11 pixels), 1 for equal scans.
    """
    squared, absolute, similar = [], [], []
    for part in scans_NHW.split(EVALUATION_BATCH):
        pixels = _pixels(part).to(vae.device)
        restored = _grey(vae, moments(vae, pixels)[0]).clamp(-1, 1)
        error = (restored - pixels) / 2
        squared.append(error.square().flatten(1).mean(1))
        absolute.append(error.abs().flatten(1).mean(1))
        similar.append(_ssim(restored, pixels))
    return {
        "psnr_db": float(-10 * torch.log10(torch.cat(squared).mean())),
        "l1": float(torch.cat(absolute).mean()),
        "ssim": float(torch.cat(similar).mean()),
    }


def _start_error(vae: AutoencoderKL, scans_NHW: Tensor) -> dict[str, float]:
    return {f"start_{name}": value for name, value in reconstruction_error(vae, scans_NHW).items()}


def _ssim(a_B1HW: Tensor, b_B1HW: Tensor) -> Tensor:
    window_px = min(SSIM_WINDOW_PX, (min(a_B1HW.shape[-2:]) - 1) | 1)
    a_B1HW, b_B1HW = (images * 0.5 + 0.5 for images in (a_B1HW, b_B1HW))  # it is defined from 0 up
    similar, _ = compute_ssim_and_cs(
        a_B1HW, b_B1HW, spatial_dims=2, kernel_size=(window_px,) * 2, kernel_sigma=(1.5, 1.5), data_range=1.0
    )
    return similar.flatten(1).mean(1)


def _initial(job: AutoencoderJob) -> State:
    recipe = job.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        discriminator: nn.Module = PatchDiscriminator(
            spatial_dims=2, in_channels=1, channels=32, num_layers_d=2, norm=("GROUP", {"num_groups": 8})
        )
    model = ray.train.torch.prepare_model(Reconstruction(_start(job)))
    discriminator = ray.train.torch.prepare_model(discriminator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return State(
        model,
        discriminator,
        torch.optim.AdamW(trained, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.AdamW(discriminator.parameters(), recipe.learning_rate / 2, betas=(0.5, 0.9), weight_decay=0.0),
    )


def _start(job: AutoencoderJob) -> AutoencoderKL:
    recipe = job.recipe
    if recipe.start_from is None:
        return build_autoencoder(recipe, job.size_px, job.seed)
    with tempfile.TemporaryDirectory(prefix="scanloom-autoencoder-") as folder:
        vae = load_autoencoder(fetch_autoencoder(recipe.start_from, Path(folder)), recipe.start_from)
    vae.train().requires_grad_(True)
    if recipe.decoder_only:
        for encoding in (vae.encoder, vae.quant_conv):
            if encoding is not None:
                encoding.requires_grad_(False)
    return vae


def _train_step(state: State, recipe: Autoencoder, pixels: Tensor, noise: Tensor) -> Tensor:
    adversarial = recipe.adversarial_weight > 0 and state.step >= recipe.adversarial_from_step
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.learning_rate * _rate_factor(recipe, state.step)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        reconstructed, mean, logvar = state.model(pixels, noise)
        loss: Tensor = _reconstruction_loss(reconstructed, pixels)
        loss = loss + recipe.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        total = loss
        if adversarial:
            # The bare discriminator: this pass must not touch its gradients' reduction.
            verdict = bare(state.discriminator).requires_grad_(False)(reconstructed)[-1]
            total = loss - recipe.adversarial_weight * verdict.float().mean()
    _update(state.optimizer, state.model, total)
    if adversarial:
        bare(state.discriminator).requires_grad_(True)
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
    scans = np.stack(
        [full_range(png_pixels(image["bytes"])).astype(np.float16) for image in table["image"].to_pylist()]
    )
    if scans.shape[1:] != (size_px, size_px):
        raise ArtefactError(f"the corpus holds scans of {scans.shape[1:]}, expected {size_px} x {size_px}")
    return torch.from_numpy(scans)


def _pixels(scans_BHW: Tensor) -> Tensor:
    return scans_BHW[:, None].float()


def _grey(vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    """What the decoder makes of latents as they were encoded, [B, 1, H, W] float32 in about [-1, 1]."""
    painted: Tensor = vae.decode(latents_BCHW).sample
    return painted.float().mean(1, keepdim=True)


def _require_finite(metrics: Mapping[str, float], state: State, recipe: Autoencoder) -> None:
    """The same on every worker: losses are averaged over them, and weights are equal."""
    what = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
    if what is None and not all(bool(p.isfinite().all()) for n in state.networks for p in n.parameters()):
        what = "a weight"
    if what:
        raise RecipeError(
            f"autoencoder: {what} is no number at step {state.step}; lower autoencoder.learning_rate "
            f"(now {recipe.learning_rate:g})"
        )


def _release(job: AutoencoderJob, state: State, scans: Tensor, rank: int) -> list[FileEntry]:
    if rank != 0:
        return []
    vae = state.vae
    # A pretrained denoiser knows its own latents' scale.
    if job.recipe.start_from is None:
        with torch.no_grad():
            parts = scans[:512].split(EVALUATION_BATCH)
            mean = torch.cat([moments(vae, _pixels(part).to(vae.device))[0] for part in parts])
        vae.register_to_config(scaling_factor=float(1.0 / mean.std()), shift_factor=float(mean.mean()))
    # diffusers notes the folder that weights were loaded from: a scratch folder, another one at every run.
    vae.register_to_config(_name_or_path="")
    with tempfile.TemporaryDirectory(prefix="scanloom-autoencoder-") as folder:
        vae.save_pretrained(Path(folder) / "vae")
        stored = Store(job.autoencoder_uri).put_folder(Path(folder))
    return [FileEntry.of(file) for file in stored]


def _parts(state: State) -> dict[str, Any]:
    return {
        "model": bare(state.model),
        "discriminator": bare(state.discriminator),
        "optimizer": state.optimizer,
        "discriminator_optimizer": state.discriminator_optimizer,
    }
