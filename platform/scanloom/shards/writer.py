"""Bytes of shards and images, deterministic: the same content gives the same bytes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from scanloom.errors import ArtefactError

ROW_GROUP_BYTES = 4 << 20
_PNG_LEVEL = 3  # libpng with level 6 is half as fast for 2 % fewer bytes


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file: zstd, page checksums and index, row groups of about 4 MB so that one image is a small read."""
    sink = io.BytesIO()
    rows = max(1, table.num_rows)
    group = max(1, min(rows, ROW_GROUP_BYTES * rows // max(1, table.nbytes)))
    text: Any = [f.name for f in table.schema if pa.types.is_string(f.type)]  # pyarrow's stub says bool
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=1,
        row_group_size=group,
        use_dictionary=text,
        write_page_checksum=True,
        write_page_index=True,
    )
    return sink.getvalue()


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


def png_bytes(pixels: npt.NDArray[Any]) -> bytes:
    """A lossless grey PNG of uint8 or uint16 pixels, shape (height, width)."""
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels of shape {pixels.shape} and type {pixels.dtype}; expected 2-D uint8 or uint16")
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels), level=_PNG_LEVEL))


def png_pixels(data: bytes) -> npt.NDArray[Any]:
    """The pixels of a grey PNG, uint8 or uint16, shape (height, width). ArtefactError for anything else."""
    try:
        pixels: npt.NDArray[Any] = np.asarray(imagecodecs.png_decode(data))
    except (ValueError, RuntimeError) as error:
        raise ArtefactError("an image column holds bytes that are no PNG") from error
    if pixels.ndim != 2:
        raise ArtefactError(f"an image column holds a PNG of shape {pixels.shape}; expected one grey channel")
    return pixels
