"""What the service promised: orders of datasets placed, found, cancelled, and read when they are done.

Every method blocks on the store, and any number of processes may have a ledger of the same store.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from scanloom.api import DatasetJob, DatasetJobs, DatasetProgress, DatasetRequest, DatasetResult, ResultFile
from scanloom.artefact import MANIFEST, PROGRESS, Artefact, open_artefact
from scanloom.errors import ArtefactError, RecipeError, ScanloomError
from scanloom.progress import STALE_S, Progress
from scanloom.recipe import CellsCohort, MarginalsCohort, Recipe, parse_recipe
from scanloom.sampling.inputs import Inputs, open_inputs
from scanloom.section import nearest
from scanloom.store import MissingError, Store
from serve.config import Datasets, ServedGenerator, Service
from serve.orders import DATASET, ID, TENANT, Order, Orders, Standing, Ticket, new_id, now, request_digest

LOG = logging.getLogger("scanloom.serve")
_PIECE_BYTES = 1 << 20
_READERS = 16
_MANIFESTS = 4
"""Of finished datasets, kept in memory; of a million images one weighs some 20 MB."""
_OF_THE_REQUEST = {"generator"}


class NotFound(ScanloomError):
    """There is no such order, or it is another tenant's; no caller can tell which."""


class Conflict(ScanloomError):
    """The order stands otherwise than the request takes for granted."""


