"""Training state that any number of workers goes on from.

Every worker writes what it owns (see training.partition), without talking to others: master weights, both moments of
Adam and the average, each a flat float32 tensor, beside a list of which slice of which parameter lies where. A worker
that resumes reads the slices that it holds now from whatever files hold them, so that neither the number of workers
nor the ZeRO stage nor the precision need to be those that saved.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scanloom.errors import ArtefactError
from scanloom.training.ema import Ema
from scanloom.training.partition import Flat, Partition, Piece

MOMENTS = ("exp_avg", "exp_avg_sq")
# How far a dynamic loss scale has come, by the names of DeepSpeed's two kinds of scaler.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Slice:
    """Where one file keeps a piece of a parameter."""

    file: Any
    """An open safetensors file."""
    flat: int
    piece: Piece


def write_part(folder: Path, partition: Partition, ema: Ema, metrics: Mapping[str, Any], rank: int) -> None:
    """Write this worker's part of the state, and from worker 0 what all have in common."""
    optimizer = partition.engine.basic_optimizer
    tensors: dict[str, Tensor] = {}
    for index, (flat, shadow) in enumerate(zip(partition.owned, ema.shadow, strict=True)):
        state = optimizer.state.get(flat.master, {})
        tensors[f"master.{index}"] = flat.values
        tensors[f"ema.{index}"] = shadow
        for moment in MOMENTS:
            tensors[f"{moment}.{index}"] = state[moment].view(-1) if state else torch.zeros_like(flat.values)
    pieces = [
        [index, piece.name, piece.start, piece.offset, piece.size]
        for index, flat in enumerate(partition.owned)
        for piece in flat.pieces
    ]
    on_cpu = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, folder / f"part-{rank:05d}.safetensors", metadata={"pieces": json.dumps(pieces)})
    if rank == 0:
        common = {
            "metrics": dict(metrics),
            "ema_updates": ema.updates,
            "optimizer_step": _optimizer_step(partition),
            "loss_scale": _loss_scale(partition.engine),
        }
        (folder / "state.json").write_text(json.dumps(common), encoding="utf-8")


class SavedState:
    """A checkpoint in a local folder. ArtefactError where it is incomplete."""

    def __init__(self, folder: Path) -> None:
        try:
            self._common: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
            self._slices: dict[str, list[Slice]] = defaultdict(list)
            for file in sorted(folder.glob("part-*.safetensors")):
                opened: Any = safe_open(file, "pt")
                for index, *piece in json.loads(opened.metadata()["pieces"]):
                    self._slices[piece[0]].append(Slice(opened, index, Piece(*piece)))
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ArtefactError(f"checkpoint: cannot be read: {reason[:200]}; delete the run's folder") from error

    @property
    def metrics(self) -> dict[str, Any]:
        """What was reported with it."""
        metrics: dict[str, Any] = self._common["metrics"]
        return metrics

    @torch.no_grad()
    def restore_weights(self, module: nn.Module) -> None:
        """Set the trainable parameters of a module that no engine has taken apart yet."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(self._read("master", name, 0, parameter.numel()).view(parameter.shape))

    @torch.no_grad()
    def restore(self, partition: Partition, ema: Ema) -> None:
        """Set this worker's master weights, moments and average.

        The module must have been given the weights before (`restore_weights`): only the masters are set here.
        """
        optimizer = partition.engine.basic_optimizer
        step = float(self._common["optimizer_step"])
        for flat in partition.flats:
            self._fill("master", flat.values, flat.pieces)
            if step:
                optimizer.state[flat.master] = self._moments(flat, step, optimizer)
        for flat, shadow in zip(partition.owned, ema.shadow, strict=True):
            self._fill("ema", shadow, flat.pieces)
        ema.updates = self._common["ema_updates"]
        scaler = _scaler(partition.engine)
        for name, value in self._common["loss_scale"].items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)

    def _moments(self, flat: Flat, step: float, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        moments = {moment: torch.zeros_like(flat.master, requires_grad=False) for moment in MOMENTS}
        for moment, value in moments.items():
            self._fill(moment, value.view(-1), flat.pieces)
        device = flat.master.device if optimizer.defaults.get("fused") else "cpu"
        return {"step": torch.tensor(step, device=device)} | moments

    def _fill(self, kind: str, flat: Tensor, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            flat[piece.offset : piece.offset + piece.size] = self._read(kind, piece.name, piece.start, piece.size)

    def _read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """`size` values of a flattened parameter from `start` on, from all files that hold some of them."""
        values = torch.empty(size)
        found = 0
        for saved in self._slices.get(name, ()):
            low, high = max(start, saved.piece.start), min(start + size, saved.piece.start + saved.piece.size)
            if low >= high:
                continue
            begin = saved.piece.offset + low - saved.piece.start
            saved_flat = saved.file.get_slice(f"{kind}.{saved.flat}")
            values[low - start : high - start] = saved_flat[begin : begin + high - low]
            found += high - low
        if found != size:
            raise ArtefactError(f"checkpoint: holds {found} of {size} values of {name}; delete the run's folder")
        return values


def _optimizer_step(partition: Partition) -> float:
    state = partition.engine.basic_optimizer.state.get(partition.flats[0].master, {})
    return float(state["step"]) if state else 0.0


def _scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


def _loss_scale(engine: Any) -> dict[str, float]:
    scaler = _scaler(engine)
    return {name: value for name in LOSS_SCALE if isinstance(value := getattr(scaler, name, None), (int, float))}
