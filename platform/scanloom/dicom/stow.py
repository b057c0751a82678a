"""Storing DICOM files in a PACS by STOW-RS (PS3.18 10.5): bytes as they are, and what became of each instance.

A request that fails for a reason that passes (overload, a broken connection) is sent again, later each time; storing
the same instance twice is no error anywhere in the standard. What a server refuses is told by instance.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import requests

from scanloom.errors import RecipeError, StoreError

LOG = logging.getLogger("scanloom.dicom")

_REFERENCED, _FAILED = "00081199", "00081198"
_INSTANCE, _FAILURE, _WARNING = "00081155", "00081197", "00081196"
_TIMEOUTS_S = (10.0, 120.0)
_LONGEST_WAIT_S = 30.0
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_ANSWERED = frozenset({200, 202, 409})
_TOO_LARGE = 413
_DUPLICATE = 0x0111
_OUT_OF_RESOURCES = range(0xA700, 0xA800)


@dataclass(frozen=True)
class Instance:
    """A DICOM file and its SOP Instance UID."""

    uid: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """What became of one instance; `reason` in words where it is not simply stored."""

    uid: str
    state: Literal["stored", "warned", "failed"]
    reason: str = ""


class Pace:
    """At most `rate` of something a second, over all threads; None: as fast as it goes."""

    def __init__(
        self,
        rate: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._clock, self._sleep = rate, clock, sleep
        self._free = clock()
        self._lock = threading.Lock()

    def wait(self, count: int) -> None:
        """Return when `count` more may go."""
        if self._rate is None:
            return
        with self._lock:
            start = max(self._free, self._clock())
            self._free = start + count / self._rate
        self._sleep(max(0.0, start - self._clock()))


class Stow:
    """The STOW-RS service of a PACS at a root such as https://pacs.example/dicom-web; threads may share it.

    `authorization`: value of the Authorization header. RecipeError for one that is none, and for a root that is no URL
    or holds a password.
    """

    def __init__(
        self,
        root: str,
        *,
        authorization: str = "",
        pace: Pace | None = None,
        attempts: int = 8,
        first_wait_s: float = 0.5,
    ) -> None:
        parts = urlsplit(root)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(f"{root}: is no http(s) URL of a DICOMweb server")
        if "@" in parts.netloc:
            raise RecipeError(
                "the URL holds a user name or password; give the value of an Authorization header instead"
            )
        self.root = root.rstrip("/")
        if not (authorization.isascii() and authorization.isprintable()):
            # Later errors would quote it.
            raise RecipeError("the value of the Authorization header holds a character that no HTTP header can")
        self._authorization = authorization
        self._pace = pace or Pace(None)
        self._attempts, self._first_wait_s = attempts, first_wait_s
        self._local = threading.local()

    def store(self, instances: Sequence[Instance]) -> list[Outcome]:
        """Send these in one request, or in smaller ones where the server asks for it; the outcome of each, in order.

        Raises StoreError where the server refuses altogether or, after several attempts, does not answer.
        """
        left = list(instances)
        outcomes: dict[str, Outcome] = {}
        for wait in self._waits():
            time.sleep(wait)
            answer = self._posted(left)
            if answer.status_code == _TOO_LARGE:
                outcomes |= self._stored_in_halves(left)
                left = []
                break
            found = _outcomes(answer, left)
            outcomes |= {uid: outcome for uid, outcome in found.items() if outcome is not None}
            left = [instance for instance in left if found[instance.uid] is None]
            if not left:
                break
            LOG.info("%s: is out of resources for %d instances; sending them again", self.root, len(left))
        outcomes |= {i.uid: Outcome(i.uid, "failed", "the server stayed out of resources") for i in left}
        return [outcomes[instance.uid] for instance in instances]

    def _stored_in_halves(self, instances: Sequence[Instance]) -> dict[str, Outcome]:
        if len(instances) == 1:
            uid = instances[0].uid
            return {uid: Outcome(uid, "failed", f"{len(instances[0].data)} bytes are too many for the server")}
        middle = len(instances) // 2
        return {o.uid: o for half in (instances[:middle], instances[middle:]) for o in self.store(half)}

    def _posted(self, instances: Sequence[Instance]) -> requests.Response:
        """The server's answer about the instances."""
        # Of no meaning to anyone and in no part: a line of it would have to be met by chance.
        boundary = uuid.uuid4().hex
        body = b"".join(_multipart(instances, boundary.encode()))
        kind = f'multipart/related; type="application/dicom"; boundary="{boundary}"'
        said, asked_wait = "", 0.0
        for wait in self._waits():
            time.sleep(max(wait, asked_wait))
            self._pace.wait(len(instances))
            try:
                answer = self._session.post(
                    f"{self.root}/studies",
                    data=body,
                    headers={"Content-Type": kind, "Accept": "application/dicom+json"},
                    timeout=_TIMEOUTS_S,
                    allow_redirects=False,
                )
            except requests.exceptions.SSLError as error:
                raise StoreError(f"{self.root}: TLS failed ({type(error).__name__}); check the URL") from None
            except (requests.ConnectionError, requests.Timeout) as error:
                said, asked_wait = f"does not answer ({type(error).__name__})", 0.0
            except requests.RequestException as error:
                # Its text could hold the header.
                raise StoreError(f"{self.root}: {type(error).__name__}; check the URL") from None
            else:
                if answer.status_code in _ANSWERED or answer.status_code == _TOO_LARGE:
                    return answer
                if answer.status_code not in _BUSY:
                    raise StoreError(f"{self.root}: refuses to store (HTTP {answer.status_code}); {_advice(answer)}")
                said, asked_wait = f"is overloaded or failing (HTTP {answer.status_code})", _asked_wait(answer)
            LOG.info("%s: %s", self.root, said)
        raise StoreError(f"{self.root}: {said}, {self._attempts} times; run it again to go on", retryable=True)

    def _waits(self) -> Iterator[float]:
        """What to wait before each attempt, in seconds."""
        yield 0.0
        for attempt in range(self._attempts - 1):
            yield min(_LONGEST_WAIT_S, self._first_wait_s * 2**attempt)

    def _authorized(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = self._authorization
        return request

    @property
    def _session(self) -> requests.Session:
        """One a thread: requests does not say that a session may be shared."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            if self._authorization:
                # As `auth`, or the entry of a .netrc would replace it.
                self._local.session.auth = self._authorized
        session: requests.Session = self._local.session
        return session


def _multipart(instances: Sequence[Instance], boundary: bytes) -> Iterator[bytes]:
    """RFC 2046 5.1."""
    for instance in instances:
        yield b"--" + boundary + b"\r\nContent-Type: application/dicom\r\n\r\n"
        yield instance.data
        yield b"\r\n"
    yield b"--" + boundary + b"--\r\n"


def _outcomes(answer: requests.Response, instances: Sequence[Instance]) -> dict[str, Outcome | None]:
    """Of every instance what the server says (PS3.18 10.5.3, I.2.2); None: it may store it another time."""
    try:
        told = answer.json() if answer.content else {}
    except json.JSONDecodeError:
        told = None
    if not isinstance(told, Mapping):
        told = {}
    outcomes: dict[str, Outcome | None] = {}
    for item in _items(told, _REFERENCED):
        warning = _value(item, _WARNING)
        uid = str(_value(item, _INSTANCE))
        outcomes[uid] = Outcome(uid, "stored") if warning is None else Outcome(uid, "warned", _warning(warning))
    for item in _items(told, _FAILED):
        uid, code = str(_value(item, _INSTANCE)), _code(_value(item, _FAILURE))
        if code == _DUPLICATE:
            outcomes[uid] = Outcome(uid, "stored", "was there before")
        else:
            outcomes[uid] = None if code in _OUT_OF_RESOURCES else Outcome(uid, "failed", _failure(code))
    # 200 says that all are stored (PS3.18 table 10.5.3-1), also where a server does not list them.
    silent = Outcome("", "stored") if answer.status_code == 200 else Outcome("", "failed", _unmentioned(answer))
    sent = {instance.uid for instance in instances}
    missing = {uid: Outcome(uid, silent.state, silent.reason) for uid in sent - outcomes.keys()}
    return {uid: outcome for uid, outcome in (outcomes | missing).items() if uid in sent}


def _items(told: Mapping[str, Any], tag: str) -> list[Mapping[str, Any]]:
    element = told.get(tag)
    values = element.get("Value") if isinstance(element, Mapping) else None
    return [item for item in values if isinstance(item, Mapping)] if isinstance(values, list) else []


def _value(item: Mapping[str, Any], tag: str) -> Any:
    element = item.get(tag)
    values = element.get("Value") if isinstance(element, Mapping) else None
    return values[0] if isinstance(values, list) and values else None


def _code(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return 0


def _failure(code: int) -> str:
    """PS3.18 table I.2-2 (failure reasons)."""
    if 0xA900 <= code <= 0xA9FF:
        said = "the data set does not match its SOP class"
    elif 0xC000 <= code <= 0xCFFF:
        said = "cannot be understood"
    else:
        said = _FAILURES.get(code, "refused")
    return f"{said} ({code:04X})"


_FAILURES = {0x0110: "processing failed", 0x0122: "SOP class is not supported", 0x0124: "not authorized"}


def _warning(value: Any) -> str:
    """PS3.18 table I.2-1 (warning reasons)."""
    code = _code(value)
    return f"stored, {_WARNINGS.get(code, 'with a warning')} ({code:04X})"


_WARNINGS = {
    0xB000: "but elements were coerced",
    0xB006: "but elements were discarded",
    0xB007: "but the data set does not match its SOP class",
}


def _unmentioned(answer: requests.Response) -> str:
    return f"the server does not say why (HTTP {answer.status_code})"


def _advice(answer: requests.Response) -> str:
    if answer.status_code in (401, 403):
        return "check the value of the Authorization header"
    return "check that the URL is the root of a DICOMweb service that stores"


def _asked_wait(answer: requests.Response) -> float:
    wait = answer.headers.get("Retry-After", "")
    return min(float(wait), _LONGEST_WAIT_S) if wait.isdigit() else 0.0
