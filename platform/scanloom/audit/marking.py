"""What a release does to each file of a dataset, as functions of plain settings that run anywhere: check, copy, mark.

A shard is marked by writing its DICOM files anew with the statement that their dataset passed the audit
(`dicom.released`), and its Parquet with their new places; pixels and labels stay as they are.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from scanloom.artefact import Artefact, FileEntry
from scanloom.dicom.checks import claims_identity_removed, violations
from scanloom.dicom.released import released
from scanloom.errors import ArtefactError, StoreError
from scanloom.sampling.dataset import DICOM, IMAGES, REJECTS
from scanloom.shards.commit import ShardPart, part_key
from scanloom.shards.reader import parquet_files, read_parquet
from scanloom.shards.writer import parquet_bytes, tar_bytes
from scanloom.store import Store, sha256_of

T = TypeVar("T")
_THREADS = 4
_NUMBER = re.compile(r"/shard-(\d{6,})-")


class Spread(Protocol):
    """Runs a function for each of some settings, somewhere; results in any order."""

    def __call__(
        self, work: Callable[[Mapping[str, Any]], T], settings: Sequence[Mapping[str, Any]], /
    ) -> Iterator[T]: ...


def in_threads(work: Callable[[Mapping[str, Any]], T], settings: Sequence[Mapping[str, Any]]) -> Iterator[T]:
    """Here, a few at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(work, settings)


class FileJob(BaseModel):
    """One file of an artefact, and where it goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    file: FileEntry
    target: str = ""
    """Store of the bundle."""
    folder: str = ""
    audit: str = ""
    """What marked files name."""


def jobs(
    source: Store, files: Sequence[FileEntry], target: Store | None = None, folder: str = "", audit: str = ""
) -> list[dict[str, Any]]:
    """The settings of `examine_file`, `copy_file` and `mark_shard`, one a file."""
    to = "" if target is None else target.uri
    made = (FileJob(source=source.uri, file=file, target=to, folder=folder, audit=audit) for file in files)
    return [one.model_dump(mode="json") for one in made]


def examine_file(config: Mapping[str, Any]) -> str:
    """Why a file of a dataset may not leave, or nothing: missing, changed, or a DICOM file without its marks."""
    job = FileJob.model_validate(config)
    store = Store(job.source)
    where = store.uri_of(job.file.path)
    if not store.exists(job.file.path):
        return f"{where}: checksum: missing (in the manifest, not in the store), the limit is none"
    is_dicom = job.file.path.startswith(f"{DICOM}/") and job.file.path.endswith(".tar")
    try:
        data = store.read(job.file.path) if is_dicom else b""
        found = hashlib.sha256(data).hexdigest() if is_dicom else store.digest(job.file.path).sha256
    except StoreError as error:
        return f"{where}: checksum: missing ({error}), the limit is none"
    if found != job.file.sha256:
        told = f"SHA-256 {found[:12]}, the manifest says {job.file.sha256[:12]}"
        return f"{where}: checksum: changed ({told}), the limit is none"
    for name, broken in _unmarked(data) if is_dicom else ():
        return f"{where}: {name}: synthetic marker: {broken}, the limit is none"
    return ""


def copy_file(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Copy a file into the bundle, never whole in memory; its entry there. ArtefactError where it changed meanwhile."""
    job = FileJob.model_validate(config)
    source, file = Store(job.source), job.file
    with tempfile.TemporaryDirectory(prefix="scanloom-release-") as scratch:
        source.fetch([file.path], Path(scratch))
        local = Path(scratch) / file.path
        if sha256_of(local) != file.sha256:
            raise ArtefactError(f"{source.uri_of(file.path)}: checksum: changed while it was copied; try again")
        Store(job.target).put(f"{job.folder}/{file.path}", local)
    moved = file.model_copy(update={"path": f"{job.folder}/{file.path}"})
    return [moved.model_dump(mode="json")]


def mark_shard(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write a Parquet shard of images and the DICOM files that it points to, marked; their entries."""
    job = FileJob.model_validate(config)
    source, target = Store(job.source), Store(job.target)
    table = read_parquet(source, job.file)
    if not len(table):
        return copy_file(config)
    number = _NUMBER.search(job.file.path)
    keys = set(table["dicom_shard"].to_pylist())
    if len(keys) != 1 or number is None or keys == {None}:
        raise ArtefactError(f"{source.uri_of(job.file.path)}: does not point into one DICOM shard; make it again")
    tar, places = _marked(source.read(keys.pop()), job.audit)
    dicom = ShardPart(DICOM, DICOM, "tar", tar, len(table))
    key = part_key(int(number[1]), dicom)
    parquet = parquet_bytes(_pointing(table, key, places), stored=("image.bytes",))
    images = ShardPart(IMAGES, IMAGES, "parquet", parquet, len(table))
    written = []
    for path, data in ((key, tar), (part_key(int(number[1]), images), parquet)):
        target.write(f"{job.folder}/{path}", data)
        entry = FileEntry.of_bytes(f"{job.folder}/{path}", data)
        written.append(entry.model_dump(mode="json"))
    return written


def marked_files(dataset: Artefact) -> tuple[list[FileEntry], list[FileEntry]]:
    """The Parquet shards that are to be marked, and the files that are copied as they are.

    Rejects are neither: how alike a refused draw was to a training scan is no matter of receivers.
    """
    left = {file.path for file in dataset.files(REJECTS)}
    marked = []
    if dataset.files(DICOM):
        marked = parquet_files(dataset, IMAGES)
        left |= {file.path for file in (*marked, *dataset.files(DICOM))}
    return marked, [file for file in dataset.manifest.files if file.path not in left]


def _marked(tar: bytes, audit: str) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """The archive with its files marked, and of each former offset the new offset and length."""
    members, offsets = [], []
    for name, offset, data in _members(tar):
        members.append((name, released(data, audit)))
        offsets.append(offset)
    made, places = tar_bytes(members)
    return made, dict(zip(offsets, places, strict=True))


def _pointing(table: pa.Table, key: str, places: Mapping[int, tuple[int, int]]) -> pa.Table:
    now = [places[offset] for offset in table["dicom_offset"].to_pylist()]
    offsets, lengths = ([one[part] for one in now] for part in (0, 1))
    values = {"dicom_shard": [key] * len(now), "dicom_offset": offsets, "dicom_length": lengths}
    for name, column in values.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(column, table.schema.field(place).type))
    return table


def _unmarked(tar: bytes) -> Iterator[tuple[str, str]]:
    for name, _, data in _members(tar):
        try:
            file = dcmread(io.BytesIO(data))
        except InvalidDicomError:
            yield name, "is no DICOM file"
            continue
        found = [str(violation) for violation in violations(file)]
        if claims_identity_removed(file):
            found.append("says that identity was removed, which only a release may say")
        if found:
            yield name, "; ".join(found)


def _members(tar: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Name, offset of the content and content of every file."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        for member in opened:
            content = opened.extractfile(member)
            if content is not None:
                yield member.name, member.offset_data, content.read()
