"""Stores: where artefacts live, `s3://bucket/prefix` or a local folder, behind one small set of operations.

Endpoint, credentials and region of S3 come from the standard AWS_* environment variables only. Every failure is a
one-line StoreError that names the object and what to do.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast
from urllib.parse import unquote, urlsplit

import pyarrow.fs

from scanloom._backends import HIDDEN, Bucket, Folder, MissingError, ObjectInfo, Sha256Sink, StoredFile, os_errors
from scanloom.base import embedded_folder
from scanloom.errors import RecipeError, StoreError

__all__ = ["MissingError", "ObjectInfo", "Store", "StoredFile"]

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_TRANSFERS = 8


@dataclass(frozen=True)
class Store:
    """A folder of objects; keys are relative, with `/` between their parts. `embedded://base` is one to read.

    Equal and picklable by `uri` alone, so that a worker on another host opens it with its own environment.
    RecipeError for a URI that is neither s3:// nor a path.
    """

    uri: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", _normal(self.uri))

    def at(self, key: str) -> Store:
        """The store rooted at a folder below this one."""
        return Store(self.uri_of(key))

    def uri_of(self, key: str) -> str:
        return f"{self.uri.rstrip('/')}/{self._listed(key)}" if key else self.uri

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith("s3://")

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """The filesystem for pyarrow, Ray Data and Ray Train, with this store's retries and timeouts."""
        return self._backend.filesystem()

    def path(self, key: str = "") -> str:
        """What `filesystem` calls the object: no scheme."""
        return self._backend.path(self._listed(key))

    def require_bucket(self) -> None:
        """Raise StoreError unless the store answers: no such bucket, refused credentials, unreachable endpoint."""
        self._backend.require()

    def require_writable(self) -> None:
        """Raise StoreError unless objects can be written, and created only once, as commits need."""
        self.require_bucket()
        probe = f"{HIDDEN}probe-{uuid.uuid4().hex}"
        try:
            self._backend.create(probe, b"first")
            if self._backend.create(probe, b"second"):
                raise StoreError(
                    f"{self.uri}: ignores If-None-Match, so that two writers could commit one shard twice; "
                    "use a bucket without versioning or another store"
                )
        except StoreError as error:
            # The user knows the store, not the probe.
            raise StoreError(str(error).replace(f"/{probe}", "", 1), retryable=error.retryable) from error
        finally:
            # A store may grant writing and refuse deletion; nothing here needs deletion.
            with suppress(StoreError):
                self._backend.delete([probe])

    def read(self, key: str) -> bytes:
        """The whole object. StoreError that names the URI where there is none."""
        sinks: list[io.BytesIO] = []

        def sink() -> BinaryIO:
            sinks[:] = [io.BytesIO()]
            return sinks[0]

        self._backend.stream(self._listed(key), sink)
        return sinks[0].getvalue()

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; StoreError where the object is shorter."""
        if length == 0:
            return b""
        data = self._backend.read_range(self._listed(key), offset, length)
        if len(data) != length:
            raise StoreError(f"{self.uri_of(key)}: the object is shorter than the range asked for")
        return data

    def digest(self, key: str) -> StoredFile:
        """Size and SHA-256 of an object, read in pieces."""
        sinks: list[Sha256Sink] = []

        def sink() -> BinaryIO:
            sinks[:] = [Sha256Sink()]
            return cast(BinaryIO, sinks[0])

        self._backend.stream(self._listed(key), sink)
        return StoredFile(key, sinks[0].bytes, sinks[0].hexdigest())

    def write(self, key: str, data: bytes) -> None:
        """Write or replace an object, whole or not at all."""
        self._backend.write(_checked(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless one is there: True when it now holds `data`, False when it holds another's.

        A lost acknowledgement makes a retry find its own object: the bytes decide, not the answer.
        """
        for attempt in range(8):
            if self._backend.create(_checked(key), data):
                return True
            try:
                return self.read(key) == data
            except MissingError:  # a rival's PUT is under way, or was just deleted
                time.sleep(0.05 * 2**attempt)
        raise StoreError(f"{self.uri_of(key)}: refused as existing, yet it cannot be read", retryable=True)

    def put(self, key: str, file: Path) -> None:
        """Write or replace an object from a local file, whole or not at all, without holding it in memory."""
        self._backend.upload(file, _checked(key))

    def copy(self, key: str, to: str) -> None:
        """Write or replace the object `to` with the content of `key`, inside the store."""
        self._backend.copy(_checked(key), _checked(to))

    def exists(self, key: str) -> bool:
        return self._backend.exists(_checked(key))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object below the folder `prefix`, sorted by key, keys relative to the store."""
        return [o for o in self._everything(prefix) if not _hidden(o.key)]

    def names(self, folder: str = "", after: str = "", limit: int = 1000) -> Sequence[str]:
        """The first `limit` names directly below a folder that sort after `after`; those of folders end in a slash."""
        found = self._backend.names(_checked(folder), after, limit)
        return [name for name in found if name and not _hidden(name)]

    def remnants(self) -> tuple[ObjectInfo, ...]:
        """Half-written files and probes of processes that were killed; those of living ones are among them."""
        return tuple(o for o in self._everything("") if _hidden(o.key))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete these objects; one that is not there is no error."""
        self._backend.delete([_checked(key) for key in keys])

    def put_folder(self, folder: Path, prefix: str = "") -> tuple[StoredFile, ...]:
        """Upload every file below a local folder; what was put, by key."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())

        def put(file: Path) -> StoredFile:
            key = str(PurePosixPath(prefix) / file.relative_to(folder).as_posix())
            sha256 = sha256_of(file)
            self._backend.upload(file, _checked(key))
            return StoredFile(key, file.stat().st_size, sha256)

        with ThreadPoolExecutor(_TRANSFERS) as pool:
            return tuple(pool.map(put, files))

    def fetch_folder(self, prefix: str, to: Path) -> None:
        """Copy every object below `prefix` into a local folder, as `fetch` does."""
        found = self.list(prefix)
        if not found:
            raise StoreError(f"{self.uri_of(prefix)}: no objects there")
        (self.at(prefix) if prefix else self).fetch([str(PurePosixPath(o.key).relative_to(prefix)) for o in found], to)

    def fetch(self, keys: Iterable[str], to: Path) -> None:
        """Copy these objects into a local folder, under their keys; each file appears whole or not at all."""

        def copy(key: str) -> None:
            target = to / key
            with os_errors(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
                half = target.with_name(f"{HIDDEN}{uuid.uuid4().hex}")
                try:
                    with half.open("wb") as stream:
                        self._backend.stream(_checked(key), lambda: _rewound(stream))
                    half.replace(target)
                finally:
                    half.unlink(missing_ok=True)

        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(copy, keys))

    def presign(self, key: str, expires_s: int) -> str:
        """A URL that reads this object without credentials for `expires_s` seconds. S3 only."""
        return self._backend.presign(_checked(key), expires_s)

    def _listed(self, key: str) -> str:
        """A key to read. A bucket may hold any, such as `a//b`, and a listing gives it; a folder has proper ones."""
        return _checked(key) if self.is_local else key

    def _everything(self, prefix: str) -> Sequence[ObjectInfo]:
        # Servers differ in order (SeaweedFS lists `a/b` before `a-b/x`).
        return sorted(self._backend.list(_checked(prefix.rstrip("/"))), key=lambda o: o.key)

    @property
    def _backend(self) -> Folder | Bucket:
        return _backend(self.uri)


@functools.lru_cache(maxsize=256)
def _backend(uri: str) -> Folder | Bucket:
    if not uri.startswith("s3://"):
        return Folder(embedded_folder(uri) or Path(uri))
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return Bucket(bucket, prefix)


def _normal(uri: str) -> str:
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise RecipeError(f"store {uri!r}: {bucket!r} is no bucket name; expected s3://bucket/prefix")
        prefix = _checked(prefix.strip("/"))
        return f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
    if embedded_folder(uri):
        return f"embedded://{_checked(uri.removeprefix('embedded://').rstrip('/'))}"
    if uri.startswith("file://"):
        uri = unquote(urlsplit(uri).path)
    if not uri or "://" in uri:
        raise RecipeError(f"store {uri!r}: expected s3://bucket/prefix or a local folder")
    return str(Path(uri).expanduser().absolute())


def sha256_of(file: Path) -> str:
    """SHA-256 of a local file in hex, read piece by piece."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checked(key: str) -> str:
    if key and any(part in {"", ".", ".."} for part in key.split("/")):
        raise StoreError(f"key {key!r}: expected parts joined by single slashes, none of them '.' or '..'")
    return key


def _hidden(key: str) -> bool:
    return PurePosixPath(key).name.startswith(HIDDEN)


def _rewound(stream: BinaryIO) -> BinaryIO:
    stream.seek(0)
    stream.truncate()
    return stream
