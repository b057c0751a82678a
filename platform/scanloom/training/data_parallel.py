"""What training under DistributedDataParallel shares: bare networks, means over workers, checkpoints of one file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed
from torch import Tensor, nn


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
