"""What a desk is doing and has done, in numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WINDOW_S = 10
"""Rates are of the last so many seconds."""


@dataclass(frozen=True)
class GeneratorStatus:
    """Of one generator; steps and images since the desk was opened, even where the generator was closed in between."""

    loaded: bool
    waiting: int
    """Images without slots."""
    running: int
    """Images between their first and last step."""
    slots_used: int
    slots: int
    """Of all sizes that are being made."""
    steps: int
    images: int
    """Handed out: draws that were refused do not count."""
    steps_per_s: float
    images_per_s: float


@dataclass(frozen=True)
class DeskStatus:
    """Of a desk and of each of its generators that was asked for."""

    healthy: bool
    orders: int
    """Taken and not ended."""
    generators: Mapping[str, GeneratorStatus]
    rejects: Mapping[str, int]
    """Draws that were refused, by reason."""

    @property
    def waiting(self) -> int:
        return self._sum(lambda status: status.waiting)

    @property
    def running(self) -> int:
        return self._sum(lambda status: status.running)

    @property
    def slots_used(self) -> int:
        return self._sum(lambda status: status.slots_used)

    @property
    def slots(self) -> int:
        """Of the generators that are loaded."""
        return self._sum(lambda status: status.slots if status.loaded else 0)

    @property
    def steps(self) -> int:
        return self._sum(lambda status: status.steps)

    @property
    def images(self) -> int:
        return self._sum(lambda status: status.images)

    @property
    def steps_per_s(self) -> float:
        return sum(status.steps_per_s for status in self.generators.values())

    @property
    def images_per_s(self) -> float:
        return sum(status.images_per_s for status in self.generators.values())

    def _sum(self, count: Callable[[GeneratorStatus], int]) -> int:
        return sum(count(status) for status in self.generators.values())


class Meter:
    """Steps and images of one generator: all, and those of the last WINDOW_S seconds."""

    def __init__(self) -> None:
        self.steps = self.images = 0
        self._seconds: deque[list[int]] = deque(maxlen=WINDOW_S + 1)
        """A second, and what was done in it."""

    def count(self, now: float, steps: int, images: int) -> None:
        self.steps += steps
        self.images += images
        if not self._seconds or self._seconds[-1][0] != int(now):
            self._seconds.append([int(now), 0, 0])
        self._seconds[-1][1] += steps
        self._seconds[-1][2] += images

    def rates(self, now: float) -> tuple[float, float]:
        """Steps and images per second."""
        recent = [(steps, images) for second, steps, images in self._seconds if now - second <= WINDOW_S]
        return sum(steps for steps, _ in recent) / WINDOW_S, sum(images for _, images in recent) / WINDOW_S
