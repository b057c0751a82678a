"""A generator whose every step waits for the test's leave, and that remembers what was asked of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from scanloom.attributes import Attributes
from scanloom.sampling.engine import Engine
from scanloom.sampling.gate import UNGATED
from scanloom.sampling.quality import Judge
from scanloom.sampling.workbench import Workbench
from tests.faulty_generator import FaultyGenerator

PATIENCE_S = 60.0


class GatedGenerator:
    """Its images are their noise; `log` gets the name at each call of the denoiser."""

    latent_shape: tuple[int, ...] = (1, 4, 4)
    schedule = FaultyGenerator.schedule

    def __init__(self, name: str = "a", log: list[str] | None = None) -> None:
        self.name = name
        self.log = [] if log is None else log
        self.told: list[Attributes] = []
        self._gate = threading.Condition()
        self._permits: int | None = None
        self._waiting = False

    def shut(self) -> None:
        """From now on a step waits until it is let through."""
        with self._gate:
            self._permits = 0

    def let(self, steps: int | None) -> None:
        """Let so many more steps through; None: all."""
        with self._gate:
            self._permits = None if steps is None else (self._permits or 0) + steps
            self._waiting = False
            self._gate.notify_all()

    def until_shut(self) -> None:
        """Return once a step waits at the gate."""
        with self._gate:
            assert self._gate.wait_for(lambda: self._waiting, PATIENCE_S), "no step came to the gate"

    def require_shape(self, latent_shape: tuple[int, ...]) -> None:
        pass

    def condition(self, attributes: Sequence[Attributes]) -> torch.Tensor:
        self.told += attributes
        if any("unheard of" in each for each in attributes):
            raise ValueError("no such attribute")
        return torch.zeros(len(attributes), 1)

    def null_condition(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 1)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        with self._gate:
            self._waiting = self._permits == 0
            self._gate.notify_all()
            assert self._gate.wait_for(lambda: self._permits != 0, PATIENCE_S), "the test never let this step through"
            self._waiting = False
            if self._permits is not None:
                self._permits -= 1
            self.log.append(self.name)
        return -latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(latents)


def bench_of(
    generator: GatedGenerator | FaultyGenerator, *, slots: int = 4, judges: Sequence[Judge] = (), attempts: int = 3,
    gate: str = UNGATED, eager_below: int = 1000,
) -> Workbench:  # fmt: skip
    """A workbench around a generator of the tests, without judges unless some are given.

    What is finished is decoded at once, or, once `eager_below` images run, with the next.
    """
    engine = Engine(generator, slots, eager_below=eager_below)
    return Workbench(generator, engine, generator.__class__.__name__, lambda bits: judges, attempts, {}, gate)
