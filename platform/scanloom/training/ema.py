"""Exponential moving average of weights, kept in float32 whatever the precision of training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Ema:
    """Shadow weights: s <- d s + (1 - d) w, with d = min(decay, (1 + updates) / (10 + updates)).

    The warm-up of d lets a short run forget its random start.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move every shadow weight towards its weight."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for shadow, parameter in zip(self.shadow, parameters, strict=True):
            shadow.lerp_(parameter.detach().float(), 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Overwrite these parameters with the shadow weights."""
        for shadow, parameter in zip(self.shadow, parameters, strict=True):
            parameter.copy_(shadow)

    def state(self) -> dict[str, int | list[Tensor]]:
        """What `restore` needs."""
        return {"updates": self.updates, "shadow": self.shadow}

    def restore(self, updates: int, shadow: list[Tensor]) -> None:
        """Continue from a saved state."""
        self.updates = updates
        for mine, saved in zip(self.shadow, shadow, strict=True):
            mine.copy_(saved)
