"""In which of its formats a client wants an answer: its Accept header (RFC 9110 12.5.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_ITEM = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*")+')
_PART = re.compile(r'(?:[^;"]|"(?:[^"\\]|\\.)*")+')
_LONGEST = 1024


@dataclass(frozen=True)
class MediaType:
    """Such as `multipart/related; type="application/dicom"`; all in lower case but the parameters' values."""

    type: str
    subtype: str
    parameters: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"{self.type}/{self.subtype}"

    def takes(self, offered: MediaType) -> bool:
        """Whether this, an item of an Accept header, is met by an offered type.

        What the offer has as a parameter may be left out; a parameter that the offer does not have is not asked for.
        """
        return (
            self.type in ("*", offered.type)
            and self.subtype in ("*", offered.subtype)
            and all(
                self.parameters.get(name, value).lower() in ("*", value.lower())
                for name, value in offered.parameters.items()
            )
        )


def media_type(text: str) -> MediaType | None:
    """The media type that a text spells; None where it is none."""
    head, *rest = _PART.findall(text) or [""]
    kind, slash, subtype = head.strip().lower().partition("/")
    if not (slash and kind and subtype):
        return None
    pairs = (part.partition("=") for part in rest)
    return MediaType(kind, subtype, {name.strip().lower(): _unquoted(value.strip()) for name, _, value in pairs})


def chosen(accept: str | None, offers: Sequence[MediaType]) -> MediaType | None:
    """The offer that the header likes best, of equals the first offer; None where it takes none of them."""
    if accept is None or not accept.strip():
        return offers[0]
    items = tuple(_items(accept[:_LONGEST]))
    likes = [(offer, _quality(offer, items)) for offer in offers]
    best, quality = max(likes, key=lambda like: like[1])
    return best if quality > 0 else None


def _quality(offer: MediaType, items: Sequence[tuple[MediaType, float]]) -> float:
    """That of the most specific item that takes it."""
    fitting = [(_specific(item), quality) for item, quality in items if item.takes(offer)]
    return max(fitting, default=((), 0.0))[1]


def _specific(item: MediaType) -> tuple[bool, bool, int]:
    return item.type != "*", item.subtype != "*", len(item.parameters)


def _items(accept: str) -> Iterator[tuple[MediaType, float]]:
    for text in _ITEM.findall(accept):
        found = media_type(text)
        if found is not None:
            asked = {name: value for name, value in found.parameters.items() if name != "q"}
            yield MediaType(found.type, found.subtype, asked), _weight(found.parameters.get("q", "1"))


def _weight(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0


def _unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if len(value) > 1 and value[0] == value[-1] == '"' else value
