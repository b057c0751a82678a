"""The denoiser's training loop: what every Ray Train worker runs under DeepSpeed."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed
from diffusers import AutoencoderKL
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from scanloom.artefact import FileEntry, open_artefact
from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.attribute_unet import AttributeDenoiser, build_denoiser
from scanloom.models.autoencoder import load_autoencoder, normalise
from scanloom.models.generator import GeneratorCard, alphas_cumprod, load_denoiser, save_generator
from scanloom.recipe import Finetune
from scanloom.store import Store
from scanloom.training.draws import draw, positions, rows_at
from scanloom.training.ema import Ema
from scanloom.training.latents import Latents, collect
from scanloom.training.objectives import add_noise, loss_weight, target

HELD_OUT_ROWS = 128
EVALUATION_BATCH = 32
# Far from any position that training reaches.
HELD_OUT_POSITION = 2**48
CHECKPOINT = "state"


class FinetuneJob(BaseModel):
    """What a worker is told; everything else it reads from the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Finetune
    seed: int
    card: GeneratorCard
    """The card of the generator to be made; `trained_steps` is the number of steps to reach."""
    autoencoder_uri: str
    generator_uri: str


@dataclass(frozen=True)
class Batch:
    """Inputs of one micro-batch of B rows."""

    noisy_BCHW: Tensor
    timesteps_B: Tensor
    features_BF: Tensor
    drop_BA: Tensor
    target_BCHW: Tensor
    weight_B: Tensor


class Batches:
    """Makes the batch of any position of the run, from latents in memory."""

    def __init__(self, job: FinetuneJob, latents: Latents, vae: AutoencoderKL) -> None:
        self._job = job
        self._latents = latents
        self._vae = vae
        self._alphas_cumprod = alphas_cumprod(job.recipe.objective).float()

    def at(self, where: Sequence[int], *, dropout: bool = True) -> Batch:
        """The batch at these positions; without dropout every attribute is told."""
        recipe, latents = self._job.recipe, self._latents
        attributes = len(self._job.card.attributes.declarations)
        rows = torch.from_numpy(rows_at(where, len(latents), self._job.seed))
        d = draw(where, self._job.card.latent_shape, attributes + 2, self._job.seed)
        mean, logvar = latents.mean_NCHW[rows].float(), latents.logvar_NCHW[rows].float()
        clean = normalise(self._vae, mean + torch.exp(0.5 * logvar) * d.posterior_BCHW)
        timesteps = (d.uniform_BU[:, 0] * len(self._alphas_cumprod)).long()
        signal = self._alphas_cumprod[timesteps]
        whole = d.uniform_BU[:, 1:2] < recipe.condition_dropout
        return Batch(
            noisy_BCHW=add_noise(clean, d.noise_BCHW, signal),
            timesteps_B=timesteps,
            features_BF=latents.features_NF[rows],
            drop_BA=(whole | (d.uniform_BU[:, 2:] < recipe.attribute_dropout)) & dropout,
            target_BCHW=target(recipe.objective, clean, d.noise_BCHW, signal),
            weight_B=loss_weight(recipe.objective, signal, recipe.min_snr_gamma),
        )


