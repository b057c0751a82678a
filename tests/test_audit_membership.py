"""A generator that knows its scans by heart betrays them, one that knows the population, or nothing, does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scanloom.artefact import Artefact, publish
from scanloom.audit.membership import STRIDE, MembershipJob, attack, attacks, losses, step_errors
from scanloom.audit.report import Membership
from scanloom.errors import ArtefactError
from scanloom.models.noise_schedule import PredictionType, noise_schedule
from scanloom.recipe_audit import MembershipInference
from scanloom.store import Store
from scanloom.training.probes import Conditions, Denoise
from tests.phantom_corpus import publish_corpus
from tests.tiny_generator import publish_generator
from tests.trained_generator import publish_trained

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


Error = Callable[[Denoise, Tensor], np.ndarray[Any, Any]]


def by_loss(denoise: Denoise, latents: Tensor) -> np.ndarray[Any, Any]:
    return losses(denoise, SCHEDULE, latents, {}, seed=3, timesteps=TIMES)


def by_step(denoise: Denoise, latents: Tensor) -> np.ndarray[Any, Any]:
    return step_errors(denoise, SCHEDULE, latents, {}, timesteps=TIMES)


def test_the_loss_of_the_right_denoiser_is_the_closed_form() -> None:
    found = losses(of_population, SCHEDULE, normal(0), {}, seed=1, timesteps=TIMES, noises=20)
    # Var[n | noisy] = 1 - sigma**2 = alpha**2 of data and noise that are standard normal.
    expected = SCHEDULE.alphas_T[list(TIMES)].square().numpy()
    assert found.mean(axis=0) == pytest.approx(expected, rel=0.15)
    assert found.shape == (150, 2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_step_error_of_the_right_denoiser_is_the_closed_form(kind: PredictionType) -> None:
    schedule, latents, times = noise_schedule(kind), normal(0), (50, 100)
    alphas, sigmas = schedule.alphas_T, schedule.sigmas_T

    def denoise(noisy_BCHW: Tensor, times_B: Tensor, _: Conditions) -> Tensor:
        """E[x | noisy] = alpha noisy / (alpha**2 + sigma**2) of standard normal data, E[n | noisy] with sigma."""
        alpha, sigma = float(alphas[times_B[0]]), float(sigmas[times_B[0]])
        per = noisy_BCHW / (alpha**2 + sigma**2)
        return {"epsilon": sigma * per, "v_prediction": 0.0 * per, "flow": (sigma - alpha) * per}[kind]

    def factor(before: int, after: int) -> float:
        scale = alphas[before] ** 2 + sigmas[before] ** 2
        return float((alphas[after] * alphas[before] + sigmas[after] * sigmas[before]) / scale)

    found = step_errors(denoise, schedule, latents, {}, timesteps=times)
    for column, time in enumerate(times):
        there = np.prod([factor(at, at + STRIDE) for at in range(0, time, STRIDE)])
        changed = 1.0 - factor(time, time + STRIDE) * factor(time + STRIDE, time)
        expected = (there * changed) ** 2 * latents.square().flatten(1).mean(1).numpy()
        assert found[:, column] == pytest.approx(expected, rel=2e-2, abs=1e-12)


def test_memorising_is_betrayed_and_knowing_the_population_is_not() -> None:
    members, others = normal(1), normal(2)

    def told(denoise: Denoise, error: Error) -> dict[str, tuple[float, float, float, float]]:
        ours, theirs = error(denoise, members), error(denoise, others)
        found = attacks(ours, theirs, NAMES, NAMES, TIMES)
        return {one.name: (one.auc.low, one.auc.high, one.tpr.low, one.tpr.high) for one in found}

    for error in (by_loss, by_step):
        caught, innocent = told(by_heart(members), error), told(of_population, error)
        assert [name.removesuffix(", turned round") for name in caught] == ["timestep 100", "timestep 500", "mean"]
        assert caught["timestep 100"][0] > 0.95
        assert caught["timestep 100"][2] > 0.9
        assert innocent["mean"][0] < 0.5
        assert innocent["mean"][1] < 0.65
        assert innocent["mean"][2] <= 0.01


def test_an_attack_that_is_wrong_beyond_chance_is_turned_round() -> None:
    errors = np.random.default_rng(1).standard_normal((150, 1))
    for ours, name in (
        (errors - 2.0, "timestep 1"),
        (errors + 2.0, "timestep 1, turned round"),
        (errors, "timestep 1"),
    ):
        first, _ = attacks(ours, np.random.default_rng(2).standard_normal((150, 1)), NAMES, NAMES, (1,))
        assert first.name == name
        assert first.auc.high > 0.5
        assert (first.auc.low > 0.8) == (first.tpr.value > 0.1) == (ours is not errors)


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


def test_an_untrained_generator_betrays_nothing(tmp_path: Path) -> None:
    corpus = publish_corpus(f"{tmp_path}/corpus", scans=96)
    found = told_of(corpus, publish_trained(f"{tmp_path}/generator", corpus, steps=0))
    assert (found.members, found.others, found.member_patients) == (72, 24, 72)
    assert [one.name for one in found.attacks if "mean" in one.name] == ["loss, mean", "t-error, mean"]
    assert all((one.auc.low or 0.0) < 0.5 < (one.auc.high or 1.0) for one in found.attacks if "mean" in one.name)


@pytest.mark.slow
def test_a_generator_trained_for_too_long_betrays_its_scans(tmp_path: Path) -> None:
    corpus = publish_corpus(f"{tmp_path}/corpus", scans=160)
    settings: dict[str, Any] = {"batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 20}
    made = publish_trained(f"{tmp_path}/generator", corpus, 600, condition_dropout=0.0, **settings)
    found = {one.name: one for one in told_of(corpus, made).attacks}
    assert (found["loss, mean"].auc.low or 0.0) > 0.9
    assert (found["loss, mean"].tpr.low or 0.0) > 0.3
    assert (found["t-error, timestep 200"].auc.low or 0.0) > 0.5


def test_scans_of_another_size_and_a_corpus_without_held_out_ones_are_refused(tmp_path: Path) -> None:
    corpus = publish_corpus(f"{tmp_path}/corpus", scans=8)
    with pytest.raises(ArtefactError, match=r"tiny: makes images of \(16, 16\), the corpus has scans of \(32, 32\)"):
        told_of(corpus, publish_generator(f"{tmp_path}/other"))
    kept = [entry for entry in corpus.manifest.files if not entry.path.startswith("validation")]
    store = Store(f"{tmp_path}/alone")
    for entry in kept:
        store.write(entry.path, corpus.store.read(entry.path))
    alone = publish(
        store, kind="corpus", name="alone", recipe={}, inputs=[], files=kept, statistics=corpus.manifest.statistics
    )
    with pytest.raises(ArtefactError, match="has no scans of held-out patients"):
        told_of(alone, publish_generator(f"{tmp_path}/another"))


def told_of(corpus: Artefact, generator: Artefact) -> Membership:
    settings = MembershipInference()
    job = MembershipJob(settings=settings, seed=0, corpus_uri=corpus.uri, generator_uri=generator.uri)
    return attack(job.model_dump(mode="json"))


def test_of_few_others_guessing_finds_more_members() -> None:
    def told(others: int) -> Membership:
        return Membership(
            generator="0", members=200, others=others, member_patients=200, other_patients=others, attacks=()
        )  # fmt: skip

    random = np.random.default_rng(3)
    for others in (40, 100, 250):
        found = []
        for _ in range(400):
            errors = random.standard_normal(others + 200)
            threshold = np.sort(errors[:others])[others // 100]
            found.append((errors[others:] < threshold).mean())
        assert np.mean(found) == pytest.approx(told(others).guessed_tpr, rel=0.2)
