"""The plan of a corpus: which units are curated and how, in a new folder, one to go on with, or the next version.

A corpus never changes. When its source has, `plan_curation` plans the version after it, which takes over the shards
of the units that are still as they were (scans.units) and reads the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from scanloom.artefact import UNITS, Lineage, canonical_json, find_artefact, plan_digest
from scanloom.attributes import AttributeSchema
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import Decode, NumberAttribute, PhantomSource, Prepare, Recipe, Source, Split
from scanloom.scans.deidentify import Pseudonyms, pseudonyms_from_environment
from scanloom.scans.resize import Resize
from scanloom.scans.scan import SourceFile
from scanloom.scans.sources import files_per_unit, list_files
from scanloom.scans.units import Listing, ShardFacts, Unit, by_digest, cut, grown, listing_of, remembered
from scanloom.shards.commit import ShardCommit, begin, claimed_plan, committed, committed_shards
from scanloom.store import Store

STAGING = "staging"
OLDEST_SHOWN_YEARS = 90
"""What every age over 89 is recorded as."""
FORMAT = 2
"""Raised whenever the same scans would come out as other bytes."""


class Curation(BaseModel):
    """What a worker needs to curate any unit of a plan; the pseudonym key comes from its environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: str
    grown_from: str = ""
    """URI of the version of the corpus whose shards are taken over, if any."""
    source: Source
    attributes: AttributeSchema
    size_px: int
    resize: Resize
    decode: Decode
    burned_in_text: str
    split: Split
    seed: int
    key_fingerprint: str
    plan: str

    @property
    def store(self) -> Store:
        return Store(self.corpus)


@dataclass(frozen=True)
class CurationPlan:
    """All the units of a corpus, and how they are curated.

    `lineage` identifies what is read (not where it lies) and the version grown from; `later` counts the files that
    came while an unfinished run was away, which its next version will hold; `taken_over` are the commits of the
    units that the version before has read, by unit.
    """

    curation: Curation
    section: Prepare
    version: int
    units: tuple[Unit, ...]
    listing: Listing
    lineage: tuple[Lineage, ...]
    taken_over: Mapping[int, ShardCommit]
    later: int

    def unit(self, index: int) -> Unit:
        """The unit of that number. IndexError where there is none."""
        for unit in self.units:
            if unit.index == index:
                return unit
        raise IndexError(index)

    def taken_over_json(self, unit: int) -> str | None:
        """The commit of a unit that the version before has read, as a task carries it."""
        return self.taken_over[unit].model_dump_json() if unit in self.taken_over else None

    def remarks(self, statistics: Mapping[str, Any], asked_version: int) -> Iterator[str]:
        """What whoever asked for the corpus should know of it, a line each; `statistics` of its manifest."""
        alike = statistics["near_duplicates"]
        if alike["pairs"]:
            yield (
                f"{alike['pairs']} pairs of nearly equal scans of different patients, {alike['across_splits']} of them "
                f"across splits: {self.curation.corpus}/near-duplicates/pairs.parquet"
            )
        if statistics["with_text"]:
            yield (
                f"lines of text are seen in {statistics['with_text']} scans (column text_lines); look at them, or keep "
                "such scans out with --set prepare.burned_in_text=quarantine"
            )
        if self.taken_over:
            yield f"{len(self.taken_over)} of {len(self.units)} units were taken over from {self.curation.grown_from}"
        if self.later:
            yield f"{self.later} files came while this corpus was being made; prepare again for the version with them"
        if self.version != asked_version:
            yield f"the source has changed: this is version {self.version}, for --set corpus_version={self.version}"


@dataclass(frozen=True)
class _Version:
    """A version of the corpus that is begun: its folder and plan, what it remembers, and how far it has come."""

    store: Store
    plan: str
    listing: Listing
    finished: bool
    read: frozenset[int]
    """Units that are staged: what becomes of their files no longer matters."""

    @functools.cached_property
    def shards(self) -> dict[int, ShardCommit]:
        """Its committed shards by unit, read once."""
        return committed(self.store, self.plan)


