"""Requests for one image each, sent at times that do not depend on how fast answers come (open loop), or as many at
once as are always under way (closed loop).

Latency counts from the moment at which a request was to be sent: a late client must not flatter a service.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

FEWEST, MOST = 4, 50
"""Steps of an image, evenly spread."""
ATTRIBUTES = {"age": 63.0, "sex": "F", "view": "PA"}


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    url: str
    headers: dict[str, str]
    deadline_s: float


@dataclass(frozen=True)
class Outcome:
    """Times in seconds since the first request was to be sent."""

    sent: float
    """When it was to be sent."""
    ended: float
    status: int
    """0: no answer."""
    dropped: bool
    """Accepted and not made."""

    @property
    def latency_s(self) -> float:
        return self.ended - self.sent


def arrivals(per_s: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process."""
    gaps = np.random.default_rng(seed).exponential(1.0 / per_s, int(per_s * seconds * 2) + 100)
    times = np.cumsum(gaps)
    return [float(at) for at in times[times < seconds]]


def step_counts(seed: int) -> Iterator[int]:
    """For ever."""
    generator = np.random.default_rng(seed)
    while True:
        yield int(generator.integers(FEWEST, MOST, endpoint=True))


def open_loop(target: Target, times: Sequence[float], seed: int) -> list[Outcome]:
    """What came of requests sent at these times, in seconds from now; returns when all are answered."""
    return asyncio.run(_open_loop(target, times, seed))


def closed_loop(target: Target, at_once: int, seconds: float, seed: int) -> list[Outcome]:
    """What came of as many requests as are answered by so many clients, each of which asks again at once."""
    return asyncio.run(_closed_loop(target, at_once, seconds, seed))


async def _open_loop(target: Target, times: Sequence[float], seed: int) -> list[Outcome]:
    async with _client() as client:
        start, steps = time.perf_counter() + 0.1, step_counts(seed)
        asked = list(zip(times, steps, strict=False))

        async def one(number: int, at: float, count: int) -> Outcome:
            await asyncio.sleep(start + at - time.perf_counter())
            return await _ask(client, target, number, count, at, lambda: time.perf_counter() - start)

        return list(await asyncio.gather(*(one(number, at, count) for number, (at, count) in enumerate(asked))))


async def _closed_loop(target: Target, at_once: int, seconds: float, seed: int) -> list[Outcome]:
    async with _client() as client:
        start, steps, outcomes = time.perf_counter(), step_counts(seed), list[Outcome]()

        def now() -> float:
            return time.perf_counter() - start

        async def one() -> None:
            while now() < seconds:
                outcomes.append(await _ask(client, target, len(outcomes), next(steps), now(), now))

        await asyncio.gather(*(one() for _ in range(at_once)))
        return outcomes


def _client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)


async def _ask(
    client: httpx.AsyncClient, target: Target, number: int, steps: int, sent: float, now: Callable[[], float]
) -> Outcome:
    body: dict[str, Any] = {"attributes": ATTRIBUTES, "seed": number, "steps": steps, "guidance_scale": 1.0}
    try:
        answer = await client.post(target.url, json=body | {"deadline_s": target.deadline_s}, headers=target.headers)
    except httpx.HTTPError:
        return Outcome(sent, now(), 0, False)
    return Outcome(sent, now(), answer.status_code, "longer than was foreseen" in answer.text[:1000])
