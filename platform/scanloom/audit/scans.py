"""Rows of a corpus or a dataset as an audit looks at them: spread over all of it, one shard in memory at a time.

Legend of shape suffixes: N rows, S pixels of a square's side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scanloom.artefact import Artefact
from scanloom.errors import ArtefactError
from scanloom.models.copy_encoder import square_of
from scanloom.sampling.dataset import IMAGES
from scanloom.shards.reader import parquet_files, read_parquet
from scanloom.shards.writer import image_pixels, png_pixels

Row = Mapping[str, Any]
HELD_OUT = ("holdout", "validation")
"""Splits of a corpus that nothing is trained on; either may be empty."""


class Owned(Protocol):
    """What is known of some scans, and whose each of them is."""

    @property
    def owners(self) -> Sequence[str]: ...
    def of(self, chosen_N: NDArray[np.bool_], /) -> Self: ...


T = TypeVar("T", bound=Owned)


def held_out_splits(corpus: Artefact) -> list[str]:
    """Those of HELD_OUT that hold scans."""
    return [split for split in HELD_OUT if parquet_files(corpus, split)]


def calibration_and_check(corpus: Artefact, look: Callable[[str], T]) -> tuple[T, T]:
    """Scans to calibrate with, and of other patients to check on: holdout and validation, or the halves of either.

    `look` tells what is known of a split's scans. ArtefactError where they are of fewer than two patients.
    """
    seen = [one for one in map(look, held_out_splits(corpus)) if len(one.owners)]
    if len(seen) == 2:
        return seen[0], seen[1]
    if not seen or len(set(seen[0].owners)) < 2:
        raise ArtefactError(
            f"{corpus.uri}: has scans of fewer than two held-out patients, so that nothing tells a copy from a chance "
            "likeness; prepare more scans, or change prepare.split"
        )
    order = sorted(set(seen[0].owners), key=lambda owner: hashlib.sha256(owner.encode()).digest())
    first = set(order[: (len(order) + 1) // 2])
    chosen = np.array([owner in first for owner in seen[0].owners])
    return seen[0].of(chosen), seen[0].of(~chosen)


def count(artefact: Artefact, folder: str) -> int:
    """Rows of a folder, IMAGES of a dataset or a split of a corpus, by the footers of its files."""
    paths = [artefact.store.path(entry.path) for entry in parquet_files(artefact, folder)]
    return sum(int(pq.read_metadata(path, filesystem=artefact.store.filesystem).num_rows) for path in paths)


def spread_count(artefact: Artefact, folder: str, most: int) -> int:
    """How many rows `spread` gives."""
    rows = count(artefact, folder)
    return math.ceil(rows / _stride(rows, most))


def spread(artefact: Artefact, folder: str, most: int) -> Iterator[Row]:
    """At most `most` rows of a folder, every k-th of them; ArtefactError for a damaged shard."""
    stride, number = _stride(count(artefact, folder), most), 0
    for entry in parquet_files(artefact, folder):
        table = read_parquet(artefact.store, entry)
        for place in range(-number % stride, len(table), stride):
            yield table.slice(place, 1).to_pylist()[0]
        number += len(table)


def in_batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """The rows, so many at a time; fewer at the end."""
    left = iter(rows)
    while batch := list(islice(left, size)):
        yield batch


def pixels_of(row: Row, folder: str) -> tuple[NDArray[Any], int]:
    """The stored pixels of a row and the bits that they use."""
    if folder == IMAGES:
        return image_pixels(row), int(row["bits_stored"])
    pixels = png_pixels(row["image"]["bytes"])
    # A corpus uses the whole range of the type.
    return pixels, 8 * pixels.itemsize


def square(row: Row, folder: str, size_px: int) -> NDArray[np.float32]:
    """A row's pixels as a square [S, S] in [0, 1]."""
    return square_of(*pixels_of(row, folder), size_px)


def squares(rows: Sequence[Row], folder: str, size_px: int) -> NDArray[np.float32]:
    """Rows' pixels as squares [N, S, S] in [0, 1]."""
    found = [square(row, folder, size_px) for row in rows]
    return np.stack(found) if found else np.zeros((0, size_px, size_px), np.float32)


def owner_of(row: Row, folder: str) -> str:
    """Whose a scan is; a synthetic image is its own."""
    return str(row["id"] if folder == IMAGES else row["patient"])


def _stride(rows: int, most: int) -> int:
    return max(1, math.ceil(rows / most))