def plan_curation(recipe: Recipe) -> CurationPlan:
    """List the source and fix everything that determines the corpus; its digest is the plan's.

    The version is the recipe's, or a later one where the source has grown since.

    Raises RecipeError: no prepare section, an empty source, no pseudonym key, attributes the source cannot give, a
    version without the one before it; ArtefactError where files vanished or changed while an unfinished run was away.
    """
    section = _section(recipe)
    schema = AttributeSchema(declarations=recipe.attributes)
    source = _anywhere(section.source)
    _require_apart(recipe, source)
    _require_capped(schema, source)
    pseudonyms = pseudonyms_of(source)
    files = by_digest(list_files(source, schema), pseudonyms)
    rules = _rules(recipe, section, source, pseudonyms)
    number, before, there = _version(recipe, rules, files)
    listing = there.listing if there else _listing(rules, files, before, files_per_unit(source))
    units = remembered(listing, files)
    curation = Curation(
        corpus=_folder(recipe, number).uri,
        grown_from=before.store.uri if before else "",
        source=source,
        attributes=schema,
        **{name: getattr(section, name) for name in ("size_px", "resize", "decode", "burned_in_text", "split")},
        seed=recipe.seed,
        key_fingerprint=pseudonyms.fingerprint,
        plan=plan_digest("corpus", FORMAT, listing.model_dump(mode="json", exclude_defaults=True)),
    )
    return CurationPlan(
        curation, section, number, tuple(units), listing, _lineage(source, units, pseudonyms, before),
        _taken_over(listing, before), len(files.keys() - listing.digests),
    )  # fmt: skip


def claim(plan: CurationPlan) -> None:
    """Begin the corpus in its folder, or go on with it; it remembers its units from here on.

    Raises ArtefactError where the folder holds something else.
    """
    store = plan.curation.store
    # First what the plan stands for, so that no plan is ever there without it.
    store.write(_listing_key(plan.curation.plan), plan.listing.model_dump_json().encode())
    begin(store, "corpus", plan.curation.plan)


def _section(recipe: Recipe) -> Prepare:
    if recipe.prepare is None:
        raise RecipeError(f"recipe {recipe.name}: has no 'prepare' section; it says where the scans are")
    return recipe.prepare


def _anywhere(source: Source) -> Source:
    """The source with paths that mean the same in every worker's folder."""
    places = {
        name: Store(value).uri
        for name in ("uri", "table")
        if (value := getattr(source, name, "")) and not value.startswith(("http://", "https://"))
    }
    return source.model_copy(update=places)


def _require_apart(recipe: Recipe, source: Source) -> None:
    if not isinstance(source, PhantomSource) and f"{Store(recipe.store).uri}/".startswith(f"{source.uri}/"):
        raise RecipeError(
            f"store {recipe.store}: lies inside prepare.source.uri {source.uri}, so that a second run would read "
            "what the first one wrote; choose another folder"
        )


def _require_capped(schema: AttributeSchema, source: Source) -> None:
    """Raise RecipeError where an age over 89 could be told from another (45 CFR 164.514(b)(2)(i)(C))."""
    for attribute in schema.declarations if not isinstance(source, PhantomSource) else ():
        if isinstance(attribute, NumberAttribute) and attribute.unit == "years":
            highest = attribute.maximum if attribute.cap is None else attribute.cap
            if highest > OLDEST_SHOWN_YEARS:
                raise RecipeError(
                    f"attribute {attribute.name!r}: ages over 89 can identify a patient; set its cap to "
                    f"{OLDEST_SHOWN_YEARS} (and its maximum, if you like), so that all of them read alike"
                )


def pseudonyms_of(source: Source) -> Pseudonyms:
    """The pseudonyms for a source's patients; phantoms are nobody and need no secret."""
    return Pseudonyms(b"phantoms are nobody") if isinstance(source, PhantomSource) else pseudonyms_from_environment()


def _rules(recipe: Recipe, section: Prepare, source: Source, pseudonyms: Pseudonyms) -> str:
    """A digest of all that determines a corpus beside its files; not of where they lie."""
    chosen = section.model_dump(
        mode="json", include={"size_px", "resize", "decode", "burned_in_text", "near_duplicate_bits", "split"}
    )
    reading = source.model_dump(mode="json", exclude={"uri", "table", "scans"})
    attributes = [declaration.model_dump(mode="json") for declaration in recipe.attributes]
    return plan_digest("rules", FORMAT, chosen, reading, attributes, pseudonyms.fingerprint, recipe.seed)


