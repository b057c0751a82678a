"""Clients that ask a service for images one after the other, and what became of what they asked for."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from scanloom.client import Client, ServiceError
from tests.running_service import RunningService, wait_until

SEEDS = 5
"""Different images that are asked for, again and again."""


@dataclass
class Traffic:
    """`with Traffic(service, clients=4) as traffic:` asks until the block ends. An image must be the same each time."""

    service: RunningService
    clients: int = 4
    attributes: dict[str, Any] = field(default_factory=lambda: {"sex": "F", "age": 60, "view": "PA"})
    steps: int = 100
    patience_s: float = 120.0
    pause_s: float = 0.0
    """Between a client's requests."""
    calls: int = 0
    failures: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    """HTTP answers by status, and connections that broke, by kind."""
    _ends: list[float] = field(default_factory=list)
    _images: dict[int, NDArray[Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._ends.append(time.monotonic())
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._ends.append(time.monotonic())

    def await_more(self, calls: int, within_s: float = 120.0) -> None:
        """Wait until so many more calls have ended."""
        wanted = self.calls + calls
        wait_until(lambda: self.calls >= wanted, within_s, f"{calls} more calls end")

    @property
    def retried(self) -> int:
        """Requests beyond one for each call."""
        return sum(self.answers.values()) - self.calls

    @property
    def longest_gap_s(self) -> float:
        """In which no call ended well."""
        return float(np.diff(sorted(self._ends)).max())

    def told(self, what: str) -> str:
        """The figures, in one line."""
        return (
            f"{what}: {self.calls} calls, {len(self.failures)} failed, {self.retried} retries, answers "
            f"{dict(self.answers)}, longest gap {self.longest_gap_s:.1f} s"
        )

    def _ask(self, number: int) -> None:
        http = httpx.Client(trust_env=False, transport=_Counted(self.answers, self._lock))
        with Client(self.service.url, self.service.key, patience_s=self.patience_s, http=http) as client:
            turn = number
            while not self._over.wait(self.pause_s):
                self._ask_once(client, turn % SEEDS)
                turn += 1

    def _ask_once(self, client: Client, seed: int) -> None:
        try:
            made = client.images.generate(self.attributes, seed=seed, steps=self.steps, deadline_s=self.patience_s)
            image = np.asarray(made.numpy()[0])
        except ServiceError as error:
            with self._lock:
                self.calls += 1
                self.failures.append(f"{type(error).__name__}: {error}")
            return
        with self._lock:
            self.calls += 1
            self._ends.append(time.monotonic())
            first = self._images.setdefault(seed, image)
        if not np.array_equal(first, image):
            self.failures.append(f"seed {seed}: another image than before")


class _Counted(httpx.HTTPTransport):
    """Counts what comes of every request."""

    def __init__(self, answers: Counter[str], lock: threading.Lock) -> None:
        super().__init__()
        self._answers, self._lock = answers, lock

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            answer = super().handle_request(request)
        except httpx.TransportError as error:
            self._count(type(error).__name__)
            raise
        self._count(str(answer.status_code))
        return answer

    def _count(self, what: str) -> None:
        with self._lock:
            self._answers[what] += 1
