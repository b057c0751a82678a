"""Whether a generator betrays what it was trained on: attacks that hold a scan, and ask how well it is denoised.

What was trained on is denoised with less loss (Carlini et al. 2023, section 5.3; Matsumoto et al. 2023), and a step
along the deterministic trajectory and back leads nearer to where it started (Duan et al. 2023). Members are training
scans, the others scans of held-out patients, all with the attributes that they are trained with; each timestep is an
attack of its own, and the mean over all timesteps of a kind is one more.

Legend of shape suffixes: N images, B of a batch, T timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from scanloom.artefact import Artefact, open_artefact
from scanloom.audit.intervals import Estimate, auc, percentile, sensitivity
from scanloom.audit.intervals import multiplicities as resamples
from scanloom.audit.report import Interval, Membership, MembershipAttack
from scanloom.audit.scans import Row, held_out_splits, in_batches, pixels_of, spread
from scanloom.errors import ArtefactError
from scanloom.models.generator import Generator, load_generator
from scanloom.models.noise_schedule import NoiseSchedule, PredictionType
from scanloom.recipe_audit import MembershipInference
from scanloom.sampling.noise import gaussian_noise
from scanloom.training.objectives import add_noise, target
from scanloom.training.probes import Conditions, Denoise
from scanloom.training.views import full_range

TIMESTEPS = (50, 100, 200, 300, 400, 600, 800)
"""Where the loss is taken."""
STEP_TIMESTEPS = (100, 200, 300)
STRIDE = 10
"""Where a step there and back is taken, and how long it is: k 10 as Duan et al., around as noisy as their t 100."""
FALSE_POSITIVES = 0.01
_BATCH = 32
_REPLICATES = 200


class MembershipJob(BaseModel):
    """What whoever attacks is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: MembershipInference
    seed: int
    corpus_uri: str
    generator_uri: str


@torch.no_grad()
def losses(
    denoise: Denoise,
    schedule: NoiseSchedule,
    latents_NCHW: Tensor,
    conditions: Conditions,
    *,
    seed: int,
    timesteps: Sequence[int] = TIMESTEPS,
    noises: int = 1,
    device: torch.device | str = "cpu",
) -> NDArray[np.float64]:
    """Mean squared error [N, T] of what the denoiser predicts of each latent at each timestep, over `noises` draws.

    Every latent gets the same noise, so that no image is easier by chance.
    """
    out = np.zeros((len(latents_NCHW), len(timesteps)))
    shape = latents_NCHW.shape[1:]
    for draw in range(noises):
        for column, timestep in enumerate(timesteps):
            noise_CHW = torch.from_numpy(gaussian_noise(seed, draw * len(timesteps) + column, shape)).to(device)
            for start in range(0, len(latents_NCHW), _BATCH):
                rows = slice(start, start + _BATCH)
                latents = latents_NCHW[rows].float().to(device)
                noise = noise_CHW.expand_as(latents)
                times_B = torch.full((len(latents),), timestep, dtype=torch.int64, device=device)
                alphas, sigmas = (
                    table[timestep].float().to(device).expand(len(latents))
                    for table in (schedule.alphas_T, schedule.sigmas_T)
                )
                told = denoise(
                    add_noise(latents, noise, alphas, sigmas), times_B,
                    {name: value[rows].to(device) for name, value in conditions.items()},
                ).float()  # fmt: skip
                wanted = target(schedule.prediction_type, latents, noise, alphas, sigmas)
                out[rows, column] += (told - wanted).square().flatten(1).mean(1).cpu().double().numpy() / noises
    return out


