"""Curation: from the units of a source to the shards of a corpus, each exactly once, whoever dies on the way.

Two steps, since an instance may occur in two units and no unit knows the others. `stage_unit` reads one unit, uploads
its shard and records it under `staging/`, create-only. When
all units are staged, `duplicates` says which scans lose (the first in unit, member and frame order wins, whatever
finished first), and `settle_unit` commits each shard: as it is, or written again without its losers. A run that is
killed anywhere finds what is staged and what is committed.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scanloom.errors import RecipeError, ScanError, ScanloomError, StoreError
from scanloom.recipe import Split
from scanloom.scans.burned_in import text_lines
from scanloom.scans.corpus_plan import STAGING, Curation, pseudonyms_of
from scanloom.scans.deidentify import Actions
from scanloom.scans.fingerprint import fingerprint
from scanloom.scans.isolation import Fence
from scanloom.scans.quarantine import reject
from scanloom.scans.resize import fit
from scanloom.scans.scan import Context, Found, Scan
from scanloom.scans.sources import read_unit
from scanloom.scans.tally import QUARANTINE, SPLITS, corpus_statistics, shard_tally
from scanloom.scans.units import Unit
from scanloom.shards.commit import (
    ShardCommit,
    ShardPart,
    clean_orphans,
    commit_key,
    commit_uploaded,
    committed,
    upload_parts,
)
from scanloom.shards.schemas import QUARANTINE_SCHEMA, corpus_schema
from scanloom.shards.writer import ParquetSpool, png_bytes
from scanloom.store import Store

_TABLES = (*SPLITS, QUARANTINE)
PATIENCE_S = 600.0
"""Longest time between two scans: more than the slowest store takes for the largest file."""
_ROW_BYTES = 512
"""About what a row weighs beside its image."""


# --- the work on one unit -------------------------------------------------------------------------------------


def stage_unit(row: Mapping[str, Any], curation: Curation) -> dict[str, int]:
    """Curate the unit in `row["unit"]` (JSON) and stage its shard; counts of scans kept and refused.

    Where `row["taken_over"]` is the shard of the version that this corpus grows from, that is copied and nothing read.

    Raises RecipeError where this worker's pseudonym key is not the plan's, StoreError where a store fails.
    """
    unit = Unit.model_validate_json(row["unit"])
    staging = curation.store.at(STAGING)
    # A task that is run again after its commit has nothing left to do.
    if staging.exists(commit_key(unit.index)):
        return {"scans": 0, "rejected": 0}
    if row["taken_over"]:
        return _take_over(ShardCommit.model_validate_json(row["taken_over"]), staging, curation)
    with curated_unit(unit, curation, fenced=_tried_before(staging, unit)) as (spooled, actions):
        _stage(staging, unit, spooled, actions, curation)
        rejected = pq.read_metadata(spooled[QUARANTINE]).num_rows if QUARANTINE in spooled else 0
        rows = sum(pq.read_metadata(path).num_rows for path in spooled.values())
        return {"scans": rows - rejected, "rejected": rejected}


def _tried_before(staging: Store, unit: Unit) -> bool:
    """Whether an attempt at this unit was made and did not come to its end; from now on one is."""
    mark = f"attempts/unit-{unit.index:06d}"
    tried = staging.exists(mark)
    if not tried:
        staging.write(mark, b"")
    return tried


@contextmanager
def curated_unit(unit: Unit, curation: Curation, *, fenced: bool = False) -> Iterator[tuple[dict[str, Path], Actions]]:
    """The unit's scans by split and its quarantine as local Parquet files, and what was done to its headers.

    However many scans the unit has, one row group of each table is in memory. Tables without rows have no file; the
    files are gone at the end. `fenced` reads in another process, which a file may take down with it.
    """
    actions: Actions = Counter()
    with tempfile.TemporaryDirectory(prefix="scanloom-") as folder, warnings.catch_warnings(), ExitStack() as stack:
        context = _context(curation, stack.enter_context(Fence()) if fenced else None)
        # pydicom warns in the words of the header.
        warnings.simplefilter("ignore")
        tables = _Tables(Path(folder), curation)
        counted = -1
        for member, frame, found in _watched(_anonymous(read_unit(curation.source, unit, context), unit)):
            if isinstance(found, Scan):
                try:
                    tables.add(
                        _split_of(context, found, curation.split), _corpus_row(unit, member, frame, found, curation)
                    )
                    # A header is counted once, with the first of its frames that is kept.
                    if member != counted:
                        actions.update(found.subject.actions)
                    counted = member
                    continue
                except ScanError as error:
                    found = error
            tables.add(QUARANTINE, _quarantine_row(unit.index, unit.name, member, frame, found))
        yield tables.close(), actions


def _anonymous(found: Iterator[Found], unit: Unit) -> Iterator[Found]:
    """What is found, and StoreErrors without the names of the source's files, which can identify patients."""
    try:
        yield from found
    except StoreError as error:
        text = str(error)
        for number, file in enumerate(unit.files):
            text = text.replace(f"/{file.key}", f"/(file {number} of unit {unit.index}, see --locate)")
        raise StoreError(text, retryable=error.retryable) from None


