"""What the commits of a dataset add up to: its files, and per cell of the cohort what was asked for and what was made.

A commit is forgotten once it is counted: of fifteen thousand shards a driver keeps names, sizes and hashes of their
files, and sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from threading import Lock
from typing import Any

from scanloom.artefact import FileEntry
from scanloom.sampling.plan import PlanSpec, achieved
from scanloom.shards.commit import ShardCommit

Counts = Mapping[str, Mapping[str, int]]
"""As `cell_counts` has them: table -> cell -> images."""


class Tally:
    """The sums over the commits that were added; each shard counts once, however often it is added."""

    def __init__(self, spec: PlanSpec) -> None:
        self._spec = spec
        self._lock = Lock()
        self._shards: set[int] = set()
        self._files: list[tuple[str, int, str]] = []
        self._cells: dict[str, Counter[tuple[str, str]]] = {
            kind: Counter() for kind in ("made", "rejected", "infeasible")
        }
        self._environments: dict[str, dict[str, Any]] = {}
        self.images = 0
        """Images in the dataset so far."""
        self.engine_s = 0.0
        """What the engines worked on what is committed, in seconds."""
        self._rejects: Counter[str] = Counter()

    def add(self, commit: ShardCommit) -> int:
        """Count a shard; the images of the plan that it settles, 0 where it was counted before. Any thread may."""
        with self._lock:
            if commit.shard in self._shards:
                return 0
            self._shards.add(commit.shard)
            self._count(commit)
        return planned(self._spec, commit.shard)

    def _count(self, commit: ShardCommit) -> None:
        self._files += [(file.path, file.bytes, file.sha256) for file in commit.files.values()]
        figures = commit.statistics
        for kind, name in (("made", "cells"), ("rejected", "rejected"), ("infeasible", "infeasible")):
            self._cells[kind].update(_flat(figures.get(name, {})))
        self._rejects.update(figures.get("rejects", {}))
        self.engine_s += figures["engine_s"]
        self._environments.setdefault(str(sorted(figures["environment"].items())), figures["environment"])
        self.images += commit.rows

    @property
    def missing(self) -> list[int]:
        """The shards that were not added, in order."""
        return [shard for shard in range(self._spec.shards) if shard not in self._shards]

    @property
    def rejects(self) -> dict[str, int]:
        """Draws that did not enter the dataset, by reason; `infeasible` counts images that no draw could fill."""
        with self._lock:
            return dict(sorted(self._rejects.items()))

    def files(self) -> Iterator[FileEntry]:
        """Every file that a commit names."""
        return (FileEntry(path=path, bytes=size, sha256=sha256) for path, size, sha256 in self._files)

    def keys(self) -> set[str]:
        """The keys of `files`."""
        return {path for path, _, _ in self._files}

    def cells(self) -> list[dict[str, Any]]:
        """Per cell of the cohort: table, attributes, images requested and made, draws rejected, images infeasible."""
        rows = achieved(self._spec, [_nested(self._cells["made"], self._spec)])
        place: Counter[int] = Counter()
        for row in rows:
            key = str(row["table"]), str(place[row["table"]])
            place[row["table"]] += 1
            row |= {"rejected": self._cells["rejected"][key], "infeasible": self._cells["infeasible"][key]}
        return rows

    def statistics(self) -> dict[str, Any]:
        """What the dataset's manifest says of its images and of how they came about."""
        return {
            "rows": self.images,
            "cells": self.cells(),
            "rejects": self.rejects,
            "infeasible": self._rejects["infeasible"],
            "engine_s": self.engine_s,
            "images_per_engine_s": self.images / self.engine_s if self.engine_s else 0.0,
            "environments": list(self._environments.values()),
        }


def planned(spec: PlanSpec, shard: int) -> int:
    """How many images the plan has in a shard."""
    return min(spec.images_per_shard, spec.images - shard * spec.images_per_shard)


def _flat(counts: Counts) -> dict[tuple[str, str], int]:
    return {(table, cell): images for table, cells in counts.items() for cell, images in cells.items()}


def _nested(counts: Counter[tuple[str, str]], spec: PlanSpec) -> Counts:
    nested: dict[str, dict[str, int]] = {str(number): {} for number in range(len(spec.cohort.tables))}
    for (table, cell), images in counts.items():
        nested[table][cell] = images
    return nested
