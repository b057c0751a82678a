"""Curation: from the units of a source to the shards of a corpus, each exactly once, whoever dies on the way.

Two steps, since an instance may occur in two units and no unit knows the others. `stage_unit` reads one unit, uploads
its shard and records it under `staging/`, create-only. When all units are staged, `duplicates` says which scans lose
(the first in unit and member order wins, whatever finished first), and `settle_unit` commits each shard: as it is, or
written again without its losers. A run that is killed anywhere finds what is staged and what is committed.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from scanloom.artefact import Lineage, canonical_json, plan_digest
from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError, ScanloomError
from scanloom.recipe import PhantomSource, Prepare, Recipe, Source, Split
from scanloom.scans.deidentify import Actions, Pseudonyms, pseudonyms_from_environment
from scanloom.scans.quarantine import reject
from scanloom.scans.resize import Resize, fit
from scanloom.scans.sources import Context, Scan, Unit, list_units, read_unit
from scanloom.scans.tally import QUARANTINE, SPLITS, corpus_statistics, shard_tally
from scanloom.shards.commit import (
    ShardCommit,
    ShardPart,
    clean_orphans,
    commit_key,
    commit_uploaded,
    committed,
    upload_parts,
)
from scanloom.shards.reader import read_parquet
from scanloom.shards.schemas import QUARANTINE_SCHEMA, corpus_schema
from scanloom.shards.writer import parquet_bytes, png_bytes
from scanloom.store import Store

FORMAT = 1
"""Raised whenever the same scans would come out as other bytes."""
STAGING = "staging"


class Curation(BaseModel):
    """What a worker needs to curate any unit of a plan; the pseudonym key comes from its environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: str
    source: Source
    attributes: AttributeSchema
    size_px: int
    resize: Resize
    split: Split
    seed: int
    key_fingerprint: str
    plan: str

    @property
    def store(self) -> Store:
        return Store(self.corpus)


@dataclass(frozen=True)
class CurationPlan:
    """All the units of a corpus, and how they are curated; `source` identifies what is read, not where it lies."""

    curation: Curation
    section: Prepare
    units: tuple[Unit, ...]
    source: Lineage


# --- planning -------------------------------------------------------------------------------------------------


def plan_curation(recipe: Recipe) -> CurationPlan:
    """List the source and fix everything that determines the corpus; its digest is the plan's.

    Raises RecipeError: no prepare section, an empty source, no pseudonym key, attributes the source cannot give.
    """
    section = _section(recipe)
    schema = AttributeSchema(declarations=recipe.attributes)
    source = _anywhere(section.source)
    _require_apart(recipe, source)
    pseudonyms = pseudonyms_of(source)
    units = tuple(list_units(source, schema))
    # Keyed, since object names may hold identifiers that could be guessed from a plain hash.
    content = canonical_json([unit.model_dump(mode="json") for unit in units])
    digest = pseudonyms.digest("units", content)
    rules = section.model_dump(mode="json", include={"size_px", "resize", "split"})
    plan = plan_digest(
        "corpus", FORMAT, digest, rules, schema.model_dump(mode="json"), pseudonyms.fingerprint, recipe.seed
    )
    curation = Curation(
        corpus=Store(recipe.uri("corpus")).uri,
        source=source,
        attributes=schema,
        size_px=section.size_px,
        resize=section.resize,
        split=section.split,
        seed=recipe.seed,
        key_fingerprint=pseudonyms.fingerprint,
        plan=plan,
    )
    uri = "" if isinstance(source, PhantomSource) else source.uri
    return CurationPlan(curation, section, units, Lineage(role="source", kind=source.kind, uri=uri, digest=digest))


def _section(recipe: Recipe) -> Prepare:
    if recipe.prepare is None:
        raise RecipeError(f"recipe {recipe.name}: has no 'prepare' section; it says where the scans are")
    return recipe.prepare


def _anywhere(source: Source) -> Source:
    """The source with paths that mean the same in every worker's folder."""
    places = {name: Store(getattr(source, name)).uri for name in ("uri", "table") if hasattr(source, name)}
    return source.model_copy(update=places)


def _require_apart(recipe: Recipe, source: Source) -> None:
    if not isinstance(source, PhantomSource) and f"{Store(recipe.store).uri}/".startswith(f"{source.uri}/"):
        raise RecipeError(
            f"store {recipe.store}: lies inside prepare.source.uri {source.uri}, so that a second run would read "
            "what the first one wrote; choose another folder"
        )


def pseudonyms_of(source: Source) -> Pseudonyms:
    """The pseudonyms for a source's patients; phantoms are nobody and need no secret."""
    return Pseudonyms(b"phantoms are nobody") if isinstance(source, PhantomSource) else pseudonyms_from_environment()


