"""Noise schedules: their ends, what diffusers reads of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.noise_schedule import PredictionType, noise_schedule, read_schedule, write_schedule

KINDS: tuple[PredictionType, ...] = ("v_prediction", "epsilon", "flow")


@pytest.mark.parametrize("kind", KINDS)
def test_signal_falls_noise_rises_and_together_they_keep_their_sum(kind: PredictionType) -> None:
    schedule = noise_schedule(kind)
    assert schedule.alphas_T.dtype == schedule.sigmas_T.dtype == torch.float64
    assert (schedule.alphas_T.diff() < 0).all()
    assert (schedule.sigmas_T.diff() > 0).all()
    power = 1 if kind == "flow" else 2
    whole = schedule.alphas_T**power + schedule.sigmas_T**power
    torch.testing.assert_close(whole, torch.ones_like(whole))


@pytest.mark.parametrize("betas", [None, "scaled_linear"])
def test_zero_terminal_snr_ends_in_pure_noise_and_begins_as_before(betas: None) -> None:
    plain = noise_schedule("v_prediction", betas=betas)
    zero = noise_schedule("v_prediction", betas=betas, zero_terminal_snr=True)
    assert zero.alphas_T[-1] == 0.0
    assert zero.sigmas_T[-1] == 1.0
    assert plain.alphas_T[-1] > 0.0
    torch.testing.assert_close(zero.alphas_T[0], plain.alphas_T[0], rtol=1e-6, atol=0)


def test_flow_ends_in_pure_noise_and_has_the_sigmas_of_diffusers() -> None:
    schedule = noise_schedule("flow")
    assert schedule.alphas_T[-1] == 0.0
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(schedule.sigmas_T.float(), theirs.sigmas.flip(0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again_bit_for_bit(kind: PredictionType, tmp_path: Path) -> None:
    schedule = noise_schedule(kind, zero_terminal_snr=kind == "v_prediction")
    write_schedule(schedule, tmp_path)
    again = read_schedule(tmp_path)
    assert again.prediction_type == kind
    assert torch.equal(again.alphas_T, schedule.alphas_T)
    assert torch.equal(again.sigmas_T, schedule.sigmas_T)
    write_schedule(again, tmp_path / "second")
    name = "scheduler/scheduler_config.json"
    assert (tmp_path / "second" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler"])
def test_the_schedule_of_a_base_model_is_read_whatever_samples_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    settings = {
        "_class_name": name, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "skip_prk_steps": True, "steps_offset": 1,
    }  # fmt: skip
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    read = read_schedule(tmp_path)
    assert torch.equal(read.alphas_T, noise_schedule("epsilon").alphas_T)
    write_schedule(read, tmp_path / "second")
    assert DDIMScheduler.from_pretrained(tmp_path / "second" / "scheduler").config.timestep_spacing == "trailing"


def test_epsilon_with_zero_terminal_snr_is_refused_with_the_remedy() -> None:
    with pytest.raises(RecipeError, match="v_prediction"):
        noise_schedule("epsilon", zero_terminal_snr=True)


@pytest.mark.parametrize("text", [None, "no JSON", '{"_class_name": "DDIMScheduler", "prediction_type": "sample"}'])
def test_a_schedule_that_is_missing_or_of_another_kind_is_one_clear_error(text: str | None, tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    if text is not None:
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    with pytest.raises(ArtefactError, match="scheduler") as caught:
        read_schedule(tmp_path)
    assert "\n" not in str(caught.value)