def _watched(found: Iterator[Found]) -> Iterator[Found]:
    """What is found, while the kernel ends this process if it takes ten minutes to find the next.

    A codec that hangs cannot be interrupted otherwise; the unit is then read again behind the fence.
    """
    mine = threading.current_thread() is threading.main_thread() and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    try:
        while True:
            if mine:
                signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
            item = next(found, None)
            if item is None:
                return
            yield item
    finally:
        if mine:
            signal.setitimer(signal.ITIMER_REAL, 0.0)


class _Tables:
    """The tables of a shard while they grow on local disk."""

    def __init__(self, folder: Path, curation: Curation) -> None:
        self._folder = folder
        self._schema = corpus_schema(curation.attributes)
        self._spools: dict[str, ParquetSpool] = {}

    def __getitem__(self, name: str) -> ParquetSpool:
        if name not in self._spools:
            schema = QUARANTINE_SCHEMA if name == QUARANTINE else self._schema
            self._spools[name] = ParquetSpool(self._folder / f"{name}.parquet", schema)
        return self._spools[name]

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        self[name].append(row, _ROW_BYTES + (len(row["image"]["bytes"]) if "image" in row else 0))

    def close(self) -> dict[str, Path]:
        """The files of the tables that have rows."""
        for spool in self._spools.values():
            spool.close()
        return {name: self._spools[name].path for name in _TABLES if name in self._spools and self._spools[name].rows}


def _context(curation: Curation, fence: Fence | None) -> Context:
    pseudonyms = pseudonyms_of(curation.source)
    if pseudonyms.fingerprint != curation.key_fingerprint:
        raise RecipeError(
            "this worker's SCANLOOM_PSEUDONYM_KEY is not the one the run was planned with; set the same key everywhere"
        )
    return Context(curation.attributes, pseudonyms, curation.decode, curation.seed, curation.size_px, fence)


def _split_of(context: Context, scan: Scan, split: Split) -> str:
    """The holdout ends at 1 and takes its share from there, so that a corpus that grows keeps it."""
    share = context.pseudonyms.share(scan.subject.patient)
    if share < split.train:
        return "train"
    return "validation" if share < 1.0 - split.holdout else "holdout"


