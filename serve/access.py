"""Who may ask: callers by their API key or by a signed token (OIDC), and what each may do.

No error and no log line ever repeats a key, a token or what a token says.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import jwt
import yaml
from pydantic import TypeAdapter, ValidationError

from scanloom.api import Name
from scanloom.api_key import Scope, fingerprint
from scanloom.errors import RecipeError, ScanloomError
from scanloom.section import nearest
from serve.config import Access, ApiKey, Oidc
from serve.issuer_keys import IssuerKeys
from serve.issuer_keys import IssuerUnreachable as IssuerUnreachable

LOG = logging.getLogger("scanloom.serve")
LOOK_S = 1.0
"""How often the file of keys is looked at."""
SAY_AGAIN_S = 60.0
"""How often the log says that it cannot be used."""
ASYMMETRIC = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
"""Algorithms whose verifying key cannot sign; with others the issuer's public keys would forge tokens."""
_LONGEST = 16 << 10
_BEARER = re.compile(r"bearer +([\x21-\x7e]+) *", re.IGNORECASE)
_SUBJECT = re.compile(r"[\x20-\x7e]{1,255}")
_NAME = TypeAdapter(Name)
_KEYS = TypeAdapter(tuple[ApiKey, ...])
_SCOPES: Mapping[str, Scope] = {scope: scope for scope in get_args(Scope)}


class Unauthenticated(ScanloomError):
    """Nobody that is known: no key or token, or one that is not taken."""


class Forbidden(ScanloomError):
    """Somebody who is known, and may not do this."""


@dataclass(frozen=True)
class Caller:
    """Who asks; `who` is the id of an API key or the subject of a token."""

    tenant: str
    who: str
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Raise Forbidden unless the caller has this scope, or admin, which has all."""
        if not {scope, "admin"} & self.scopes:
            raise Forbidden(f"this needs the scope {scope!r}, which your key or token lacks; ask for one that has it")


EVERYBODY = Caller("local", "anybody", frozenset(_SCOPES.values()))


class Gatekeeper:
    """Tells callers by the Authorization header of their requests. To be used in one event loop.

    RecipeError for settings that cannot be meant: both open and with keys, keys that repeat, an algorithm of shared
    secrets, a file that is not there.
    """

    def __init__(self, access: Access, clock: Callable[[], float] = time.monotonic) -> None:
        if access.open and (access.keys or access.keys_file or access.oidc):
            raise RecipeError("access: open lets everybody in, whatever keys and issuer say; take one or the other")
        self._open = access.open
        self._keys = _ApiKeys(access.keys, access.keys_file, clock)
        self._tokens = _Tokens(access.oidc, IssuerKeys(access.oidc.jwks, clock)) if access.oidc else None
        if not (access.open or access.keys or access.keys_file or access.oidc):
            LOG.warning("access: neither keys nor an issuer are set, so every request will be refused")

    async def admit(self, authorization: str | None, sender: str | None = None) -> Caller:
        """Who sent this header, from the address `sender`.

        Unauthenticated; Forbidden; IssuerUnreachable where it cannot be told at present.
        """
        if self._open:
            # A cluster's Serve listens on all addresses unless it is told otherwise, wherever these settings came from.
            if sender is None or not is_loopback(sender):
                raise Forbidden("the service is open to the host that it runs on alone; set keys to let others in")
            return EVERYBODY
        token = _bearer(authorization)
        if caller := await self._keys.find(token):
            return caller
        if self._tokens is not None and token.count(".") == 2 and not token.startswith("scanloom_"):
            return await self._tokens.read(token)
        raise Unauthenticated("the key is not known here; check it, or ask for one")


def is_loopback(host: str) -> bool:
    """Whether an address, or the name `localhost`, is this host's own."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _bearer(authorization: str | None) -> str:
    if not authorization:
        raise Unauthenticated("no key; send it in the header `Authorization: Bearer KEY`")
    found = _BEARER.fullmatch(authorization) if len(authorization) <= _LONGEST else None
    if found is None:
        raise Unauthenticated("the header Authorization is not `Bearer KEY`; send your key or token like that")
    return found[1]


# --- API keys -------------------------------------------------------------------------------------------------


