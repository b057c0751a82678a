"""Shares of gradients and weights that workers send each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from scanloom.recipe import Finetune
from scanloom.training import engine, exchange
from scanloom.training.exchange import Piece, pieces
from tests.training_worker import on_workers

RECIPE = Finetune(batch_size=12, gradient_accumulation=2, learning_rate=1e-2, zero_stage=1, gradient_clip=0.05)
STEPS = 3


def test_every_share_is_cut_where_parameters_begin_and_padding_is_not_sent() -> None:
    with patch.object(exchange, "PIECE", 4):
        found = list(pieces([(0, 2), (2, 7), (7, 8), (8, 17)], share=10, workers=3))
    assert found == [
        Piece(0, 0, 7, frozenset({0, 1})),
        Piece(0, 7, 10, frozenset({2, 3})),
        Piece(1, 10, 20, frozenset({3})),
    ]


class Layers(nn.Module):
    """Of which the second serves the first micro-batch of a step alone, and the last the first step alone."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, rows: Tensor, step: int, turn: int) -> Tensor:
        for index, serves in enumerate((True, turn == 0, True, step == 0)):
            rows = self.layers[index](rows) if serves else rows
        return rows


def _rows(step: int) -> Tensor:
    return torch.randn(RECIPE.batch_size, 5, generator=torch.Generator().manual_seed(step))


def _trained_alone() -> dict[str, Tensor]:
    model = Layers()
    optimizer = torch.optim.AdamW(model.parameters(), RECIPE.learning_rate, engine.BETAS, weight_decay=0.0)
    for step in range(STEPS):
        loss = torch.zeros(())
        for worker in _rows(step).chunk(3):
            for turn, rows in enumerate(worker.chunk(2)):
                loss = loss + model(rows, step, turn).square().mean() / 6
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        nn.utils.clip_grad_norm_(model.parameters(), RECIPE.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}


def _train(rank: int, workers: int, folder: Path) -> None:
    with patch.object(exchange, "PIECE", 8):
        model: Any = engine.start(RECIPE, Layers())
    assert model.exchange is not None
    for group in model.engine.optimizer.param_groups:
        group["lr"] = RECIPE.learning_rate
    for step in range(STEPS):
        for turn, rows in enumerate(_rows(step).chunk(workers)[rank].chunk(2)):
            model.learn(model.engine(rows, step, turn).square().mean())
    torch.save({name: value.detach() for name, value in model.engine.module.named_parameters()}, folder / f"{rank}.pt")


def test_three_workers_train_what_one_does_also_where_a_gradient_comes_early_or_never(tmp_path: Path) -> None:
    on_workers(3, tmp_path, "exchange", _train, (tmp_path,))
    alone = _trained_alone()
    for rank in range(3):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert not torch.equal(alone["layers.1.weight"], Layers().layers[1].get_parameter("weight"))