def _corpus_row(unit: Unit, member: int, frame: int | None, scan: Scan, curation: Curation) -> dict[str, Any]:
    """The row of a scan. ScanError where text is seen in its pixels and the recipe does not want that."""
    seen = None if curation.burned_in_text == "ignore" else len(text_lines(scan.image.pixels))
    if seen and curation.burned_in_text == "quarantine":
        raise reject("text-seen", "PixelData")
    square = fit(scan.image, curation.size_px, curation.resize)
    subject, rendering, geometry = scan.subject, scan.image.rendering, square.geometry
    return {
        "id": subject.id,
        "patient": subject.patient,
        "study": subject.study,
        "image": {"bytes": png_bytes(square.pixels, deflate=False), "path": f"{subject.id}.png"},
        "width": curation.size_px,
        "height": curation.size_px,
        "bits_stored": scan.image.bits_stored,
        "spacing_mm": geometry.spacing_mm[0] if geometry.spacing_mm else None,
        "window": rendering.choice,
        "value_low": rendering.low,
        "value_high": rendering.high,
        "value_unit": rendering.unit or None,
        "orientation": geometry.orientation or None,
        "direction": geometry.direction,
        "position_mm": geometry.position_mm,
        "repairs": scan.image.repairs,
        "text_lines": seen,
        "fingerprint": fingerprint(square.pixels),
        "unit": unit.index,
        "member": member,
        "frame": frame,
        **subject.attributes,
    }


def _quarantine_row(unit: int, unit_name: str, member: int, frame: int | None, error: ScanError) -> dict[str, Any]:
    return {
        "unit": unit,
        "unit_name": unit_name,
        "member": member,
        "frame": frame,
        "code": error.code,
        "tag": error.tag,
        "reason": error.reason,
    }


def _stage(
    staging: Store, unit: Unit, spooled: Mapping[str, Path], actions: Actions, curation: Curation
) -> ShardCommit:
    tables = {name: _without_images(path) for name, path in spooled.items()}
    instances = [
        [row["member"], row["frame"], row["id"]]
        for split in SPLITS
        if split in tables
        for row in tables[split].select(["member", "frame", "id"]).to_pylist()
    ]
    performed: dict[str, dict[str, int]] = {}
    for (keyword, action), count in sorted(actions.items()):
        performed.setdefault(keyword, {})[action] = count
    statistics = shard_tally(tables, curation.attributes) | {
        "name": unit.name,
        "deidentification": performed,
        "instances": sorted(instances, key=_place),
    }
    return commit_uploaded(
        staging,
        ShardCommit(
            shard=unit.index,
            plan=curation.plan,
            rows=len(instances),
            files=upload_parts(curation.store, unit.index, _parts(spooled)),
            statistics=statistics,
        ),
    )


def _place(instance: Sequence[Any]) -> tuple[int, int]:
    """Member and frame of an instance; an object with a single frame has no other at its place."""
    member, frame, _ = instance
    return member, -1 if frame is None else frame


def _without_images(path: Path) -> pa.Table:
    return pq.read_table(path, columns=[name for name in pq.read_schema(path).names if name != "image"])


def _parts(spooled: Mapping[str, Path]) -> list[ShardPart]:
    return [ShardPart(name, name, "parquet", path, pq.read_metadata(path).num_rows) for name, path in spooled.items()]


def _take_over(shard: ShardCommit, staging: Store, curation: Curation) -> dict[str, int]:
    root, old = _common_root(curation.grown_from, curation.corpus)
    new = curation.corpus.removeprefix(f"{root.uri}/")
    for file in shard.files.values():
        root.copy(f"{old}/{file.path}", f"{new}/{file.path}")
    commit_uploaded(staging, shard.model_copy(update={"plan": curation.plan}))
    return {"scans": shard.rows, "rejected": sum(shard.statistics["quarantined"].values())}


def _common_root(former: str, corpus: str) -> tuple[Store, str]:
    """The store that holds both versions, and the folder of the former in it."""
    root, _, folder = former.rpartition("/")
    if corpus.rpartition("/")[0] != root:
        raise ScanloomError(f"{corpus}: lies in another store than {former}, from which it grows")
    return Store(root), folder


# --- duplicates and the end -----------------------------------------------------------------------------------


def staged(curation: Curation) -> dict[int, ShardCommit]:
    """The staged shards by unit."""
    return committed(curation.store.at(STAGING), curation.plan)


def duplicates(shards: Mapping[int, ShardCommit]) -> dict[int, list[str]]:
    """Unit -> places (`member` or `member/frame`) whose instance an earlier place holds already."""
    seen: set[str] = set()
    losers: dict[int, list[str]] = {}
    for unit in sorted(shards):
        for member, frame, instance in shards[unit].statistics["instances"]:
            if instance in seen:
                losers.setdefault(unit, []).append(_place_name(member, frame))
            seen.add(instance)
    return losers


