"""The files in a tar, tar.gz or zip of a store, in order, without more than one of them and a read-ahead in memory.

What an archive is says its content, not its name. An archive is material that anybody may have made, so nothing that
it claims is believed: sizes are read up to what is there, and an archive that inflates or branches out of proportion
is left alone. No scan is lost in silence either: Python's tarfile takes a damaged header, or an archive cut between
two members, for its end; here such an archive ends with a `broken-archive` refusal. A file that is itself an archive
is refused, since who unpacks those has to bound what unpacking them may cost.
"""

from __future__ import annotations

import io
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from tarfile import BLOCKSIZE, TarInfo
from typing import Any, Protocol, TypeAlias

from scanloom.errors import ScanError
from scanloom.scans.decode import MAX_FILE_BYTES
from scanloom.scans.quarantine import reject
from scanloom.scans.ranged import RangedFile
from scanloom.store import Store

MOST_MEMBERS = 100_000
"""Files and folders that one archive may hold, and one more for every 4 KiB of it: an archive of scans has no limit."""
LEAST_MEMBER_BYTES = 4096

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")
_READ_AHEAD = 8 << 20
_PIECE = 1 << 20
# A whole archive of scans compresses twofold to twentyfold, one black image a thousandfold.
_FREE_BYTES = 100 << 20
_MOST_TIMES = 200
# Names of members, and what pax says beside them.
_LONGEST_HEADER = 1 << 20
_LONGEST_DIRECTORY = 32 << 20

_GZIP = b"\x1f\x8b"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_PAX_RECORD = re.compile(rb"([0-9]{1,10}) ([^=\n]{1,1000})=")
_UNIX = 3
_GZIP_PIECE = 16 << 10
_SPARSE_BLOCK_CONTINUES = 504
_SPARSE_HEADER_CONTINUES = 482
_BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, OSError, ValueError, OverflowError, NotImplementedError),
)

Content = bytes | ScanError
_Member = tuple[str, Callable[[], Content]]


def is_archive_name(key: str) -> bool:
    """Whether an object of this name is to be opened: .tar, .tar.gz, .tgz or .zip."""
    return key.lower().endswith(_SUFFIXES)


def is_packed(content: bytes) -> bool:
    """Whether a file, of which the first 512 bytes are enough, is itself an archive or compressed."""
    return content[128:132] != b"DICM" and _kind(content[:BLOCKSIZE]) is not None


def read_archive(store: Store, key: str, size: int) -> Iterator[tuple[int, Content]]:
    """Per file in the archive its ordinal and its bytes, or the reason why it has none; never nothing at all.

    Directories are not files. The files of a zip come in the order in which they lie in it, not in that of its
    directory. An archive that cannot be read on ends with a refusal at the ordinal where that was found.
    """
    ordinal = 0
    try:
        for _, content in _members(store, key, size):
            yield ordinal, content()
            ordinal += 1
        if not ordinal:
            yield 0, reject("empty-archive")
    except ScanError as refusal:
        yield ordinal, refusal
    except _BROKEN:
        yield ordinal, reject("broken-archive")


def archive_names(store: Store, key: str, size: int) -> list[str]:
    """The names of the archive's files by ordinal, as far as it can be read."""
    names = []
    try:
        for name, _ in _members(store, key, size):
            names.append(name)
    except (ScanError, *_BROKEN):
        pass
    return names


def _members(store: Store, key: str, size: int) -> Iterator[_Member]:
    if not size:
        raise reject("empty-file")
    source = io.BufferedReader(_Source(store, key, size), _READ_AHEAD)
    head = source.read(BLOCKSIZE)
    kind = _kind(head)
    source.seek(0)
    # A tar without members is nothing but zeros.
    if kind is None and any(head):
        raise reject("not-an-archive")
    if kind == "zip":
        return _zip_members(source)
    return _tar_members(_Inflated(source) if kind == "gzip" else _Plain(source))


def _kind(head: bytes) -> str | None:
    if head.startswith(_GZIP):
        return "gzip"
    if head.startswith(_ZIP):
        return "zip"
    # A tar from before 1988 has no magic, but its checksum.
    return "tar" if head[257:262] == b"ustar" or _is_tar_header(head) else None


def _is_tar_header(block: bytes) -> bool:
    try:
        _tar_header(block)
    except tarfile.TarError:
        return False
    return True


