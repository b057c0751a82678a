"""Noising, targets and weights against closed forms and diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler

from scanloom.models.generator import TRAIN_TIMESTEPS, alphas_cumprod
from scanloom.training.ema import Ema
from scanloom.training.objectives import PredictionType, add_noise, loss_weight, target

TIMES = torch.tensor([0, 1, 250, 500, 900, 999])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, len(TIMES), 4, 8, 8, generator=generator)
    return clean, noise, alphas_cumprod("v_prediction")[TIMES].float()


def test_noise_and_velocity_are_those_of_diffusers(batch: tuple[torch.Tensor, ...]) -> None:
    clean, noise, signal = batch
    reference = DDIMScheduler(num_train_timesteps=TRAIN_TIMESTEPS, beta_schedule="squaredcos_cap_v2")
    expected_noisy = reference.add_noise(clean, noise, TIMES)  # type: ignore[attr-defined]
    expected_velocity = reference.get_velocity(clean, noise, TIMES)  # type: ignore[attr-defined]
    torch.testing.assert_close(add_noise(clean, noise, signal), expected_noisy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target("v_prediction", clean, noise, signal), expected_velocity, rtol=1e-5, atol=1e-5)


def test_clean_latents_follow_from_noisy_ones_and_the_velocity(batch: tuple[torch.Tensor, ...]) -> None:
    clean, noise, signal = batch
    alpha, sigma = signal.sqrt().view(-1, 1, 1, 1), (1 - signal).sqrt().view(-1, 1, 1, 1)
    velocity = target("v_prediction", clean, noise, signal)
    torch.testing.assert_close(alpha * add_noise(clean, noise, signal) - sigma * velocity, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_clean_latent_by_at_most_gamma(prediction_type: PredictionType) -> None:
    # An error e of the network is an error of the clean latent of e / SNR (epsilon) and e / (SNR + 1) (v), squared;
    # so weight x factor is min(SNR, gamma) whatever is predicted: section 3.4 of the paper.
    signal = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999])
    snr = signal / (1 - signal)
    factor = snr if prediction_type == "epsilon" else snr + 1
    weighed = loss_weight(prediction_type, signal, 5.0) * factor
    torch.testing.assert_close(weighed, snr.clamp_max(5.0), rtol=1e-4, atol=1e-6)
    assert torch.equal(loss_weight(prediction_type, signal, None), torch.ones(5))


def test_the_schedule_ends_in_noise_and_starts_in_signal() -> None:
    schedule = alphas_cumprod("v_prediction")
    assert len(schedule) == TRAIN_TIMESTEPS
    assert bool((schedule.diff() < 0).all())
    assert float(schedule[0]) > 0.999
    assert float(schedule[-1]) < 1e-6


def test_epsilon_keeps_some_signal_at_the_end_where_it_says_nothing_of_the_image() -> None:
    # Sampling divides by the square root of this: 1/15 and not 1/20000.
    assert float(alphas_cumprod("epsilon")[-1]) == pytest.approx(0.0047, rel=0.02)


def test_ema_moves_and_settles_on_constant_weights() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = Ema([weight], decay=0.9)
    weight.data.fill_(1.0)
    ema.update([weight])
    # The first update counts 9/10: warm-up decay is (1 + 0) / (10 + 0).
    assert torch.allclose(ema.shadow[0], torch.full((3,), 0.9))
    for _ in range(200):
        ema.update([weight])
    assert torch.allclose(ema.shadow[0], torch.ones(3))


def test_ema_continues_from_its_saved_state_as_if_never_stopped() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    straight, stopped = Ema([weight], 0.99), Ema([weight], 0.99)
    for value in (1.0, 2.0, 3.0):
        weight.data.fill_(value)
        straight.update([weight])
        stopped.update([weight])
        resumed = Ema([weight], 0.99)
        resumed.restore(stopped.updates, stopped.shadow)
        stopped = resumed
    assert torch.equal(straight.shadow[0], stopped.shadow[0])
    target_weight = torch.nn.Parameter(torch.zeros(2))
    straight.copy_to([target_weight])
    assert torch.equal(target_weight.data, straight.shadow[0])
