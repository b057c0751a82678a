"""A small generator artefact with random weights, for tests of what comes after training."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scanloom.artefact import Artefact, FileEntry, publish
from scanloom.attributes import AttributeSchema, Envelope, Range
from scanloom.models.attribute_unet import build_denoiser
from scanloom.models.autoencoder import build_autoencoder
from scanloom.models.card import GeneratorCard
from scanloom.models.family import save_generator
from scanloom.models.noise_schedule import TRAIN_TIMESTEPS, noise_schedule
from scanloom.recipe import AttributeUnet, Autoencoder, CategoryAttribute, LabelsAttribute, NumberAttribute
from scanloom.store import Store

SIZE = 16
ATTRIBUTES = (
    CategoryAttribute(name="sex", values=("F", "M"), source="PatientSex"),
    NumberAttribute(name="age", unit="years", minimum=0, maximum=120, source="PatientAge"),
    CategoryAttribute(name="view", values=("PA", "AP"), source="ViewPosition"),
    LabelsAttribute(name="findings", values=("Cardiomegaly", "Effusion", "Nodule")),
)
SCHEMA = AttributeSchema(declarations=ATTRIBUTES)
ENVELOPE = Envelope(
    scans=40,
    values={"sex": {"F": 22, "M": 18}, "view": {"PA": 40}, "findings": {"none": 20, "Cardiomegaly": 9, "Effusion": 5}},
    ranges={"age": Range(low=21.0, high=88.0)},
)
CELLS: list[dict[str, Any]] = [
    {"sex": "F", "age": [20, 29], "view": "PA", "findings": [], "count": 10},
    {"sex": "M", "age": [80, 89], "view": "PA", "findings": ["Cardiomegaly"], "count": 20},
    {"sex": "F", "age": None, "view": None, "findings": None, "count": 10},
]
STATISTICS: dict[str, Any] = {
    "schema": SCHEMA.model_dump(mode="json"),
    "envelope": ENVELOPE.model_dump(mode="json"),
    "cells": CELLS,
    "spacing_mm": 0.7,
    "size_px": SIZE,
}


def publish_generator(
    uri: str, seed: int = 0, inputs: Sequence[Artefact] = (), timesteps: int = TRAIN_TIMESTEPS
) -> Artefact:
    """A finished generator at `uri` that makes SIZE x SIZE images, different ones for different attributes.

    `timesteps` of its noise schedule, as a base model of another family may have.
    """
    latent_shape = (4, SIZE // 2, SIZE // 2)
    config = AttributeUnet(channels=(8, 16), attention_head_dim=8, condition_dim=16)
    card = GeneratorCard(
        family="attribute-unet",
        name="tiny",
        attributes=SCHEMA,
        envelope=ENVELOPE,
        condition_dim=config.condition_dim,
        latent_shape=latent_shape,
        image_shape=(1, SIZE, SIZE),
        spacing_mm=0.7,
        trained_steps=0,
    )
    schedule = noise_schedule("v_prediction")
    schedule = replace(schedule, settings={**schedule.settings, "num_train_timesteps": timesteps})
    denoiser = build_denoiser(config, SCHEMA, latent_shape, seed)
    # An untrained denoiser says 0, whatever it is asked.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in denoiser.unet.conv_out.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    with tempfile.TemporaryDirectory() as folder:
        vae = build_autoencoder(Autoencoder(channels=(8, 8)), SIZE, seed)
        save_generator(Path(folder), card, denoiser, vae, schedule, None)
        files = [FileEntry.of(stored) for stored in Store(uri).put_folder(Path(folder))]
    return publish(
        Store(uri), kind="generator", name="tiny", recipe={}, inputs=inputs, files=files, statistics=STATISTICS
    )  # fmt: skip
