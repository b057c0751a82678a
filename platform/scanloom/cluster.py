"""What a Ray cluster says of itself to whoever is about to give it work: `scanloom doctor --cluster`.

Asked of its dashboard over HTTP: neither Ray nor its version is needed here. The token is sent that Ray's
own commands would send.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from scanloom.errors import RecipeError

MOST_SKEW_S = 60.0
"""Between two clocks. S3 refuses signatures from 15 minutes on; leases and tokens expire wrongly before."""
_ANSWER_S = 10.0
_MOST_NODES = 1000


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    found: str
    note: str = ""
    usable: bool = True


def examine(
    address: str, token: str | None, ray_version: str | None, gpus: float, now: Callable[[], datetime] | None = None
) -> list[Finding]:
    """Whether the cluster answers, lets us in, runs `ray_version` (None: any), has the time, and has so many GPUs.

    Raises RecipeError where `address` is none. Whatever else is wrong is a finding that says what to do.
    """
    if not address.startswith(("http://", "https://")):
        raise RecipeError(f"--cluster {address}: expected the dashboard's address, such as http://127.0.0.1:8265")
    root = address.rstrip("/")
    try:
        said, date = _ask(f"{root}/api/version", token)
        version = str(said["ray_version"])
        nodes, _ = _ask(f"{root}/api/v0/nodes?limit={_MOST_NODES}", token)
        alive = [node for node in nodes["data"]["result"]["result"] if node["state"] == "ALIVE"]
    except urllib.error.HTTPError as error:
        return [Finding("cluster", "refuses", _refusal(error.code, token), usable=False)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        note = f"{root} does not answer as Ray's dashboard ({type(error).__name__}); check address and network policies"
        return [Finding("cluster", "unreachable", note, usable=False)]
    return [
        Finding("cluster", f"{len(alive)} nodes", root),
        _version(version, ray_version),
        clock("cluster's clock", date, now),
        _gpus(sum(float(node["resources_total"].get("GPU", 0)) for node in alive), gpus),
    ]


def auth_token(environment: Mapping[str, str] = os.environ) -> str | None:
    """The token that Ray's own commands would send: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    That last one not where RAY_AUTH_MODE is `disabled`.
    """
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    if named is None and environment.get("RAY_AUTH_MODE") == "disabled":
        return None
    file = Path(named) if named else Path(environment.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def clock(what: str, date: str | None, now: Callable[[], datetime] | None = None) -> Finding:
    """How far the clock that wrote a `Date` header is from ours."""
    try:
        theirs = parsedate_to_datetime(date or "")
    except ValueError:
        return Finding(what, "unknown", "its answers have no date")
    skew_s = (theirs - (now or _now)()).total_seconds()
    usable = abs(skew_s) <= MOST_SKEW_S
    note = "" if usable else "set both by NTP: stores refuse signatures of another time"
    return Finding(what, f"{abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}", note, usable)


def store_clock(endpoint: str, now: Callable[[], datetime] | None = None) -> Finding:
    """The same of a store, whatever it answers to one who does not say who he is."""
    try:
        with urllib.request.urlopen(endpoint, timeout=_ANSWER_S) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        date = error.headers["Date"]
    except (OSError, ValueError) as error:
        return Finding("store's clock", "unknown", f"{endpoint} does not answer ({type(error).__name__})", usable=False)
    return clock("store's clock", date, now)


def _ask(url: str, token: str | None) -> tuple[Mapping[str, Any], str | None]:
    request = urllib.request.Request(url)
    if token:
        # Not for whom the answer may send us to.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
        return json.loads(answer.read()), answer.headers["Date"]


def _refusal(code: int, token: str | None) -> str:
    if code in (401, 403):
        had = "RAY_AUTH_TOKEN is not this cluster's" if token else "RAY_AUTH_TOKEN is not set"
        return f"{had}; KubeRay keeps the token in the Secret named like the cluster"
    return f"answers {code}; is this Ray's dashboard?"


def _version(theirs: str, ours: str | None) -> Finding:
    same = ours is None or theirs == ours
    note = "" if same else f"{ours} is installed here: use the image that the cluster runs, or its version"
    return Finding("cluster's Ray", theirs, note, same)


def _gpus(there: float, needed: float) -> Finding:
    if there >= needed:
        return Finding("cluster's GPUs", f"{there:g}", f"the recipe needs {needed:g}" if needed else "")
    note = f"the recipe needs {needed:g}; add nodes, wait for the autoscaler, or set fewer workers or engines"
    return Finding("cluster's GPUs", f"{there:g}", note, usable=False)


def _now() -> datetime:
    return datetime.now(UTC)
