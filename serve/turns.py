"""Blocking calls in threads, shared by tenants: none can take them all, and no line of requests is endless."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from scanloom.errors import BusyError

Result = TypeVar("Result")

THREADS = 16
MOST_RUNNING, MOST_WAITING = 4, 16
"""Of one tenant: calls that run at once, and requests that have not ended."""
_RETRY_S = 2.0


class Line:
    """The requests of one tenant that make calls. To be used in one event loop."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._running = asyncio.Semaphore(MOST_RUNNING)
        self.alone = asyncio.Lock()
        """For what only one request of the tenant may do at a time."""
        self.requests = self.calls = 0

    async def call(self, method: Callable[..., Result], *arguments: Any) -> Result:
        """What a blocking method gives, in a thread."""
        loop = asyncio.get_running_loop()
        await self._running.acquire()
        self.calls += 1
        running = self._threads.submit(method, *arguments)
        # Who stops waiting does not stop the thread, which counts until it ends.
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._ended))
        return await asyncio.wrap_future(running)

    def _ended(self) -> None:
        self.calls -= 1
        self._running.release()


class Turns:
    """The lines of all tenants before the same threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="ledger")
        self._lines: dict[str, Line] = {}

    @asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[Line]:
        """The tenant's line, for one request. Raises BusyError where too many of its requests wait already."""
        line = self._lines.setdefault(tenant, Line(self._threads))
        if line.requests >= MOST_WAITING:
            raise BusyError(f"{MOST_WAITING} requests of this tenant wait for the store; ask again", _RETRY_S)
        line.requests += 1
        try:
            yield line
        finally:
            line.requests -= 1
            if not (line.requests or line.calls):
                self._lines.pop(tenant, None)
