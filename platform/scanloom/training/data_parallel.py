"""What training under DistributedDataParallel shares: the loop, means over workers, checkpoints of one file."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed
from torch import Tensor, nn

from scanloom.errors import RecipeError

REPORT_EVERY_STEPS = 20


@dataclass
class Run:
    """A network in training, its optimizer, and the steps that it has taken."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0

    @property
    def network(self) -> Any:
        return bare(self.model)

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"model": self.network, "optimizer": self.optimizer}


@dataclass(frozen=True)
class Length:
    """How long a run is, and how often it is saved."""

    steps: int
    batch_size: int
    checkpoint_every_steps: int


def run_steps(
    run: Run, file: str, length: Length, advance: Callable[[int, int], Tensor], learning_rate: str
) -> dict[str, Any]:
    """Take what is left of a run's steps, from its last checkpoint in `file` on; the last metrics. Collective.

    `advance(rank, workers)` takes one step, counts it in `run.step`, and gives its loss. Raises RecipeError, naming
    the recipe's key `learning_rate`, where the loss is no number, before a checkpoint is overwritten.
    """
    metrics = restore(file, run.parts)
    run.step = metrics.get("step", 0)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    started, resumed_at = time.monotonic(), run.step
    while run.step < length.steps:
        loss = advance(rank, workers)
        saving = run.step % length.checkpoint_every_steps == 0 and run.step < length.steps
        if not saving and run.step % REPORT_EVERY_STEPS and run.step < length.steps:
            continue
        mean_loss = mean_over_workers(loss)
        if not math.isfinite(mean_loss):
            section = learning_rate.partition(".")[0]
            raise RecipeError(f"{section}: the loss is no number at step {run.step}; lower {learning_rate}")
        rate = (run.step - resumed_at) * length.batch_size / (time.monotonic() - started)
        metrics = {"step": run.step, "loss": mean_loss, "images_per_s": rate}
        if saving:
            report_checkpoint(file, run.parts, metrics, rank)
        else:
            ray.train.report(metrics)
    return metrics


def bare(model: nn.Module) -> Any:
    """The network that DistributedDataParallel wraps, or the model itself where nothing does."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def mean_over_workers(value: Tensor) -> float:
    """The mean of a scalar over all workers. Collective."""
    value = value.detach().float().clone()
    torch.distributed.all_reduce(value)
    return float(value) / torch.distributed.get_world_size()


def report_checkpoint(file: str, parts: Mapping[str, Any], metrics: dict[str, Any], rank: int) -> None:
    """Report `metrics`, worker 0 with a checkpoint: the state of every part, and the metrics, in `file`. Collective."""
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory(prefix="scanloom-checkpoint-") as folder:
        saved = {name: part.state_dict() for name, part in parts.items()} | {"metrics": metrics}
        torch.save(saved, Path(folder) / file)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def restore(file: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Put the parts into the state of the run's last checkpoint; its metrics, or {} where there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {}
    with checkpoint.as_directory() as folder:
        saved = torch.load(Path(folder) / file, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    metrics: dict[str, Any] = saved["metrics"]
    return metrics
