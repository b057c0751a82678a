"""`/v1/datasets`: datasets of any size, ordered now and made by jobs. The ledger knows them; this is its HTTP face."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

from fastapi import Query
from pydantic import BaseModel
from starlette.concurrency import iterate_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from scanloom.api import DatasetJob, DatasetRequest
from scanloom.errors import ArtefactError
from serve.access import Caller
from serve.audit_log import Entry
from serve.body import read_body
from serve.catalogue import offered
from serve.images import idempotency_key
from serve.ledger import Ledger
from serve.parts import Parts
from serve.pictures import JSON, PARQUET
from serve.problem import Refusal, refusal_of
from serve.ranges import Wanted, wanted
from serve.turns import Turns

Result = TypeVar("Result")

MOST_LISTED = 200
"""Datasets on a page: each costs the store some reads."""
_SUFFIXES = {"json": JSON, "parquet": PARQUET, "tar": "application/x-tar"}
_OTHER = "application/octet-stream"
FILE_TYPES = (*_SUFFIXES.values(), _OTHER)
"""Media types of a dataset's files."""
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED, description="Datasets on a page.")]
After = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="`next` of the page before.")]


class Datasets:
    """Answers the routes of `/v1/datasets`; callers see the datasets of their tenant, admins all."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._turns = Turns()

    async def post(self, request: Request) -> Response:
        """Accept an order: 202, or 200 with the dataset that the same Idempotency-Key ordered before."""
        caller = _caller(request)
        body = await read_body(request, DatasetRequest)
        offer = offered(self._parts.catalogue, body.generator)
        offer.require_steps(body.steps)
        key = idempotency_key(request)
        try:
            # An order that is on its way is placed and counted, whether the client waits for it or not.
            job, new = await asyncio.shield(asyncio.ensure_future(self._placed(caller, body, request, key)))
        except ArtefactError as error:
            self._note(request, caller, "outside-envelope")
            raise Refusal("outside-envelope", str(error), envelope=offer.envelope) from error
        except Exception as error:
            self._note(request, caller, refusal_of(error).kind)
            raise
        self._note(request, caller, "done" if new else "known", job)
        return _answer(job.model_dump_json(), 202 if new else 200, {"Location": f"/v1/datasets/{job.id}"})

    async def list(self, request: Request, limit: Limit = 100, after: After = None) -> Response:
        """The datasets that were ordered, newest first."""
        return _answer(await self._call(request, _dumped, self._ledger.jobs, _tenant(request), limit, after))

    async def get(self, request: Request, id: str) -> Response:
        """Where a dataset stands."""
        return _answer(await self._call(request, _dumped, self._ledger.find, _tenant(request), id))

    async def cancel(self, request: Request, id: str) -> Response:
        """End a dataset that is not finished; what is made of it stays unfinished in the store."""
        job = await self._call(request, self._ledger.cancel, _tenant(request), id)
        self._note(request, _caller(request), "done", job, action="cancel")
        return _answer(job.model_dump_json())

    async def result(self, request: Request, id: str) -> Response:
        """The files of a finished dataset, and where each can be read."""
        return _answer(await self._call(request, _dumped, self._ledger.result, _tenant(request), id))

    async def file(self, request: Request, id: str, path: str) -> Response:
        """A file of a finished dataset in a store that is a local folder, or a part of it."""
        part, first, rest = await self._call(
            request, _begun, self._ledger, _tenant(request), id, path, request.headers
        )  # fmt: skip
        if part.status == 304:
            return Response(status_code=304, headers=part.headers)

        def content() -> Iterator[bytes]:
            yield first
            yield from rest

        media_type = _SUFFIXES.get(path.rpartition(".")[2], _OTHER)
        return StreamingResponse(iterate_in_threadpool(content()), part.status, part.headers, media_type)

    async def _placed(
        self, caller: Caller, body: DatasetRequest, request: Request, key: str | None
    ) -> tuple[DatasetJob, bool]:
        ledger, order = self._ledger, (caller.tenant, body, request.state.request, key)
        # One at a time, so that the jobs that are counted are those that are there.
        async with self._turns.of(caller.tenant) as line, line.alone:
            if key is not None and await line.call(ledger.ordered, caller.tenant, key) is not None:
                return await line.call(ledger.place, *order)
            open_jobs = await line.call(ledger.open_jobs, caller.tenant)
            with self._parts.quotas.charge_dataset(caller, body.images, open_jobs, body.steps) as charge:
                job, new = await line.call(ledger.place, *order)
                if new:
                    charge.made(body.images)
                return job, new

    @property
    def _ledger(self) -> Ledger:
        if self._parts.ledger is None:
            raise Refusal("not-found", "this service takes no orders for datasets")
        return self._parts.ledger

    async def _call(self, request: Request, method: Callable[..., Result], *arguments: Any) -> Result:
        """What a blocking method gives, in its turn. Raises BusyError where too many of the tenant's wait."""
        async with self._turns.of(request.state.caller.tenant) as line:
            return await line.call(method, *arguments)

    def _note(
        self, request: Request, caller: Caller, outcome: str, job: DatasetJob | None = None, action: str = "dataset"
    ) -> None:
        made: dict[str, Any] = {} if job is None else {
            "generator": job.generator, "generator_digest": job.generator_digest, "seed": job.seed,
            "count": job.images, "plan": job.plan, "dataset": job.id,
        }  # fmt: skip
        entry = Entry(
            request=request.state.request, tenant=caller.tenant, who=caller.who, action=action, outcome=outcome, **made
        )
        self._parts.audit.note(entry)


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    caller.require("datasets")
    return caller


def _tenant(request: Request) -> str | None:
    caller = _caller(request)
    return None if "admin" in caller.scopes else caller.tenant


def _begun(
    ledger: Ledger, tenant: str | None, id: str, path: str, headers: Headers
) -> tuple[Wanted, bytes, Iterator[bytes]]:
    """What is wanted of a file, its first piece and the rest, so that what is wrong is known before the answer
    begins."""
    file = ledger.file(tenant, id, path)
    part = wanted(headers, file.size, file.sha256)
    pieces = file.pieces(part.start, part.stop)
    return part, next(pieces, b""), pieces


def _dumped(method: Callable[..., BaseModel], *arguments: Any) -> str:
    """What a method gives, as JSON: of a large dataset's result that takes a while too."""
    return method(*arguments).model_dump_json()


def _answer(text: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(text, status, headers, JSON)