class _ApiKeys:
    """The keys of the settings, and those of a file that may change while the service runs."""

    def __init__(self, given: Sequence[ApiKey], file: str | None, clock: Callable[[], float]) -> None:
        self._given = tuple(given)
        self._file = Path(file) if file else None
        self._clock = clock
        self._looked_at = clock()
        # Looked at before it is read: an edit in between is then seen as one.
        self._stamp = _stamp(self._file)
        self._keys = self._all()
        self._said_at: float | None = None
        """When it was told last that the file cannot be used; None: it can."""
        # Not the loop's own threads, which others may hold up.
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="api-keys")

    async def find(self, token: str) -> Caller | None:
        """Whose key it is; None where it is nobody's. Unauthenticated where it has expired."""
        if self._file is not None and self._clock() - self._looked_at >= LOOK_S:
            self._looked_at = self._clock()
            await asyncio.get_running_loop().run_in_executor(self._looking, self._look)
        asked = fingerprint(token)
        # All of them, always: what it costs tells nothing of how near a guess was.
        matching = [key for key in self._keys if hmac.compare_digest(key.sha256, asked)]
        if not matching:
            return None
        (key,) = matching
        if key.expires is not None and key.expires <= datetime.now(UTC):
            raise Unauthenticated(f"the key {key.id!r} expired at {key.expires.isoformat()}; ask for a new one")
        return Caller(key.tenant, key.id, frozenset(key.scopes))

    def _look(self) -> None:
        stamp = _stamp(self._file)
        if stamp == self._stamp and not self._is_to_be_said_again():
            return
        self._stamp = stamp
        try:
            self._keys = self._all()
        except RecipeError as error:
            # Again and again: whoever takes away the file to revoke its keys must hear that they are in force.
            self._said_at = self._clock()
            LOG.error("%s; the former %d keys are used on", error, len(self._keys))
        else:
            self._said_at = None
            LOG.info("%s: read again, %d keys in all", self._file, len(self._keys))

    def _is_to_be_said_again(self) -> bool:
        return self._said_at is not None and self._clock() - self._said_at >= SAY_AGAIN_S

    def _all(self) -> tuple[ApiKey, ...]:
        keys = (*self._given, *(_read(self._file) if self._file else ()))
        for what, values in (("id", [key.id for key in keys]), ("sha256", [key.sha256 for key in keys])):
            if repeated := [value for value, count in Counter(values).items() if count > 1]:
                raise RecipeError(
                    f"access.keys and {self._file}: {what} {repeated[0]!r} is there twice; each is of one key"
                )
        return keys


def _stamp(file: Path | None) -> tuple[int, ...] | None:
    """What changes when the file does, also where it is replaced as a whole; None where there is none."""
    try:
        status = os.stat(file) if file else None  # noqa: PTH116 - of a link's target, as Kubernetes mounts secrets
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if status else None


def _read(file: Path) -> tuple[ApiKey, ...]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: {error.strerror}; it should list API keys") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: no YAML") from error
    if content is None:
        # An editor that truncates and then writes passes through this.
        raise RecipeError(f"{file}: is empty; write [] where there are to be no keys")
    try:
        return _KEYS.validate_python(content)
    except ValidationError as error:
        # Without the input: it may hold a key where its hash belongs.
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise RecipeError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


# --- signed tokens --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    """JSON Web Tokens (RFC 7519) of one issuer."""

    oidc: Oidc
    keys: IssuerKeys
    reader: jwt.PyJWT = field(default_factory=lambda: jwt.PyJWT({"enforce_minimum_key_length": True}))

    def __post_init__(self) -> None:
        for name in self.oidc.algorithms:
            if name not in ASYMMETRIC:
                raise RecipeError(
                    f"oidc.algorithms: {name!r} is no algorithm of public keys{nearest(name, ASYMMETRIC)}"
                )

    async def read(self, token: str) -> Caller:
        """Who the token says it is, once it is known to be the issuer's, for this service, and in time."""
        claims = await self._claims(token)
        subject = claims["sub"]
        if not isinstance(subject, str) or not _SUBJECT.fullmatch(subject):
            raise Unauthenticated("the token's subject is no printable text of 1 to 255 characters")
        return Caller(self._tenant(claims), subject, self._scopes(claims))

    async def _claims(self, token: str) -> Mapping[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            algorithm, kid = header.get("alg"), header.get("kid")
            if not isinstance(algorithm, str) or algorithm not in self.oidc.algorithms:
                allowed = ", ".join(self.oidc.algorithms)
                raise Unauthenticated(f"the token is not signed by an algorithm that is taken here: {allowed}")
            key = await self.keys.find(kid if isinstance(kid, str) else None, algorithm)
            if key is None:
                raise Unauthenticated("the token's key is not among those of the issuer; get another token")
            return self.reader.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self.oidc.audience,
                issuer=self.oidc.issuer,
                leeway=self.oidc.leeway_s,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise Unauthenticated(_reason(error)) from None

    def _tenant(self, claims: Mapping[str, Any]) -> str:
        # It becomes a folder of the store.
        try:
            return _NAME.validate_python(claims.get(self.oidc.tenant_claim), strict=True)
        except ValidationError:
            raise Forbidden(
                f"the token's claim {self.oidc.tenant_claim!r} is missing or no name of up to 64 letters, digits, "
                "'.', '_' and '-'; ask the issuer for a tenant"
            ) from None

    def _scopes(self, claims: Mapping[str, Any]) -> frozenset[Scope]:
        """Those that mean something here; tokens often carry those of other services."""
        claim = claims.get(self.oidc.scope_claim, ())
        words = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else ()
        return frozenset(_SCOPES[word] for word in words if isinstance(word, str) and word in _SCOPES)


_REASONS: Mapping[type[jwt.PyJWTError], str] = {
    jwt.ExpiredSignatureError: "the token has expired; get another",
    jwt.ImmatureSignatureError: "the token is not valid yet; check the clocks",
    jwt.InvalidAudienceError: "the token is for another audience; get one for this service",
    jwt.InvalidIssuerError: "the token is of another issuer",
    jwt.InvalidSignatureError: "the token's signature is wrong; get another",
    jwt.MissingRequiredClaimError: "the token lacks one of the claims exp, iss, aud and sub",
}


def _reason(error: jwt.PyJWTError) -> str:
    # PyJWT's own texts may quote the token.
    found = next((text for kind, text in _REASONS.items() if isinstance(error, kind)), None)
    return found or "the token is damaged; get another"
