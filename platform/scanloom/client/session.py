"""One service and one key: how it is asked, when again, and what its refusals mean."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from scanloom import __version__
from scanloom.api import FieldProblem, Problem
from scanloom.client.errors import Busy, NotAllowed, NotFound, RequestRefused, ServiceDown, ServiceError
from scanloom.client.flow import Flow, NoAnswer, Pause, Reply, Send, send
from scanloom.errors import RecipeError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

JSON = "application/json"
AGAIN = frozenset({408, 429, 502, 503, 504})
"""Answers after which the same request may succeed."""
PATIENCE_S = 300.0
SILENCE_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_MOST_DAMAGED = 3


@dataclass(frozen=True)
class Session:
    """Where the service is, and the key for it.

    `patience_s`: how long a call may take with all its retries; `clock` in seconds, `chance` in [0, 1).
    """

    url: str
    key: str | None = field(default=None, repr=False)
    patience_s: float = PATIENCE_S
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random

    def headers(self, **more: str) -> dict[str, str]:
        """Those of every request to the service."""
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"User-Agent": f"scanloom/{__version__}", "Accept": JSON, **key, **more}

    def address(self, path: str, query: Mapping[str, Any] | None = None) -> str:
        """URL of a path of the service."""
        given = {name: value for name, value in (query or {}).items() if value is not None}
        return self.url + path + (f"?{urlencode(given)}" if given else "")


def session_of(url: str | None, key: str | None, patience_s: float) -> Session:
    """The session that a client's arguments, or SCANLOOM_URL and SCANLOOM_API_KEY, name.

    RecipeError where they name none.
    """
    place = url or os.environ.get("SCANLOOM_URL")
    if not place:
        raise RecipeError("no service is named; give its URL, or set SCANLOOM_URL")
    parts = urlsplit(place)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise RecipeError("the service's URL is not of the form https://host:port; correct it, or SCANLOOM_URL")
    key = key or os.environ.get("SCANLOOM_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise RecipeError("the API key holds a character that no key has; copy it again")
    return Session(place.rstrip("/"), key, patience_s)


def checked(model: type[M], **fields: Any) -> M:
    """A request's body; fields that are None are left out. RequestRefused where the service would refuse it too."""
    try:
        return model.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        fields_at_fault = [
            FieldProblem(field=".".join(map(str, f["loc"])), message=f["msg"].removeprefix("Value error, "))
            for f in faults
        ]
        told = "; ".join(f"{fault.field}: {fault.message}".removeprefix(": ") for fault in fields_at_fault)
        problem = Problem(
            type="urn:scanloom:problem:invalid", title="Not sent", status=422, detail=told, instance="",
            errors=fields_at_fault,
        )  # fmt: skip
        raise RequestRefused(told, problem) from error


def get(session: Session, path: str, model: type[M], query: Mapping[str, Any] | None = None) -> Flow[M]:
    """What the service has at a path. Raises as `answered` does."""
    asked = Send("GET", session.address(path, query), session.headers(), silence_s=SILENCE_S)
    return answered(session, asked, parser(model))


def post(
    session: Session,
    path: str,
    body: BaseModel | None,
    parse: Callable[[Reply], T],
    headers: Mapping[str, str] | None = None,
    silence_s: float = SILENCE_S,
) -> Flow[T]:
    """What the service answers to a body. It must be one that may come twice. Raises as `answered` does."""
    content = _content(body) if body else b""
    kind = {"Content-Type": JSON} if body else {}
    headers = session.headers(**kind, **(headers or {}))
    return answered(session, Send("POST", session.address(path), headers, content, silence_s), parse)


def _content(body: BaseModel) -> bytes:
    try:
        return body.model_dump_json(exclude_unset=True).encode()
    except PydanticSerializationError as error:
        raise RequestRefused(f"a value is none that JSON has, so nothing was sent: {error}") from error


def parser(model: type[M]) -> Callable[[Reply], M]:
    """What reads a model from a reply's body."""
    return lambda reply: model.model_validate_json(reply.body)


def answered(session: Session, asked: Send, parse: Callable[[Reply], T]) -> Flow[T]:
    """What `parse` makes of the answer (ValueError: it is damaged), asked for again as long as that may help.

    Raises the ServiceError of an answer that no retry changes, or of the last one when patience is at its end.
    """
    until = session.clock() + session.patience_s
    damaged = 0
    for attempt in count():
        failure, told_s = None, None
        try:
            reply = yield from send(asked)
            if reply.status < 300:
                return parse(reply)
            failure, told_s = error_of(reply), wait_of(reply)
            if reply.status == 500 and failure.problem is None:
                # Not the service's word but that of the server before it, whose worker died over the request.
                damaged += 1
                if damaged == _MOST_DAMAGED:
                    raise failure
            elif reply.status not in AGAIN:
                raise failure
        except NoAnswer as error:
            failure = ServiceDown(f"{session.url}: {error}; check the URL and that the service runs")
        except ValueError as error:
            damaged += 1
            failure = ServiceDown(f"{session.url}: the answer is cut or of another kind than asked for")
            if damaged == _MOST_DAMAGED:
                raise failure from error
        pause_s = pause(session, attempt, told_s)
        if session.clock() + pause_s > until:
            raise failure
        yield Pause(pause_s)
    raise AssertionError("unreachable")


def pause(session: Session, attempt: int, told_s: float | None) -> float:
    """Seconds before the next attempt: what the service said, else ever longer; by chance, so that clients part."""
    own_s: float = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(attempt, 16)) * (0.5 + 0.5 * session.chance())
    return own_s if told_s is None else told_s + min(own_s, 0.1 * told_s + 0.1)


def wait_of(reply: Reply) -> float | None:
    """What the service says when to ask again, in seconds: its problem, or the header Retry-After (RFC 9110 10.2.3)."""
    problem = _problem(reply)
    if problem is not None and problem.retry_after_s is not None:
        return max(0.0, problem.retry_after_s)
    told = reply.headers.get("retry-after", "").strip()
    try:
        seconds = float(told) if told.isdigit() else (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # another text; a date without a time zone
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def error_of(reply: Reply) -> ServiceError:
    """The error that an answer means which is no success."""
    problem = _problem(reply)
    kind = _kind(reply.status, problem)
    if problem is None:
        return kind(f"HTTP {reply.status} without an explanation; check that this is scanloom's service")
    name = problem.type.rpartition(":")[2]
    return kind(f"{problem.detail} ({name}, request {problem.instance})", problem)


def _kind(status: int, problem: Problem | None) -> type[ServiceError]:
    if status == 429 or (problem is not None and problem.type.endswith(":deadline")):
        return Busy
    if status >= 500 or status == 408 or status < 400:
        return ServiceDown
    return {401: NotAllowed, 403: NotAllowed, 404: NotFound}.get(status, RequestRefused)


def _problem(reply: Reply) -> Problem | None:
    try:
        return Problem.model_validate_json(reply.body)
    except ValidationError:
        return None
