"""The loss attack: a denoiser that knows its scans by heart betrays them, one that knows the population does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from scanloom.audit.membership import attacks, losses
from scanloom.models.noise_schedule import noise_schedule
from scanloom.training.probes import Conditions, Denoise

SCHEDULE = noise_schedule("epsilon")
SHAPE = (1, 4, 4)
TIMES = (100, 500)
NAMES = [str(number) for number in range(150)]


def normal(seed: int) -> Tensor:
    return torch.randn((150, *SHAPE), generator=torch.Generator().manual_seed(seed))


def of_population(noisy_BCHW: Tensor, times_B: Tensor, _: Conditions) -> Tensor:
    """E[n | noisy] of standard normal data: sigma times the noisy latent, as alpha**2 + sigma**2 = 1."""
    return SCHEDULE.sigmas_T[times_B].float().view(-1, 1, 1, 1) * noisy_BCHW


def by_heart(known: Tensor) -> Denoise:
    """E[n | noisy] of data that are exactly the known latents."""

    def denoise(noisy_BCHW: Tensor, times_B: Tensor, _: Conditions) -> Tensor:
        alpha, sigma = (float(table[times_B[0]]) for table in (SCHEDULE.alphas_T, SCHEDULE.sigmas_T))
        apart = (noisy_BCHW.flatten(1)[:, None] - alpha * known.flatten(1)[None]).square().sum(-1)
        data = (-apart / (2 * sigma**2)).softmax(1) @ known.flatten(1)
        return (noisy_BCHW - alpha * data.reshape_as(noisy_BCHW)) / sigma

    return denoise


def test_the_loss_of_the_right_denoiser_is_the_closed_form() -> None:
    found = losses(of_population, SCHEDULE, normal(0), {}, seed=1, timesteps=TIMES, noises=20)
    # Var[n | noisy] = 1 - sigma**2 = alpha**2 of data and noise that are standard normal.
    expected = SCHEDULE.alphas_T[list(TIMES)].square().numpy()
    assert found.mean(axis=0) == pytest.approx(expected, rel=0.15)
    assert found.shape == (150, 2)


def test_memorising_is_betrayed_and_knowing_the_population_is_not() -> None:
    members, others = normal(1), normal(2)

    def told(denoise: Denoise) -> dict[str, tuple[float, float, float, float]]:
        ours, theirs = (losses(denoise, SCHEDULE, x, {}, seed=3, timesteps=TIMES) for x in (members, others))
        found = attacks(ours, theirs, NAMES, NAMES, TIMES)
        return {one.name: (one.auc.low, one.auc.high, one.tpr.low, one.tpr.high) for one in found}

    caught, innocent = told(by_heart(members)), told(of_population)
    assert list(caught) == ["timestep 100", "timestep 500", "mean"]
    assert caught["timestep 100"][0] > 0.95
    assert caught["timestep 100"][2] > 0.9
    assert innocent["mean"][0] < 0.5
    assert innocent["mean"][1] < 0.65
    assert innocent["mean"][2] <= 0.01


def test_patients_with_several_scans_make_the_interval_wider() -> None:
    random = np.random.default_rng(0)
    patients = [str(n // 5) for n in range(150)]
    own, other = (np.repeat(random.standard_normal((30, 1)), 5, axis=0) for _ in range(2))
    [_, grouped] = attacks(own, other, patients, patients, (1,))
    [_, plain] = attacks(own, other, NAMES, NAMES, (1,))
    assert grouped.auc.value == pytest.approx(plain.auc.value)
    assert grouped.auc.high - grouped.auc.low > 1.5 * (plain.auc.high - plain.auc.low)


def test_conditions_go_with_their_latents() -> None:
    seen: list[Tensor] = []

    def denoise(noisy_BCHW: Tensor, times_B: Tensor, conditions: Conditions) -> Tensor:
        seen.append(conditions["label"])
        return noisy_BCHW

    losses(denoise, SCHEDULE, normal(0)[:40], {"label": torch.arange(40)}, seed=0, timesteps=(10,))
    assert torch.cat(seen).tolist() == list(range(40))
