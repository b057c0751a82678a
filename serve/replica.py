"""One engine process of the service: a desk with the generators that it serves."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING

from scanloom.errors import RecipeError
from scanloom.sampling.image_order import ImageOrder, MadeImages
from scanloom.sampling.inputs import open_inputs
from serve.config import ServedGenerator, Service
from serve.logs import log_to_stderr
from serve.metrics import Metrics

if TYPE_CHECKING:
    from scanloom.sampling.desk_status import DeskStatus
    from scanloom.sampling.workbench import Workbench

LOG = logging.getLogger("scanloom")
_PUBLISHED_EVERY_S = 1.0
_OPENING_S = 3600.0


class Replica:
    """Makes images to order. It is constructed once it has made an image with each generator that it starts with."""

    def __init__(self, service: Service) -> None:
        """Raises ArtefactError or StoreError where one of the first `replicas.loaded` generators cannot be loaded."""
        log_to_stderr()
        # Here, so that the gateway, which only names this class, starts without torch.
        from scanloom.sampling.desk import Desk

        self._service = service
        self._served = {generator.name: generator for generator in service.generators}
        replicas = service.replicas
        self._desk = Desk(self._open, look=self._look, loaded=replicas.loaded, orders=replicas.requests)
        self._stopped = threading.Event()
        try:
            # Warm by the time that Serve sends requests.
            for opened in [self._desk.open(name) for name in list(self._served)[: replicas.loaded]]:
                opened.result(_OPENING_S)
        except BaseException:
            self.__del__()
            raise
        threading.Thread(target=self._publish, name="scanloom-publish", daemon=True).start()

    async def make(self, order: ImageOrder) -> MadeImages:
        """The images of an order; who is cancelled here frees their slots. Raises as `Desk.take` and its future do."""
        return await asyncio.wrap_future(self._desk.take(order))

    def status(self) -> DeskStatus:
        return self._desk.status()

    def check_health(self) -> None:
        """Raise where nothing will be made here any more, so that Serve starts another replica."""
        if not self._desk.healthy:
            raise RuntimeError("the engine hangs, or ended by an error that is in this replica's log; it is replaced")

    def drain(self, seconds: float | None = None) -> None:
        """Take no more orders, and finish what there is within so many seconds, by default `replicas.drain_s`."""
        self._stopped.set()
        self._desk.close(self._service.replicas.drain_s if seconds is None else seconds)

    def __del__(self) -> None:
        """Serve calls it once it has waited for the requests that it had sent; what is left nobody waits for."""
        if hasattr(self, "_stopped"):
            self.drain(0.0)

    def _open(self, name: str) -> Workbench:
        from scanloom.sampling.workbench import open_workbench

        served, replicas = self._known(name), self._service.replicas
        return open_workbench(
            served.uri, slots=replicas.slots, rows=replicas.rows, solver=served.solver, precision=served.precision,
            compiled=served.compiled, quality=served.quality, device="cuda" if replicas.gpus else "cpu",
            threads=replicas.cpus,
        )  # fmt: skip

    def _look(self, name: str) -> None:
        served = self._known(name)
        open_inputs(served.uri, served.quality).require_whole()

    def _known(self, name: str) -> ServedGenerator:
        if name not in self._served:
            raise RecipeError(f"generator {name!r} is not served; there are {', '.join(self._served)}")
        return self._served[name]

    def _publish(self) -> None:
        measure, rejects = Metrics(), Counter[str]()
        while not self._stopped.wait(_PUBLISHED_EVERY_S):
            told = self._desk.status()
            measure.engine(
                slots=told.slots, used=told.slots_used, waiting=told.waiting,
                loaded=sum(status.loaded for status in told.generators.values()), steps=told.steps, images=told.images,
            )  # fmt: skip
            for reason, count in (Counter(told.rejects) - rejects).items():
                measure.redrawn(reason, count)
            rejects = Counter(told.rejects)
