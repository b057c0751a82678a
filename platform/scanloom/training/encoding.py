"""From corpus shards to latents shards: the worker class of the encode job."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from scanloom.artefact import open_artefact
from scanloom.errors import ArtefactError
from scanloom.models.autoencoder import load_autoencoder, moments
from scanloom.models.generator import read_latent_shape
from scanloom.shards.commit import ShardPart, commit_shard, committed
from scanloom.shards.reader import read_parquet
from scanloom.shards.schemas import flattened, latents_schema, prompt_hash
from scanloom.shards.writer import parquet_bytes, png_pixels
from scanloom.store import Store
from scanloom.training.encoding_plan import SPLITS, EncodingJob
from scanloom.training.views import Distinct, View, full_range, look, times_trained, views


class ShardEncoder:
    """Encodes one corpus shard a call and commits it; a plain class, wrapped by Ray Data at its place of use."""

    def __init__(self, job: EncodingJob) -> None:
        torch.set_num_threads(1)
        corpus, autoencoder = open_artefact(job.corpus_uri, "corpus"), open_artefact(job.autoencoder_uri, "autoencoder")
        self._job = job
        self._corpus = corpus.store
        self._size_px = int(corpus.manifest.statistics["size_px"])
        self._shards = committed(corpus.store, corpus.manifest.statistics["plan"])
        self._latents = Store(job.latents_uri)
        self._shape = read_latent_shape(autoencoder, self._size_px)
        with tempfile.TemporaryDirectory(prefix="scanloom-vae-") as folder:
            autoencoder.fetch(Path(folder))
            self._vae = load_autoencoder(Path(folder) / "vae").to(job.device)
        if job.recipe.precision == "bf16":
            self._vae.bfloat16()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode the shards numbered in `batch["shard"]`."""
        for shard in batch["shard"]:
            self._encode(int(shard))
        return {"shard": np.asarray(batch["shard"])}

    def _encode(self, shard: int) -> None:
        files = self._shards[shard].files
        parts, encoded = [], 0
        for split in (split for split in SPLITS if split in files):
            scans = read_parquet(self._corpus, files[split])
            images = [image["bytes"] for image in scans["image"].to_pylist()]
            distinct = Distinct.of(images, views(self._job.recipe, split))
            table = self._table(scans, distinct, shard, split)
            parts.append(ShardPart(split, split, "parquet", parquet_bytes(table), table.num_rows))
            encoded += len(distinct.pictures)
        rows = sum(part.rows for part in parts)
        commit_shard(self._latents, self._job.plan, shard, parts, rows, {"encoded": encoded})

    def _table(self, scans: pa.Table, distinct: Distinct, shard: int, split: str) -> pa.Table:
        means, logvars = self._moments(distinct.pictures)
        if not (np.isfinite(means).all() and np.isfinite(logvars).all()):
            raise ArtefactError(
                f"{self._job.autoencoder_uri}: makes latents of shard {shard} that are no numbers in half precision; "
                "set encode.precision=fp32, or give another autoencoder"
            )
        canaries = self._job.recipe.canaries if split == "train" else None
        times = [times_trained(canaries, name) for name in scans["id"].to_pylist()]
        rows = [(*row, time) for row in distinct.rows for time in range(times[row[0]])]
        pictures = np.array([picture for _, picture, _, _ in rows], np.int64)
        kept = scans.select(["id", *self._job.attributes.names])
        scans = kept.take(pa.array([scan for scan, _, _, _ in rows], pa.int64()))
        ids = [
            view.row_id(scan) + (f"x{time}" if time else "")
            for scan, (_, _, view, time) in zip(scans["id"].to_pylist(), rows, strict=True)
        ]
        columns = {name: scans[name] for name in self._job.attributes.names} | {"id": pa.array(ids, pa.string())}
        columns |= {"mean": flattened(means[pictures]), "logvar": flattened(logvars[pictures])}
        if self._job.text:
            columns["prompt"] = pa.array([prompt_hash(text) for text in self._job.prompts(scans)], pa.string())
        schema = latents_schema(self._job.attributes, self._shape, prompts=bool(self._job.text))
        return pa.table(columns).select(schema.names).cast(schema)

    @torch.inference_mode()
    def _moments(self, pictures: Sequence[tuple[bytes, View]]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        shape = len(pictures), int(np.prod(self._shape))
        means, logvars = np.empty(shape, np.float16), np.empty(shape, np.float16)
        start = 0
        for pixels_B1HW in self._batches(pictures):
            pixels_B1HW = pixels_B1HW.to(self._vae.device, self._vae.dtype, non_blocking=True)
            mean, logvar = moments(self._vae, pixels_B1HW)
            stop = start + len(pixels_B1HW)
            means[start:stop], logvars[start:stop] = (m.flatten(1).half().cpu().numpy() for m in (mean, logvar))
            start = stop
        return means, logvars

    def _batches(self, pictures: Sequence[tuple[bytes, View]]) -> Iterator[Tensor]:
        """Pixels [B, 1, H, W] in [-1, 1]; the next batch is decoded while the one before is encoded."""
        size = self._job.recipe.batch_size
        with ThreadPoolExecutor(1) as ahead:
            waiting = [ahead.submit(self._pixels, pictures[:size])] if pictures else []
            for start in range(size, len(pictures) + size, size):
                pixels = waiting.pop().result()
                if start < len(pictures):
                    waiting.append(ahead.submit(self._pixels, pictures[start : start + size]))
                yield pixels

    def _pixels(self, pictures: Sequence[tuple[bytes, View]]) -> Tensor:
        decoded: dict[bytes, NDArray[np.float32]] = {}
        shown = []
        for image, view in pictures:
            if image not in decoded:
                decoded[image] = full_range(png_pixels(image))
            scan = decoded[image]
            if scan.shape != (self._size_px, self._size_px):
                raise ArtefactError(
                    f"{self._job.corpus_uri}: holds a scan of {scan.shape}, expected {self._size_px} x {self._size_px}"
                )
            # Seeded by the image, not by the row: equal images then have equal views, each encoded once.
            draw = (self._job.seed, int.from_bytes(hashlib.sha256(image).digest()[:8], "big"))
            shown.append(look(scan, view, draw, self._job.recipe.crop_share))
        return torch.from_numpy(np.stack(shown)[:, None])
