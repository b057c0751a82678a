"""Noising, targets, weights and timesteps against closed forms and diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from scanloom.models.noise_schedule import TRAIN_TIMESTEPS, NoiseSchedule, PredictionType, noise_schedule
from scanloom.training.objectives import add_noise, loss_weight, target, timesteps

TIMES = torch.tensor([0, 1, 250, 500, 900, 999])


@pytest.fixture
def latents() -> tuple[torch.Tensor, torch.Tensor]:
    """Clean latents and noise."""
    clean, noise = torch.randn(2, len(TIMES), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return clean, noise


def at(schedule: NoiseSchedule, times: torch.Tensor = TIMES) -> tuple[torch.Tensor, torch.Tensor]:
    return schedule.alphas_T[times].float(), schedule.sigmas_T[times].float()


def test_noise_and_velocity_are_those_of_diffusers(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noise = latents
    alphas, sigmas = at(noise_schedule("v_prediction"))
    reference = DDIMScheduler(num_train_timesteps=TRAIN_TIMESTEPS, beta_schedule="squaredcos_cap_v2")
    expected_noisy = reference.add_noise(clean, noise, TIMES)  # type: ignore[attr-defined]
    expected_velocity = reference.get_velocity(clean, noise, TIMES)  # type: ignore[attr-defined]
    torch.testing.assert_close(add_noise(clean, noise, alphas, sigmas), expected_noisy, rtol=1e-5, atol=1e-5)
    ours = target("v_prediction", clean, noise, alphas, sigmas)
    torch.testing.assert_close(ours, expected_velocity, rtol=1e-5, atol=1e-5)


def test_flow_is_noised_as_by_diffusers_and_its_target_points_from_data_to_noise(
    latents: tuple[torch.Tensor, torch.Tensor],
) -> None:
    clean, noise = latents
    alphas, sigmas = at(noise_schedule("flow"))
    reference = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS)
    # Its timesteps run from 1000 down to 1.
    expected = reference.scale_noise(clean, reference.timesteps[TRAIN_TIMESTEPS - 1 - TIMES], noise)  # type: ignore[attr-defined]
    noisy = add_noise(clean, noise, alphas, sigmas)
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-5)
    back = noisy - sigmas.view(-1, 1, 1, 1) * target("flow", clean, noise, alphas, sigmas)
    torch.testing.assert_close(back, clean, rtol=1e-4, atol=1e-4)


def test_clean_latents_follow_from_noisy_ones_and_the_velocity(latents: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noise = latents
    alphas, sigmas = at(noise_schedule("v_prediction"))
    velocity = target("v_prediction", clean, noise, alphas, sigmas)
    back = alphas.view(-1, 1, 1, 1) * add_noise(clean, noise, alphas, sigmas) - sigmas.view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(back, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_min_snr_weighs_the_error_of_the_clean_latent_by_at_most_gamma(prediction_type: PredictionType) -> None:
    # Section 3.4 of the paper, with the clean latent's error measured: predict with an error of one, solve for x.
    schedule = noise_schedule(prediction_type)
    alphas, sigmas = at(schedule, torch.tensor([10, 250, 500, 900]))
    clean, noise = torch.zeros(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    noisy = add_noise(clean, noise, alphas, sigmas)
    wrong = target(prediction_type, clean, noise, alphas, sigmas) + 1.0
    alpha, sigma = alphas.view(-1, 1, 1, 1), sigmas.view(-1, 1, 1, 1)
    solved = {
        "epsilon": (noisy - sigma * wrong) / alpha,
        "v_prediction": alpha * noisy - sigma * wrong,
        "flow": noisy - sigma * wrong,
    }[prediction_type]
    snr = (alphas / sigmas).square()
    weighed = loss_weight(prediction_type, alphas, sigmas, 5.0)
    torch.testing.assert_close(weighed, snr.clamp_max(5.0) * solved.flatten().square(), rtol=1e-3, atol=1e-6)
    assert torch.equal(loss_weight(prediction_type, alphas, sigmas, None), torch.ones(4))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_weights_stay_finite_where_all_is_noise(prediction_type: PredictionType) -> None:
    schedule = noise_schedule(prediction_type, zero_terminal_snr=prediction_type == "v_prediction")
    assert float(schedule.alphas_T[-1]) == pytest.approx(0.0, abs=1e-6)
    weights = loss_weight(prediction_type, *at(schedule), 5.0)
    assert bool(torch.isfinite(weights).all())
    assert float(weights.min()) >= 0


def test_uniform_timesteps_cover_the_schedule_and_logit_normal_ones_its_middle() -> None:
    drawn = torch.rand(20000, generator=torch.Generator().manual_seed(1))
    drawn[:2] = torch.tensor([0.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()])
    even, middle = timesteps(drawn, 1000, "uniform"), timesteps(drawn, 1000, "logit-normal")
    for some in (even, middle):
        assert int(some.min()) >= 0
        assert int(some.max()) < 1000
    assert float(even.float().std()) == pytest.approx(1000 / 12**0.5, rel=0.02)
    # Half of a standard normal lies within 0.6745, the sigmoid of which is 0.6625.
    inside = (middle >= 337) & (middle < 663)
    assert float(inside.float().mean()) == pytest.approx(0.5, abs=0.02)
