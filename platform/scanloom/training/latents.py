"""Latents in memory: what a training worker keeps of the latents artefact.

A scan of 64x64 is 4 KB of latents, so a million fit into a host's memory; one pass over the Ray Data stream fills it,
and every epoch after that costs no I/O and has a known order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from scanloom.attributes import AttributeSchema
from scanloom.errors import ArtefactError
from scanloom.models.conditioner import features


@dataclass(frozen=True)
class Latents:
    """N rows in the order of their ids, so that the order does not depend on how they were streamed."""

    mean_NCHW: Tensor
    """float16, as encoded: neither shifted nor scaled."""
    logvar_NCHW: Tensor
    """float16."""
    features_NF: Tensor
    """float32; see models.conditioner.features."""

    def __len__(self) -> int:
        return len(self.mean_NCHW)


def collect(batches: Iterable[pa.Table], shape: tuple[int, int, int], schema: AttributeSchema) -> Latents:
    """All rows of a stream of latents tables. Raises ArtefactError where there are none or of another shape."""
    tables = [batch for batch in batches if batch.num_rows]
    if not tables:
        raise ArtefactError("the latents hold no rows of a split that training needs; prepare more scans")
    table = pa.concat_tables(tables).sort_by("id")
    rows = [schema.from_row(row) for row in table.select(list(schema.names)).to_pylist()]
    return Latents(
        _column(table, "mean", shape), _column(table, "logvar", shape), torch.from_numpy(features(schema, rows))
    )


def _column(table: pa.Table, name: str, shape: tuple[int, int, int]) -> Tensor:
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float16)
    if flat.size != table.num_rows * int(np.prod(shape)):
        raise ArtefactError(f"latents column {name!r} does not have the autoencoder's shape {shape}; encode again")
    return torch.from_numpy(flat.reshape(table.num_rows, *shape))
