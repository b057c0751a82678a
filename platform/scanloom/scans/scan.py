"""What every source yields: files in a fixed order, and per file its scans or the typed reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

from scanloom.attributes import AttributeSchema
from scanloom.errors import ScanError
from scanloom.recipe import Decode
from scanloom.scans.deidentify import Pseudonyms, Subject
from scanloom.scans.image import ScanImage
from scanloom.scans.isolation import Fence

Key = Annotated[
    str,
    PlainSerializer(lambda key: key.encode("utf-8", "surrogateescape").decode("latin-1"), when_used="json"),
    BeforeValidator(lambda text: text.encode("latin-1").decode("utf-8", "surrogateescape")),
]
"""An object's key; in JSON each of its bytes is a character, since a file's name need not be UTF-8."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """What a table says of one file, as text; nothing here is de-identified yet. `texts` by attribute source."""

    file: str
    patient: str
    study: str
    texts: Mapping[str, str]
    geometry: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One object of a source.

    `version` differs when the content may differ (an ETag, a time of modification). A file that is `alone` makes a
    unit of its own: an archive, a volume, a series. `rows` are the table's rows for it: exactly one, if all is well.
    """

    key: Key
    bytes: int
    version: str = ""
    alone: bool = False
    rows: tuple[TableRow, ...] = field(default=())


@dataclass(frozen=True)
class Context:
    """What reading a unit needs beside the source."""

    schema: AttributeSchema
    pseudonyms: Pseudonyms
    decode: Decode
    seed: int
    size_px: int
    fence: Fence | None = None
    """Where files are read that may take their reader down with them; None: right here."""


@dataclass(frozen=True)
class Scan:
    """One de-identified scan at its own size."""

    subject: Subject
    image: ScanImage


Found = tuple[int, int | None, Scan | ScanError]
"""Member (ordinal of the file in its unit), frame (None: the file as a whole), and the scan or why there is none."""
