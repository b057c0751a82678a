"""Solvers against diffusers' schedulers, and against data whose exact answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.noise_schedule import NoiseSchedule, PredictionType, noise_schedule
from scanloom.sampling.solvers import SolverName, advance, trailing_timesteps, trajectory

MEAN, SPREAD = 0.7, 0.35


def of(alphas_cumprod: np.ndarray[Any, np.dtype[np.float64]], kind: PredictionType) -> NoiseSchedule:
    """The variance-preserving schedule with these shares of signal variance."""
    signal = np.asarray(alphas_cumprod, dtype=np.float64)
    return NoiseSchedule(kind, torch.from_numpy(np.sqrt(signal)), torch.from_numpy(np.sqrt(1.0 - signal)))


def cosine(schedule: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A schedule that ends at exactly zero signal."""
    at = np.cos(0.5 * np.pi * np.arange(1, schedule + 1) / schedule) ** 2
    at[-1] = 0.0
    return at


def network(latents: torch.Tensor, timesteps: torch.Tensor | float) -> torch.Tensor:
    """Anything smooth that depends on latent and time."""
    time = torch.as_tensor(timesteps, dtype=latents.dtype).reshape(-1, *(1,) * (latents.dim() - 1)) / 1000
    return torch.sin(2.0 * latents) * (0.3 + time) + 0.5 * latents.roll(1, -1) * torch.cos(3.0 * time)


def solve(
    solver: SolverName,
    alphas_cumprod: np.ndarray[Any, np.dtype[np.float64]],
    kind: PredictionType,
    steps: int,
    start: torch.Tensor,
    denoiser: Callable[[torch.Tensor, int], torch.Tensor] = network,
) -> torch.Tensor:
    plan = trajectory(solver, of(alphas_cumprod, kind), steps)
    latents, predicted = start, torch.zeros_like(start)
    for timestep, row in zip(plan.timesteps, plan.coefficients, strict=True):
        rows = torch.from_numpy(np.repeat(row[None], len(start), axis=0))
        latents, predicted = advance(latents, denoiser(latents, int(timestep)), predicted, rows)
    return latents


def scheduled(scheduler: Any, steps: int, start: torch.Tensor) -> torch.Tensor:
    latents: torch.Tensor = start
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        output = network(latents, int(timestep))
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


def exact_v(alphas_cumprod: np.ndarray[Any, np.dtype[np.float64]]) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """The perfect v-prediction for data N(MEAN, SPREAD**2)."""

    def denoiser(latents: torch.Tensor, timestep: int) -> torch.Tensor:
        alpha, sigma = float(np.sqrt(alphas_cumprod[timestep])), float(np.sqrt(1 - alphas_cumprod[timestep]))
        variance = alpha**2 * SPREAD**2 + sigma**2
        data = MEAN + alpha * SPREAD**2 / variance * (latents - alpha * MEAN)
        epsilon = sigma / variance * (latents - alpha * MEAN)
        return alpha * epsilon - sigma * data

    return denoiser


def error_on_gaussian_data(solver: SolverName, steps: int) -> float:
    """Largest error at the last noise level, on a schedule even in log-SNR, where solvers show their order."""
    schedule = 1.0 / (1.0 + np.exp(np.linspace(-8.0, 8.0, 61_441)))
    exact = exact_v(schedule)
    place = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64).reshape(1, 9)

    def at(timestep: int) -> torch.Tensor:
        # The probability-flow ODE keeps an image's place in the distribution.
        alpha_squared = float(schedule[timestep])
        spread = math.sqrt(alpha_squared * SPREAD**2 + 1 - alpha_squared)
        return math.sqrt(alpha_squared) * MEAN + spread * place

    last = int(trailing_timesteps(len(schedule), steps)[-1])
    made = solve(solver, schedule, "v_prediction", steps, at(len(schedule) - 1), exact)
    # The last step goes to sigma 0 in one: to the data that the last level predicts.
    alpha, sigma = float(schedule[last]) ** 0.5, (1 - float(schedule[last])) ** 0.5
    return float((made - (alpha * at(last) - sigma * exact(at(last), last))).abs().max())


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("steps", [1, 4, 10, 25, 50])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_ddim_equals_diffusers(kind: PredictionType, steps: int, beta_schedule: str) -> None:
    scheduler = DDIMScheduler(
        beta_schedule=beta_schedule, prediction_type=kind, clip_sample=False, timestep_spacing="trailing"
    )
    start = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    ours = solve("ddim", scheduler.alphas_cumprod.double().numpy(), kind, steps, start)
    theirs = scheduled(scheduler, steps, start)
    # Epsilon at almost no signal divides by 5e-5: both lose the same digits of a number that large.
    assert torch.allclose(ours, theirs, rtol=2e-3, atol=1e-4 * max(1.0, float(theirs.abs().max())))


