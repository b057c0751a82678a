"""The members of a tar in a store, in order, without holding more than one member and a read-ahead in memory.

Python's tarfile takes a damaged header, or an archive cut between two members, for its end. A source must not lose
scans so: here such an archive ends with a `broken-archive` refusal.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from tarfile import EOFHeaderError, HeaderError, ReadError, TarFile  # type: ignore[attr-defined]
from typing import Any, BinaryIO, cast

from scanloom.errors import ScanError
from scanloom.scans.decode import MAX_FILE_BYTES
from scanloom.scans.quarantine import reject
from scanloom.store import Store

_READ_AHEAD = 8 << 20
_GZIP = b"\x1f\x8b"
_BROKEN = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UnicodeError, ValueError)


def read_archive(store: Store, key: str, size: int) -> Iterator[tuple[int, bytes | ScanError]]:
    """Per file in the archive its ordinal and its bytes, or the reason why it has none.

    Directories are not files. A broken archive ends with a refusal at the ordinal where it broke.
    """
    ordinal = 0
    try:
        for tar, member in _members(store, key, size):
            content = _content(tar, member)
            yield ordinal, content
            ordinal += 1
    except _BROKEN:
        yield ordinal, reject("broken-archive")


def archive_names(store: Store, key: str, size: int) -> list[str]:
    """The names of the archive's files by ordinal, as far as it can be read."""
    names = []
    try:
        for _, member in _members(store, key, size):
            names.append(member.name)
    except _BROKEN:
        pass
    return names


def _members(store: Store, key: str, size: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    stream = _open(store, key, size)
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo) as tar:
        while (member := tar.next()) is not None:
            if not member.isdir():
                yield tar, member
            # A stream never goes back to them.
            tar.members.clear()  # type: ignore[attr-defined]
    # The checksum of a gzip stream stands at its end.
    while stream.read(_READ_AHEAD):
        pass


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | ScanError:
    if member.size > MAX_FILE_BYTES:
        return reject("too-large")
    stream = tar.extractfile(member) if member.isfile() else None
    return stream.read() if stream is not None else reject("archive-link")


def _open(store: Store, key: str, size: int) -> BinaryIO:
    buffered = io.BufferedReader(_Ranged(store, key, size), _READ_AHEAD)
    return cast(BinaryIO, gzip.GzipFile(fileobj=buffered) if buffered.peek(2)[:2] == _GZIP else buffered)


class _Ranged(io.RawIOBase):
    """An object of a store as a readable stream: each read is one retried range request."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        super().__init__()
        self._store, self._key, self._size, self._at = store, key, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._at)
        buffer[:length] = self._store.read_range(self._key, self._at, length)
        self._at += length
        return length


class _StrictTarInfo(tarfile.TarInfo):
    """A header that is damaged, cut or missing is an error, also after the first one."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError("damaged header") from error
