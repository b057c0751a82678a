"""Reading shards back, never without noticing that a byte changed."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scanloom.artefact import Artefact, FileEntry
from scanloom.errors import ArtefactError, StoreError
from scanloom.store import Store

_ATTEMPTS = 6


def read_file(store: Store, entry: FileEntry) -> bytes:
    """The bytes of an artefact's file, checked against its SHA-256. ArtefactError where they differ."""
    data = store.read(entry.path)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ArtefactError(f"{store.uri_of(entry.path)}: changed since it was written; restore it or make it again")
    return data


def read_parquet(store: Store, entry: FileEntry, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet shard: whole and checked by its SHA-256, or only `columns`, checked by the pages' checksums.

    Raises ArtefactError for a damaged shard, StoreError where it cannot be read.
    """
    if columns is None:
        return _parse(io.BytesIO(read_file(store, entry)), store.uri_of(entry.path), None)
    for attempt in range(_ATTEMPTS):
        try:
            with store.filesystem.open_input_file(store.path(entry.path)) as source:
                return _parse(source, store.uri_of(entry.path), list(columns))
        except FileNotFoundError as error:
            raise StoreError(f"{store.uri_of(entry.path)}: no such object") from error
        except ArtefactError:
            # A bit that flipped on the way reads well the second time; damage at rest does not.
            if attempt:
                raise
        except OSError as error:
            if attempt == _ATTEMPTS - 1:
                raise StoreError(f"{store.uri_of(entry.path)}: {_line(error)}", retryable=True) from error
        time.sleep(0.05 * 2**attempt)
    raise AssertionError("unreachable")


def parquet_files(artefact: Artefact, folder: str) -> list[FileEntry]:
    """The Parquet shards below `folder`, such as a corpus's `train`, in their order."""
    return [entry for entry in artefact.files(folder) if entry.path.endswith(".parquet")]


def parquet_paths(artefact: Artefact, folder: str, enough_rows: int | None = None) -> list[str]:
    """Paths of the Parquet shards below `folder`, as `artefact.store.filesystem` and Ray Data read them.

    With `enough_rows` the first shards that hold that many, by their footers: the same ones every time.
    """
    paths = [artefact.store.path(entry.path) for entry in parquet_files(artefact, folder)]
    if enough_rows is None:
        return paths
    rows = 0
    for count, path in enumerate(paths, 1):
        rows += pq.read_metadata(path, filesystem=artefact.store.filesystem).num_rows
        if rows >= enough_rows:
            return paths[:count]
    return paths


def rows(artefact: Artefact, folder: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of an artefact's Parquet shards below `folder` (such as train), in shard order."""
    for entry in parquet_files(artefact, folder):
        yield from read_parquet(artefact.store, entry, columns).to_pylist()


def _parse(source: Any, where: str, columns: list[str] | None) -> pa.Table:
    try:
        return pq.ParquetFile(source, page_checksum_verification=True).read(columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        # Arrow raises plain OSError for a failed checksum and for a failed read alike.
        if isinstance(error, OSError) and "CRC" not in str(error) and columns is not None:
            raise
        raise ArtefactError(f"{where}: is a damaged Parquet file ({_line(error)})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
