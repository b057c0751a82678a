"""Bytes of shards and images, deterministic: the same content gives the same bytes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from scanloom.errors import ArtefactError

ROW_GROUP_BYTES = 4 << 20
# Scans are smooth with noise: predicted by Paeth's filter and coded without a search for repetitions they take a
# quarter of the time of zlib's default and a sixth less space.
_DEFLATED = {"level": 1, "strategy": imagecodecs.PNG.STRATEGY.RLE, "filter": imagecodecs.PNG.FILTER.PAETH}
# The plainer filter takes half of the time where nothing else does; zstd then needs 1 to 3 % more space.
_STORED = {"level": 0, "filter": imagecodecs.PNG.FILTER.UP}


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file: zstd, page checksums and index, row groups of about 4 MB so that one image is a small read."""
    sink = io.BytesIO()
    rows = max(1, table.num_rows)
    group = max(1, min(rows, ROW_GROUP_BYTES * rows // max(1, table.nbytes)))
    pq.write_table(table, sink, row_group_size=group, **_options(table.schema))
    return sink.getvalue()


def _options(schema: pa.Schema) -> dict[str, Any]:
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [field.name for field in schema if pa.types.is_string(field.type)],
        "write_page_checksum": True,
        "write_page_index": True,
    }


class ParquetSpool:
    """A Parquet file on local disk that grows row by row while only one row group, of about 4 MB, is in memory.

    The same rows in the same order give the same bytes. To be closed before the file is read.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.rows = 0
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, **_options(schema))
        self._pending: list[Mapping[str, Any]] = []
        self._pending_bytes = 0

    def append(self, row: Mapping[str, Any], row_bytes: int) -> None:
        """Add a row; `row_bytes` is about what it weighs."""
        self._pending.append(row)
        self._pending_bytes += row_bytes
        self.rows += 1
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def append_table(self, table: pa.Table) -> None:
        """Add the rows of a table as a row group of its own."""
        self._flush()
        self.rows += table.num_rows
        if table.num_rows:
            self._writer.write_table(table)

    def close(self) -> None:
        """Write what is pending and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_pylist(self._pending, schema=self._schema))
            self._pending, self._pending_bytes = [], 0


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> tuple[bytes, list[tuple[int, int]]]:
    """A tar file and, per member, offset and length of its content in it, in bytes.

    Times and owners are zero. ValueError for a name that the ustar format cannot hold (255 bytes).
    """
    sink = io.BytesIO()
    places = []
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            places.append((tar.offset + tarfile.BLOCKSIZE, len(data)))
            tar.addfile(entry, io.BytesIO(data))
    return sink.getvalue(), places


def png_bytes(pixels: npt.NDArray[Any], *, deflate: bool = True) -> bytes:
    """A lossless grey PNG of uint8 or uint16 pixels, shape (height, width).

    Without `deflate` it is filtered and stored: for a column that Parquet compresses with zstd, which makes it as
    small in a quarter of the time.
    """
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels of shape {pixels.shape} and type {pixels.dtype}; expected 2-D uint8 or uint16")
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels), **(_DEFLATED if deflate else _STORED)))


def png_pixels(data: bytes) -> npt.NDArray[Any]:
    """The pixels of a grey PNG, uint8 or uint16, shape (height, width). ArtefactError for anything else."""
    try:
        pixels: npt.NDArray[Any] = np.asarray(imagecodecs.png_decode(data))
    except (ValueError, RuntimeError) as error:
        raise ArtefactError("an image column holds bytes that are no PNG") from error
    if pixels.ndim != 2:
        raise ArtefactError(f"an image column holds a PNG of shape {pixels.shape}; expected one grey channel")
    return pixels
