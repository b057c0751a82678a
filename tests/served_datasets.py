"""A service that makes datasets, as far as orders and their jobs go: settings, a generator, a cluster that is none."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scanloom.api import DatasetRequest
from scanloom.artefact import Artefact, FileEntry, publish
from scanloom.store import Store
from serve.config import Service
from serve.ledger import Ledger
from serve.ray_jobs import JobState, JobsUnavailable
from tests.tiny_generator import STATISTICS

REQUEST = DatasetRequest.model_validate(
    {"images": 10, "cohort": {"kind": "cells", "cells": [{"sex": "F", "share": 1}]}, "steps": 2, "seed": 7}
)
OTHER = REQUEST.model_copy(update={"images": 11})


def publish_bare_generator(uri: str) -> Artefact:
    """What an order looks at: a manifest, without weights."""
    return publish(
        Store(uri), kind="generator", name="tiny", recipe={}, inputs=[], files=[], statistics=STATISTICS
    )  # fmt: skip


def service(store_uri: str, generator_uri: str, **datasets: Any) -> Service:
    """The settings of a service with one generator, `tiny`, whose datasets lie in a store."""
    return Service.model_validate(
        {
            "generators": [{"name": "tiny", "uri": generator_uri}],
            "datasets": {"store": store_uri, "images_per_shard": 4, "poll_s": 0.1, **datasets},
        }
    )


def ledgers(folder: Path, generator_uri: str) -> Iterator[Ledger]:
    """New ledgers without end, each with a store of its own in a folder."""
    return (Ledger(service(str(folder / str(number)), generator_uri)) for number in itertools.count())


@dataclass
class FakeCluster:
    """The Jobs API of a cluster that runs what a test wants to have run."""

    jobs: dict[str, JobState] = field(default_factory=dict)
    recipes: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    down: bool = False

    def state(self, name: str) -> JobState | None:
        self._require_up()
        return self.jobs.get(name)

    def submit(self, name: str, recipe: str) -> None:
        self._require_up()
        if name not in self.jobs:
            self.log.append(("submit", name))
            self.jobs[name] = JobState(live=True)
            self.recipes[name] = recipe

    def stop(self, name: str) -> None:
        self._require_up()
        self.log.append(("stop", name))
        if self.jobs[name].live:
            self.jobs[name] = JobState(live=False, message="stopped")

    def end(self, name: str, exit_code: int | None = 0, message: str = "", *, started: bool = True) -> None:
        """Have a job end by itself, long ago."""
        self.jobs[name] = JobState(live=False, exit_code=exit_code, message=message, ended=0.0, started=started)

    @property
    def live(self) -> list[str]:
        return [name for name, job in self.jobs.items() if job.live]

    def _require_up(self) -> None:
        if self.down:
            raise JobsUnavailable("Ray's Jobs API does not answer")


def finish(settings: Service, tenant: str, order_id: str, files: dict[str, bytes] | None = None) -> Artefact:
    """Write the dataset of an order as its job does at the end."""
    assert settings.datasets is not None
    store = Store(settings.datasets.store).at(f"{tenant}/{order_id}/dataset")
    content = {"images/shard-000000-0a1b2c3d4e5f.parquet": b"0123456789"} if files is None else files
    entries = []
    for path, data in content.items():
        store.write(path, data)
        entries.append(FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    statistics = {"rows": 10, "gate": "ungated", "cells": []}
    return publish(
        store, kind="dataset", name="dataset", recipe={}, inputs=[], files=entries, statistics=statistics
    )  # fmt: skip
