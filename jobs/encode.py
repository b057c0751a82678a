"""Corpus -> autoencoder -> latents: train or fetch the autoencoder, then encode every scan and every prompt once.

python -m jobs.encode RECIPE [--set KEY=VALUE ...]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray.data

from jobs.cluster import connected, require_room, run_recipe
from jobs.training import require_workers, scans_of, train
from scanloom import console
from scanloom.artefact import Artefact, FileEntry, find_artefact, lineage, open_artefact, publish
from scanloom.recipe import Recipe
from scanloom.shards.commit import begin, committed, committed_shards
from scanloom.shards.reader import parquet_paths
from scanloom.store import Store
from scanloom.training.encoding import ShardEncoder
from scanloom.training.encoding_plan import SPLITS, EncodingJob, distinct_prompts, finished, plan_encoding, prompt_rows
from scanloom.training.given_weights import put_autoencoder
from scanloom.training.prompt_encoding import PromptEncoder
from scanloom.training.reconstruction import AutoencoderJob, plan_autoencoder, train_autoencoder
from scanloom.training.runs import forget, run_name

# A driver that tracks more tasks than this spends its time on them; shards then share a task.
MOST_TASKS = 2000


def encode(recipe: Recipe) -> None:
    """Make the recipe's autoencoder and latents artefacts, or what is left of them."""
    started = time.monotonic()
    Store(recipe.store).require_writable()
    corpus = open_artefact(recipe.uri("corpus"), "corpus")
    with connected():
        autoencoder = _autoencoder(recipe, corpus)
        latents = _latents(recipe, corpus, autoencoder)
    psnr_db, made = autoencoder.manifest.statistics.get("psnr_db"), latents.manifest.statistics
    quality = f"held-out PSNR {psnr_db:.1f} dB" if psnr_db else "given"
    rows = [
        ("autoencoder", autoencoder.uri, quality, autoencoder.digest[:12]),
        ("latents", latents.uri, f"{made['rows']} rows, {made['prompts']} prompts", latents.digest[:12]),
    ]
    console.result_table(f"encode: {time.monotonic() - started:.0f} s", ("what", "where", "made", "digest"), rows)


def _autoencoder(recipe: Recipe, corpus: Artefact) -> Artefact:
    store = Store(recipe.uri("autoencoder"))
    given, plan = plan_autoencoder(recipe, corpus)
    begin(store, "autoencoder", plan)
    if done := find_artefact(store.uri, "autoencoder"):
        return done
    runs, name = Store(recipe.uri("runs")), run_name("autoencoder", plan)
    made = put_autoencoder(given, store) if given else _train(recipe, corpus, runs, name)
    files = [FileEntry.model_validate(entry) for entry in made.pop("files")]
    artefact = publish(
        store, kind="autoencoder", name=recipe.name, recipe=recipe.model_dump(mode="json"), inputs=[corpus],
        files=files, statistics={"plan": plan} | made,
    )  # fmt: skip
    forget(runs, name)
    return artefact


def _train(recipe: Recipe, corpus: Artefact, runs: Store, name: str) -> dict[str, Any]:
    section, job = recipe.autoencoder, AutoencoderJob.of(recipe, corpus)
    require_workers(section, "autoencoder")
    scans = scans_of(corpus, SPLITS, ["id", "image"], section.max_scans)
    return train("autoencoder", section, train_autoencoder, job, scans, runs, name)


def _latents(recipe: Recipe, corpus: Artefact, autoencoder: Artefact) -> Artefact:
    store, job = Store(recipe.uri("latents")), plan_encoding(recipe, corpus, autoencoder)
    begin(store, "latents", job.plan)
    if done := find_artefact(store.uri, "latents"):
        return done
    numbers, section = sorted(committed_shards(corpus.store)), recipe.encode
    workers = min(section.workers, len(numbers))
    require_room(workers, workers * section.gpus_per_worker, "encode.workers")
    prompts = prompt_rows(_texts(job, corpus), first=numbers[-1] + 1) if job.text else []
    _distribute("prompts", PromptEncoder, prompts, job)
    _distribute("scans", ShardEncoder, [{"shard": shard} for shard in numbers], job)
    return publish(
        store, kind="latents", name=recipe.name, recipe=recipe.model_dump(mode="json"),
        inputs=[lineage("corpus", corpus), lineage("autoencoder", autoencoder)],
        **finished(committed(store, job.plan).values(), corpus),
    )  # fmt: skip


def _texts(job: EncodingJob, corpus: Artefact) -> set[str]:
    """The distinct prompts of everything that training sees."""
    paths = [path for split in SPLITS for path in parquet_paths(corpus, split)]
    rows = ray.data.read_parquet(paths, filesystem=corpus.store.filesystem, columns=list(job.attributes.names))
    distinct: Any = distinct_prompts  # Ray's annotation leaves out functions of more than the batch
    texts = rows.map_batches(distinct, fn_args=(job,), batch_format="pyarrow", batch_size=4096)
    return {row["text"] for row in texts.iter_rows()}


def _distribute(what: str, worker: Any, shards: Sequence[dict[str, Any]], job: EncodingJob) -> None:
    """Let actors of a worker class make the shards that are not committed yet."""
    there = committed_shards(Store(job.latents_uri))
    missing = [row for row in shards if row["shard"] not in there]
    section = job.recipe
    with console.progress(what, len(shards), "shards", done=len(shards) - len(missing)) as advance:
        if missing:
            left: ray.data.Dataset = ray.data.from_items(missing, override_num_blocks=min(len(missing), MOST_TASKS))
            made = left.map_batches(
                worker,
                fn_constructor_args=(job,),
                batch_size=1,
                num_cpus=1,
                num_gpus=section.gpus_per_worker,
                # An actor has its next shard at hand, whatever Ray Data takes to hand one out.
                compute=ray.data.ActorPoolStrategy(
                    size=min(section.workers, len(missing)), max_tasks_in_flight_per_actor=4
                ),
            )
            for _ in made.iter_rows():
                advance(1)


if __name__ == "__main__":
    raise SystemExit(run_recipe(encode, "encode", __doc__ or "", None))
