"""Shard commits: many writers, any of which may die, no database, every shard exactly once.

A writer uploads data objects under content-addressed names, so that attempts never overwrite each other, and then
creates one commit object per shard with a conditional PUT. Who loses that race adopts the winner's commit. Readers
trust commits alone: that a data object exists never means that it is complete or wanted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from scanloom.artefact import COMMITS, MANIFEST, PLAN, FileEntry, open_artefact
from scanloom.errors import ArtefactError
from scanloom.store import Store, sha256_of

_READERS = 16
_LONGEST_WRITE_S = 3600.0
_DATA_KEY = re.compile(r".*/shard-\d{6,}-[0-9a-f]{12}\.[a-z]+")
_COMMIT_KEY = re.compile(rf"{COMMITS}/shard-(\d{{6,}})\.json")


class ShardCommit(BaseModel):
    """What one shard consists of; `files` by role (such as train, parquet, dicom)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: int
    plan: str
    rows: int
    files: dict[str, FileEntry]
    statistics: dict[str, Any]


@dataclass(frozen=True)
class ShardPart:
    """One data object of a shard, to go to `<folder>/shard-<number>-<sha256[:12]>.<suffix>`."""

    role: str
    folder: str
    suffix: str
    data: bytes | Path = field(repr=False)
    """The content, or the local file that holds it: what may be large is spooled to disk."""
    rows: int

    @functools.cached_property
    def sha256(self) -> str:
        if isinstance(self.data, bytes):
            return hashlib.sha256(self.data).hexdigest()
        return sha256_of(self.data)

    def content(self) -> bytes:
        """All of it, in memory."""
        return self.data if isinstance(self.data, bytes) else self.data.read_bytes()

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size


def begin(store: Store, kind: str, plan_digest: str) -> None:
    """Claim the folder for this plan, or go on with it; nothing else may be in the way.

    Raises ArtefactError where the folder holds another plan's shards or an artefact without a plan.
    """
    text = json.dumps({"kind": kind, "plan": plan_digest}, sort_keys=True).encode()
    if not store.exists(PLAN) and store.exists(MANIFEST):
        present = open_artefact(store.uri).manifest
        raise ArtefactError(
            f"{store.uri}: holds the {present.kind} {present.name!r} already; choose another folder or delete it"
        )
    if store.create(PLAN, text):
        return
    there = _claim(store)
    raise ArtefactError(
        f"{store.uri}: holds the {there['kind']} of another plan ({there['plan'][:12]}, this recipe's is the {kind} "
        f"{plan_digest[:12]}); choose another folder, restore that recipe, or delete the folder"
    )


def claimed_plan(store: Store) -> str | None:
    """The digest of the plan that `begin` claimed the folder for; None where nobody has.

    Raises ArtefactError where the claim is damaged.
    """
    return _claim(store)["plan"] if store.exists(PLAN) else None


def part_key(shard: int, part: ShardPart) -> str:
    """Key of a shard's data object, e.g. `train/shard-000123-0a1b2c3d4e5f.parquet`."""
    return f"{part.folder}/shard-{shard:06d}-{part.sha256[:12]}.{part.suffix}"


def commit_key(shard: int) -> str:
    """Key of a shard's commit object."""
    return f"{COMMITS}/shard-{shard:06d}.json"


def commit_shard(
    store: Store,
    plan_digest: str,
    shard: int,
    parts: Sequence[ShardPart],
    rows: int,
    statistics: Mapping[str, Any],
) -> ShardCommit:
    """Upload a shard's parts, then commit it; the winner's commit where a rival was first.

    Raises ArtefactError where the winner belongs to another plan.
    """
    files = upload_parts(store, shard, parts)
    return commit_uploaded(
        store, ShardCommit(shard=shard, plan=plan_digest, rows=rows, files=files, statistics=dict(statistics))
    )


