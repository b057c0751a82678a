"""A finished dataset as DICOM files elsewhere: in a folder or bucket, or in a PACS by STOW-RS. Run again, it goes on.

A folder itself shows what it has. What a PACS took is noted in a journal in a store, one object a shard of the
dataset, so that a run that was killed sends again one shard at most; storing an instance twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from scanloom.artefact import Artefact, FileEntry, canonical_json
from scanloom.dicom.stow import Instance, Outcome, Stow
from scanloom.dicom.template import render
from scanloom.errors import ArtefactError
from scanloom.sampling.dataset import DICOM, IMAGES, describe_instance, instance_path
from scanloom.sampling.plan import PlanSpec
from scanloom.shards.reader import read_file, read_parquet
from scanloom.shards.writer import image_pixels
from scanloom.store import Store

_REQUEST_BYTES = 8 << 20
_INDEX = ["id", "sop_instance_uid", "dicom_shard", "dicom_offset", "dicom_length"]

Row = Mapping[str, Any]
Advance = Callable[[int], object]
"""Called with the number of images that are dealt with."""


@dataclass(frozen=True)
class Exported:
    """What an export came to, in images."""

    stored: int
    """By this run."""
    before: int
    """Found stored already."""
    warned: tuple[Outcome, ...] = ()
    """Stored all the same."""
    failed: tuple[Outcome, ...] = ()


def to_store(
    dataset: Artefact, target: Store, layout: Literal["flat", "study"], parallel: int, advance: Advance
) -> Exported:
    """Write every image's DICOM file into a folder or bucket, `parallel` at a time, but for those that it has.

    A file is there whole or not at all. Raises StoreError, and ArtefactError for a damaged dataset.
    """
    spec = _spec(dataset)
    target.require_writable()
    present = {found.key: found.bytes for found in target.list()}
    stored = before = 0
    with ThreadPoolExecutor(parallel) as pool:
        for entry in dataset.files(IMAGES):
            rows = _index(dataset, entry)
            paths = {row["id"]: instance_path(spec, row["id"], layout) for row in rows}
            missing = [row for row in rows if not _is_whole(row, present.get(paths[row["id"]]))]
            before += len(rows) - len(missing)
            advance(len(rows) - len(missing))
            writes = [
                pool.submit(target.write, paths[row["id"]], instance.data)
                for row, instance in zip(missing, _instances(dataset, spec, entry, missing), strict=True)
            ]
            for write in writes:
                write.result()
                stored += 1
                advance(1)
    return Exported(stored, before)


def to_pacs(dataset: Artefact, stow: Stow, journal: Store, parallel: int, advance: Advance) -> Exported:
    """Send every image's DICOM file to a PACS, `parallel` requests at a time, but for those that the journal notes.

    What the PACS refused in an earlier run is sent again. Raises StoreError where it does not answer at all, and
    ArtefactError for a damaged dataset.
    """
    spec = _spec(dataset)
    journal.require_writable()
    noted = {found.key for found in journal.list()}
    stored = before = 0
    warned: list[Outcome] = []
    failed: list[Outcome] = []
    with ThreadPoolExecutor(parallel) as pool:
        for entry in dataset.files(IMAGES):
            key = f"{entry.path.rpartition('/')[2].removesuffix('.parquet')}.json"
            rows = _index(dataset, entry)
            if key in noted:
                refused = _refused(journal, key)
                left = [row for row in rows if row["sop_instance_uid"] in refused]
                before += len(rows) - len(left)
                advance(len(rows) - len(left))
                rows = left
            if not rows:
                continue
            outcomes = []
            for told in pool.map(stow.store, _requests(_instances(dataset, spec, entry, rows))):
                outcomes += told
                advance(len(told))
            lost = [outcome for outcome in outcomes if outcome.state == "failed"]
            journal.write(key, canonical_json({"failed": {o.uid: o.reason for o in lost}}))
            stored += len(outcomes) - len(lost)
            warned += [outcome for outcome in outcomes if outcome.state == "warned"]
            failed += lost
    return Exported(stored, before, tuple(warned), tuple(failed))


def journal_uri(dataset: Artefact, root: str) -> str:
    """Where by default what a PACS took of a dataset is noted: beside the dataset, by its digest and the PACS."""
    name = hashlib.sha256(f"{dataset.digest}/{root.rstrip('/')}".encode()).hexdigest()[:12]
    return f"{dataset.uri}.exports/{name}"


def _spec(dataset: Artefact) -> PlanSpec:
    try:
        return PlanSpec.model_validate(dataset.manifest.statistics["spec"])
    except (KeyError, ValueError) as error:
        raise ArtefactError(f"{dataset.uri}: its manifest holds no plan of this version; generate it again") from error


def _is_whole(row: Row, size: int | None) -> bool:
    """Whether a file of this size (None: no file) is the row's; a dataset without DICOM does not say how long it is."""
    return size is not None and row["dicom_length"] in (None, size)


def _index(dataset: Artefact, entry: FileEntry) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_parquet(dataset.store, entry, _INDEX).to_pylist()
    return rows


def _instances(dataset: Artefact, spec: PlanSpec, entry: FileEntry, rows: Sequence[Row]) -> Iterator[Instance]:
    """The DICOM files of these rows of a shard, as they are stored, or made from the images where none are."""
    if not rows:
        return
    if rows[0]["dicom_shard"] is None:
        wanted = {row["id"] for row in rows}
        for row in read_parquet(dataset.store, entry).to_pylist():
            if row["id"] in wanted:
                told = describe_instance(spec, row["id"], spec.attributes.from_row(row))
                yield Instance(row["sop_instance_uid"], render(image_pixels(row), told))
        return
    files = {file.path: file for file in dataset.files(DICOM)}
    if rows[0]["dicom_shard"] not in files:
        raise ArtefactError(f"{dataset.uri}: {rows[0]['dicom_shard']} is not in its manifest; generate it again")
    tar = memoryview(read_file(dataset.store, files[rows[0]["dicom_shard"]]))
    for row in rows:
        start = row["dicom_offset"]
        yield Instance(row["sop_instance_uid"], bytes(tar[start : start + row["dicom_length"]]))


def _requests(instances: Iterator[Instance]) -> Iterator[list[Instance]]:
    """Instances by the request, some megabytes each and at least one."""
    batch: list[Instance] = []
    for instance in instances:
        if batch and sum(len(i.data) for i in batch) + len(instance.data) > _REQUEST_BYTES:
            yield batch
            batch = []
        batch.append(instance)
    if batch:
        yield batch


def _refused(journal: Store, key: str) -> set[str]:
    try:
        return set(json.loads(journal.read(key))["failed"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{journal.uri_of(key)}: is no note of an export; delete it and export again") from error