def _read(read: Callable[[int], bytes], size: int) -> bytes:
    """At most `size` bytes, fewer where there are fewer, without believing that there are so many."""
    # To zlib, and so to a gzip stream, no bytes at all stand for no limit.
    first = read(min(size, _PIECE)) if size else b""
    if len(first) == size:
        return first
    sink = io.BytesIO(first)
    sink.seek(0, io.SEEK_END)
    while (missing := size - sink.tell()) and (piece := read(min(missing, _PIECE))):
        sink.write(piece)
    return sink.getvalue()


def _unpacked(content: bytes) -> Content:
    return reject("packed-file") if is_packed(content) else content


def _require_in_proportion(inflated: int, packed: int) -> None:
    if inflated > _FREE_BYTES + _MOST_TIMES * packed:
        raise reject("archive-bomb")


def _require_plausible(members: int, place: int) -> None:
    """Raise ScanError where so many members stand before `place` in an archive that they can hold nothing."""
    if members >= MOST_MEMBERS + place // LEAST_MEMBER_BYTES:
        raise reject("archive-bomb")


# --- tar ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A tar's member, once the headers that extend its own are read."""

    name: str
    kind: bytes
    size: int
    sparse: bool

    @property
    def stored(self) -> int:
        """Bytes that follow the header: links, devices and folders have none, whatever their size says."""
        return self.size if self.is_file or self.kind not in tarfile.SUPPORTED_TYPES else 0

    @property
    def is_file(self) -> bool:
        return self.kind in tarfile.REGULAR_TYPES


def _tar_members(stream: _Stream) -> Iterator[_Member]:
    number = 0
    while (entry := _entry(stream)) is not None:
        _require_plausible(number, stream.tell())
        number += 1
        end = stream.tell() + entry.stored + -entry.stored % BLOCKSIZE
        if entry.kind != tarfile.DIRTYPE:
            yield entry.name, partial(_tar_content, stream, entry)
        stream.skip(end - stream.tell())
    # A second archive may be glued to the first; and the checksum of a gzip stream stands at its end.
    while piece := stream.read(_PIECE):
        if piece.strip(b"\0"):
            raise tarfile.ReadError("content after the end")


def _tar_content(stream: _Stream, entry: _Entry) -> Content:
    if entry.sparse:
        return reject("archive-sparse")
    if not entry.is_file:
        return reject("archive-link")
    if entry.size > MAX_FILE_BYTES:
        return reject("too-large")
    content = _read(stream.read, entry.size)
    if len(content) < entry.size:
        raise EOFError
    return _unpacked(content)


def _entry(stream: _Stream) -> _Entry | None:
    """The next member, or None at the end. Raises what is in `_BROKEN`, also where the end's mark is missing."""
    extended: dict[str, str] = {}
    while True:
        block = _exactly(stream, BLOCKSIZE)
        if not any(block):
            return None
        header = _tar_header(block)
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended |= _pax(_extension(stream, header.size))
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = _extension(stream, header.size).rstrip(b"\0").decode(errors="replace")
        elif header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            _extension(stream, header.size)
        else:
            return _extended(stream, header, block, extended)


def _tar_header(block: bytes) -> TarInfo:
    header = TarInfo.frombuf(block, "utf-8", "replace")
    if header.size < 0:
        raise tarfile.InvalidHeaderError("negative size")  # type: ignore[attr-defined]
    return header


def _extended(stream: _Stream, header: TarInfo, block: bytes, extended: Mapping[str, str]) -> _Entry:
    """The member of this header; the map of a GNU sparse file, which stands between header and content, is passed."""
    is_map = header.type == tarfile.GNUTYPE_SPARSE
    more = is_map and block[_SPARSE_HEADER_CONTINUES]
    while more:
        more = _exactly(stream, BLOCKSIZE)[_SPARSE_BLOCK_CONTINUES]
    return _Entry(
        name=extended.get("path", header.name),
        kind=header.type,
        size=int(extended.get("size", header.size)),
        sparse=is_map or any(key.startswith("GNU.sparse.") for key in extended),
    )


def _extension(stream: _Stream, size: int) -> bytes:
    if size > _LONGEST_HEADER:
        raise tarfile.ReadError("absurd header")
    return _exactly(stream, size + -size % BLOCKSIZE)[:size]


def _pax(records: bytes) -> dict[str, str]:
    """The keywords and values of an extended header (POSIX.1-2017, pax): `LENGTH KEYWORD=VALUE` lines."""
    fields, at = {}, 0
    while records[at : at + 1].strip(b"\0"):
        found = _PAX_RECORD.match(records, at)
        end = at + int(found[1]) if found else 0
        if found is None or end < found.end() + 1 or records[end - 1 : end] != b"\n":
            raise tarfile.ReadError("damaged extended header")
        fields[found[2].decode(errors="replace")] = records[found.end() : end - 1].decode(errors="replace")
        at = end
    if not fields.get("size", "0").isdecimal():
        raise tarfile.ReadError("damaged size")
    return fields