# --- versions -------------------------------------------------------------------------------------------------


def _version(
    recipe: Recipe, rules: str, files: Mapping[str, SourceFile]
) -> tuple[int, _Version | None, _Version | None]:
    """The number to make or go on with, the finished version that it grows from, and itself where it is begun."""
    number = recipe.corpus_version
    before = _begun(_folder(recipe, number - 1), rules) if number > 1 else None
    while (there := _begun(_folder(recipe, number), rules)) is not None:
        if there.finished and files.keys() == there.listing.digests:
            return number, _former(before, there), there
        if not there.finished:
            _require_present(there, files)
            return number, _former(before, there), there
        number, before = number + 1, there
    if recipe.corpus_version > 1 and before is None:
        raise RecipeError(
            f"corpus_version {recipe.corpus_version}: {_folder(recipe, number - 1).uri} holds no corpus by the same "
            "rules to grow from; leave corpus_version out"
        )
    return number, before if before and before.finished else None, None


def _former(before: _Version | None, there: _Version) -> _Version | None:
    """The version before, where that is what this one was grown from.

    It may have been finished, or made anew, after this one was begun: then equal units lost other duplicates.
    """
    return before if before and before.finished and before.plan == there.listing.grown_from else None


def _require_present(version: _Version, files: Mapping[str, SourceFile]) -> None:
    unread = [unit for unit in version.listing.units if unit.index not in version.read]
    lost = sum(digest not in files for unit in unread for digest in unit.files)
    if lost:
        raise ArtefactError(
            f"{version.store.uri}: {lost} files of the source vanished or changed since this corpus was begun, before "
            "they were read; delete this folder and run again"
        )


def _folder(recipe: Recipe, version: int) -> Store:
    return Store(recipe.model_copy(update={"corpus_version": version}).uri("corpus"))


def _listing(rules: str, files: Mapping[str, SourceFile], before: _Version | None, files_per_unit: int) -> Listing:
    if before is None:
        return listing_of(rules, cut(list(files.values()), files_per_unit, 0), files)
    facts = {
        unit: ShardFacts(shard.rows, "duplicate" in shard.statistics["quarantined"])
        for unit, shard in before.shards.items()
    }
    return listing_of(rules, grown(before.listing, files, facts, files_per_unit), files, before.plan)


def _taken_over(listing: Listing, before: _Version | None) -> dict[int, ShardCommit]:
    if before is None:
        return {}
    same = set(before.listing.units)
    return {unit.index: before.shards[unit.index] for unit in listing.units if unit in same}


def _begun(store: Store, rules: str) -> _Version | None:
    """What is in a version's folder; None where there is nothing, or a corpus by other rules (`begin` refuses that)."""
    plan = claimed_plan(store)
    if plan is None or not store.exists(_listing_key(plan)):
        return None
    try:
        listing = Listing.model_validate_json(store.read(_listing_key(plan)))
    except ValidationError as error:
        raise ArtefactError(f"{store.uri_of(_listing_key(plan))}: is damaged; restore it") from error
    if listing.rules != rules:
        return None
    finished = find_artefact(store.uri, "corpus") is not None
    return _Version(store, plan, listing, finished, frozenset(committed_shards(store.at(STAGING))))


def _listing_key(plan: str) -> str:
    return f"{UNITS}/{plan[:12]}.json"


def _lineage(
    source: Source, units: Sequence[Unit], pseudonyms: Pseudonyms, before: _Version | None
) -> tuple[Lineage, ...]:
    # Keyed, since object names may hold identifiers that could be guessed from a plain hash; without the files'
    # times, so that a copy of a source gives the same corpus.
    content = canonical_json([[[file.key, file.bytes] for file in unit.files] for unit in units])
    uri = "" if isinstance(source, PhantomSource) else source.uri
    read = Lineage(role="source", kind=source.kind, uri=uri, digest=pseudonyms.digest("units", content))
    former = find_artefact(before.store.uri, "corpus") if before else None
    if former is None:
        return (read,)
    return read, Lineage(role="grown-from", kind="corpus", uri=former.uri, digest=former.digest)
