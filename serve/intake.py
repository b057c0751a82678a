"""What every request passes through, as ASGI middleware: its id, its log line, who sends it, and its body.

Nothing of a request is read before its sender is known, and no more of it than the limits allow.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access import Caller, Gatekeeper
from serve.config import Limits
from serve.metrics import Metrics
from serve.problem import Refusal, refusal_of, response

LOG = logging.getLogger("scanloom.serve")
ACCESS_LOG = logging.getLogger("scanloom.access")
"""One line of JSON a request."""
OPEN = frozenset({"/healthz", "/readyz", "/openapi.json"})
"""Paths that need no key; every other does, whether there is anything or not."""
REQUEST_ID = "X-Request-ID"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_GONE = 499
"""Logged where the client was gone before it had its answer, as nginx does."""
_LONGEST_PATH = 200


class ClientGone(Exception):
    """The client closed the connection; nobody waits for an answer."""


class Intake:
    """Outermost: gives every request an id, answers every error with a problem, and writes the access log."""

    def __init__(self, app: ASGIApp, measure: Metrics) -> None:
        self._app, self._measure = app, measure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, _request_id(Headers(scope=scope)))
        # FastAPI's `request.state` is this very dictionary.
        state = scope.setdefault("state", {})
        state["request"], state["asked"] = answer.request, time.time()
        started = time.monotonic()
        try:
            await self._app(scope, receive, answer.send)
        except ClientGone:
            answer.status = _GONE
        except asyncio.CancelledError:
            answer.status = answer.status or _GONE
            raise
        except Exception as error:  # noqa: BLE001 - whatever happens, the client is told, and the service goes on
            await self._refuse(error, scope, receive, answer)
        finally:
            self._note(scope, answer, time.monotonic() - started)

    async def _refuse(self, error: Exception, scope: Scope, receive: Receive, answer: _Answer) -> None:
        refusal = refusal_of(error)
        if refusal.kind in ("internal", "store-unavailable"):
            LOG.error("request %s: %s", answer.request, refusal, exc_info=error)
        if answer.status:
            # Half of an answer has left: only a broken connection says that the rest will not come.
            raise error
        self._measure.refused(refusal.kind)
        await response(refusal, answer.request)(scope, receive, answer.send)

    def _note(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        caller: Caller | None = scope["state"].get("caller")
        route = getattr(scope.get("route"), "path", "")
        tenant = caller.tenant if caller else ""
        status = answer.status or _GONE
        self._measure.answered(route, tenant, status, seconds)
        line: Mapping[str, Any] = {
            "time": round(time.time(), 3), "request": answer.request, "tenant": tenant,
            "who": caller.who if caller else "", "method": scope["method"], "route": route,
            "path": scope["path"][:_LONGEST_PATH], "status": status, "seconds": round(seconds, 4),
            "bytes_in": scope["state"].get("bytes_in", 0), "bytes_out": answer.bytes,
        }  # fmt: skip
        ACCESS_LOG.info(json.dumps(line))


class Admission:
    """Tells who sends a request, by its Authorization header, and lets nobody else in."""

    def __init__(self, app: ASGIApp, gatekeeper: Gatekeeper) -> None:
        self._app, self._gatekeeper = app, gatekeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            sent = Headers(scope=scope).getlist("Authorization")
            if len(sent) > 1:
                raise Refusal("bad-request", "there are several Authorization headers; send one")
            scope["state"]["caller"] = await self._gatekeeper.admit(sent[0] if sent else None, _sender(scope))
        await self._app(scope, receive, send)


def _sender(scope: Scope) -> str | None:
    """The address that the request came from."""
    client = scope.get("client")
    return str(client[0]) if client else None


class Bodies:
    """Reads the whole body, within the limits, before anything looks at the request."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("Content-Length", "0")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._limits.body_bytes):
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.body_s):
                body = await self._read(receive)
        except TimeoutError:
            raise Refusal(
                "too-slow", f"the body did not come within {self._limits.body_s:g} s; send it faster", headers=_CLOSE
            ) from None
        scope["state"]["bytes_in"] = len(body)
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        chunks = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunks += message.get("body", b"")
            if len(chunks) > self._limits.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(chunks)

    def _too_large(self) -> Refusal:
        # What is still to come is not read, so that nothing else can use the connection.
        return Refusal(
            "too-large", f"the body is over {self._limits.body_bytes} bytes; ask for less at once", headers=_CLOSE
        )


_CLOSE = {"Connection": "close"}


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then what else the connection tells."""
    ahead: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return ahead.pop() if ahead else await receive()

    return replayed


class _Answer:
    """What is sent of an answer: with the request's id among its headers, and measured."""

    def __init__(self, send: Send, request: str) -> None:
        self._send, self.request = send, request
        self.status = 0
        self.bytes = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID] = self.request
        else:
            self.bytes += len(message.get("body", b""))
        await self._send(message)


def _request_id(headers: Headers) -> str:
    sent = headers.get(REQUEST_ID, "")
    return sent if _ID.fullmatch(sent) else secrets.token_hex(8)