def upload_parts(store: Store, shard: int, parts: Sequence[ShardPart]) -> dict[str, FileEntry]:
    """Upload a shard's data objects without committing them; their entries by role."""
    files = {part.role: _uploaded(store, shard, part) for part in parts}
    if len(files) != len(parts):
        raise ValueError(f"shard {shard}: roles repeat: {[part.role for part in parts]}")
    return files


def commit_uploaded(store: Store, ours: ShardCommit) -> ShardCommit:
    """Commit a shard whose data objects are there; the winner's commit where a rival was first.

    Raises ArtefactError where the winner belongs to another plan.
    """
    if store.create(commit_key(ours.shard), ours.model_dump_json().encode()):
        return ours
    return _read_commit(store, commit_key(ours.shard), ours.plan)


def committed(store: Store, plan_digest: str) -> dict[int, ShardCommit]:
    """Every committed shard by number. Raises as `read_commits` does."""
    return {commit.shard: commit for commit in read_commits(store, plan_digest, committed_shards(store))}


def read_commits(store: Store, plan_digest: str, shards: Iterable[int]) -> Iterator[ShardCommit]:
    """The commits of these shards, read several at a time; none is kept once it was taken.

    Raises ArtefactError for a damaged commit or one of another plan.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(lambda shard: _read_commit(store, commit_key(shard), plan_digest), sorted(shards))


def committed_shards(store: Store) -> set[int]:
    """The numbers of the committed shards, by the names of their commits alone."""
    return {int(named[1]) for found in store.list(COMMITS) if (named := _COMMIT_KEY.fullmatch(found.key))}


def orphans(store: Store, grace_s: float, wanted: Set[str] | None = None) -> list[str]:
    """Data objects that no commit names and that are older than `grace_s`: left behind by attempts that lost or died.

    `wanted` are the keys that the commits name, where the caller knows them and every shard is committed.

    A writer that is still between its upload and its commit is protected by the grace period alone. Files that a
    killed process left half-written count too, when nobody can be writing them any more.
    """
    # The listing comes first: what is committed after it can only take keys off the result, not put any on.
    old = [o.key for o in store.list() if _DATA_KEY.fullmatch(o.key) and o.modified < time.time() - grace_s]
    if wanted is None:
        commits = committed(store, _claim(store)["plan"]).values()
        wanted = {file.path for commit in commits for file in commit.files.values()}
    half_written = [o.key for o in store.remnants() if o.modified < time.time() - max(grace_s, _LONGEST_WRITE_S)]
    return [key for key in old if key not in wanted] + half_written


def clean_orphans(store: Store, grace_s: float, wanted: Set[str] | None = None) -> list[str]:
    """Delete the orphans; the keys deleted."""
    keys = orphans(store, grace_s, wanted)
    store.delete(keys)
    return keys


def _uploaded(store: Store, shard: int, part: ShardPart) -> FileEntry:
    key = part_key(shard, part)
    if isinstance(part.data, bytes):
        store.write(key, part.data)
    else:
        store.put(key, part.data)
    return FileEntry(path=key, bytes=part.size, sha256=part.sha256)


def _read_commit(store: Store, key: str, plan_digest: str) -> ShardCommit:
    try:
        commit = ShardCommit.model_validate_json(store.read(key))
    except ValidationError as error:
        raise ArtefactError(f"{store.uri_of(key)}: is no shard commit; delete it and run the job again") from error
    named = _COMMIT_KEY.fullmatch(key)
    if commit.plan != plan_digest or named is None or int(named[1]) != commit.shard:
        raise ArtefactError(
            f"{store.uri_of(key)}: belongs to another plan ({commit.plan[:12]}, not {plan_digest[:12]}); "
            "choose another folder"
        )
    return commit


def _claim(store: Store) -> dict[str, str]:
    try:
        tree = json.loads(store.read(PLAN))
        return {"kind": str(tree["kind"]), "plan": str(tree["plan"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{store.uri_of(PLAN)}: is no scanloom plan; choose another folder") from error
