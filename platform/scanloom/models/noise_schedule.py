"""Noise schedules: how much of a noisy latent is data and how much is noise, and how diffusers stores that.

Legend of shape suffixes: T timesteps of the schedule.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from scanloom.errors import ArtefactError, RecipeError

PredictionType = Literal["v_prediction", "epsilon", "flow"]
Betas = Literal["squaredcos_cap_v2", "scaled_linear"]
"""The cosine schedule of Nichol & Dhariwal 2021; that of latent diffusion (Rombach et al. 2022)."""
TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseSchedule:
    """A noisy latent at timestep t is alphas_T[t] x + sigmas_T[t] n, with data x and standard normal n."""

    prediction_type: PredictionType
    alphas_T: Tensor
    """float64 [T], decreasing."""
    sigmas_T: Tensor
    """float64 [T], increasing. alpha**2 + sigma**2 = 1 except for flow, where alpha + sigma = 1."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The configuration of diffusers' scheduler."""


def noise_schedule(
    prediction_type: PredictionType, *, zero_terminal_snr: bool = False, betas: Betas | None = None
) -> NoiseSchedule:
    """The noise schedule of TRAIN_TIMESTEPS steps, sampled with trailing spacing.

    For v the cosine schedule: its last signal-to-noise ratio is about zero, so that sampling starts from what training
    saw (Lin et al. 2024). Epsilon says nothing about the image there, so that it gets the schedule of latent
    diffusion, which ends with some signal. `betas` names the other one, as a base model may need. Flow (Lipman et al.
    2023; Liu et al. 2023) has sigma = (t + 1) / T and needs neither.

    With `zero_terminal_snr` the last alpha is exactly 0 (Lin et al. 2024, algorithm 1). Raises RecipeError for that
    with epsilon.
    """
    if prediction_type == "flow":
        return _flow({"num_train_timesteps": TRAIN_TIMESTEPS, "shift": 1.0})
    if zero_terminal_snr and prediction_type == "epsilon":
        raise RecipeError(
            "zero_terminal_snr: epsilon says nothing of the image where all is noise; set objective to v_prediction"
        )
    betas = betas or ("squaredcos_cap_v2" if prediction_type == "v_prediction" else "scaled_linear")
    ends = {"beta_start": 0.00085, "beta_end": 0.012} if betas == "scaled_linear" else {}
    return _ddim(
        {
            "beta_schedule": betas,
            **ends,
            "num_train_timesteps": TRAIN_TIMESTEPS,
            "prediction_type": prediction_type,
            "clip_sample": False,
            "set_alpha_to_one": True,
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": zero_terminal_snr,
        }
    )


def write_schedule(schedule: NoiseSchedule, folder: Path) -> None:
    """Write the scheduler of a generator folder (`scheduler/scheduler_config.json`), for plain diffusers."""
    scheduler_class(schedule)(**schedule.settings).save_pretrained(folder / "scheduler")


def scheduler_class(schedule: NoiseSchedule) -> type[DDIMScheduler] | type[FlowMatchEulerDiscreteScheduler]:
    """The class of diffusers that samples on this schedule."""
    return FlowMatchEulerDiscreteScheduler if schedule.prediction_type == "flow" else DDIMScheduler


def read_schedule(folder: Path, where: str | None = None) -> NoiseSchedule:
    """The schedule of a generator folder or of a base model, whichever diffusers scheduler it names.

    Only what training fixed is read: how many steps an inference takes, and where, is said elsewhere. So a flow's
    `shift` changes nothing here. Raises ArtefactError where there is none or it is of another kind.
    """
    where = where or str(folder)
    try:
        settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_bytes())
        if settings.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
            return _flow(_understood(FlowMatchEulerDiscreteScheduler, settings))
        known = _understood(DDIMScheduler, DDIMScheduler.from_config(settings).config)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split()).replace(str(folder), where)
        raise ArtefactError(f"{where}: scheduler/scheduler_config.json cannot be read: {reason[:200]}") from error
    if known["prediction_type"] not in ("v_prediction", "epsilon"):
        raise ArtefactError(
            f"{where}: its scheduler predicts {known['prediction_type']!r}; known: v_prediction, epsilon, flow"
        )
    return _ddim(known | {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"})


def _ddim(settings: Mapping[str, Any]) -> NoiseSchedule:
    # numpy's square root is the nearest float64; torch's, on CPU, depends on the place in the array.
    signal_T = DDIMScheduler(**settings).alphas_cumprod.double().numpy()
    alphas_T, sigmas_T = torch.from_numpy(np.sqrt(signal_T)), torch.from_numpy(np.sqrt(1.0 - signal_T))
    return NoiseSchedule(settings["prediction_type"], alphas_T, sigmas_T, settings)


def _flow(settings: Mapping[str, Any]) -> NoiseSchedule:
    count = int(settings.get("num_train_timesteps", TRAIN_TIMESTEPS))
    sigmas_T = torch.arange(1, count + 1, dtype=torch.float64) / count
    return NoiseSchedule("flow", 1.0 - sigmas_T, sigmas_T, settings)


def _understood(scheduler: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a scheduler's class takes; another class's say how that one samples."""
    taken = inspect.signature(scheduler).parameters
    return {name: value for name, value in settings.items() if name in taken}