@torch.no_grad()
def step_errors(
    denoise: Denoise,
    schedule: NoiseSchedule,
    latents_NCHW: Tensor,
    conditions: Conditions,
    *,
    timesteps: Sequence[int] = STEP_TIMESTEPS,
    device: torch.device | str = "cpu",
) -> NDArray[np.float64]:
    """The t-error [N, T] of each latent at each timestep, multiples of STRIDE (SecMI: Duan et al. 2023, section 3).

    A latent goes up the deterministic trajectory to the timestep (DDIM inversion), from there a step further up and
    back; the error is the mean square of what that step changed.
    """
    out = np.zeros((len(latents_NCHW), len(timesteps)))
    for start in range(0, len(latents_NCHW), _BATCH):
        rows = slice(start, start + _BATCH)
        here = latents_NCHW[rows].float().to(device)
        told = {name: value[rows].to(device) for name, value in conditions.items()}
        for timestep in range(0, max(timesteps) + 1, STRIDE):
            ahead = _moved(denoise, schedule, here, told, timestep, timestep + STRIDE)
            if timestep in timesteps:
                back = _moved(denoise, schedule, ahead, told, timestep + STRIDE, timestep)
                error = (back - here).square().flatten(1).mean(1)
                out[rows, list(timesteps).index(timestep)] = error.cpu().double().numpy()
            here = ahead
    return out


def _moved(
    denoise: Denoise, schedule: NoiseSchedule, latents_BCHW: Tensor, told: Conditions, before: int, after: int
) -> Tensor:
    """Latents of one timestep at another, along the trajectory that the denoiser sees from there (DDIM, eta 0)."""
    times_B = torch.full((len(latents_BCHW),), before, dtype=torch.int64, device=latents_BCHW.device)
    alpha, sigma = float(schedule.alphas_T[before]), float(schedule.sigmas_T[before])
    predicted = denoise(latents_BCHW, times_B, told).float()
    data, noise = _data_and_noise(schedule.prediction_type, latents_BCHW, predicted, alpha, sigma)
    return float(schedule.alphas_T[after]) * data + float(schedule.sigmas_T[after]) * noise


def _data_and_noise(
    kind: PredictionType, latents: Tensor, predicted: Tensor, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    if kind == "epsilon":
        return (latents - sigma * predicted) / alpha, predicted
    if kind == "flow":
        return latents - sigma * predicted, latents + alpha * predicted
    return alpha * latents - sigma * predicted, sigma * latents + alpha * predicted


@dataclass(frozen=True)
class Attack:
    """How well a score tells members from others."""

    name: str
    """The timestep, or `mean`."""
    auc: Estimate
    """0.5 where nothing is betrayed."""
    tpr: Estimate
    """Share of members found where at most one in a hundred others is taken for one; 0.01 where nothing is."""


def attacks(
    members_NT: NDArray[np.float64],
    others_NT: NDArray[np.float64],
    member_patients: Sequence[str],
    other_patients: Sequence[str],
    timesteps: Sequence[int] = TIMESTEPS,
) -> tuple[Attack, ...]:
    """The attack at each timestep, then by the mean of all, each in units of the others' spread; by patients.

    The lower the error, the more likely a member. Where that is wrong beyond chance an attack is turned round, and says
    so: a network that knows a scan by heart may be the more easily thrown off its trajectory, which betrays it too.
    """
    centre, spread = others_NT.mean(axis=0), np.maximum(others_NT.std(axis=0), 1e-12)
    scores = [-(errors_NT - centre) / spread for errors_NT in (members_NT, others_NT)]
    columns = [(f"timestep {timestep}", *(score[:, k] for score in scores)) for k, timestep in enumerate(timesteps)]
    columns.append(("mean", *(score.mean(axis=1) for score in scores)))
    groups = (member_patients, other_patients)
    return tuple(_attack(name, ours, theirs, groups) for name, ours, theirs in columns)


def _attack(
    name: str, ours: NDArray[np.float64], theirs: NDArray[np.float64], groups: tuple[Sequence[str], Sequence[str]]
) -> Attack:
    area = _area(ours, theirs, groups)
    if area.high < 0.5:
        name, ours, theirs = f"{name}, turned round", -ours, -theirs
        area = _area(ours, theirs, groups)
    return Attack(name, area, sensitivity(ours, theirs, FALSE_POSITIVES, groups=groups))


def _area(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], groups: tuple[Sequence[str], Sequence[str]]
) -> Estimate:
    """DeLong's interval where every patient has one scan, else that of a bootstrap over patients."""
    plain = auc(ours, theirs)
    if all(len(set(names)) == len(names) for names in groups):
        return plain
    above = (ours[:, None] > theirs[None, :]) + 0.5 * (ours[:, None] == theirs[None, :])
    mine, other = (resamples(names, _REPLICATES, seed) for seed, names in enumerate(groups))
    found = np.einsum("rm,mn,rn->r", mine, above, other, optimize=True) / (mine.sum(1) * other.sum(1))
    return percentile(plain.value, found)


