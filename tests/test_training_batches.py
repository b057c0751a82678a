"""Batches of any position, made ahead of their use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scanloom.models.autoencoder import build_autoencoder
from scanloom.models.family import schedule_of
from scanloom.recipe import Autoencoder, Finetune
from scanloom.training.batches import Ahead, Batch, Batches
from scanloom.training.latents import AttributeConditions, Latents


def made(**keys: Any) -> Batches:
    recipe = Finetune.model_validate(keys)
    generator = torch.Generator().manual_seed(0)
    latents = Latents(
        torch.randn(10, 4, 8, 8, generator=generator).half(),
        torch.full((10, 4, 8, 8), -20.0).half(),
        AttributeConditions(torch.rand(10, 5, generator=generator), 3),
    )
    vae = build_autoencoder(Autoencoder(channels=(8, 8)), 16, 0)
    return Batches(recipe, 7, latents, vae, schedule_of(recipe.denoiser, recipe.objective), 3)


def test_ahead_makes_each_step_once_and_none_beyond_the_last() -> None:
    asked: list[int] = []

    def make(step: int) -> list[Batch]:
        asked.append(step)
        return [made().at([step])]

    ahead = Ahead(make, steps=4)
    steps = [ahead.at(step)[0] for step in range(1, 4)]
    assert asked == [1, 2, 3]
    for step, batch in zip(range(1, 4), steps, strict=True):
        assert torch.equal(batch.noisy_BCHW, made().at([step]).noisy_BCHW)


def test_what_goes_wrong_while_making_a_batch_is_raised_where_it_is_used() -> None:
    def make(step: int) -> list[Batch]:
        if step == 1:
            raise ValueError("no such row")
        return []

    ahead = Ahead(make, steps=3)
    ahead.at(0)
    with pytest.raises(ValueError, match="no such row"):
        ahead.at(1)


def test_flow_batches_mix_data_and_noise_and_their_target_leads_from_one_to_the_other() -> None:
    batch = made(objective="flow", timestep_density="logit-normal", min_snr_gamma=None).at(range(6))
    sigma_B = (batch.timesteps_B.float() + 1).view(-1, 1, 1, 1) / 1000
    clean = batch.noisy_BCHW - sigma_B * batch.target_BCHW
    noise = batch.noisy_BCHW + (1 - sigma_B) * batch.target_BCHW
    torch.testing.assert_close(batch.noisy_BCHW, (1 - sigma_B) * clean + sigma_B * noise, rtol=1e-4, atol=1e-5)
    assert abs(float(noise.std()) - 1) < 0.05


def test_conditions_are_dropped_in_training_at_their_rates_and_never_in_evaluation() -> None:
    batches = made(condition_dropout=0.2, attribute_dropout=0.1)
    drop_BA = batches.at(range(4000)).condition["drop"]
    # Dropped with all, or alone: 0.2 + 0.8 x 0.1.
    assert float(drop_BA.float().mean()) == pytest.approx(0.28, abs=0.02)
    assert float(drop_BA.all(dim=1).float().mean()) == pytest.approx(0.2, abs=0.02)
    assert not batches.at(range(100), training=False).condition["drop"].any()