def train_denoiser(config: dict[str, Any]) -> None:
    """Train a denoiser to its last step and write the generator's folder into the store.

    `config` is a FinetuneJob as a dict; the Ray Train datasets `train` and `validation` hold latents. Metrics are
    reported every `log_every_steps`; checkpoints are collective. The last report carries the written files as
    `files`. Raises RecipeError when the loss is no longer finite, before anything is overwritten.
    """
    job = FinetuneJob.model_validate(config)
    recipe = job.recipe
    torch.set_num_threads(recipe.cpus_per_worker)
    engine = _engine(job)
    device = engine.device
    with tempfile.TemporaryDirectory(prefix="scanloom-vae-") as scratch:
        vae = _fetch_autoencoder(job, Path(scratch))
    batches = Batches(job, _stream("train", job), vae)
    held_out = Batches(job, _stream("validation", job), vae)
    ema = Ema(engine.module.parameters(), recipe.ema_decay)
    metrics = _restore(engine, ema)
    step = int(metrics["step"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    started, resumed_at = time.monotonic(), step
    since, summed = step, torch.zeros((), device=device)
    while step < recipe.steps:
        where = positions(step, recipe.batch_size, rank, workers)
        for group in engine.optimizer.param_groups:
            # Set at every step and not by a scheduler object, whose first step after a resume has the initial rate.
            group["lr"] = recipe.learning_rate * learning_rate_factor(recipe, step)
        summed += _train_step(engine, batches, where, recipe.gradient_accumulation)
        step += 1
        ema.update(engine.module.parameters())
        saving = step % recipe.checkpoint_every_steps == 0 or step == recipe.steps
        if not saving and step % recipe.log_every_steps:
            continue
        loss = _mean_over_workers(summed / (step - since), 1)
        _require_finite(loss, job, step)
        rate = (step - resumed_at) * recipe.batch_size / (time.monotonic() - started)
        metrics = {"step": step, "loss": loss, "images_per_s": rate}
        since, summed = step, torch.zeros((), device=device)
        if saving:
            metrics["held_out_loss"] = _held_out_loss(engine, ema, held_out, range(rank, HELD_OUT_ROWS, workers))
            _require_finite(metrics["held_out_loss"], job, step)
        if saving and step < recipe.steps:
            _report_checkpoint(engine, ema, metrics)
        elif not saving:
            ray.train.report(metrics)
    # Also where a resumed run finds all its steps done: what it had written may be gone.
    _report_checkpoint(engine, ema, metrics, _release(job, ema, vae, rank))


def deepspeed_config(recipe: Finetune) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe."""
    return {
        "train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "gradient_clipping": recipe.gradient_clip,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "zero_optimization": {"stage": recipe.zero_stage},
        "optimizer": {
            "type": "AdamW",
            # torch's AdamW: DeepSpeed's own CPU Adam compiles C++ at start.
            "params": {
                "lr": recipe.learning_rate,
                "betas": [0.9, 0.99],
                "weight_decay": recipe.weight_decay,
                "torch_adam": True,
            },
        },
        "steps_per_print": 10**9,
    }


def learning_rate_factor(recipe: Finetune, step: int) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to a tenth."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, share)))


def _engine(job: FinetuneJob) -> Any:
    if not job.recipe.use_gpu:
        # Without it DeepSpeed guesses, and a CPU worker on a GPU host guesses wrong.
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # reads DS_ACCELERATOR when imported

    if not job.recipe.use_gpu:
        # A C++ extension for collectives in shared memory, compiled at first use: it needs a compiler on every host,
        # takes a minute, and a worker killed while compiling leaves a lock that its successors wait for. Gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    denoiser = _initial(job)
    engine, _, _, _ = deepspeed.initialize(
        model=denoiser,
        model_parameters=list(denoiser.parameters()),
        config=deepspeed_config(job.recipe),
    )
    return engine


def _initial(job: FinetuneJob) -> AttributeDenoiser:
    if job.recipe.start_from is not None:
        return load_denoiser(job.recipe.start_from, job.card.attributes, job.card.latent_shape)
    return build_denoiser(job.recipe.denoiser, job.card.attributes, job.card.latent_shape, job.seed)


def _fetch_autoencoder(job: FinetuneJob, folder: Path) -> AutoencoderKL:
    open_artefact(job.autoencoder_uri, "autoencoder").fetch(folder)
    return load_autoencoder(folder / "vae")


def _stream(split: str, job: FinetuneJob) -> Latents:
    shard = ray.train.get_dataset_shard(split)
    if shard is None:
        raise ArtefactError(f"training was given no {split!r} latents")
    batches = shard.iter_batches(batch_size=4096, batch_format="pyarrow")
    return collect(batches, job.card.latent_shape, job.card.attributes)


def _train_step(engine: Any, batches: Batches, where: range, accumulation: int) -> Tensor:
    total = torch.zeros((), device=engine.device)
    share = len(where) // accumulation
    for start in range(0, len(where), share):
        loss = _loss(engine, batches.at(where[start : start + share]), weighted=True)
        engine.backward(loss)
        engine.step()
        total += loss.detach() / accumulation
    return total


def _loss(engine: Any, batch: Batch, *, weighted: bool) -> Tensor:
    device, dtype = engine.device, next(engine.module.parameters()).dtype
    predicted = engine(
        batch.noisy_BCHW.to(device, dtype),
        batch.timesteps_B.to(device),
        batch.features_BF.to(device),
        batch.drop_BA.to(device),
    )
    error_B = (predicted.float() - batch.target_BCHW.to(device)).square().flatten(1).mean(1)
    loss: Tensor = (error_B * batch.weight_B.to(device)).mean() if weighted else error_B.mean()
    return loss


@torch.no_grad()
def _held_out_loss(engine: Any, ema: Ema, held_out: Batches, rows: range) -> float:
    """Unweighted, every attribute told, of the averaged weights: those that are released."""
    parameters = list(engine.module.parameters())
    trained = [parameter.clone() for parameter in parameters]
    ema.copy_to(parameters)
    engine.eval()
    total = torch.zeros((), device=engine.device)
    for begin in range(0, len(rows), EVALUATION_BATCH):
        where = [HELD_OUT_POSITION + row for row in rows[begin : begin + EVALUATION_BATCH]]
        total += _loss(engine, held_out.at(where, dropout=False), weighted=False) * len(where)
    engine.train()
    for parameter, value in zip(parameters, trained, strict=True):
        parameter.copy_(value)
    return _mean_over_workers(total, len(rows))


def _mean_over_workers(total: Tensor, count: int) -> float:
    both = torch.stack([total.detach().float(), torch.tensor(float(count), device=total.device)])
    torch.distributed.all_reduce(both)
    return float(both[0] / both[1])


def _require_finite(loss: float, job: FinetuneJob, step: int) -> None:
    if not math.isfinite(loss):
        rate = job.recipe.learning_rate
        raise RecipeError(f"loss is {loss} at step {step}; lower finetune.learning_rate (now {rate:g})")


def _report_checkpoint(engine: Any, ema: Ema, metrics: dict[str, Any], files: Sequence[FileEntry] = ()) -> None:
    with tempfile.TemporaryDirectory(prefix="scanloom-checkpoint-") as folder:
        # Collective: under ZeRO every rank holds a part of the optimizer, and each uploads its own.
        state = {"metrics": metrics, "ema": ema.state()}
        engine.save_checkpoint(folder, tag=CHECKPOINT, client_state=state)
        ray.train.report(
            metrics | {"files": [entry.model_dump() for entry in files]},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
        )


def _restore(engine: Any, ema: Ema) -> dict[str, Any]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {"step": 0}
    with checkpoint.as_directory() as folder:
        _, state = engine.load_checkpoint(folder, tag=CHECKPOINT)
    ema.restore(state["ema"]["updates"], state["ema"]["shadow"])
    metrics: dict[str, Any] = state["metrics"]
    return metrics


def _release(job: FinetuneJob, ema: Ema, vae: AutoencoderKL, rank: int) -> list[FileEntry]:
    if rank != 0:
        return []
    denoiser = _initial(job)
    ema.copy_to(denoiser.parameters())
    with tempfile.TemporaryDirectory(prefix="scanloom-generator-") as folder:
        save_generator(Path(folder), job.card, denoiser, vae, job.recipe.objective)
        stored = Store(job.generator_uri).put_folder(Path(folder))
    return [FileEntry.of(file) for file in stored]