def _exactly(stream: _Stream, size: int) -> bytes:
    data = _read(stream.read, size)
    if len(data) < size:
        raise EOFError
    return data


# --- zip ------------------------------------------------------------------------------------------------------


def _zip_members(source: _ReadAhead) -> Iterator[_Member]:
    source.raw.limit = _LONGEST_DIRECTORY
    with zipfile.ZipFile(source) as archive:
        source.raw.limit = None
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        end = inflated = 0
        for number, info in enumerate(infos):
            # Members that share their bytes inflate without end.
            if info.header_offset < end:
                raise reject("archive-bomb")
            _require_plausible(number, info.header_offset)
            end = info.header_offset + zipfile.sizeFileHeader + info.compress_size  # type: ignore[attr-defined]
            if info.filename.endswith("/") and not info.file_size:
                continue
            if info.file_size <= MAX_FILE_BYTES:
                inflated += info.file_size
            _require_in_proportion(inflated, end)
            yield info.filename, partial(_zip_content, archive, info)


def _zip_content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Content:
    if info.flag_bits & 0x41:
        return reject("archive-encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return reject("archive-compression")
    if info.create_system == _UNIX and stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        return reject("archive-link")
    if info.file_size > MAX_FILE_BYTES:
        return reject("too-large")
    try:
        with archive.open(info) as stream:
            content = _read(stream.read, info.file_size + 1)
    except _BROKEN:
        return reject("broken-member")
    return _unpacked(content) if len(content) == info.file_size else reject("broken-member")


# --- streams --------------------------------------------------------------------------------------------------


class _Stream(Protocol):
    """What is read once, from front to back; `read` gives no bytes at the end alone, and fewer than asked anywhere."""

    def read(self, size: int, /) -> bytes: ...
    def skip(self, size: int) -> None: ...
    def tell(self) -> int: ...


class _Plain:
    """A stream that passes what is skipped without fetching it."""

    def __init__(self, source: _ReadAhead) -> None:
        self._source = source
        self.read, self.tell = source.read, source.tell

    def skip(self, size: int) -> None:
        self._source.seek(size, io.SEEK_CUR)


class _Inflated:
    """The content of a gzip file of one or more parts. Raises zlib.error, EOFError, ScanError (archive-bomb)."""

    def __init__(self, source: _ReadAhead) -> None:
        self._source, self._at, self._parts = source, 0, 0
        self._part, self._packed = zlib.decompressobj(wbits=31), b""

    def read(self, size: int) -> bytes:
        while not self._part.eof or self._begin_part():
            packed = self._part.unconsumed_tail or self._packed or self._source.read(_GZIP_PIECE)
            piece, self._packed = self._part.decompress(packed, size), b""
            self._at += len(piece)
            _require_in_proportion(self._at, self._source.tell())
            if piece:
                return piece
            if not packed and not self._part.eof:
                raise EOFError
        return b""

    def _begin_part(self) -> bool:
        """Whether another part follows, perhaps after a padding of zeros."""
        rest = self._part.unused_data
        while not rest.strip(b"\0"):
            rest = self._source.read(_GZIP_PIECE)
            if not rest:
                return False
        self._part, self._packed = zlib.decompressobj(wbits=31), rest.lstrip(b"\0")
        self._parts += 1
        if self._parts > MOST_MEMBERS:
            raise reject("archive-bomb")
        return True

    def skip(self, size: int) -> None:
        while size > 0:
            piece = self.read(min(size, _PIECE))
            if not piece:
                raise EOFError
            size -= len(piece)

    def tell(self) -> int:
        return self._at


class _Source(RangedFile):
    """An archive in a store. With a `limit`, ScanError (archive-bomb) once more bytes than that were read."""

    limit: int | None = None

    def readinto(self, buffer: Any) -> int:
        length = super().readinto(buffer)
        if self.limit is not None:
            self.limit -= length
            if self.limit < 0:
                raise reject("archive-bomb")
        return length

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError as error:
            # What zipfile expects of a file that is shorter than an archive's end can be.
            raise OSError("before the start") from error


_ReadAhead: TypeAlias = "io.BufferedReader[_Source]"
