"""Orders of datasets as objects in a store, which are all that is known of them: nothing is kept anywhere else.

    _keys/<tenant>/<hash>               which order an Idempotency-Key stands for
    _open/<tenant>/<id>                 there is, or is about to be, an order that has not ended
    <tenant>/<id>/order.json            the order; from here on it is accepted
    <tenant>/<id>/recipe.yaml           the same for the job, and dataset/plan.json: both follow from order.json
    <tenant>/<id>/submissions/0001.json the first attempt was or is about to be submitted, and so on
    .../submissions/0001-01.json        the same once more, to a cluster that did not know it
    <tenant>/<id>/cancel.json           somebody wants no more of it
    <tenant>/<id>/cancelled.json        it was cancelled, and nobody works on it
    <tenant>/<id>/failed.json           it failed, and why
    <tenant>/<id>/dataset/              the dataset; finished when its manifest is there

Every object is created once and never replaced, so that any number of processes may write and any of them die. What
an order's state is follows from which objects are there. Objects below `_open` are deleted when an order has ended;
where a store refuses that, they cost a look after each start.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from scanloom.api import DatasetRequest, DatasetState
from scanloom.artefact import MANIFEST, PROGRESS, canonical_json, plan_digest
from scanloom.errors import ArtefactError, StoreError
from scanloom.shards.commit import begin
from scanloom.store import MissingError, Store

DATASET = "dataset"
ORDER, RECIPE = "order.json", "recipe.yaml"
CANCEL, CANCELLED, FAILED = "cancel.json", "cancelled.json", "failed.json"
SUBMISSIONS = "submissions"
# No tenant's name starts with an underscore.
KEYS, OPEN = "_keys", "_open"
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ID = re.compile(r"[0-9a-f]{24}")
_LATEST_MS = 2**48 - 1
_SUBMISSION = re.compile(r"(\d{4})(?:-(\d{2,}))?\.json")
_GIVEN_UP_MS = 86_400_000


class Order(BaseModel):
    """What was ordered, by whom, and all that determines what is made of it."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    id: str
    tenant: str
    request_id: str
    request: DatasetRequest
    generator: str
    """The name under which it is served."""
    generator_uri: str
    generator_digest: str
    plan: str
    """Digest of the plan."""
    recipe: Mapping[str, Any]
    created: str
    """UTC, ISO 8601."""


@dataclass(frozen=True, order=True)
class Ticket:
    """Names an order. Tickets sort by tenant, then from new to old."""

    tenant: str
    id: str

    @property
    def folder(self) -> str:
        return f"{self.tenant}/{self.id}"


@dataclass(frozen=True)
class Standing:
    """What the store says of an order."""

    state: DatasetState
    cancel_asked: bool = False

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "failed", "cancelled")


@dataclass(frozen=True)
class Attempt:
    """One submission of an order's job."""

    number: int
    """From 1."""
    failures: int
    """Of the attempts before, those that count."""
    again: int = 0
    """How often it was submitted before, to clusters that have lost it."""
    losses: int = 0
    """How often in a row it was lost without an image made since."""
    done: int = 0
    """Images that were there when it was submitted."""


def new_id(milliseconds: float | None = None) -> str:
    """24 hex digits, those of later orders first: stores list by name from the lowest, and readers want the newest."""
    now = time.time_ns() // 1_000_000 if milliseconds is None else int(milliseconds)
    return f"{_LATEST_MS - now:012x}{secrets.token_hex(6)}"


def request_digest(request: DatasetRequest) -> str:
    """What tells whether two requests are the same."""
    return plan_digest("order", request.model_dump(mode="json"))


