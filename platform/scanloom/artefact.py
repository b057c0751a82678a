"""Artefacts: immutable folders in a store, each finished by a `manifest.json` that is written last and once.

The manifest names every file with its SHA-256, the recipe and code that made it, and its inputs by digest (lineage).
A folder without a manifest is unfinished, whatever else it holds.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from scanloom.errors import ArtefactError, StoreError
from scanloom.store import Store, StoredFile, sha256_of

MANIFEST = "manifest.json"
# Folder of what a training run noted on its way.
RECORD = "training"
PLAN = "plan.json"
PROGRESS = "progress.json"
"""How far the job has come that makes the artefact; see `scanloom.progress`."""
COMMITS = "commits"
UNITS = "units"
"""What a corpus remembers of its source."""
SCHEMA_VERSION = 1

Kind = Literal["corpus", "autoencoder", "latents", "generator", "probe", "gate", "dataset", "audit", "release"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
    """One file; `path` is relative to the artefact, `sha256` in hex."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, stored: StoredFile) -> FileEntry:
        """The entry of a file in the artefact's store, as `Store.put_folder` and `Store.digest` tell of it."""
        return cls(path=stored.key, bytes=stored.bytes, sha256=stored.sha256)

    @classmethod
    def of_bytes(cls, path: str, data: builtins.bytes) -> FileEntry:
        """The entry of a file that holds `data`."""
        return cls(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


class Lineage(_Record):
    """An input: what it was used as, and which exactly. The digest identifies it; the URI says where it was."""

    role: str
    kind: str
    uri: str
    digest: str


class Manifest(_Record):
    """What an artefact is; `created_at` in UTC, ISO 8601."""

    kind: Kind
    name: str
    schema_version: int = SCHEMA_VERSION
    code_version: str
    recipe: dict[str, Any]
    inputs: tuple[Lineage, ...]
    files: tuple[FileEntry, ...]
    statistics: dict[str, Any]
    created_at: str

    @property
    def digest(self) -> str:
        """SHA-256 over content and inputs, not over place, name or time; so not over RECORD, which notes times."""
        content = {
            "kind": self.kind,
            "schema_version": self.schema_version,
            "files": sorted([f.path, f.sha256] for f in self.files if not f.path.startswith(f"{RECORD}/")),
            "inputs": sorted([entry.role, entry.digest] for entry in self.inputs),
        }
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def used_as(self, role: str) -> Lineage | None:
        """The input of a role, the first where there are several."""
        return next((entry for entry in self.inputs if entry.role == role), None)


@dataclass(frozen=True)
class Artefact:
    """A finished artefact: its store, rooted at the artefact, and its manifest."""

    store: Store
    manifest: Manifest

    @property
    def uri(self) -> str:
        return self.store.uri

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def files(self, folder: str) -> tuple[FileEntry, ...]:
        """The files below a folder of the artefact, by path."""
        return tuple(file for file in self.manifest.files if file.path.startswith(f"{folder}/"))

    def entry(self, path: str) -> FileEntry:
        """The file at a path of the artefact. ArtefactError where it holds none."""
        found = next((file for file in self.manifest.files if file.path == path), None)
        if found is None:
            raise ArtefactError(f"{self.uri}: holds no {path}; make it again")
        return found

    def fetch(self, folder: Path) -> None:
        """Copy every file into a local folder. ArtefactError where one is not what the manifest says."""
        self.store.fetch([file.path for file in self.manifest.files], folder)
        for file in self.manifest.files:
            if sha256_of(folder / file.path) != file.sha256:
                raise ArtefactError(f"{self.store.uri_of(file.path)}: changed since it was written; make it again")


@dataclass(frozen=True)
class Problem:
    """What verification found at one path."""

    path: str
    fault: Literal["missing", "changed", "extra"]
    detail: str


def canonical_json(content: object) -> bytes:
    """JSON with one spelling for one content, for digests. ValueError for NaN and infinities."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8


def plan_digest(*parts: object) -> str:
    """SHA-256 of what determines a result: kind, input digests, settings. Parts are anything that JSON holds."""
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def lineage(role: str, artefact: Artefact) -> Lineage:
    """An artefact as the input of another one."""
    return Lineage(role=role, kind=artefact.manifest.kind, uri=artefact.uri, digest=artefact.digest)


def open_artefact(uri: str, kind: Kind | None = None) -> Artefact:
    """The finished artefact at a URI.

    Raises ArtefactError where there is none, it is unfinished, damaged, of another kind or of newer code.
    """
    store = Store(uri)
    if not store.exists(MANIFEST):
        raise ArtefactError(f"{store.uri}: {_what_is_there(store)}")
    manifest = _parse(store.read(MANIFEST), store.uri)
    if kind is not None and manifest.kind != kind:
        raise ArtefactError(f"{store.uri}: is a {manifest.kind}, expected a {kind}; check the URI")
    return Artefact(store, manifest)


def find_artefact(uri: str, kind: Kind) -> Artefact | None:
    """The finished artefact at a URI, or None where it is not finished yet. Raises as `open_artefact` does."""
    return open_artefact(uri, kind) if Store(uri).exists(MANIFEST) else None


def publish(
    store: Store,
    *,
    kind: Kind,
    name: str,
    recipe: Mapping[str, Any],
    inputs: Sequence[Artefact | Lineage],
    files: Iterable[FileEntry],
    statistics: Mapping[str, Any],
) -> Artefact:
    """Finish the artefact rooted at `store`: write its manifest, the last object, once.

    An input given as an artefact has its kind as its role.
    Where an equal-digest manifest is there already (a rival or an earlier run finished the same content) that one is
    adopted; another one raises ArtefactError.
    """
    manifest = Manifest(
        kind=kind,
        name=name,
        code_version=code_version(),
        recipe=dict(recipe),
        inputs=tuple(i if isinstance(i, Lineage) else lineage(i.manifest.kind, i) for i in inputs),
        files=tuple(sorted(files, key=lambda file: file.path)),
        statistics=dict(statistics),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    text = manifest.model_dump_json(indent=1).encode()
    if store.create(MANIFEST, text):
        return Artefact(store, manifest)
    present = open_artefact(store.uri)
    if present.digest != manifest.digest:
        raise ArtefactError(
            f"{store.uri}: holds another {present.manifest.kind} already ({present.digest[:12]}, this run made "
            f"{manifest.digest[:12]}); choose another folder or delete that one"
        )
    return present


def verify(artefact: Artefact, examined: Callable[[], object] = lambda: None) -> Iterator[Problem]:
    """Re-hash every file; what is missing or changed, then what is there without being in the manifest.

    `examined` is called after each file.
    """
    with ThreadPoolExecutor(8) as pool:
        for problem in pool.map(lambda file: _examine(artefact.store, file), artefact.manifest.files):
            examined()
            if problem is not None:
                yield problem
    known = {file.path for file in artefact.manifest.files}
    for found in artefact.store.list():
        if found.key not in known | {MANIFEST, PLAN, PROGRESS} and found.key.split("/")[0] not in (COMMITS, UNITS):
            yield Problem(found.key, "extra", "not in the manifest; readers never look at it")


@functools.cache
def code_version() -> str:
    """The package's version, with the commit where the code runs from a checkout (`+dirty` where that was edited)."""
    version = importlib.metadata.version("scanloom")
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return version
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=.dirty", "--exclude=*"]
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{described}"


def _what_is_there(store: Store) -> str:
    if store.list(COMMITS) or store.exists(PLAN):
        done = len(store.list(COMMITS))
        return f"unfinished ({done} shards are committed, the manifest is not); run its job again to finish it"
    return "there is no artefact here (no manifest.json); check the URI, or run the job that makes it"


def _parse(text: bytes, uri: str) -> Manifest:
    try:
        tree = json.loads(text)
        if isinstance(tree, dict) and tree.get("schema_version", 0) > SCHEMA_VERSION:
            raise ArtefactError(
                f"{uri}: made by newer code (schema version {tree['schema_version']}, this code reads up to "
                f"{SCHEMA_VERSION}); upgrade scanloom"
            )
        return Manifest.model_validate(tree)
    except (ValidationError, ValueError, TypeError) as error:
        kinds = ", ".join(get_args(Kind))
        raise ArtefactError(f"{uri}: manifest.json is damaged or no scanloom manifest (kinds: {kinds})") from error


def _examine(store: Store, file: FileEntry) -> Problem | None:
    if not store.exists(file.path):
        return Problem(file.path, "missing", "in the manifest, not in the store")
    try:
        found = store.digest(file.path)
    except StoreError as error:
        return Problem(file.path, "missing", str(error))
    if found.bytes != file.bytes:
        return Problem(file.path, "changed", f"{found.bytes} bytes, the manifest says {file.bytes}")
    if found.sha256 != file.sha256:
        return Problem(file.path, "changed", f"SHA-256 {found.sha256[:12]}, the manifest says {file.sha256[:12]}")
    return None
