"""Rows of a corpus or a dataset as an audit looks at them: spread over all of it, one shard in memory at a time.

Legend of shape suffixes: S pixels of a square's side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scanloom.artefact import Artefact, FileEntry
from scanloom.models.copy_encoder import square_of
from scanloom.sampling.dataset import IMAGES
from scanloom.shards.reader import read_parquet
from scanloom.shards.writer import image_pixels, png_pixels

Row = Mapping[str, Any]


def shards(artefact: Artefact, folder: str) -> list[FileEntry]:
    """The Parquet files of a folder, `IMAGES` of a dataset or a split of a corpus, in their order."""
    return [entry for entry in artefact.files(folder) if entry.path.endswith(".parquet")]


def count(artefact: Artefact, folder: str) -> int:
    """Rows of a folder, by the footers of its files."""
    paths = [artefact.store.path(entry.path) for entry in shards(artefact, folder)]
    return sum(int(pq.read_metadata(path, filesystem=artefact.store.filesystem).num_rows) for path in paths)


def spread_count(artefact: Artefact, folder: str, most: int) -> int:
    """How many rows `spread` gives."""
    rows = count(artefact, folder)
    return math.ceil(rows / _stride(rows, most))


def spread(artefact: Artefact, folder: str, most: int) -> Iterator[Row]:
    """At most `most` rows of a folder, every k-th of them; ArtefactError for a damaged shard."""
    stride, number = _stride(count(artefact, folder), most), 0
    for entry in shards(artefact, folder):
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


def _stride(rows: int, most: int) -> int:
    return max(1, math.ceil(rows / most))