@dataclass(frozen=True)
class DatasetFile:
    """A file of a finished dataset, which never changes."""

    store: Store
    path: str
    size: int
    """In bytes."""
    sha256: str

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes start <= n < stop, a piece at a time. Raises StoreError where the store fails."""
        for begin in range(start, stop, _PIECE_BYTES):
            yield self.store.read_range(self.path, begin, min(_PIECE_BYTES, stop - begin))


class Ledger:
    """The orders of a service. RecipeError where its settings have no `datasets`.

    A `tenant` of None may see the orders of all. Every method raises StoreError where the store fails.
    """

    def __init__(self, service: Service) -> None:
        if service.datasets is None:
            raise RecipeError("datasets: the service's settings have none; say where datasets are to be kept")
        self._service = service
        self._datasets: Datasets = service.datasets
        self.orders = Orders(Store(service.datasets.store))
        # A large cohort takes seconds of the interpreter, which other requests need too.
        self._compiling = threading.Lock()
        self._finished = functools.lru_cache(_MANIFESTS)(self._open_dataset)

    def place(
        self, tenant: str, request: DatasetRequest, request_id: str, idempotency_key: str | None = None
    ) -> tuple[DatasetJob, bool]:
        """The accepted order, and whether it is a new one.

        The same key with the same request gives the same order, also where an earlier call died half-way. Raises
        Conflict for the key with another request; RecipeError or ArtefactError for what cannot be made, as
        `scanloom.sampling.plan.order` does. What is refused is not written.
        """
        _require_tenant(tenant)
        order_id = new_id()
        if idempotency_key is not None:
            claimed = self.orders.claimed(tenant, idempotency_key)
            if claimed is not None:
                _require_same(claimed[1], request)
                if (known := self.orders.read(Ticket(tenant, claimed[0]))) is not None:
                    return self._told(known), False
        self._require_fitting(request)
        order = self._compiled(tenant, request, request_id, order_id)
        if idempotency_key is not None:
            # From here on whoever comes with this key goes on with this id, and one of them creates the order.
            order_id, digest = self.orders.claim(tenant, idempotency_key, request, order_id)
            _require_same(digest, request)
            if order_id != order.id:
                order = self._compiled(tenant, request, request_id, order_id)
        placed, new = self.orders.place(order)
        return self._told(placed), new

    def ordered(self, tenant: str, idempotency_key: str) -> DatasetJob | None:
        """The order that the key stands for; None where it stands for none yet."""
        _require_tenant(tenant)
        claimed = self.orders.claimed(tenant, idempotency_key)
        known = None if claimed is None else self.orders.read(Ticket(tenant, claimed[0]))
        return None if known is None else self._told(known)

    def find(self, tenant: str | None, id: str) -> DatasetJob:
        """The order and where it stands. Raises NotFound."""
        return self._told(self._order(tenant, id))

    def jobs(self, tenant: str | None, limit: int, after: str | None = None) -> DatasetJobs:
        """The newest `limit` orders that are older than the order `after`. Raises NotFound where that is no id."""
        if after is not None:
            _require_id(after)
        if tenant is not None:
            _require_tenant(tenant)
        tickets = self.orders.tickets(tenant, after or "", limit + 1)
        with ThreadPoolExecutor(_READERS) as pool:
            orders = list(pool.map(self._read_or_none, tickets[:limit]))
            told = list(pool.map(self._told, [order for order in orders if order is not None]))
        return DatasetJobs(datasets=told, next=tickets[limit - 1].id if len(tickets) > limit else None)

    def open_jobs(self, tenant: str) -> int:
        """How many of a tenant's orders have not ended."""
        _require_tenant(tenant)
        with ThreadPoolExecutor(_READERS) as pool:
            standings = pool.map(self.orders.standing, self.orders.open(tenant))
            return sum(standing is not None and not standing.ended for standing in standings)

    def cancel(self, tenant: str | None, id: str) -> DatasetJob:
        """Want no more of the order; it is cancelled when its job was stopped. To ask again changes nothing.

        Raises NotFound, and Conflict where the order has ended otherwise.
        """
        order = self._order(tenant, id)
        ticket = Ticket(order.tenant, order.id)
        standing = self._standing(ticket)
        if standing.ended and standing.state != "cancelled":
            raise Conflict(f"dataset {id} has {standing.state}; there is nothing to cancel")
        if not standing.ended:
            self.orders.ask_to_cancel(ticket)
        return self._told(order)

    def result(self, tenant: str | None, id: str) -> DatasetResult:
        """The finished dataset, each file with a URL; the first is the manifest. Raises NotFound and Conflict."""
        ticket, dataset = self._dataset(tenant, id)
        text = dataset.store.read(MANIFEST)
        sha256 = hashlib.sha256(text).hexdigest()
        named = [(MANIFEST, len(text), sha256), *((f.path, f.bytes, f.sha256) for f in dataset.manifest.files)]
        statistics = dataset.manifest.statistics
        expires = datetime.now(UTC) + timedelta(seconds=self._datasets.links_s)
        return DatasetResult(
            id=id,
            digest=dataset.digest,
            rows=statistics["rows"],
            gate=statistics["gate"],
            statistics=statistics,
            expires=expires.isoformat(timespec="seconds"),
            files=[
                ResultFile(path=path, bytes=size, sha256=sha256, url=self._url(dataset.store, ticket, path))
                for path, size, sha256 in named
            ],
        )

    def file(self, tenant: str | None, id: str, path: str) -> DatasetFile:
        """A finished dataset's file. Raises NotFound, at once, for what its manifest does not name."""
        _, dataset = self._dataset(tenant, id)
        if path == MANIFEST:
            text = dataset.store.read(MANIFEST)
            return DatasetFile(dataset.store, path, len(text), hashlib.sha256(text).hexdigest())
        entry = next((file for file in dataset.manifest.files if file.path == path), None)
        if entry is None:
            raise NotFound(f"dataset {id} has no file {path[:200]!r}; its result names those that it has")
        return DatasetFile(dataset.store, path, entry.bytes, entry.sha256)

    def _read_or_none(self, ticket: Ticket) -> Order | None:
        try:
            return self.orders.read(ticket)
        except ArtefactError as error:
            LOG.warning("%s", error)  # a list of the others is worth more than none
            return None

    # --- one order --------------------------------------------------------------------------------------------

    def _order(self, tenant: str | None, id: str) -> Order:
        _require_id(id)
        if tenant is not None:
            _require_tenant(tenant)
        for owner in self.orders.tenants() if tenant is None else [tenant]:
            if (order := self.orders.read(Ticket(owner, id))) is not None:
                return order
        raise NotFound(f"there is no dataset {id}")

    def _standing(self, ticket: Ticket) -> Standing:
        standing = self.orders.standing(ticket)
        if standing is None:
            raise NotFound(f"there is no dataset {ticket.id}")
        return standing

    def _told(self, order: Order) -> DatasetJob:
        ticket = Ticket(order.tenant, order.id)
        standing = self._standing(ticket)
        return DatasetJob(
            id=order.id,
            state=standing.state,
            generator=order.generator,
            generator_digest=order.generator_digest,
            plan=order.plan,
            images=order.request.images,
            seed=order.request.seed,
            created=order.created,
            request=order.request_id,
            progress=self._progress(ticket, order, standing),
            problem=self.orders.problem(ticket) if standing.state == "failed" else None,
        )

    def _progress(self, ticket: Ticket, order: Order, standing: Standing) -> DatasetProgress:
        total = order.request.images
        try:
            reported = Progress.model_validate_json(self.orders.store.read(f"{ticket.folder}/{DATASET}/{PROGRESS}"))
        except (MissingError, ValidationError):
            done = total if standing.state == "finished" else 0
            return DatasetProgress(images_total=total, images_done=done, images_per_s=None, eta_s=None)
        running = standing.state == "running" and reported.state == "running" and reported.age_s < STALE_S
        return DatasetProgress(
            images_total=total,
            images_done=total if standing.state == "finished" else reported.images_done,
            images_per_s=reported.images_per_s if running else None,
            eta_s=reported.eta_s if running else None,
            rejects=reported.rejects,
        )

    # --- a finished dataset -----------------------------------------------------------------------------------

    def _dataset(self, tenant: str | None, id: str) -> tuple[Ticket, Artefact]:
        order = self._order(tenant, id)
        ticket = Ticket(order.tenant, order.id)
        standing = self._standing(ticket)
        if standing.state != "finished":
            raise Conflict(f"dataset {id} is {standing.state}; its files are there when it has finished")
        return ticket, self._finished(ticket)

    def _open_dataset(self, ticket: Ticket) -> Artefact:
        return open_artefact(self.orders.store.uri_of(f"{ticket.folder}/{DATASET}"), "dataset")

    def _url(self, store: Store, ticket: Ticket, path: str) -> str:
        if store.is_local:
            return f"/v1/datasets/{ticket.id}/files/{quote(path)}"
        return store.presign(path, self._datasets.links_s)

    # --- a new order ------------------------------------------------------------------------------------------

    def _compiled(self, tenant: str, request: DatasetRequest, request_id: str, order_id: str) -> Order:
        """The order with its whole plan, none of which is written yet."""
        served = self._served(request.generator)
        inputs = _opened(served)
        generator = inputs.generator
        recipe = self._recipe(tenant, request, request_id, order_id, served, inputs)
        assert recipe.generate is not None
        with self._compiling:
            ordered = inputs.order(recipe.generate)
        return Order(
            id=order_id,
            tenant=tenant,
            request_id=request_id,
            request=request,
            generator=served.name,
            generator_uri=generator.uri,
            generator_digest=generator.digest,
            plan=ordered.spec.digest,
            recipe=recipe.model_dump(mode="json", include={"name", "store", "attributes", "generate"}),
            created=now(),
        )

    def _recipe(
        self, tenant: str, request: DatasetRequest, request_id: str, order_id: str, served: ServedGenerator,
        inputs: Inputs,
    ) -> Recipe:  # fmt: skip
        datasets = self._datasets
        generator, (probe, gate) = inputs.generator, inputs.uris
        quality = served.quality.model_copy(update={"probe": probe, "gate": gate})
        section = {
            **request.model_dump(mode="json", exclude=_OF_THE_REQUEST),
            "dataset": DATASET,
            "generator": generator.uri,
            "order": request_id,
            "solver": served.solver,
            "precision": served.precision,
            "compiled": served.compiled,
            "quality": quality.model_dump(mode="json"),
            "slots": max(2, self._service.replicas.slots),  # a guided image takes two
            "images_per_shard": datasets.images_per_shard,
            "engines": datasets.engines,
            "cpus_per_engine": datasets.cpus_per_engine,
            "gpus_per_engine": datasets.gpus_per_engine,
            "writers": datasets.writers,
        }
        schema: Mapping[str, Any] = generator.manifest.statistics.get("schema", {})
        tree = {
            "name": order_id,
            "store": self.orders.store.uri_of(f"{tenant}/{order_id}"),
            "attributes": schema.get("declarations", ()),
            "generate": section,
        }
        return parse_recipe(tree, f"of dataset {order_id}")

    def _require_fitting(self, request: DatasetRequest) -> None:
        """Raise RecipeError for what is too large to be planned beside other requests, or made at all."""
        most = self._datasets
        if request.images > most.most_images:
            raise RecipeError(
                f"images: {most.most_images} at most in one dataset; order several, each with its own seed"
            )
        cells = 1
        if isinstance(request.cohort, CellsCohort):
            cells = len(request.cohort.cells)
        elif isinstance(request.cohort, MarginalsCohort):
            cells = math.prod(len(shares) for shares in request.cohort.marginals.values())
        if cells > most.most_cells:
            raise RecipeError(
                f"cohort: {cells} cells or combinations of marginals; {most.most_cells} at most in an order"
            )

    def _served(self, name: str | None) -> ServedGenerator:
        generators = self._service.generators
        if name is None:
            return generators[0]
        for served in generators:
            if served.name == name:
                return served
        raise RecipeError(f"generator {name!r} is not served{nearest(name, [served.name for served in generators])}")


def _opened(served: ServedGenerator) -> Inputs:
    try:
        return open_inputs(served.uri, served.quality)
    except ArtefactError as error:
        # Nothing that the request could mend.
        raise ScanloomError(f"generator {served.name} cannot be used now: {error}") from error


def _require_tenant(tenant: str) -> None:
    if not TENANT.fullmatch(tenant):
        raise RecipeError("a tenant's name is of 1 to 64 letters, digits, '.', '_' and '-', the first of them no sign")


def _require_id(id: str) -> None:
    if not ID.fullmatch(id):
        raise NotFound("there is no dataset of that id; ids have 24 hex digits")


def _require_same(digest: str, request: DatasetRequest) -> None:
    if digest != request_digest(request):
        raise Conflict("Idempotency-Key: it was used for another request; take a new one")
