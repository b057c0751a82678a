"""Small generators trained in this process, without Ray and DeepSpeed, for as many steps as a test needs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from scanloom.artefact import Artefact, FileEntry, open_artefact, publish
from scanloom.attributes import AttributeSchema, Envelope
from scanloom.audit.scans import pixels_of, spread
from scanloom.models.attribute_unet import AttributeDenoiser, build_denoiser
from scanloom.models.autoencoder import build_autoencoder, moments
from scanloom.models.card import GeneratorCard
from scanloom.models.conditioner import features
from scanloom.models.family import save_generator
from scanloom.models.noise_schedule import NoiseSchedule, noise_schedule
from scanloom.recipe import AttributeUnet, Autoencoder, Finetune
from scanloom.store import Store
from scanloom.training.batches import Batches
from scanloom.training.draws import positions
from scanloom.training.engine import learning_rate_factor
from scanloom.training.latents import AttributeConditions, Latents
from scanloom.training.views import full_range


def train(
    latents: Latents, vae: AutoencoderKL, schema: AttributeSchema, config: AttributeUnet, recipe: Finetune,
    schedule: NoiseSchedule, seed: int = 0,
) -> AttributeDenoiser:  # fmt: skip
    """A denoiser trained as the finetune job trains it, but for the average of its weights."""
    shape = tuple(latents.mean_NCHW.shape[1:])
    denoiser = build_denoiser(config, schema, (shape[0], shape[1], shape[2]), seed).train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    batches = Batches(recipe, seed, latents, vae, schedule, len(schema.declarations))
    for step in range(recipe.steps):
        batch = batches.at(positions(step, recipe.batch_size, 0, 1))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(recipe, step)
        told = denoiser(batch.noisy_BCHW, batch.timesteps_B, batch.condition)
        loss = ((told - batch.target_BCHW).square().flatten(1).mean(1) * batch.weight_B).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), recipe.gradient_clip)
        optimizer.step()
    return denoiser.eval()


def publish_trained(uri: str, corpus: Artefact, steps: int, seed: int = 0, **settings: Any) -> Artefact:
    """A generator of a corpus's train split at `uri`, trained for so many steps; its autoencoder has random weights."""
    told = corpus.manifest.statistics
    schema, size_px = AttributeSchema.model_validate(told["schema"]), int(told["size_px"])
    rows = list(spread(corpus, "train", 10**6))
    pixels_N1HW = torch.from_numpy(np.stack([full_range(pixels_of(row, "train")[0]) for row in rows]))[:, None]
    vae = build_autoencoder(Autoencoder(channels=(8, 8, 8)), size_px, seed)
    with torch.inference_mode():
        mean, logvar = moments(vae, pixels_N1HW)
    vae.register_to_config(scaling_factor=float(1.0 / mean.std()), shift_factor=float(mean.mean()))
    conditions = AttributeConditions(
        torch.from_numpy(features(schema, [schema.from_row(row) for row in rows])), len(schema.declarations)
    )
    latents = Latents(mean.half(), logvar.half() - 12.0, conditions)
    config = AttributeUnet(channels=(32, 64), attention_head_dim=8, condition_dim=16)
    recipe = Finetune(denoiser=config, steps=steps, **settings) if steps else Finetune(denoiser=config)
    schedule = noise_schedule(recipe.objective)
    shape: tuple[int, int, int] = (mean.shape[1], mean.shape[2], mean.shape[3])
    if steps:
        denoiser = train(latents, vae, schema, config, recipe, schedule, seed)
    else:
        denoiser = build_denoiser(config, schema, shape, seed)
    card = GeneratorCard(
        family="attribute-unet", name="tiny", attributes=schema, envelope=Envelope.model_validate(told["envelope"]),
        condition_dim=config.condition_dim, latent_shape=shape, image_shape=(1, size_px, size_px),
        spacing_mm=told["spacing_mm"], trained_steps=steps,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save_generator(Path(folder), card, denoiser, vae, schedule, None)
        files = [FileEntry.of(stored) for stored in Store(uri).put_folder(Path(folder))]
    statistics = {name: told[name] for name in ("schema", "envelope", "cells", "spacing_mm", "size_px")}
    return publish(
        Store(uri), kind="generator", name="tiny", recipe={}, inputs=[open_artefact(corpus.uri)], files=files,
        statistics=statistics,
    )  # fmt: skip