def test_ddim_equals_diffusers_at_zero_terminal_snr() -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    schedule = scheduler.alphas_cumprod.double().numpy()
    assert schedule[-1] == 0.0
    start = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        solve("ddim", schedule, "v_prediction", 20, start), scheduled(scheduler, 20, start), atol=1e-4
    )


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
def test_dpmpp_2m_equals_diffusers(kind: PredictionType, steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=kind,
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    start = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(2))
    ours = solve("dpmpp-2m", scheduler.alphas_cumprod.double().numpy(), kind, steps, start)
    theirs = scheduled(scheduler, steps, start)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 if kind == "epsilon" else 1e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_euler_equals_diffusers(kind: PredictionType, steps: int) -> None:
    """Theirs walks in x / alpha over sigma / alpha, where the noise explodes; ours stays where the variance does."""
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=kind,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    start = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(4))
    schedule = scheduler.alphas_cumprod.double().numpy()
    ours = solve("euler", schedule, kind, steps, start)
    scheduler.set_timesteps(steps)
    latents: torch.Tensor = start / math.sqrt(schedule[-1])
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(latents, timestep), int(timestep))
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    assert torch.allclose(ours, latents, rtol=1e-3, atol=2e-3 if kind == "epsilon" else 2e-4)


def flow() -> NoiseSchedule:
    return noise_schedule("flow")


def solve_flow(solver: SolverName, steps: int, start: torch.Tensor) -> torch.Tensor:
    plan = trajectory(solver, flow(), steps)
    latents, predicted = start, torch.zeros_like(start)
    for timestep, row in zip(plan.timesteps, plan.coefficients, strict=True):
        rows = torch.from_numpy(np.repeat(row[None], len(start), axis=0))
        latents, predicted = advance(latents, network(latents, int(timestep) + 1), predicted, rows)
    return latents


@pytest.mark.parametrize("solver", ["euler", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
def test_euler_on_a_flow_equals_diffusers(solver: SolverName, steps: int) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    start = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    latents: torch.Tensor = start
    for timestep in scheduler.timesteps:
        latents = scheduler.step(network(latents, timestep), timestep, latents, return_dict=False)[0]
    assert torch.allclose(solve_flow(solver, steps, start), latents, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
def test_dpmpp_2m_on_a_flow_equals_diffusers(steps: int) -> None:
    scheduler: Any = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    start = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(6))
    scheduler.set_timesteps(steps)
    # The scheduler's own spacing of a flow is another one, and it takes sigmas from nobody.
    sigmas = np.linspace(1.0, 1.0 / steps, steps)
    scheduler.sigmas = torch.tensor([*sigmas, 0.0])
    scheduler.timesteps = torch.from_numpy(np.round(1000 * sigmas))
    latents: torch.Tensor = start
    for timestep in scheduler.timesteps:
        latents = scheduler.step(network(latents, float(timestep)), timestep, latents, return_dict=False)[0]
    assert torch.allclose(solve_flow("dpmpp-2m", steps, start), latents, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver, order", [("ddim", 1.0), ("dpmpp-2m", 2.0)])
def test_error_on_gaussian_data_falls_with_the_solvers_order(solver: SolverName, order: float) -> None:
    errors = [error_on_gaussian_data(solver, steps) for steps in (20, 40, 80, 160)]
    measured = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert measured == pytest.approx(order, abs=0.25)


def test_second_order_beats_first_at_twenty_steps() -> None:
    assert error_on_gaussian_data("dpmpp-2m", 20) < 0.25 * error_on_gaussian_data("ddim", 20)


def test_images_at_other_places_of_other_trajectories_do_not_disturb_each_other() -> None:
    schedule = cosine(1000)
    short, long = (trajectory("dpmpp-2m", of(schedule, "v_prediction"), steps) for steps in (3, 8))
    start = torch.randn((2, 4), generator=torch.Generator().manual_seed(3))
    latents, predicted, finished = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    places = [0, 0]
    for _ in range(8):
        rows = [t.coefficients[min(p, t.steps - 1)] for t, p in zip((short, long), places, strict=True)]
        times = [int(t.timesteps[min(p, t.steps - 1)]) for t, p in zip((short, long), places, strict=True)]
        outputs = network(latents, torch.tensor(times))
        latents, predicted = advance(latents, outputs, predicted, torch.from_numpy(np.stack(rows)))
        places = [place + 1 for place in places]
        for image, trail in enumerate((short, long)):
            if places[image] == trail.steps:
                finished[image] = latents[image]
    for image, steps in enumerate((3, 8)):
        alone = solve("dpmpp-2m", schedule, "v_prediction", steps, start[image : image + 1])
        assert torch.allclose(finished[image], alone[0], atol=1e-6)


def test_coefficients_are_finite_at_zero_terminal_snr_for_every_step_count() -> None:
    solvers: tuple[SolverName, ...] = ("ddim", "euler", "dpmpp-2m")
    for solver in solvers:
        for steps in (1, 2, 3, 999, 1000):
            assert np.isfinite(trajectory(solver, of(cosine(1000), "v_prediction"), steps).coefficients).all()


def test_epsilon_at_zero_terminal_snr_is_refused_with_the_remedy() -> None:
    with pytest.raises(ArtefactError, match="v_prediction"):
        trajectory("ddim", of(cosine(1000), "epsilon"), 10)


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_that_the_schedule_lacks_are_refused(steps: int) -> None:
    with pytest.raises(RecipeError, match="1 to 1000"):
        trajectory("ddim", of(cosine(1000), "v_prediction"), steps)


def test_timesteps_start_at_the_end_of_the_schedule_and_never_repeat() -> None:
    for steps in (1, 3, 7, 30, 333, 1000):
        timesteps = trailing_timesteps(1000, steps)
        assert timesteps[0] == 999
        assert len(timesteps) == steps
        assert (np.diff(timesteps) < 0).all()
        assert timesteps[-1] >= 0
