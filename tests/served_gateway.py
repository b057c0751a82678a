"""The service on loopback but for engines and jobs: images are arithmetic, datasets are finished by the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scanloom.errors import ScanloomError
from scanloom.sampling.image_order import ImageOrder, MadeImages
from serve.config import Service
from serve.gateway import gateway
from serve.ledger import Ledger
from tests.served_datasets import finish
from tests.served_images import KEYS, listening, parts_of, settings
from tests.tiny_generator import SIZE

TENANT = "clinic-a"
FILES = {
    "images/shard-000000-0a1b2c3d4e5f.parquet": bytes(range(256)) * 4000,
    "images/shard-000001-1a2b3c4d5e6f.parquet": b"one" * 100_000,
    "dicom/shard-000000-0a1b2c3d4e5f.tar": b"",
}
"""Of every dataset that is finished here."""


def pixels_of(order: ImageOrder) -> Any:
    """[N, H, W]: what an order's images are here, of seed and index alone."""
    dtype = np.uint8 if order.bits_stored == 8 else np.uint16
    indices = range(order.first_index, order.first_index + order.count)
    draws = [np.random.default_rng([order.seed, index]) for index in indices]
    return np.stack([draw.integers(0, 2**order.bits_stored, (SIZE, SIZE), dtype) for draw in draws])


@dataclass
class Served:
    """A running service; `key` is of a tenant that may do all but administer."""

    url: str
    service: Service
    digest: str
    """Of its generator."""
    key: str = field(default=KEYS["lab"], repr=False)

    def finish(self, id: str) -> None:
        """Write the dataset of an order, as its job would."""
        finish(self.service, TENANT, id, FILES)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Finish orders as soon as they are accepted."""
        ended = threading.Event()
        ledger = Ledger(self.service)

        def work() -> None:
            while not ended.wait(0.05):
                for job in ledger.jobs(TENANT, 100, None).datasets:
                    if job.state == "accepted":
                        with suppress(ScanloomError):
                            self.finish(job.id)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextmanager
def served(generator_uri: str, datasets: str, **more: Any) -> Iterator[Served]:
    """A service with one generator, whose datasets lie in the store `datasets`; `more` of its settings."""

    async def make(order: ImageOrder) -> MadeImages:
        return MadeImages(pixels_of(order), [0] * order.count, digest)

    service = settings(generator_uri, datasets, **more)
    parts = parts_of(service, make)
    digest = parts.catalogue["tiny"].digest
    with listening(gateway(parts)) as (host, port):
        yield Served(f"http://{host}:{port}", service, digest)
