"""Latents in memory: what a training worker keeps of the latents artefact.

A scan of 64x64 is 4 KB of latents, so a million fit into a host's memory; reading the shards once fills it, and every
epoch after that costs no I/O and has a known order. Each worker needs all of them and reads them itself: Ray Data would
pass every row through the object store, and leave processes of its own beside the training. Of prompts only the
distinct ones are held.

Legend of shape suffixes: N rows, U distinct prompts, L text tokens, D token width, P width of the pooled text,
B batch, A attributes, F feature columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from scanloom.artefact import Artefact
from scanloom.attributes import AttributeSchema
from scanloom.errors import ArtefactError
from scanloom.models.conditioner import features
from scanloom.shards.reader import parquet_files, read_parquet
from scanloom.shards.schemas import PROMPTS, SHAPE, prompt_hash

_READERS = 4
"""Shards on their way at once: what a store takes to answer is waited for once, and memory holds few as bytes."""


class Conditions(Protocol):
    """What the denoiser is told of each row, in the form that its family's forward takes."""

    def batch(self, rows: Tensor, drop_all_B: Tensor, drop_BA: Tensor | None = None) -> dict[str, Tensor]:
        """The conditions of `rows` (int64 [B]), keyed as the family's forward names them.

        Rows of `drop_all_B` get the null condition; `drop_BA` makes single attributes unknown where the family can.
        """
        ...


@dataclass(frozen=True)
class AttributeConditions:
    """Of the attribute-unet family: numeric attributes, of which each can be dropped."""

    features_NF: Tensor
    """float32; see models.conditioner.features."""
    attributes: int

    def batch(self, rows: Tensor, drop_all_B: Tensor, drop_BA: Tensor | None = None) -> dict[str, Tensor]:
        """`features` float32 [B, F] and `drop` bool [B, A]."""
        drop = drop_all_B[:, None].expand(-1, self.attributes)
        return {"features": self.features_NF[rows], "drop": drop.clone() if drop_BA is None else drop | drop_BA}


@dataclass(frozen=True)
class Prompts:
    """The embeddings of the distinct prompts of a corpus."""

    number: Mapping[str, int]
    """Hash -> row of the tables."""
    tokens_ULD: Tensor
    """float16."""
    pooled_UP: Tensor | None
    """float16; None for a family whose denoiser takes tokens alone."""

    @property
    def null(self) -> int:
        """The row of the prompt that says nothing."""
        return self.number[prompt_hash("")]


@dataclass(frozen=True)
class TextConditions:
    """Of the text families: a table of distinct embeddings and, per row, which one."""

    prompts: Prompts
    index_N: Tensor
    """int64."""

    def batch(self, rows: Tensor, drop_all_B: Tensor, drop_BA: Tensor | None = None) -> dict[str, Tensor]:
        """`tokens` float32 [B, L, D] and, where the family has it, `pooled` float32 [B, P]; no attribute alone drops.

        The null condition is the embedding of the empty prompt.
        """
        chosen = self.index_N[rows].masked_fill(drop_all_B, self.prompts.null)
        batch = {"tokens": self.prompts.tokens_ULD[chosen].float()}
        if self.prompts.pooled_UP is not None:
            batch["pooled"] = self.prompts.pooled_UP[chosen].float()
        return batch


@dataclass(frozen=True)
class Latents:
    """N rows in the order of their ids, so that the order does not depend on how they were read."""

    mean_NCHW: Tensor
    """float16, as encoded: neither shifted nor scaled."""
    logvar_NCHW: Tensor
    """float16."""
    conditions: Conditions

    def __len__(self) -> int:
        return len(self.mean_NCHW)


def read_latents(latents: Artefact, split: str, shape: tuple[int, int, int], schema: AttributeSchema) -> Latents:
    """All rows of a split of a latents artefact, conditioned on text where it was encoded for that.

    Raises ArtefactError as `collect` and `read_prompts` do, and where a shard is damaged.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        tables = readers.map(partial(read_parquet, latents.store), parquet_files(latents, split))
        return collect(tables, shape, schema, read_prompts(latents))


def collect(
    batches: Iterable[pa.Table], shape: tuple[int, int, int], schema: AttributeSchema, prompts: Prompts | None = None
) -> Latents:
    """All rows of latents tables; with `prompts` (see `read_prompts`) conditioned on text.

    Raises ArtefactError where there are none, of another shape, or without the attributes or prompts they should have.
    """
    tables = [batch for batch in batches if batch.num_rows]
    if not tables:
        raise ArtefactError("the latents hold no rows of a split that training needs; prepare more scans")
    table = pa.concat_tables(tables).sort_by("id")
    conditions = _attributes(table, schema) if prompts is None else _texts(table, prompts)
    return Latents(_column(table, "mean", shape), _column(table, "logvar", shape), conditions)


def read_prompts(latents: Artefact) -> Prompts | None:
    """The prompts of a latents artefact; None where it was encoded for a family without text.

    Raises ArtefactError where they are damaged, of several shapes, or lack the empty prompt.
    """
    files = latents.files(PROMPTS)
    if not files:
        return None
    table = pa.concat_tables([read_parquet(latents.store, file) for file in files])
    number = {name: row for row, name in enumerate(table["hash"].to_pylist())}
    if prompt_hash("") not in number or len(number) != table.num_rows:
        raise ArtefactError(f"{latents.uri}: its prompts repeat or lack the empty one; encode again")
    pooled = _embedding(table, "pooled") if "pooled" in table.column_names else None
    return Prompts(number, _embedding(table, "tokens"), pooled)


def _attributes(table: pa.Table, schema: AttributeSchema) -> AttributeConditions:
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise ArtefactError(f"the latents have no attribute {', '.join(missing)}; encode again")
    rows = [schema.from_row(row) for row in table.select(list(schema.names)).to_pylist()]
    return AttributeConditions(torch.from_numpy(features(schema, rows)), len(schema.declarations))


def _texts(table: pa.Table, prompts: Prompts) -> TextConditions:
    if "prompt" not in table.column_names:
        raise ArtefactError("the latents name no prompts, they were encoded for another family; encode again")
    named = table["prompt"].to_pylist()
    if unknown := set(named) - set(prompts.number):
        raise ArtefactError(f"the latents name {len(unknown)} prompts without an embedding; encode again")
    return TextConditions(prompts, torch.tensor([prompts.number[name] for name in named]))


def _embedding(table: pa.Table, name: str) -> Tensor:
    shape = tuple(int(size) for size in table.schema.field(name).metadata[SHAPE].decode().split(","))
    return _column(table, name, shape)


def _column(table: pa.Table, name: str, shape: tuple[int, ...]) -> Tensor:
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float16)
    if flat.size != table.num_rows * int(np.prod(shape)):
        raise ArtefactError(f"latents column {name!r} does not have the expected shape {shape}; encode again")
    return torch.from_numpy(flat.reshape(table.num_rows, *shape))
