"""Scans of different patients that are nearly the same picture, which defeats a split by patient.

One person under two numbers, or one scan exported twice under new identifiers, can stand on both sides of a split.
The corpus names such pairs by its own pseudonymous ids; nothing is removed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from scanloom.artefact import FileEntry
from scanloom.scans.fingerprint import alike
from scanloom.scans.tally import SPLITS
from scanloom.shards.commit import ShardCommit
from scanloom.shards.reader import read_parquet
from scanloom.shards.writer import parquet_bytes
from scanloom.store import Store

PAIRS = "near-duplicates/pairs.parquet"
MOST_LISTED = 100_000
_COLUMNS = ("id", "patient", "fingerprint")


def report_near_duplicates(
    store: Store, commits: Iterable[ShardCommit], max_bits: int
) -> tuple[tuple[FileEntry, ...], dict[str, Any]]:
    """The Parquet file of all pairs of at most `max_bits` of 256 (none where there are none), and their counts.

    `pairs` counts them, `patients` those they involve, `across_splits` the pairs that stand in two splits. Pairs
    beyond the first 100,000 are counted and not listed.
    """
    scans, fingerprints, patients = _scans(store, commits)
    found = alike(fingerprints, patients, max_bits) if len(scans) > 1 else iter(())
    rows: list[dict[str, Any]] = []
    counts = {"max_bits": max_bits, "pairs": 0, "patients": 0, "across_splits": 0}
    involved: set[int] = set()
    for first, second, bits in found:
        (one, one_split), (other, other_split) = scans[first], scans[second]
        counts["pairs"] += 1
        counts["across_splits"] += one_split != other_split
        involved.update((int(patients[first]), int(patients[second])))
        if len(rows) < MOST_LISTED:
            rows.append(
                {"id": one, "split": one_split, "other_id": other, "other_split": other_split, "bits": int(bits)}
            )
    counts["patients"] = len(involved)
    if not rows:
        return (), {"near_duplicates": counts}
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: (row["bits"], row["id"], row["other_id"])))
    data = parquet_bytes(table)
    store.write(PAIRS, data)
    entry = FileEntry(path=PAIRS, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return (entry,), {"near_duplicates": counts}


def _scans(
    store: Store, commits: Iterable[ShardCommit]
) -> tuple[list[tuple[str, str]], np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Id and split, fingerprint [N, 32] and patient number [N] of every scan."""
    scans: list[tuple[str, str]] = []
    fingerprints: list[bytes] = []
    numbers: dict[str, int] = {}
    patients: list[int] = []
    for commit, split in itertools.product(sorted(commits, key=lambda commit: commit.shard), SPLITS):
        if split in commit.files:
            table = read_parquet(store, commit.files[split], _COLUMNS)
            scans += [(scan, split) for scan in table["id"].to_pylist()]
            fingerprints += table["fingerprint"].to_pylist()
            patients += [numbers.setdefault(patient, len(numbers)) for patient in table["patient"].to_pylist()]
    bits = np.frombuffer(b"".join(fingerprints), dtype=np.uint8).reshape(-1, 32)
    return scans, bits, np.asarray(patients, dtype=np.int64)
