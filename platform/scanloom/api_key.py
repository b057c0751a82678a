"""API keys of the generation service: how one is made, and what the service keeps of it."""

from __future__ import annotations

import hashlib
import secrets
import string
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from scanloom.api import Name
from scanloom.errors import RecipeError

Scope = Literal["generate", "datasets", "admin"]
"""generate: images and generators; datasets: datasets and generators; admin: every tenant's datasets, and metrics."""

PATTERN = r"scanloom_[A-Za-z0-9][A-Za-z0-9._-]{0,63}_[A-Za-z0-9]{40}"
"""What every key looks like, for scanners that search for leaked ones."""
_LETTERS = string.ascii_letters + string.digits
_NAME: TypeAdapter[Any] = TypeAdapter(Name)
_SCOPE: TypeAdapter[Any] = TypeAdapter(Scope)
_LENGTH = 40  # of 62 letters: 238 bits, far beyond guessing, so that a plain hash of the key protects it


def new_key(key_id: str) -> str:
    """A key that nobody can guess; `key_id` is readable in it."""
    return f"scanloom_{key_id}_{''.join(secrets.choice(_LETTERS) for _ in range(_LENGTH))}"


def fingerprint(key: str) -> str:
    """SHA-256 of a key, in hex: all that the service knows of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def entry(key: str, key_id: str, tenant: str, scopes: Sequence[str], days: int | None) -> dict[str, Any]:
    """A key as `keys_file` lists it, as plain data; `days` from now on it is taken, None: for ever.

    RecipeError for what is no name of a key or a tenant, and no scope.
    """
    for what, text, kind in (("id", key_id, _NAME), ("tenant", tenant, _NAME), *(("scope", s, _SCOPE) for s in scopes)):
        try:
            kind.validate_python(text)
        except ValidationError as error:
            raise RecipeError(f"{what} {text!r}: {error.errors()[0]['msg']}") from None
    found: dict[str, Any] = {"id": key_id, "sha256": fingerprint(key), "tenant": tenant, "scopes": list(scopes)}
    if days is not None:
        found["expires"] = (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds")
    return found
