"""Corpus -> autoencoder -> latents: train or fetch the autoencoder, then encode every shard once.

python -m jobs.encode RECIPE [--set KEY=VALUE ...]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import ray.data
from ray.train import DataConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.cluster import connected, interruptible, require_room, run_recipe
from scanloom import console
from scanloom.artefact import Artefact, FileEntry, find_artefact, lineage, open_artefact, plan_digest, publish
from scanloom.models.autoencoder import load_autoencoder
from scanloom.recipe import Recipe
from scanloom.shards.commit import begin, committed
from scanloom.shards.reader import parquet_paths
from scanloom.store import Store
from scanloom.training.encoding import SPLITS, ShardEncoder
from scanloom.training.reconstruction import AutoencoderJob, train_autoencoder
from scanloom.training.reports import following
from scanloom.training.runs import forget, run_config, run_name

# Where a step runs does not change what it makes.
PLACE = {"workers", "cpus_per_worker", "use_gpu", "checkpoint_every_steps"}


def encode(recipe: Recipe) -> None:
    """Make the recipe's autoencoder and latents artefacts, or what is left of them."""
    started = time.monotonic()
    Store(recipe.store).require_writable()
    corpus = open_artefact(recipe.uri("corpus"), "corpus")
    with connected():
        autoencoder = _autoencoder(recipe, corpus)
        latents = _latents(recipe, corpus, autoencoder)
    psnr_db = autoencoder.manifest.statistics.get("psnr_db")
    quality = f"held-out PSNR {psnr_db:.1f} dB" if psnr_db else "given"
    rows = [
        ("autoencoder", autoencoder.uri, quality, autoencoder.digest[:12]),
        ("latents", latents.uri, f"{latents.manifest.statistics['rows']} scans", latents.digest[:12]),
    ]
    console.result_table(f"encode: {time.monotonic() - started:.0f} s", ("what", "where", "made", "digest"), rows)


def _autoencoder(recipe: Recipe, corpus: Artefact) -> Artefact:
    store = Store(recipe.uri("autoencoder"))
    section = recipe.autoencoder
    plan = plan_digest("autoencoder", corpus.digest, recipe.seed, section.model_dump(mode="json", exclude=PLACE))
    begin(store, "autoencoder", plan)
    if done := find_artefact(store.uri, "autoencoder"):
        return done
    runs, name = Store(recipe.uri("runs")), run_name("autoencoder", plan, section.workers)
    if section.path:
        made: dict[str, Any] = {"taken_from": section.path, "files": _copy(section.path, store)}
    else:
        made = _train(recipe, corpus, runs, name)
    files = [FileEntry.model_validate(entry) for entry in made.pop("files")]
    artefact = publish(
        store, kind="autoencoder", name=recipe.name, recipe=recipe.model_dump(mode="json"), inputs=[corpus],
        files=files, statistics={"plan": plan} | made,
    )  # fmt: skip
    forget(runs, name)
    return artefact


def _copy(path: str, store: Store) -> list[FileEntry]:
    with tempfile.TemporaryDirectory(prefix="scanloom-autoencoder-") as folder:
        Store(path).fetch_folder("", Path(folder) / "vae")
        load_autoencoder(Path(folder) / "vae", path)
        return [FileEntry.of(file) for file in store.put_folder(Path(folder))]


def _train(recipe: Recipe, corpus: Artefact, runs: Store, name: str) -> dict[str, Any]:
    section = recipe.autoencoder
    require_room(section.workers * section.cpus_per_worker, section.workers * section.use_gpu, "autoencoder.workers")
    job = AutoencoderJob(
        recipe=section, seed=recipe.seed, size_px=corpus.manifest.statistics["size_px"],
        autoencoder_uri=recipe.uri("autoencoder"),
    )  # fmt: skip
    scans: dict[str, Any] = {
        split: ray.data.read_parquet(
            parquet_paths(corpus, split, section.max_scans), filesystem=corpus.store.filesystem
        ).select_columns(["id", "image"])
        for split in SPLITS
    }
    with (
        console.progress("autoencoder", section.steps, "steps") as advance,
        following(console.step_follower(advance)) as reports,
    ):
        trainer = TorchTrainer(
            train_autoencoder,
            train_loop_config=job.model_dump(mode="json"),
            datasets=scans,
            dataset_config=DataConfig(datasets_to_split=[]),
            scaling_config=ScalingConfig(
                num_workers=section.workers, use_gpu=section.use_gpu,
                resources_per_worker={"CPU": section.cpus_per_worker},
            ),
            run_config=run_config(
                runs, name, max_failures=section.max_failures, keep_checkpoints=1, reports=reports,
            ),
        )  # fmt: skip
        return dict(interruptible(trainer.fit).metrics or {})


def _latents(recipe: Recipe, corpus: Artefact, autoencoder: Artefact) -> Artefact:
    store = Store(recipe.uri("latents"))
    plan = plan_digest("latents", corpus.digest, autoencoder.digest)
    begin(store, "latents", plan)
    if done := find_artefact(store.uri, "latents"):
        return done
    shards = sorted(committed(corpus.store, corpus.manifest.statistics["plan"]))
    missing = [shard for shard in shards if shard not in committed(store, plan)]
    section = recipe.encode
    with console.progress("encode", len(shards), "shards", done=len(shards) - len(missing)) as advance:
        if missing:
            shards_left: ray.data.Dataset = ray.data.from_items(
                [{"shard": shard} for shard in missing], override_num_blocks=len(missing)
            )
            encoded = shards_left.map_batches(
                ShardEncoder,
                fn_constructor_args=(
                    corpus.uri, autoencoder.uri, store.uri, plan, section.batch_size,
                    "cuda" if section.gpus_per_worker else "cpu",
                ),
                batch_size=1,
                num_cpus=1,
                num_gpus=section.gpus_per_worker,
                compute=ray.data.ActorPoolStrategy(size=min(section.workers, len(missing))),
            )  # fmt: skip
            for _ in encoded.iter_rows():
                advance(1)
    commits = committed(store, plan)
    carried = {key: corpus.manifest.statistics[key] for key in ("schema", "envelope", "cells", "spacing_mm", "size_px")}
    return publish(
        store, kind="latents", name=recipe.name, recipe=recipe.model_dump(mode="json"),
        inputs=[lineage("corpus", corpus), lineage("autoencoder", autoencoder)],
        files=[entry for commit in commits.values() for entry in commit.files.values()],
        statistics={"plan": plan, "rows": sum(c.rows for c in commits.values())} | carried,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run_recipe(encode, "encode", __doc__ or "", None))
