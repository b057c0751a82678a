"""Exponential moving average of weights, kept in float32 whatever the precision of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ema:
    """Shadow weights: s <- d s + (1 - d) w, with d = min(decay, (1 + updates) / (10 + updates)).

    The warm-up of d lets a short run forget its random start. The weights are float32 tensors that change in place,
    such as the master weights that a worker owns: the average is divided among workers as they are.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._weights = list(weights)
        self.shadow = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self) -> None:
        """Move every shadow weight towards its weight."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self.shadow:
            torch._foreach_lerp_(self.shadow, self._weights, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]