# --- the work on one unit -------------------------------------------------------------------------------------


def stage_unit(row: Mapping[str, Any], curation: Curation) -> dict[str, int]:
    """Curate the unit in `row["unit"]` (JSON) and stage its shard; counts of scans kept and refused.

    Raises RecipeError where this worker's pseudonym key is not the plan's, StoreError where a store fails.
    """
    unit = Unit.model_validate_json(row["unit"])
    staging = curation.store.at(STAGING)
    # A task that is run again after its commit has nothing left to do.
    if not staging.exists(commit_key(unit.index)):
        tables, actions = curate_unit(unit, curation)
        _stage(staging, unit, tables, actions, curation)
        return _counts(unit.index, tables)
    return {"unit": unit.index, "scans": 0, "rejected": 0}


def curate_unit(unit: Unit, curation: Curation) -> tuple[dict[str, pa.Table], Actions]:
    """The unit's scans by split and its quarantine as tables (none of them empty), and what was done to its headers.

    A whole unit's curated scans are held in memory: archives of more than a few GB should be cut.
    """
    context = _context(curation)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in (*SPLITS, QUARANTINE)}
    actions: Actions = Counter()
    with warnings.catch_warnings():
        # pydicom warns in the words of the header.
        warnings.simplefilter("ignore")
        for member, found in read_unit(curation.source, unit, context):
            if isinstance(found, ScanError):
                rows[QUARANTINE].append(_quarantine_row(unit.index, unit.name, member, found))
                continue
            actions.update(found.subject.actions)
            split = _split_of(context.pseudonyms.share(found.subject.patient), curation.split)
            rows[split].append(_corpus_row(unit, member, found, curation))
    schema = corpus_schema(curation.attributes)
    return {
        name: pa.Table.from_pylist(r, schema=QUARANTINE_SCHEMA if name == QUARANTINE else schema)
        for name, r in rows.items()
        if r
    }, actions


def _context(curation: Curation) -> Context:
    pseudonyms = pseudonyms_of(curation.source)
    if pseudonyms.fingerprint != curation.key_fingerprint:
        raise RecipeError(
            "this worker's SCANLOOM_PSEUDONYM_KEY is not the one the run was planned with; set the same key everywhere"
        )
    return Context(curation.attributes, pseudonyms, curation.seed, curation.size_px)


def _split_of(share: float, split: Split) -> str:
    """The holdout ends at 1 and takes its share from there, so that a corpus that grows keeps it."""
    if share < split.train:
        return "train"
    return "validation" if share < 1.0 - split.holdout else "holdout"


def _corpus_row(unit: Unit, member: int, scan: Scan, curation: Curation) -> dict[str, Any]:
    square = fit(scan.image, curation.size_px, curation.resize)
    subject = scan.subject
    return {
        "id": subject.id,
        "patient": subject.patient,
        "study": subject.study,
        "image": {"bytes": png_bytes(square.pixels), "path": f"{subject.id}.png"},
        "width": curation.size_px,
        "height": curation.size_px,
        "bits_stored": scan.image.bits_stored,
        "spacing_mm": square.spacing_mm,
        "unit": unit.index,
        "member": member,
        **subject.attributes,
    }


def _quarantine_row(unit: int, unit_name: str, member: int, error: ScanError) -> dict[str, Any]:
    return {
        "unit": unit,
        "unit_name": unit_name,
        "member": member,
        "code": error.code,
        "tag": error.tag,
        "reason": error.reason,
    }


def _stage(
    staging: Store, unit: Unit, tables: Mapping[str, pa.Table], actions: Actions, curation: Curation
) -> ShardCommit:
    instances = [
        [member, instance]
        for split in SPLITS
        if split in tables
        for member, instance in zip(tables[split]["member"].to_pylist(), tables[split]["id"].to_pylist(), strict=True)
    ]
    performed: dict[str, dict[str, int]] = {}
    for (keyword, action), count in sorted(actions.items()):
        performed.setdefault(keyword, {})[action] = count
    statistics = shard_tally(tables, curation.attributes) | {
        "name": unit.name,
        "deidentification": performed,
        "instances": sorted(instances),
    }
    return commit_uploaded(
        staging,
        ShardCommit(
            shard=unit.index,
            plan=curation.plan,
            rows=len(instances),
            files=upload_parts(curation.store, unit.index, _parts(tables)),
            statistics=statistics,
        ),
    )


def _parts(tables: Mapping[str, pa.Table]) -> list[ShardPart]:
    return [ShardPart(name, name, "parquet", parquet_bytes(table), table.num_rows) for name, table in tables.items()]


