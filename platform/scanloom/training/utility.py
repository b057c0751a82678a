"""What images are worth for training: one classifier that learns in one way from one seed, and reads held-out scans.

A classifier follows from its lesson and the material alone, so that one whose worker was killed is trained again to the
same weights. Whatever it learns from, it takes as many steps.

Legend of shape suffixes: N images, M held-out scans, L labels, B rows of a batch, S pixels of a side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional

from scanloom.attributes import Attributes, AttributeSchema
from scanloom.errors import RecipeError
from scanloom.models.classifier import build_classifier, takes
from scanloom.recipe_audit import ARMS, Arm, UtilityStudy
from scanloom.training.draws import rows_at

READ_ROWS = 64
_SHIFT, _CONTRAST, _BRIGHTNESS = 0.05, 0.1, 0.05


@dataclass(frozen=True)
class Part:
    """Images and what they show."""

    inputs_NX: NDArray[np.floating[Any]]
    """Squares float16 [N, S, S] in [0, 1], or vectors float32 [N, D]."""
    wanted_NL: NDArray[np.float32]
    """0 or 1; NaN where it is not known."""

    def __len__(self) -> int:
        return len(self.inputs_NX)


@dataclass(frozen=True)
class Material:
    """All that classifiers learn from and are tested on; read once and shared by all of them."""

    schema: AttributeSchema
    labels: tuple[str, ...]
    train: Part
    synthetic: Part
    held_out: Part
    patients: list[str]
    """Of the held-out scans."""
    attributes: list[Attributes]
    """Of the held-out scans."""
    classifier: str
    """In words."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Labels that cannot be tested, each with the reason."""


class Lesson(BaseModel):
    """How one classifier learns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: Arm
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    device: str = "cpu"


@dataclass(frozen=True)
class Scores:
    """What one classifier reads of the held-out scans."""

    arm: Arm
    seed: int
    likelihood_ML: NDArray[np.float32]
    seconds: float


def lessons(settings: UtilityStudy, seed: int) -> list[Lesson]:
    """Of every arm as many as there are seeds."""
    return [
        Lesson(
            arm=arm, seed=(seed * settings.seeds + number) % 2**60, steps=settings.steps,
            batch_size=settings.batch_size, learning_rate=settings.learning_rate,
            device="cuda" if settings.use_gpu else "cpu",
        )
        for number in range(settings.seeds)
        for arm in ARMS
    ]  # fmt: skip


def train_and_score(lesson: Lesson, material: Material) -> Scores:
    """Train one classifier and read the held-out scans with it. RecipeError where its loss is no number."""
    started = time.monotonic()
    torch.set_num_threads(1)
    if not material.labels:
        return Scores(lesson.arm, lesson.seed, np.zeros((len(material.held_out), 0), np.float32), 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed)
        network = build_classifier(material.train.inputs_NX.shape[1:], len(material.labels)).to(lesson.device)
    network.train()
    for number, (parts, steps) in enumerate(_courses(lesson, material)):
        _learn(network, parts, steps, lesson, lesson.seed * 2 + number)
    read_ML = _read(network.eval(), material.held_out, lesson.device)
    return Scores(lesson.arm, lesson.seed, read_ML, time.monotonic() - started)


def _courses(lesson: Lesson, material: Material) -> list[tuple[list[Part], int]]:
    """One after the other: from what is learned, all parts in equal shares of a batch, and for how many steps."""
    real, made, steps = material.train, material.synthetic, lesson.steps
    if lesson.arm == "synthetic, then real":
        return [([made], steps // 2), ([real], steps - steps // 2)]
    arms: Mapping[Arm, list[Part]] = {"real": [real], "synthetic": [made], "real and synthetic": [real, made]}
    return [(arms[lesson.arm], steps)]


def _learn(network: nn.Module, parts: Sequence[Part], steps: int, lesson: Lesson, seed: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lesson.learning_rate, weight_decay=0.01)
    share = lesson.batch_size // len(parts)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lesson.learning_rate * _rate_factor(step, steps)
        where = range(step * share, (step + 1) * share)
        chosen = [rows_at(where, len(part), seed + 7919 * number) for number, part in enumerate(parts)]
        drawn = np.random.default_rng((seed, step))
        inputs_BX = np.concatenate([part.inputs_NX[rows] for part, rows in zip(parts, chosen, strict=True)])
        wanted_BL = np.concatenate([part.wanted_NL[rows] for part, rows in zip(parts, chosen, strict=True)])
        seen = takes(torch.from_numpy(moved(inputs_BX.astype(np.float32), drawn))).to(lesson.device)
        loss = masked_loss(network(seen), torch.from_numpy(wanted_BL).to(lesson.device))
        if not torch.isfinite(loss):
            raise RecipeError("a classifier's loss is no number; lower audit.utility.learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def masked_loss(logits_BL: Tensor, wanted_BL: Tensor) -> Tensor:
    """Mean binary cross-entropy over what is known."""
    known = ~wanted_BL.isnan()
    each = functional.binary_cross_entropy_with_logits(logits_BL, wanted_BL.nan_to_num(), reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


def moved(inputs_BX: NDArray[np.float32], drawn: np.random.Generator) -> NDArray[np.float32]:
    """Squares, each shifted and with another contrast and brightness; vectors as they are. Never mirrored: a heart is
    on the left."""
    if inputs_BX.ndim == 2:
        return inputs_BX
    rows, size, _ = inputs_BX.shape
    most = round(_SHIFT * size)
    shift_2B = drawn.integers(-most, most + 1, (2, rows))
    down_BS, across_BS = (np.clip(np.arange(size) + shift[:, None], 0, size - 1) for shift in shift_2B)
    cut = inputs_BX[np.arange(rows)[:, None, None], down_BS[:, :, None], across_BS[:, None, :]]
    contrast, brightness = drawn.uniform(-1.0, 1.0, (2, rows, 1, 1)).astype(np.float32)
    changed: NDArray[np.float32] = (cut - 0.5) * (1.0 + _CONTRAST * contrast) + 0.5 + _BRIGHTNESS * brightness
    return changed


@torch.inference_mode()
def _read(network: nn.Module, part: Part, device: str) -> NDArray[np.float32]:
    told = [
        network(takes(torch.from_numpy(part.inputs_NX[start : start + READ_ROWS].astype(np.float32))).to(device))
        for start in range(0, len(part), READ_ROWS)
    ]
    likelihood: NDArray[np.float32] = torch.cat(told).sigmoid().cpu().numpy()
    return likelihood


def _rate_factor(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return warm * (0.02 + 0.49 * (1.0 + math.cos(math.pi * step / steps)))
