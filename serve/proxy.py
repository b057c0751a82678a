"""What stands in Serve's HTTP proxy, before the gateways: what the proxy says by itself is told as a problem, too.

The proxy calls `middlewares` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it in the environment in which Ray
is started, which `serve.local` and the image see to.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scanloom.api import PROBLEM_JSON, ProblemKind
from serve.engines import RETRY_AFTER_S
from serve.problem import Refusal, response

REQUEST_ID = "X-Request-ID"
_OF_SERVE = "/-/"
"""Addresses that are the proxy's own."""
_RETRY_S = 2.0

_MEANT: Mapping[int, tuple[ProblemKind, str]] = {
    # The service takes every path, so that there is none for the proxy while the service is not there.
    404: ("unavailable", "the service is not there yet, or was stopped; ask again"),
    408: ("deadline", "the request took longer than the server in front of the service waits; ask for less at once"),
    429: ("busy", "more requests wait for a gateway than may; ask again"),
}
_LOST: tuple[ProblemKind, str] = (
    "unavailable",
    "the gateway that had the request was lost, or none is there; ask again",
)


def middlewares() -> list[Middleware]:
    """For Serve's proxy."""
    return [Middleware(OwnWords)]


class OwnWords:
    """Turns refusals that are no problem (RFC 9457), which no gateway sends, into one by which clients know what to do.

    Gateways' answers pass as they are, piece by piece.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_OF_SERVE):
            await self._app(scope, receive, send)
            return
        refusal: Refusal | None = None

        async def told(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start":
                refusal = _refusal(message["status"], Headers(raw=message.get("headers", [])))
            if refusal is None:
                await send(message)
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                await response(refusal, refusal.headers[REQUEST_ID])(scope, receive, send)

        await self._app(scope, receive, told)


def _refusal(status: int, headers: Headers) -> Refusal | None:
    """What an answer of this status means that is no gateway's; None for one that is, or is no refusal."""
    if status < 400 or headers.get("Content-Type", "").startswith(PROBLEM_JSON):
        return None
    if status < 500 and status not in _MEANT:
        return None
    kind, detail = _MEANT.get(status, _LOST)
    stated = headers.get("Retry-After", "")
    retry_s = float(stated) if stated.isdecimal() else RETRY_AFTER_S if kind == "busy" else _RETRY_S
    # Given by Serve, to its own answers too.
    request = headers.get(REQUEST_ID) or secrets.token_hex(8)
    return Refusal(kind, detail, retry_after_s=None if kind == "deadline" else retry_s, headers={REQUEST_ID: request})