def _place_name(member: int, frame: int | None) -> str:
    return str(member) if frame is None else f"{member}/{frame}"


def rejections(shards: Mapping[int, ShardCommit], losers: Mapping[int, Sequence[str]]) -> Counter[str]:
    """How many files or frames each quarantine code has."""
    counts: Counter[str] = Counter()
    for shard in shards.values():
        counts.update(shard.statistics["quarantined"])
    counts["duplicate"] += sum(map(len, losers.values()))
    return +counts


def too_few_left(
    shards: Mapping[int, ShardCommit], losers: Mapping[int, Sequence[str]], max_rejected_share: float
) -> str | None:
    """Why the run must stop, where too many scans were refused or none is left; else None."""
    rejected = rejections(shards, losers)
    refused = sum(rejected.values())
    found = sum(shard.rows for shard in shards.values()) + refused - sum(map(len, losers.values()))
    if refused <= max_rejected_share * found and refused < found:
        return None
    reasons = ", ".join(f"{code} {count}" for code, count in rejected.most_common())
    limit = (
        f"more than prepare.max_rejected_share allows ({max_rejected_share:g})" if refused < found else "none is left"
    )
    return (
        f"{refused} of {found} scans were refused, {limit}: {reasons or 'there were none'}; "
        "docs/quarantine.md says what each code means"
    )


def settle_unit(row: Mapping[str, Any], curation: Curation) -> dict[str, int]:
    """Commit the staged shard in `row["staged"]` (JSON), without the places in `row["losers"]`; their count."""
    shard = ShardCommit.model_validate_json(row["staged"])
    losers = list(row["losers"])
    if curation.store.exists(commit_key(shard.shard)):
        return {"duplicates": 0}
    if losers:
        shard = _without(shard, losers, curation)
    commit_uploaded(curation.store, shard)
    return {"duplicates": len(losers)}


def _without(shard: ShardCommit, losers: Sequence[str], curation: Curation) -> ShardCommit:
    """The shard written again with its losers in the quarantine, row group by row group."""
    lost = set(losers)
    with tempfile.TemporaryDirectory(prefix="scanloom-") as folder:
        here = Path(folder)
        curation.store.fetch([file.path for file in shard.files.values()], here)
        (here / "new").mkdir()
        tables = _Tables(here / "new", curation)
        refused = []
        for split in SPLITS:
            if split in shard.files:
                _copy_rows(here / shard.files[split].path, tables[split], lost)
        if QUARANTINE in shard.files:
            refused = pq.read_table(here / shard.files[QUARANTINE].path, page_checksum_verification=True).to_pylist()
        for place in losers:
            member, _, frame = place.partition("/")
            why = reject("duplicate")
            name = shard.statistics["name"]
            refused.append(_quarantine_row(shard.shard, name, int(member), int(frame) if frame else None, why))
        for row in sorted(refused, key=lambda row: _place((row["member"], row["frame"], ""))):
            tables.add(QUARANTINE, row)
        left = tables.close()
        kept = [i for i in shard.statistics["instances"] if _place_name(i[0], i[1]) not in lost]
        without_images = {name: _without_images(path) for name, path in left.items()}
        return shard.model_copy(
            update={
                "rows": shard.rows - len(losers),
                "files": upload_parts(curation.store, shard.shard, _parts(left)),
                "statistics": shard.statistics | shard_tally(without_images, curation.attributes) | {"instances": kept},
            }
        )


def _copy_rows(source: Path, sink: ParquetSpool, lost: set[str]) -> None:
    with pq.ParquetFile(source, page_checksum_verification=True) as parquet:
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group)
            places = rows.select(["member", "frame"]).to_pylist()
            sink.append_table(rows.filter(pa.array([_place_name(p["member"], p["frame"]) not in lost for p in places])))


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
