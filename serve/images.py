"""`POST /v1/images`: a few images, made while the client waits."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from scanloom.api import ImagesRequest
from scanloom.errors import DeadlineError
from scanloom.sampling.image_order import ImageOrder, MadeImages
from serve.access import Caller
from serve.audit_log import Entry
from serve.body import read_body
from serve.catalogue import Offer, offered
from serve.config import Limits
from serve.intake import LOG, ClientGone
from serve.parts import Parts
from serve.pictures import DICOM, MULTIPART, Encoded, Pictures, encoded, format_of, require_describable
from serve.problem import invalid, refusal_of

Result = TypeVar("Result")

IDEMPOTENCY_KEY = "Idempotency-Key"
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_LATE_S = 2.0
"""After its deadline in which an order may still be answered or refused by the engines."""
_INDICES = 2**32


class Images:
    """Answers `POST /v1/images`; `encoders` runs what computes."""

    def __init__(self, parts: Parts, encoders: Executor) -> None:
        self._parts, self._encoders = parts, encoders

    async def post(self, request: Request) -> Response:
        """The images, in the format that Accept asks for. Raises Refusal and what the parts raise."""
        caller: Caller = request.state.caller
        caller.require("generate")
        body = await read_body(request, ImagesRequest)
        offer = offered(self._parts.catalogue, body.generator)
        order = self._order(request, caller, body, offer)
        accepted = format_of(request.headers.get("Accept"), body.count, body.dicom)
        if accepted in (DICOM, MULTIPART):
            require_describable(offer, order, body.dicom)
        try:
            made, answer = await while_connected(request, self._answered(caller, offer, order, body, accepted))
        except BaseException as error:
            self._note(caller, order, offer, _outcome(error))
            raise
        self._note(caller, order, made, "done")
        headers = dict(answer.headers) | _headers(offer, order, made)
        return Response(answer.body, 200, headers, answer.media_type)

    async def _answered(
        self, caller: Caller, offer: Offer, order: ImageOrder, body: ImagesRequest, accepted: str
    ) -> tuple[MadeImages, Encoded]:
        with self._parts.quotas.reserve(caller, order.count, offer.own_steps(order)) as held:
            self._parts.measure.asked(order.count)
            made = await self._made(order)
            held.made(order.count)
            if (made.digest, made.gate) != (offer.digest, offer.gate):
                # Its images are named by it, its envelope is the former one's.
                LOG.warning(
                    "generator %s or its gate was replaced since the gateway started; restart the gateway", offer.name
                )
            pictures = Pictures(offer, order, body.dicom, made)
            loop = asyncio.get_running_loop()
            return made, await loop.run_in_executor(self._encoders, encoded, pictures, accepted)

    async def _made(self, order: ImageOrder) -> MadeImages:
        try:
            async with asyncio.timeout(max(0.0, order.due - time.time()) + _LATE_S):
                return await self._parts.make(order)
        except TimeoutError:
            raise DeadlineError(
                "no engine made the images by their deadline; ask again, or for a later one", 1.0
            ) from None

    def _order(self, request: Request, caller: Caller, body: ImagesRequest, offer: Offer) -> ImageOrder:
        limits = self._parts.service.limits
        _require_within(limits, body, offer)
        offer.require_steps(body.steps)
        asked: float = request.state.asked
        return ImageOrder(
            request=request.state.request,
            generator=offer.name,
            attributes=offer.attributes(body.attributes),
            seed=_seed(caller, body.seed, idempotency_key(request)),
            due=asked + (body.deadline_s or limits.deadline_s),
            asked=asked,
            first_index=body.first_index,
            count=body.count,
            steps=body.steps,
            guidance_scale=body.guidance_scale,
            latent_shape=offer.latent_shape(body.size_px),
            bits_stored=body.bits_stored,
            priority=body.priority,
        )

    def _note(self, caller: Caller, order: ImageOrder, maker: Offer | MadeImages, outcome: str) -> None:
        entry = Entry(
            request=order.request,
            tenant=caller.tenant,
            who=caller.who,
            action="images",
            outcome=outcome,
            generator=order.generator,
            generator_digest=maker.digest,
            gate=maker.gate,
            seed=order.seed,
            first_index=order.first_index,
            count=order.count,
        )
        self._parts.audit.note(entry)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled where the client goes away first. Raises ClientGone then."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            # Quotas are given back and slots freed before anything else is done.
            await asyncio.wait((working,))


def idempotency_key(request: Request) -> str | None:
    """The header Idempotency-Key. Raises Refusal for one that is no word of up to 255 visible characters."""
    key = request.headers.get(IDEMPOTENCY_KEY)
    if key is not None and not _KEY.fullmatch(key):
        raise invalid(IDEMPOTENCY_KEY, "expected 1 to 255 visible ASCII characters")
    return key


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _seed(caller: Caller, given: int | None, key: str | None) -> int:
    """The request's seed; without one, a retry with the same key has the same."""
    if given is not None:
        return given
    if key is None:
        return secrets.randbits(63)
    return int.from_bytes(hashlib.sha256(f"{caller.tenant}\0{key}".encode()).digest()[:8]) >> 1


def _require_within(limits: Limits, body: ImagesRequest, offer: Offer) -> None:
    """Raise Refusal of the field that asks for more than one request may."""
    height, width = body.size_px or offer.size_px
    if body.count > limits.images:
        raise invalid("count", f"{body.count} is over the {limits.images} images of a request; order a dataset")
    if body.count * height * width > limits.pixels:
        raise invalid(
            "count" if body.count > 1 else "size_px",
            f"{body.count} images of {height} x {width} are over the {limits.pixels} pixels of a request",
        )
    if body.first_index + body.count > _INDICES:
        raise invalid("first_index", f"images have indices below {_INDICES}")
    if body.deadline_s is not None and body.deadline_s > limits.longest_deadline_s:
        raise invalid("deadline_s", f"{body.deadline_s:g} is over the {limits.longest_deadline_s:g} s of a request")


def _headers(offer: Offer, order: ImageOrder, made: MadeImages) -> dict[str, str]:
    """What an answer says beside its images, whatever its format."""
    return {
        "X-Seed": str(order.seed),
        "X-Generator": offer.name,
        "X-Generator-Digest": made.digest,
        "X-Gate": made.gate,
        "Vary": "Accept",
    }


def _outcome(error: BaseException) -> str:
    """Of an order that came to nothing, for the audit log: the kind of its problem, or that the client left."""
    if isinstance(error, (ClientGone, asyncio.CancelledError)):
        return "gone"
    return refusal_of(error).kind
