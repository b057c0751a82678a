"""Units: the files of a source cut into pieces of work, and what of them a former version of the corpus has read.

A file is recognised by a keyed digest of its name, size and version, since names can identify patients. A corpus
keeps the digests of its units. When the source has grown, units whose files are all still there are kept with their
numbers, and only the rest is cut into new ones, so that nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from scanloom.artefact import canonical_json
from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.scan import SourceFile

UNIT_BYTES = 256 << 20
"""Loose files beyond this are cut into another unit."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Unit(_Record):
    """The smallest piece of work of a source: the same unit gives the same scans and the same refusals."""

    index: int
    files: tuple[SourceFile, ...]

    @property
    def name(self) -> str:
        """Kind and number, and nothing of what the source calls it."""
        return f"{'object' if self.files[0].alone else 'files'}-{self.index:06d}"


class UnitRecord(_Record):
    """A unit as the corpus remembers it: the keyed digests of its files, in their order."""

    index: int
    files: tuple[str, ...]


class ShardFacts(NamedTuple):
    """What became of a unit: how many scans it gave, and whether it lost some that others gave too."""

    scans: int
    lost_duplicates: bool


class Listing(_Record):
    """The units of one version of a corpus, and a digest of everything else that determines it."""

    rules: str
    units: tuple[UnitRecord, ...]
    grown_from: str = ""
    """The plan of the version whose units were kept; no other version's shards may be taken over."""

    @property
    def digests(self) -> set[str]:
        return {digest for unit in self.units for digest in unit.files}


def by_digest(files: Iterable[SourceFile], pseudonyms: Pseudonyms) -> dict[str, SourceFile]:
    """The files by keyed digest, in their order."""
    return {_digest(file, pseudonyms): file for file in files}


def _digest(file: SourceFile, pseudonyms: Pseudonyms) -> str:
    rows = [[row.file, row.patient, row.study, dict(row.texts), list(row.geometry)] for row in file.rows]
    return pseudonyms.digest("file", canonical_json([file.key, file.bytes, file.version, rows]))[:24]


def cut(files: Sequence[SourceFile], files_per_unit: int, first: int) -> list[Unit]:
    """Units numbered from `first`: files that are alone by themselves, others in groups, all in their order."""
    groups: list[list[SourceFile]] = []
    open_bytes = 0
    for file in files:
        last = groups[-1] if groups else []
        full = not last or last[0].alone or len(last) == files_per_unit or open_bytes + file.bytes > UNIT_BYTES
        if file.alone or full:
            groups.append([])
            open_bytes = 0
        groups[-1].append(file)
        open_bytes += file.bytes
    return [Unit(index=first + i, files=tuple(group)) for i, group in enumerate(groups)]


def remembered(listing: Listing, files: Mapping[str, SourceFile]) -> list[Unit]:
    """The units of a listing whose files are all still in the source."""
    present = [unit for unit in listing.units if files.keys() >= set(unit.files)]
    return [Unit(index=unit.index, files=tuple(files[digest] for digest in unit.files)) for unit in present]


def grown(
    listing: Listing, files: Mapping[str, SourceFile], shards: Mapping[int, ShardFacts], files_per_unit: int
) -> list[Unit]:
    """The units of a source that has changed since `listing`; those that were read already are as they were.

    A unit of which a file has vanished or changed is cut anew from what is left of it. If it held scans, then so are
    the units that lost duplicates: they may have lost them to these.
    """
    intact = [unit for unit in listing.units if files.keys() >= set(unit.files)]
    gone = {unit.index for unit in listing.units} - {unit.index for unit in intact}
    if any(shards[unit].scans for unit in gone):
        intact = [unit for unit in intact if not shards[unit.index].lost_duplicates]
    kept = remembered(Listing(rules=listing.rules, units=tuple(intact)), files)
    known = {digest for unit in intact for digest in unit.files}
    rest = [file for digest, file in files.items() if digest not in known]
    first = 1 + max((unit.index for unit in listing.units), default=-1)
    return kept + cut(rest, files_per_unit, first)


def listing_of(rules: str, units: Sequence[Unit], files: Mapping[str, SourceFile], grown_from: str = "") -> Listing:
    """What the corpus remembers of these units, and of the version (by its plan) that some were kept from."""
    digests = {file.key: digest for digest, file in files.items()}
    records = [UnitRecord(index=unit.index, files=tuple(digests[f.key] for f in unit.files)) for unit in units]
    return Listing(rules=rules, units=tuple(records), grown_from=grown_from)
