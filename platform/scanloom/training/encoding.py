"""From corpus shards to latents shards: the worker class of the encode job."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from scanloom.artefact import open_artefact
from scanloom.attributes import AttributeSchema
from scanloom.models.autoencoder import latent_shape, load_autoencoder, moments
from scanloom.shards.commit import ShardPart, commit_shard, committed
from scanloom.shards.reader import read_parquet
from scanloom.shards.schemas import latents_schema
from scanloom.shards.writer import parquet_bytes, png_pixels
from scanloom.store import Store

SPLITS = ("train", "validation")


class ShardEncoder:
    """Encodes one corpus shard a call and commits its latents; a plain class, wrapped by Ray Data at its place of use.

    The holdout split is never encoded: nothing that trains may see it.
    """

    def __init__(
        self, corpus_uri: str, autoencoder_uri: str, latents_uri: str, plan: str, batch_size: int, device: str
    ) -> None:
        torch.set_num_threads(1)
        corpus = open_artefact(corpus_uri, "corpus")
        self._corpus = corpus.store
        self._schema = AttributeSchema.model_validate(corpus.manifest.statistics["schema"])
        self._shards = committed(corpus.store, corpus.manifest.statistics["plan"])
        self._latents = Store(latents_uri)
        self._plan = plan
        self._batch_size = batch_size
        with tempfile.TemporaryDirectory(prefix="scanloom-vae-") as folder:
            open_artefact(autoencoder_uri, "autoencoder").fetch(Path(folder))
            self._vae = load_autoencoder(Path(folder) / "vae").to(device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode the shards numbered in `batch["shard"]`; rows written per shard."""
        rows = [self._encode(int(shard)) for shard in batch["shard"]]
        return {"shard": np.asarray(batch["shard"]), "rows": np.array(rows)}

    def _encode(self, shard: int) -> int:
        files = self._shards[shard].files
        tables = {s: self._table(read_parquet(self._corpus, files[s])) for s in SPLITS if s in files}
        parts = [ShardPart(s, s, "parquet", parquet_bytes(t), t.num_rows) for s, t in tables.items()]
        rows = sum(part.rows for part in parts)
        commit_shard(self._latents, self._plan, shard, parts, rows, {})
        return rows

    def _table(self, scans: pa.Table) -> pa.Table:
        images = [png_pixels(image["bytes"]) for image in scans["image"].to_pylist()]
        shape = latent_shape(self._vae, images[0].shape[0]) if images else (1, 1, 1)
        size = int(np.prod(shape))
        means, logvars = self._moments(images, size)
        columns = {
            "id": scans["id"],
            "mean": pa.FixedSizeListArray.from_arrays(pa.array(means.ravel()), size),
            "logvar": pa.FixedSizeListArray.from_arrays(pa.array(logvars.ravel()), size),
        }
        columns |= {name: scans[name] for name in self._schema.names}
        return pa.table(columns).cast(latents_schema(self._schema, shape))

    @torch.inference_mode()
    def _moments(self, images: list[Any], size: int) -> tuple[Any, Any]:
        means, logvars = np.empty((len(images), size), np.float16), np.empty((len(images), size), np.float16)
        for start in range(0, len(images), self._batch_size):
            part = np.stack(
                [image / (np.iinfo(image.dtype).max / 2.0) - 1.0 for image in images[start:][: self._batch_size]]
            )
            mean, logvar = moments(self._vae, torch.from_numpy(part[:, None]).float().to(self._vae.device))
            means[start : start + len(part)] = mean.flatten(1).cpu().numpy()
            logvars[start : start + len(part)] = logvar.flatten(1).cpu().numpy()
        return means, logvars
