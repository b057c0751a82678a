"""A whole generation service in this process, but for Ray: every part is the real one, or what a test puts there."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI

from scanloom.api import PROBLEM_JSON, Problem
from scanloom.api_key import entry, new_key
from scanloom.sampling.image_order import ImageOrder, MadeImages
from serve.access import Gatekeeper
from serve.audit_log import AuditLog
from serve.catalogue import read_catalogue
from serve.config import Service
from serve.gateway import gateway
from serve.ledger import Ledger
from serve.metrics import Metrics
from serve.parts import Parts
from serve.quotas import Quotas
from tests.tiny_generator import SIZE

Make = Callable[[ImageOrder], Awaitable[MadeImages]]

_HOLDERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "lab": ("clinic-a", ("generate", "datasets")),
    "rival": ("clinic-b", ("generate", "datasets")),
    "viewer": ("clinic-a", ("generate",)),
    "orderer": ("clinic-a", ("datasets",)),
    "admin": ("operators", ("admin",)),
    "expired": ("clinic-a", ("generate", "datasets", "admin")),
}
KEYS = {name: new_key(name) for name in _HOLDERS}
"""API keys by their holders."""


def settings(generator_uri: str, datasets: str | None = None, **more: Any) -> Service:
    """Settings with one generator, `tiny`, and the keys; `datasets` is the store of datasets."""
    keys = [entry(KEYS[name], name, *of, None) for name, of in _HOLDERS.items()]
    keys[-1]["expires"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    told: dict[str, Any] = {
        "generators": [{"name": "tiny", "uri": generator_uri, "quality": ANY_QUALITY}],
        "replicas": {"slots": 8},
        "access": {"keys": keys},
    }
    if datasets is not None:
        told["datasets"] = {"store": datasets, "images_per_shard": 4}
    return Service.model_validate(told | more)


ORDER = {"images": 8, "cohort": {"kind": "cells", "cells": [{"sex": "F", "share": 1}]}, "steps": 2}
"""Body of an order for a dataset."""

ANY_QUALITY = {"least_contrast": 0.0, "most_white": 1.0, "most_black": 1.0, "attempts": 1}
"""Of a generator that was never trained."""


def parts_of(service: Service, make: Make, **replaced: Any) -> Parts:
    """The real parts of these settings, around what makes images."""
    made: dict[str, Any] = {
        "service": service,
        "make": make,
        "ready": _ready,
        "gatekeeper": Gatekeeper(service.access),
        "quotas": Quotas(service),
        "audit": AuditLog(None),
        "ledger": Ledger(service) if service.datasets else None,
        "catalogue": read_catalogue(service),
        "measure": Metrics(),
    }
    return Parts(**(made | replaced))


async def _ready() -> bool:
    return True


def bearer(holder: str) -> dict[str, str]:
    """The header that shows a holder's key."""
    return {"Authorization": f"Bearer {KEYS[holder]}"}


async def blank(order: ImageOrder) -> MadeImages:
    """Images at no cost."""
    dtype = np.uint8 if order.bits_stored == 8 else np.uint16
    return MadeImages(np.zeros((order.count, SIZE, SIZE), dtype), [0] * order.count, "0" * 64)


def problem(answer: httpx.Response, status: int, kind: str) -> Problem:
    """The problem of an answer, which must be of this status and kind."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == PROBLEM_JSON
    told = Problem.model_validate_json(answer.content)
    assert (told.status, told.type) == (status, f"urn:scanloom:problem:{kind}")
    assert told.instance == answer.headers["X-Request-ID"]
    return told


class Asked:
    """An application that is asked from threads, all requests in one event loop as under a server."""

    def __init__(self, app: FastAPI, holder: str | None = "lab") -> None:
        self.app = app
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="asked")
        self._thread.start()
        # An exception that leaves the application is a fault of it.
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://service", headers=bearer(holder) if holder else None
        )

    def begin(self, method: str, path: str, **told: Any) -> Future[httpx.Response]:
        """Send a request and do not wait; cancelling the future cancels it as a server does that shuts down."""
        return asyncio.run_coroutine_threadsafe(self._client.request(method, path, timeout=60.0, **told), self._loop)

    def __call__(self, method: str, path: str, **told: Any) -> httpx.Response:
        return self.begin(method, path, **told).result(120.0)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def applications(service: Service) -> Iterator[Callable[..., Asked]]:
    """Opens applications of these settings, with what a test replaces, and closes them in the end."""
    with ExitStack() as opened:

        def open_with(make: Make = blank, holder: str = "lab", service: Service = service, **replaced: Any) -> Asked:
            return opened.enter_context(closing(Asked(gateway(parts_of(service, make, **replaced)), holder)))

        yield open_with


@contextmanager
def listening(app: FastAPI) -> Iterator[tuple[str, int]]:
    """Host and port where a real server, uvicorn, runs an application."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=5))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(30.0)