def _counts(unit: int, tables: Mapping[str, pa.Table]) -> dict[str, int]:
    rejected = tables[QUARANTINE].num_rows if QUARANTINE in tables else 0
    return {"unit": unit, "scans": sum(t.num_rows for t in tables.values()) - rejected, "rejected": rejected}


# --- duplicates and the end -----------------------------------------------------------------------------------


def staged(curation: Curation) -> dict[int, ShardCommit]:
    """The staged shards by unit."""
    return committed(curation.store.at(STAGING), curation.plan)


def duplicates(shards: Mapping[int, ShardCommit]) -> dict[int, list[int]]:
    """Unit -> members whose instance an earlier (unit, member) holds already."""
    seen: set[str] = set()
    losers: dict[int, list[int]] = {}
    for unit in sorted(shards):
        for member, instance in shards[unit].statistics["instances"]:
            if instance in seen:
                losers.setdefault(unit, []).append(member)
            seen.add(instance)
    return losers


def rejections(shards: Mapping[int, ShardCommit], losers: Mapping[int, Sequence[int]]) -> Counter[str]:
    """How many files each quarantine code has."""
    counts: Counter[str] = Counter()
    for shard in shards.values():
        counts.update(shard.statistics["quarantined"])
    counts["duplicate"] += sum(map(len, losers.values()))
    return +counts


def too_few_left(shards: Iterable[ShardCommit], rejected: Counter[str], max_rejected_share: float) -> str | None:
    """Why the run must stop, where too many files were refused or none is left; else None."""
    refused = sum(rejected.values())
    found = sum(shard.rows for shard in shards) + refused - rejected["duplicate"]
    if refused <= max_rejected_share * found and refused < found:
        return None
    reasons = ", ".join(f"{code} {count}" for code, count in rejected.most_common())
    return (
        f"{refused} of {found} files were refused, more than prepare.max_rejected_share allows "
        f"({max_rejected_share:g}): {reasons or 'there were none'}; docs/quarantine.md says what each code means"
    )


def settle_unit(row: Mapping[str, Any], curation: Curation) -> dict[str, int]:
    """Commit the staged shard in `row["staged"]` (JSON), without the members in `row["losers"]`."""
    shard = ShardCommit.model_validate_json(row["staged"])
    losers = [int(member) for member in row["losers"]]
    if curation.store.exists(commit_key(shard.shard)):
        return {"unit": shard.shard, "duplicates": 0}
    if losers:
        shard = _without(shard, losers, curation)
    statistics = {name: value for name, value in shard.statistics.items() if name != "instances"}
    commit_uploaded(curation.store, shard.model_copy(update={"statistics": statistics}))
    return {"unit": shard.shard, "duplicates": len(losers)}


def _without(shard: ShardCommit, losers: Sequence[int], curation: Curation) -> ShardCommit:
    """The shard written again with its losers in the quarantine."""
    tables = {role: read_parquet(curation.store, entry) for role, entry in shard.files.items()}
    refused = [_quarantine_row(shard.shard, shard.statistics["name"], m, reject("duplicate")) for m in losers]
    quarantine = [tables.pop(QUARANTINE)] if QUARANTINE in tables else []
    quarantine.append(pa.Table.from_pylist(refused, schema=QUARANTINE_SCHEMA))
    kept = {split: t.filter(pa.array(~np.isin(t["member"].to_numpy(), losers))) for split, t in tables.items()}
    left = {split: table for split, table in kept.items() if table.num_rows}
    left[QUARANTINE] = pa.concat_tables(quarantine).sort_by("member")
    return shard.model_copy(
        update={
            "rows": shard.rows - len(losers),
            "files": upload_parts(curation.store, shard.shard, _parts(left)),
            "statistics": shard.statistics | shard_tally(left, curation.attributes),
        }
    )


def finished_statistics(commits: Iterable[ShardCommit], curation: Curation) -> dict[str, Any]:
    """The statistics of the corpus's manifest.

    Raises ScanloomError where no patient fell into the train split.
    """
    statistics = corpus_statistics([commit.statistics for commit in commits], curation.attributes)
    if not statistics["scans"]["train"]:
        raise ScanloomError(
            f"none of the {statistics['rows']} scans is of a patient in the train split; more patients are needed, "
            "or a larger prepare.split.train"
        )
    return statistics | {
        "plan": curation.plan,
        "size_px": curation.size_px,
        "pseudonym_key": curation.key_fingerprint,
    }


def clean(curation: Curation) -> None:
    """Delete what a finished corpus needs no more: the staged records, and shards that held duplicates."""
    clean_orphans(curation.store, grace_s=0)
    curation.store.delete(f"{STAGING}/{found.key}" for found in curation.store.at(STAGING).list())