# --- the job --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attacked:
    """The errors of some scans, and whose they are."""

    losses_NT: NDArray[np.float64]
    steps_NT: NDArray[np.float64]
    patients: list[str]


def attack(config: Mapping[str, Any]) -> Membership:
    """Attack a generator with scans of its corpus. `config` is a MembershipJob as a dict.

    Scans are encoded anew, so that no latents need be there any more. ArtefactError where the corpus has no held-out
    scans, or scans that the generator was not made for.
    """
    job = MembershipJob.model_validate(config)
    corpus = open_artefact(job.corpus_uri, "corpus")
    generator = load_generator(job.generator_uri, "cuda" if job.settings.use_gpu else "cpu")
    splits = held_out_splits(corpus)
    if not splits:
        raise ArtefactError(
            f"{corpus.uri}: has no scans of held-out patients to tell members from; change prepare.split, or set "
            "audit.membership to null"
        )
    each = -(-job.settings.scans // len(splits))
    members = _attacked(generator, corpus, ["train"], job.settings.scans, job.seed)
    others = _attacked(generator, corpus, splits, each, job.seed)
    told: list[MembershipAttack] = []
    for kind, ours, theirs, timesteps in (
        ("loss", members.losses_NT, others.losses_NT, TIMESTEPS),
        ("t-error", members.steps_NT, others.steps_NT, STEP_TIMESTEPS),
    ):
        told += [
            MembershipAttack(name=f"{kind}, {one.name}", auc=Interval.of(one.auc), tpr=Interval.of(one.tpr))
            for one in attacks(ours, theirs, members.patients, others.patients, timesteps)
        ]
    return Membership(
        generator=generator.digest, members=len(members.patients), others=len(others.patients),
        member_patients=len(set(members.patients)), other_patients=len(set(others.patients)), attacks=tuple(told),
    )  # fmt: skip


def _attacked(generator: Generator, corpus: Artefact, splits: Sequence[str], most: int, seed: int) -> _Attacked:
    """At most `most` scans of each split; a batch of them in memory at a time."""
    losses_: list[NDArray[np.float64]] = []
    steps: list[NDArray[np.float64]] = []
    patients: list[str] = []

    def denoise(latents: Tensor, times_B: Tensor, told: Conditions) -> Tensor:
        return generator.denoise(latents, times_B, told["condition"])

    for split in splits:
        for batch in in_batches(spread(corpus, split, most), _BATCH):
            latents = generator.encode(torch.from_numpy(np.stack([_pixels(generator, row, split) for row in batch])))
            told = {"condition": generator.condition([generator.schema.from_row(row) for row in batch])}
            losses_.append(losses(denoise, generator.schedule, latents, told, seed=seed, device=generator.device))
            steps.append(step_errors(denoise, generator.schedule, latents, told, device=generator.device))
            patients += [row["patient"] for row in batch]
    return _Attacked(np.concatenate(losses_), np.concatenate(steps), patients)


def _pixels(generator: Generator, row: Row, split: str) -> NDArray[np.float32]:
    """[1, H, W] in [-1, 1]."""
    pixels, _ = pixels_of(row, split)
    if pixels.shape != generator.image_shape[1:]:
        raise ArtefactError(
            f"{generator.name}: makes images of {generator.image_shape[1:]}, the corpus has scans of {pixels.shape}; "
            "audit against the corpus that it was trained on"
        )
    return full_range(pixels)[None]
