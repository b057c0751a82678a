"""Parts of files by HTTP (RFC 9110, sections 13 and 14): which bytes of a file that never changes a request is for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from serve.problem import Refusal

_SPAN = re.compile(r"\s*bytes\s*=[\s,]*(\d{0,19})-(\d{0,19})[\s,]*", re.IGNORECASE)
_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')


@dataclass(frozen=True)
class Wanted:
    """How a request for a file is answered: with bytes start <= n < stop."""

    status: int
    """200: all of it; 206: a part; 304: nothing, the client has it."""
    start: int
    stop: int
    headers: dict[str, str]
    """What says so, beside the media type."""


def wanted(headers: Headers, size: int, sha256: str) -> Wanted:
    """What a request with these headers wants of a file of `size` bytes whose strong entity tag is its SHA-256.

    A header Range that is malformed, of another unit or of several parts is ignored, as RFC 9110 allows; so is one
    whose If-Range names another content, or a date, since files here have none.

    Raises Refusal: 412 where If-Match names another content, 416 for a part that begins behind the end.
    """
    tag = f'"{sha256}"'
    told = {"ETag": tag, "Accept-Ranges": "bytes"}
    expected = headers.getlist("If-Match")
    if expected and not _is_named(expected, tag, strongly=True):
        raise Refusal("changed", "the file is not the one that If-Match names; ask for all of it anew", headers=told)
    if _is_named(headers.getlist("If-None-Match"), tag):
        return Wanted(304, 0, 0, told)
    if headers.get("If-Range", tag).strip() == tag and (span := _span(headers.getlist("Range"), size)) is not None:
        start, stop = span
        if start >= stop:
            raise Refusal(
                "not-satisfiable", f"the file has {size} bytes; ask for a part that begins within them",
                headers=told | {"Content-Range": f"bytes */{size}"},
            )  # fmt: skip
        part = {"Content-Range": f"bytes {start}-{stop - 1}/{size}", "Content-Length": str(stop - start)}
        return Wanted(206, start, stop, told | part)
    return Wanted(200, 0, size, told | {"Content-Length": str(size)})


def _span(ranges: list[str], size: int) -> tuple[int, int] | None:
    """The one part that is asked for, start < stop where there is any of it; None: no part, or none that is known."""
    found = _SPAN.fullmatch(ranges[0]) if len(ranges) == 1 else None
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size


def _is_named(sent: list[str], tag: str, *, strongly: bool = False) -> bool:
    """Whether the entity tags of a condition have this one; a weak one counts where they are not compared strongly."""
    text = ",".join(sent)
    tags = _TAG.findall(text)
    return text.strip() == "*" or tag in (tags if strongly else (found.removeprefix("W/") for found in tags))
