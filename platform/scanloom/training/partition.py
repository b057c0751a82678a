"""Where the optimizer's float32 values of each parameter lie, whatever DeepSpeed made of them.

Every ZeRO stage keeps master weights as some flat tensors per worker: stage 0 one a parameter on every worker, stages
1 and 2 a share of all parameters in a row, stage 3 a share of every parameter. Averages and checkpoints only need to
know which slice of which parameter lies where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """`size` values of the flattened parameter `name` from `start` on, at `offset` of their flat tensor."""

    name: str
    start: int
    offset: int
    size: int


@dataclass(frozen=True)
class Flat:
    """One tensor that this worker's optimizer steps, and the parameters' pieces in it; the rest of it is padding."""

    master: Tensor
    pieces: tuple[Piece, ...]
    owned: bool = True
    """Each value has one owner among the workers, who averages and saves it."""

    @property
    def values(self) -> Tensor:
        """The master weights, float32, one-dimensional, sharing memory."""
        return self.master.detach().view(-1)


@dataclass(frozen=True)
class Partition:
    """This worker's part of a training state under DeepSpeed."""

    engine: Any
    flats: tuple[Flat, ...]
    parameters: Mapping[str, Any]
    """The trainable parameters by name."""

    @classmethod
    def of(cls, engine: Any) -> Partition:
        """The partition of a DeepSpeed engine that owns a torch optimizer."""
        parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        names = {id(parameter): name for name, parameter in parameters.items()}
        layout = {0: _replicated, 1: _flattened, 2: _flattened, 3: _scattered}[int(engine.zero_optimization_stage())]
        return cls(engine, tuple(layout(engine, names)), parameters)

    @property
    def owned(self) -> tuple[Flat, ...]:
        return tuple(flat for flat in self.flats if flat.owned)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.engine.device
        return device

    @torch.no_grad()
    def gather(self, values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, whole and float32, of values laid out like the owned flats. Collective."""
        held = {piece.name: (piece, value) for flat, value in zip(self.owned, values, strict=True)
                for piece in flat.pieces}  # fmt: skip
        for name, parameter in self.parameters.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = torch.zeros(shape, dtype=torch.float32, device=self.device)
            if name in held:
                piece, value = held[name]
                whole.view(-1)[piece.start : piece.start + piece.size] = value[piece.offset : piece.offset + piece.size]
            torch.distributed.all_reduce(whole)
            yield name, whole

    @contextmanager
    def showing(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Let the module compute with values laid out like the owned flats, until the block ends. Collective."""
        show = self._scattered if self.engine.zero_optimization_stage() == 3 else self._whole
        with show(values):
            yield

    @contextmanager
    def _whole(self, values: Sequence[Tensor]) -> Iterator[None]:
        before = [parameter.detach().clone() for parameter in self.parameters.values()]
        for name, value in self.gather(values):
            self.parameters[name].data.copy_(value)
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters.values(), before, strict=True):
                parameter.data.copy_(value)

    @contextmanager
    def _scattered(self, values: Sequence[Tensor]) -> Iterator[None]:
        # Whole parameters that a module still holds are copies of the shares; without them the shares are fetched anew.
        self.engine.empty_partition_cache()
        before = [parameter.ds_tensor.detach().clone() for parameter in self.parameters.values()]
        for flat, value in zip(self.owned, values, strict=True):
            for piece in flat.pieces:
                share = value[piece.offset : piece.offset + piece.size]
                self.parameters[piece.name].ds_tensor.data[: piece.size].copy_(share)
        try:
            yield
        finally:
            self.engine.empty_partition_cache()
            for parameter, value in zip(self.parameters.values(), before, strict=True):
                parameter.ds_tensor.data.copy_(value)


def _replicated(engine: Any, names: Mapping[int, str]) -> Iterator[Flat]:
    """Stage 0: every worker holds all; a float32 parameter is its own master."""
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    masters = [p for group in engine.optimizer.param_groups for p in group["params"]]
    halves = getattr(engine.optimizer, "fp16_groups", None)
    parameters = masters if halves is None else [p for group in halves for p in group]
    for index, (master, parameter) in enumerate(zip(masters, parameters, strict=True)):
        piece = Piece(names[id(parameter)], 0, 0, master.numel())
        yield Flat(master, (piece,), owned=index % workers == rank)


def _flattened(engine: Any, names: Mapping[int, str]) -> Iterator[Flat]:
    """Stages 1 and 2: all parameters in a row, cut into as many parts as there are workers."""
    optimizer = engine.optimizer
    for parameters, master in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        found = [(names[id(p)], p._hp_mapping) for p in parameters if p._hp_mapping is not None]
        yield Flat(
            master,
            tuple(
                Piece(name, at.lp_fragment_address.start, at.hp_fragment_address.start, at.hp_fragment_address.numel)
                for name, at in found
            ),
        )


def _scattered(engine: Any, names: Mapping[int, str]) -> Iterator[Flat]:
    """Stage 3: each parameter cut into as many equal parts as there are workers, the last ones padded."""
    rank = torch.distributed.get_rank()
    optimizer = engine.optimizer
    for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        pieces, offset = [], 0
        for parameter in parameters:
            share = parameter.partition_numel()
            size = min(share, parameter.ds_numel - rank * share)
            if size > 0:
                pieces.append(Piece(names[id(parameter)], rank * share, offset, size))
            offset += share
        yield Flat(master, tuple(pieces))
