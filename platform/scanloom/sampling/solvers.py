"""Solvers of the diffusion ODE as tables of numbers, so that every image of a batch can be at its own place of its own.

Each supported solver is linear in what it has seen. With x the latent, D the data it predicts and alpha, sigma the
schedule at a step (any falling alpha and rising sigma: a flow's too), a step is

    D      = from_latent * x + from_output * output
    x_next = keep * x + data * D + previous * D_of_the_step_before

so a trajectory is five numbers a step and `advance` is the same three lines for all solvers. Shapes: B batch, then
the latent's own axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.noise_schedule import NoiseSchedule, PredictionType
from scanloom.recipe_generate import Solver

SolverName = Solver
Table = NDArray[np.float64]


@dataclass(frozen=True)
class Trajectory:
    """What one image does at each of its K steps."""

    timesteps: NDArray[np.int64]
    """[K], descending: the timestep that the denoiser is called with."""
    coefficients: Table
    """[K, 5]: from_latent, from_output, keep, data, previous."""

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def trajectory(solver: SolverName, schedule: NoiseSchedule, steps: int) -> Trajectory:
    """The trajectory of `steps` denoiser calls over a schedule, ending at clean data.

    The schedule's last alpha may be 0 (zero terminal SNR, Lin et al. 2024; flow) where the generator does not predict
    epsilon. Raises RecipeError for more steps than the schedule has, ArtefactError for epsilon at zero terminal SNR.
    """
    timesteps = trailing_timesteps(len(schedule.alphas_T), steps)
    alpha = np.append(schedule.alphas_T.numpy()[timesteps], 1.0)
    sigma = np.append(schedule.sigmas_T.numpy()[timesteps], 0.0)
    reads = _data_coefficients(schedule.prediction_type, alpha[:-1], sigma[:-1])
    return Trajectory(timesteps, np.concatenate([reads, _UPDATES[solver](alpha, sigma)], axis=1))


def trailing_timesteps(schedule: int, steps: int) -> NDArray[np.int64]:
    """int64 [steps], descending from schedule - 1: 'trailing' spacing (Lin et al. 2024, table 2)."""
    if not 1 <= steps <= schedule:
        raise RecipeError(f"steps={steps}: the generator's schedule allows 1 to {schedule}")
    return np.round(schedule - np.arange(steps) * (schedule / steps)).astype(np.int64) - 1


def advance(
    latents: torch.Tensor, outputs: torch.Tensor, previous: torch.Tensor, coefficients: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents one step on and the data they predict, each [B, ...] in the latents' dtype.

    `outputs` is what the denoiser said of `latents`, `previous` the data predicted a step before (any finite values
    at a first step), `coefficients` [B, 5] the rows of each image's trajectory.
    """
    table = coefficients.to(latents.dtype).T.reshape(5, -1, *(1,) * (latents.dim() - 1))
    from_latent, from_output, keep, data, before = table
    # Products and sums apart: a fused multiply-add rounds differently in a vector's body and its tail.
    predicted = from_latent * latents + from_output * outputs
    return keep * latents + data * predicted + before * previous, predicted


def _data_coefficients(prediction_type: PredictionType, alpha: Table, sigma: Table) -> Table:
    if prediction_type == "v_prediction":
        # Salimans and Ho 2022, appendix D: D = alpha x - sigma v.
        return np.stack([alpha, -sigma], axis=1)
    if prediction_type == "flow":
        # Esser et al. 2024, section 2: the output is n - D and x = (1 - sigma) D + sigma n, so that D = x - sigma v.
        return np.stack([np.ones_like(alpha), -sigma], axis=1)
    if (alpha == 0.0).any():
        raise ArtefactError(
            "the generator predicts epsilon on a schedule with zero terminal SNR, where epsilon says nothing of the "
            "data; train it with objective v_prediction"
        )
    return np.stack([1.0 / alpha, -sigma / alpha], axis=1)


def _ddim(alpha: Table, sigma: Table) -> Table:
    """[K, 3] for the K steps between K + 1 noise levels (Song et al. 2021, eq. 12, eta 0)."""
    keep = sigma[1:] / sigma[:-1]
    return np.stack([keep, alpha[1:] - keep * alpha[:-1], np.zeros_like(keep)], axis=1)


def _dpmpp_2m(alpha: Table, sigma: Table) -> Table:
    """[K, 3] of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), its first and last step of first order.

    The last step goes to sigma 0, where the extrapolation is infinite. Steps out of zero terminal SNR are of first
    order by themselves: the previous step's log-SNR is infinitely far away.
    """
    table = _ddim(alpha, sigma)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))
    ratio = h[1:-1] / h[:-2]
    half = 0.5 * ratio * table[1:-1, 1]
    table[1:-1, 1] += half
    table[1:-1, 2] = -half
    return table


_UPDATES: Mapping[SolverName, Callable[[Table, Table], Table]] = {
    # In x / alpha over sigma / alpha, and for a flow in sigma itself, a step of Euler is one of DDIM.
    "ddim": _ddim, "euler": _ddim, "dpmpp-2m": _dpmpp_2m,
}  # fmt: skip
