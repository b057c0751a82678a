"""Orders of datasets, a cluster that is none, and dispatchers as they come and go."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.dispatcher import Dispatcher, job_name
from serve.ledger import Ledger
from serve.orders import Ticket
from tests.served_datasets import REQUEST, FakeCluster, finish, service

LONG_AGO = 1e9


class Place:
    """A service's settings with a ledger, a cluster, and dispatchers as they come and go."""

    def __init__(self, store: str, generator: str, **datasets: Any) -> None:
        self.settings = service(store, generator, **datasets)
        self.ledger = Ledger(self.settings)
        self.cluster = FakeCluster()
        self.now = LONG_AGO

    def dispatcher(self) -> Dispatcher:
        return Dispatcher(self.settings, self.cluster, clock=lambda: self.now)

    def order(self, tenant: str = "acme") -> str:
        return self.ledger.place(tenant, REQUEST, "r")[0].id

    def state(self, id: str) -> str:
        return self.ledger.find(None, id).state

    def finish(self, id: str, tenant: str = "acme", attempt: int = 1) -> None:
        finish(self.settings, tenant, id)
        self.cluster.end(name(id, attempt))


def name(id: str, attempt: int = 1) -> str:
    """Of the job that makes an order of the tenant acme."""
    return job_name(Ticket("acme", id), attempt)


def places(folder: Path, generator: str) -> Callable[..., Place]:
    """Makes places of the settings that it is told, each with a store of its own in a folder."""
    number = itertools.count()
    return lambda **datasets: Place(str(folder / str(next(number))), generator, **datasets)
