"""Whether requests would be answered, as `/readyz` tells load balancers, which ask often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

KEPT_S = 1.0
WAIT_S = 2.0


class Readiness:
    """What `look` says, asked every KEPT_S at most; while it does not answer, what it said last holds.

    `look` blocks, and runs in one thread of its own, one question at a time: a controller that does not answer holds
    up nobody else. To be used in one event loop.
    """

    def __init__(self, look: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._look, self._clock = look, clock
        self._ready = False
        self._said_at = -float("inf")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="readiness")
        self._asked: asyncio.Future[None] | None = None

    async def __call__(self, wait_s: float = WAIT_S) -> bool:
        if self._clock() - self._said_at > KEPT_S:
            if self._asked is None or self._asked.done():
                self._asked = asyncio.get_running_loop().run_in_executor(self._thread, self._ask)
            answered, _ = await asyncio.wait({self._asked}, timeout=wait_s)
            for one in answered:
                one.result()
        return self._ready

    def _ask(self) -> None:
        with suppress(RayError, RayServeException):
            self._ready = self._look()
        self._said_at = self._clock()
