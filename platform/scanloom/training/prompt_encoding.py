"""From prompts to their embeddings: the worker class of the encode job's shards of distinct prompts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from scanloom.errors import ArtefactError
from scanloom.models.text_condition import TextConditioner
from scanloom.shards.commit import ShardPart, commit_shard
from scanloom.shards.schemas import PROMPTS, flattened, prompt_hash, prompts_schema
from scanloom.shards.writer import parquet_bytes
from scanloom.store import Store
from scanloom.training.encoding_plan import EncodingJob
from scanloom.training.given_weights import fetch_text_encoders


class PromptEncoder:
    """Embeds one shard of prompts a call and commits it; a plain class, wrapped by Ray Data at its place of use."""

    def __init__(self, job: EncodingJob) -> None:
        torch.set_num_threads(1)
        if job.text is None:
            raise ValueError("a family that reads attributes has no prompts")
        self._job = job
        self._latents = Store(job.latents_uri)
        with tempfile.TemporaryDirectory(prefix="scanloom-text-") as scratch:
            folder = fetch_text_encoders(job.text.weights, Path(scratch))
            self._conditioner = TextConditioner(folder, job.device, job.text.weights)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed the prompts in `batch["texts"]` (JSON lists) as the shards numbered in `batch["shard"]`."""
        for shard, texts in zip(batch["shard"], batch["texts"], strict=True):
            self._encode(int(shard), json.loads(texts))
        return {"shard": np.asarray(batch["shard"])}

    def _encode(self, shard: int, texts: list[str]) -> None:
        data = parquet_bytes(self._table(texts))
        part = ShardPart(PROMPTS, PROMPTS, "parquet", data, len(texts))
        commit_shard(self._latents, self._job.plan, shard, [part], 0, {"prompts": len(texts)})

    @torch.inference_mode()
    def _table(self, texts: list[str]) -> pa.Table:
        size = self._job.recipe.prompt_batch_size
        parts = [self._conditioner.encode(texts[start : start + size]) for start in range(0, len(texts), size)]
        embedded = {name: torch.cat([part[name].cpu() for part in parts]).half() for name in parts[0]}
        if not all(bool(values.isfinite().all()) for values in embedded.values()):
            raise ArtefactError("the text encoders give embeddings beyond half precision; check the base weights")
        pooled = embedded.get("pooled")
        length, width = embedded["tokens"].shape[1:]
        schema = prompts_schema((length, width), None if pooled is None else pooled.shape[1])
        columns: dict[str, Any] = {"hash": [prompt_hash(text) for text in texts], "text": texts}
        columns |= {name: flattened(values.numpy()) for name, values in embedded.items()}
        return pa.table(columns).select(schema.names).cast(schema)
