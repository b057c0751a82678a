"""Bytes of shards and images, deterministic: the same content gives the same bytes."""

from __future__ import annotations

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
from scanloom.recipe_generate import ImageFormat

ROW_GROUP_BYTES = 4 << 20
Buffer = bytes | memoryview
# Scans are smooth with noise: predicted by Paeth's filter and coded without a search for repetitions they take a
# quarter of the time of zlib's default and a sixth less space.
_DEFLATED = {"level": 1, "strategy": imagecodecs.PNG.STRATEGY.RLE, "filter": imagecodecs.PNG.FILTER.PAETH}
# The plainer filter takes half of the time where nothing else does; zstd then needs 1 to 3 % more space.
_STORED = {"level": 0, "filter": imagecodecs.PNG.FILTER.UP}
_JPEG_XL: Mapping[str, Any] = {"lossless": True, "effort": 1, "numthreads": 1}


def parquet_bytes(table: pa.Table, *, stored: Sequence[str] = ()) -> bytes:
    """A Parquet file: zstd, page checksums and index, row groups of about 4 MB so that one image is a small read.

    Of the leaf columns `stored` (such as `image.bytes`) nothing is compressed: their values are already, or must be
    cheap.
    """
    sink = pa.BufferOutputStream()
    rows = max(1, table.num_rows)
    group = max(1, min(rows, ROW_GROUP_BYTES * rows // max(1, table.nbytes)))
    options = _options(table.schema)
    if stored:
        options["compression"] = {name: "none" if name in stored else "zstd" for name in _leaves(table.schema)}
        options["compression_level"] = {name: 1 for name, codec in options["compression"].items() if codec == "zstd"}
    pq.write_table(table, sink, row_group_size=group, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _leaves(schema: pa.Schema) -> list[str]:
    """The columns as Parquet has them: those of structs and lists by their paths."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    columns = pq.ParquetFile(sink.getvalue()).schema
    return [columns.column(place).path for place in range(len(columns))]


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


def tar_bytes(members: Sequence[tuple[str, bytes | Sequence[Buffer]]]) -> tuple[bytes, list[tuple[int, int]]]:
    """A tar file and, per member, offset and length of its content in it, in bytes.

    A member's content is bytes or the pieces of it, which are copied once. Times and owners are zero. ValueError for a
    name that the ustar format cannot hold (255 bytes).
    """
    pieces: list[Buffer] = []
    places = []
    end = 0
    for name, data in members:
        content: Sequence[Buffer] = (data,) if isinstance(data, bytes) else data
        entry = tarfile.TarInfo(name)
        entry.size = sum(len(piece) for piece in content)
        places.append((end + tarfile.BLOCKSIZE, entry.size))
        padding = -entry.size % tarfile.BLOCKSIZE
        pieces += (entry.tobuf(tarfile.USTAR_FORMAT), *content, bytes(padding))
        end += tarfile.BLOCKSIZE + entry.size + padding
    # Two empty blocks end the archive, which is of whole records (POSIX.1-1988).
    closing = 2 * tarfile.BLOCKSIZE
    pieces.append(bytes(closing + -(end + closing) % tarfile.RECORDSIZE))
    return b"".join(pieces), places


SUFFIXES: Mapping[ImageFormat, str] = {"png": "png", "jpeg-xl": "jxl", "raw": "raw"}
"""Of the file name that an image of the image column would have; by it a reader knows the image's format."""


def image_bytes(pixels: npt.NDArray[Any], image_format: ImageFormat) -> bytes:
    """Pixels, shape (height, width), as the image column holds them: lossless, the same bytes each time.

    Raw is the bare pixels row by row, 8 bits or 16 bits little-endian. ValueError for other than uint8 or uint16.
    """
    _require_grey(pixels)
    if image_format == "png":
        return png_bytes(pixels)
    if image_format == "raw":
        return pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()
    return bytes(imagecodecs.jpegxl_encode(np.ascontiguousarray(pixels), **_JPEG_XL))


def image_pixels(row: Mapping[str, Any]) -> npt.NDArray[Any]:
    """The pixels of a dataset's row: its image, decoded as its file name says.

    The row has `image`, `width`, `height` and `bits_stored`. uint8 for 8 bits stored, uint16 for more, shape (height,
    width). ArtefactError where the bytes are not that image.
    """
    cell = row["image"]
    dtype = np.dtype(np.uint8 if row["bits_stored"] == 8 else "<u2")
    suffix = str(cell["path"]).rpartition(".")[2]
    if suffix == SUFFIXES["raw"]:
        if len(cell["bytes"]) != row["width"] * row["height"] * dtype.itemsize:
            raise ArtefactError(f"an image column holds {len(cell['bytes'])} bytes; its row says {_asked(row)}")
        return np.frombuffer(cell["bytes"], dtype).reshape(row["height"], row["width"])
    if suffix == SUFFIXES["png"]:
        pixels = png_pixels(cell["bytes"])
    elif suffix == SUFFIXES["jpeg-xl"]:
        pixels = _jpeg_xl_pixels(cell["bytes"])
    else:
        raise ArtefactError(f"an image column holds a .{suffix}; this code reads {', '.join(SUFFIXES.values())}")
    if pixels.shape != (row["height"], row["width"]) or pixels.dtype != dtype:
        raise ArtefactError(
            f"an image column holds {pixels.dtype} pixels of shape {pixels.shape}; its row says {_asked(row)}"
        )
    return pixels


def png_bytes(pixels: npt.NDArray[Any], *, deflate: bool = True) -> bytes:
    """A lossless grey PNG of uint8 or uint16 pixels, shape (height, width).

    Without `deflate` it is filtered and stored: for a column that Parquet compresses with zstd, which makes it as
    small in a quarter of the time.
    """
    _require_grey(pixels)
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


def _jpeg_xl_pixels(data: bytes) -> npt.NDArray[Any]:
    try:
        return np.asarray(imagecodecs.jpegxl_decode(data, numthreads=1))
    except (ValueError, RuntimeError) as error:
        raise ArtefactError("an image column holds bytes that are no JPEG XL image") from error


def _require_grey(pixels: npt.NDArray[Any]) -> None:
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels of shape {pixels.shape} and type {pixels.dtype}; expected 2-D uint8 or uint16")


def _asked(row: Mapping[str, Any]) -> str:
    return f"{row['height']} x {row['width']} pixels of {row['bits_stored']} bits"