@dataclass(frozen=True)
class Orders:
    """The orders in a store, with tenants and ids that their callers have checked.

    All methods raise StoreError where the store fails, and ArtefactError for an object that is damaged.
    """

    store: Store

    def place(self, order: Order) -> tuple[Order, bool]:
        """Accept the order; another one with its id where that was first, and False.

        What follows from order.json may be missing after a crash: `prepare` writes it before it is needed.
        """
        ticket = Ticket(order.tenant, order.id)
        # Before the order, so that none is ever there which no dispatcher finds.
        self.store.create(f"{OPEN}/{ticket.folder}", b"{}")
        new = self.store.create(f"{ticket.folder}/{ORDER}", order.model_dump_json(indent=1).encode())
        placed = order if new else self.read(ticket)
        if placed is None:
            raise ArtefactError(f"{self.store.uri_of(ticket.folder)}: {ORDER} was there and is gone; who deletes it?")
        with suppress(StoreError):  # it is accepted; what is not written now is before the job starts
            self.prepare(placed)
        return placed, new

    def claim(self, tenant: str, key: str, request: DatasetRequest, order_id: str) -> tuple[str, str]:
        """The id that an Idempotency-Key stands for, `order_id` unless the key was used before, and its request's
        digest.

        There need not be an order of that id yet.
        """
        content = canonical_json({"request": request_digest(request), "id": order_id})
        if self.store.create(_key_of(tenant, key), content):
            return order_id, request_digest(request)
        claimed = self.claimed(tenant, key)
        if claimed is None:
            raise ArtefactError(f"{self.store.uri_of(_key_of(tenant, key))}: was there and is gone; who deletes it?")
        return claimed

    def claimed(self, tenant: str, key: str) -> tuple[str, str] | None:
        """The id that an Idempotency-Key stands for and the digest of its request; None where it is new."""
        found = self._json(_key_of(tenant, key))
        if found is None:
            return None
        try:
            return str(found["id"]), str(found["request"])
        except KeyError as error:
            raise ArtefactError(f"{self.store.uri_of(_key_of(tenant, key))}: is damaged; delete it") from error

    def read(self, ticket: Ticket) -> Order | None:
        """The order, None where there is none."""
        key = f"{ticket.folder}/{ORDER}"
        try:
            return Order.model_validate_json(self.store.read(key))
        except MissingError:
            return None
        except ValidationError as error:
            raise ArtefactError(f"{self.store.uri_of(key)}: is no order of this version; delete its folder") from error

    def prepare(self, order: Order) -> str:
        """Write what the job reads, where that is not there; URI of the recipe.

        The dataset's folder is claimed for the plan, so that a job which would make another one, of a generator that
        has changed since, is refused by the job itself.
        """
        ticket = Ticket(order.tenant, order.id)
        recipe = f"{ticket.folder}/{RECIPE}"
        text = yaml.safe_dump(dict(order.recipe), sort_keys=False, allow_unicode=True)
        self.store.create(recipe, text.encode())
        begin(self.store.at(f"{ticket.folder}/{DATASET}"), DATASET, order.plan)
        return self.store.uri_of(recipe)

    def standing(self, ticket: Ticket) -> Standing | None:
        """How the order stands; None where there is none."""
        names = set(self.store.names(ticket.folder))
        if ORDER not in names:
            return None
        asked = CANCEL in names
        # What has ended stays so, though a job that nobody could stop finishes its dataset later.
        if FAILED in names:
            return Standing("failed", asked)
        if CANCELLED in names:
            return Standing("cancelled", asked)
        if self.is_finished(ticket):
            return Standing("finished", asked)
        return Standing("running" if f"{SUBMISSIONS}/" in names else "accepted", asked)

    def is_finished(self, ticket: Ticket) -> bool:
        """Whether the dataset is there."""
        return self.store.exists(f"{ticket.folder}/{DATASET}/{MANIFEST}")

    def tickets(self, tenant: str | None, after: str, limit: int) -> list[Ticket]:
        """The newest orders that are older than `after` (an id; empty: all), of one tenant or of all."""
        tenants = self.tenants() if tenant is None else [tenant]
        names = {t: self.store.names(t, f"{after}/" if after else "", limit) for t in tenants}
        found = [Ticket(t, name.rstrip("/")) for t in tenants for name in names[t]]
        return sorted((ticket for ticket in found if ID.fullmatch(ticket.id)), key=lambda t: t.id)[:limit]

    def tenants(self) -> list[str]:
        """Everybody who ever ordered, by name."""
        names = (name.rstrip("/") for name in self.store.names(limit=100_000))
        return [name for name in names if TENANT.fullmatch(name)]

    def open(self, tenant: str | None = None) -> list[Ticket]:
        """What may have not ended, oldest first; some may have, and of some there may be no order."""
        prefix = OPEN if tenant is None else f"{OPEN}/{tenant}"
        keys = (found.key.split("/")[1:] for found in self.store.list(prefix))
        tickets = [Ticket(*key) for key in keys if len(key) == 2 and ID.fullmatch(key[1])]
        return sorted(tickets, key=lambda ticket: ticket.id, reverse=True)

    def close(self, ticket: Ticket) -> None:
        """Note that the order has ended."""
        self.store.delete([f"{OPEN}/{ticket.folder}"])

    def drop(self, ticket: Ticket) -> bool:
        """Take an order that nobody has placed in a day out of the open ones; whether that was done."""
        if _age_ms(ticket.id) < _GIVEN_UP_MS:
            return False
        self.close(ticket)
        if self.store.exists(f"{ticket.folder}/{ORDER}"):  # somebody came with its key at this very moment
            self.store.create(f"{OPEN}/{ticket.folder}", b"{}")
        return True

    def images_done(self, ticket: Ticket) -> int:
        """What the order's job last said of itself; 0 where it never did."""
        found = self._json(f"{ticket.folder}/{DATASET}/{PROGRESS}") or {}
        done = found.get("images_done", 0)
        return done if isinstance(done, int) else 0

    def ask_to_cancel(self, ticket: Ticket) -> None:
        """Want no more of the order. One that was never submitted is cancelled at once."""
        self.store.create(f"{ticket.folder}/{CANCEL}", _note())
        # Who submits writes that down first and looks for this after, so that one of the two sees the other.
        if self.last_attempt(ticket) is None:
            self.cancelled(ticket)
            self.close(ticket)

    def cancelled(self, ticket: Ticket) -> None:
        """Note that nobody works on the cancelled order."""
        self.store.create(f"{ticket.folder}/{CANCELLED}", _note())

    def failed(self, ticket: Ticket, problem: str) -> None:
        """Note that the order failed for good."""
        self.store.create(f"{ticket.folder}/{FAILED}", _note(problem=problem))

    def problem(self, ticket: Ticket) -> str | None:
        """Why the order failed; None where it did not."""
        found = self._json(f"{ticket.folder}/{FAILED}")
        return None if found is None else str(found.get("problem", ""))

    def last_attempt(self, ticket: Ticket) -> Attempt | None:
        """The attempt that was or is to be submitted last; None: nobody ever did."""
        names = self.store.names(f"{ticket.folder}/{SUBMISSIONS}", limit=100_000)
        places = [(int(named[1]), int(named[2] or 0)) for name in names if (named := _SUBMISSION.fullmatch(name))]
        if not places:
            return None
        number, again = max(places)
        found = self._json(_attempt_key(ticket, number, again)) or {}
        failures, losses, done = (int(found.get(key, 0)) for key in ("failures", "losses", "done"))
        return Attempt(number, failures, again, losses, done)

    def begin_attempt(self, ticket: Ticket, attempt: Attempt) -> bool:
        """Note that the attempt is to be submitted; False where the order is to be cancelled, and it must not be."""
        note = _note(failures=attempt.failures, losses=attempt.losses, done=attempt.done)
        self.store.create(_attempt_key(ticket, attempt.number, attempt.again), note)
        return not self.cancel_asked(ticket)

    def cancel_asked(self, ticket: Ticket) -> bool:
        """Whether somebody wants no more of the order."""
        return self.store.exists(f"{ticket.folder}/{CANCEL}")

    def _json(self, key: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self.store.read(key))
        except MissingError:
            return None
        except ValueError as error:
            raise ArtefactError(f"{self.store.uri_of(key)}: is damaged; delete it") from error
        return found if isinstance(found, dict) else {}


def now() -> str:
    """UTC, ISO 8601, in milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _note(**facts: object) -> bytes:
    return canonical_json({"at": now(), **facts})


def _attempt_key(ticket: Ticket, number: int, again: int) -> str:
    return f"{ticket.folder}/{SUBMISSIONS}/{number:04d}{f'-{again:02d}' if again else ''}.json"


def _age_ms(order_id: str) -> int:
    return time.time_ns() // 1_000_000 - (_LATEST_MS - int(order_id[:12], 16))


def _key_of(tenant: str, key: str) -> str:
    # Not the key itself: it may be long, and hold anything.
    return f"{KEYS}/{tenant}/{hashlib.sha256(canonical_json([tenant, key])).hexdigest()}"
