"""The public keys of an issuer of tokens: read from its https URL or a file, kept, and read again when that helps."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt

from scanloom.errors import BusyError, RecipeError

LOG = logging.getLogger("scanloom.serve")
FRESH_S = 300.0
"""Keys older than this are read again; until that succeeds the former ones are used."""
STALE_S = 3600.0
"""Keys older than this are not used any more: an issuer withdraws a key by not listing it."""
AGAIN_S = 10.0
"""Between two attempts at reading, so that tokens with made-up key ids make no load at the issuer."""
_ANSWER_S = 5.0
_MOST_BYTES = 1 << 20
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "k"})
_Listed = Mapping[str | None, Mapping[str, Any]]


class IssuerUnreachable(BusyError):
    """A token cannot be judged, since its issuer's keys cannot be read at present."""

    def __reduce__(self) -> tuple[object, ...]:
        return (IssuerUnreachable, (str(self), self.retry_after_s))


class IssuerKeys:
    """Keys by their id (kid). To be used in one event loop.

    `source`: an https:// URL, http:// on loopback only, or a file. RecipeError for another.
    """

    def __init__(self, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._place = _place(source)
        self._clock = clock
        self._listed: _Listed | None = None
        self._read_at = self._tried_at = float("-inf")
        self._failing = False
        self._reading: asyncio.Task[None] | None = None
        self._made: dict[tuple[str | None, str], jwt.PyJWK] = {}

    async def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        """The key of this id for signatures of this algorithm; None where the issuer has none.

        A token without an id may be of an issuer with a single key. IssuerUnreachable where that cannot be known.
        """
        known = self._usable() and self._has(kid)
        old = self._clock() - self._read_at > FRESH_S
        # One request waits for fresh keys; others go on with those that are there, if theirs is.
        if not known or (old and not self._is_reading()):
            await self._read_again()
        if not self._usable() or (self._failing and not self._has(kid)):
            wait_s = max(0.1, self._tried_at + AGAIN_S - self._clock())
            raise IssuerUnreachable(
                "the issuer of tokens does not answer, so yours cannot be checked; try again", wait_s
            )
        return self._key(kid, algorithm)

    def _usable(self) -> bool:
        return self._listed is not None and self._clock() - self._read_at <= STALE_S

    def _has(self, kid: str | None) -> bool:
        return kid in (self._listed or {})

    def _key(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        data = (self._listed or {}).get(kid)
        if data is None or data.get("alg", algorithm) != algorithm:
            return None
        if (kid, algorithm) not in self._made:
            try:
                self._made[kid, algorithm] = jwt.PyJWK(dict(data), algorithm)
            except jwt.PyJWTError:  # a key of another type, or a damaged one
                return None
        return self._made[kid, algorithm]

    def _is_reading(self) -> bool:
        return self._reading is not None and not self._reading.done()

    async def _read_again(self) -> None:
        if not self._is_reading():
            if self._clock() - self._tried_at < AGAIN_S:
                return
            self._tried_at = self._clock()
            self._reading = asyncio.create_task(self._read())
        if self._reading is not None:
            # A caller that goes away must not stop it for the others.
            await asyncio.shield(self._reading)

    async def _read(self) -> None:
        try:
            self._listed = _parsed(await self._body())
        except (OSError, ValueError, httpx.HTTPError, TimeoutError) as error:
            self._failing = True
            LOG.error("%s: the keys of the issuer cannot be read: %s", self._source, type(error).__name__)
            return
        self._failing = False
        self._read_at = self._clock()
        self._made.clear()

    async def _body(self) -> bytes:
        if isinstance(self._place, Path):
            return await asyncio.to_thread(self._place.read_bytes)
        # Redirects are not followed: the operator named the place that is trusted.
        async with (
            asyncio.timeout(_ANSWER_S),
            httpx.AsyncClient(timeout=_ANSWER_S) as client,
            client.stream("GET", self._place, headers={"Accept": "application/json"}) as answer,
        ):
            if answer.status_code != 200:
                raise ValueError(f"HTTP {answer.status_code}")
            body = b""
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > _MOST_BYTES:
                    raise ValueError("too large")
            return body


def _place(source: str) -> str | Path:
    parts = urlsplit(source)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        return source
    if parts.scheme not in ("", "file"):
        raise RecipeError(
            f"oidc.jwks {source!r}: expected an https:// URL or a file, so that nobody can alter the keys"
        )
    place = Path(parts.path if parts.scheme else source)
    if not place.is_file():
        raise RecipeError(f"oidc.jwks {source!r}: there is no such file")
    return place


def _parsed(body: bytes) -> _Listed:
    """The keys that may verify signatures, by id; under None the only one. ValueError where there are none.

    Symmetric and private keys are none: whoever can read the list could sign with them.
    """
    content = json.loads(body)
    listed = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise ValueError("no JWK Set (RFC 7517)")
    usable = [
        key
        for key in listed
        if isinstance(key, dict)
        and key.get("kty") in ("RSA", "EC", "OKP")
        and not _PRIVATE & key.keys()
        and key.get("use", "sig") == "sig"
        and "verify" in key.get("key_ops", ["verify"])
    ]
    if not usable:
        raise ValueError("no key for signatures")
    found: dict[str | None, Mapping[str, Any]] = {key["kid"]: key for key in usable if isinstance(key.get("kid"), str)}
    if len(usable) == 1:
        found[None] = usable[0]
    return found
