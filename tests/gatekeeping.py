"""What a gatekeeper lets in: a key with its entry, a caller that shows one, and the time as a test has it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from scanloom.api_key import fingerprint, new_key
from serve.access import Caller, Gatekeeper
from serve.config import ApiKey

KEY = new_key("lab")


class Clock:
    """Seconds, as the test has them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def admit(keeper: Gatekeeper, sent: str | None, scheme: str = "Bearer ") -> Caller:
    """Who shows this key or token, in an event loop of its own."""
    return asyncio.run(admitted(keeper.admit(None if sent is None else scheme + sent)))


async def admitted(admitting: Awaitable[Caller]) -> Caller:
    return await admitting


def api_key(key: str = KEY, **changes: Any) -> ApiKey:
    """The entry of a key of the tenant clinic-a."""
    return ApiKey.model_validate({"id": "lab", "sha256": fingerprint(key), "tenant": "clinic-a"} | changes)
