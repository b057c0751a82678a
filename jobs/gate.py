"""Corpus -> privacy gate: what refuses, while images are made, those that are copies of training scans.

python -m jobs.gate RECIPE [--set KEY=VALUE ...]
"""

from __future__ import annotations

import math
import time
from typing import Any

import ray

from jobs.cluster import connected, interruptible, run_recipe
from jobs.training import train_encoder
from scanloom import console
from scanloom.artefact import Artefact, FileEntry, find_artefact, open_artefact, publish
from scanloom.audit.privacy_gate import GateJob, index_shard, make_gate, plan_gate
from scanloom.models.gate_card import GateCard
from scanloom.models.privacy_gate import ENCODER
from scanloom.recipe import Recipe
from scanloom.shards.commit import begin
from scanloom.shards.reader import parquet_files
from scanloom.store import Store
from scanloom.training.copy_encoder import CopyEncoderJob
from scanloom.training.runs import forget, run_name


def gate(recipe: Recipe) -> None:
    """Make the recipe's gate artefact, or what is left of it."""
    started = time.monotonic()
    store = Store(recipe.uri("gate"))
    store.require_writable()
    corpus = open_artefact(recipe.uri("corpus"), "corpus")
    plan = plan_gate(recipe, corpus)
    begin(store, "gate", plan)
    made = find_artefact(store.uri, "gate")
    if made is None:
        runs, name = Store(recipe.uri("runs")), run_name("gate", plan)
        runs.require_writable()
        job = GateJob.of(recipe, corpus)
        training = CopyEncoderJob(
            settings=recipe.gate, section="gate", seed=job.seed, size_px=job.size_px, weights_uri=store.uri,
            weights_key=ENCODER,
        )  # fmt: skip
        with connected():
            metrics = train_encoder(training, corpus, runs, name)
            card, files = _build(job, corpus)
        made = publish(
            store, kind="gate", name=recipe.name, recipe=recipe.model_dump(mode="json"), inputs=[corpus], files=files,
            statistics={"plan": plan, "training": metrics, "card": card.model_dump(mode="json")},
        )  # fmt: skip
        forget(runs, name)
    _report(made, time.monotonic() - started)


def _build(job: GateJob, corpus: Artefact) -> tuple[GateCard, list[FileEntry]]:
    """Index the train shards, a task each, and calibrate on the cluster, where the data is near."""
    config = job.model_dump(mode="json")
    paths = [entry.path for entry in parquet_files(corpus, "train")]
    planted = math.ceil(job.settings.planted_scans / max(1, len(paths)))
    index: Any = ray.remote(num_cpus=1, max_retries=3)(index_shard)
    make: Any = ray.remote(num_cpus=1, max_retries=3)(make_gate)
    with console.progress("index", len(paths), "shards") as advance:

        def work() -> tuple[GateCard, list[FileEntry]]:
            indexed = [index.remote(config, path, planted) for path in paths]
            for one in indexed:
                ray.wait([one], fetch_local=False)
                advance(1)
            # Each an argument of its own: of a list a task would get the promises, not what was computed.
            made: tuple[GateCard, list[FileEntry]] = ray.get(make.remote(config, *indexed))
            return made

        return interruptible(work)


def _report(made: Artefact, seconds: float) -> None:
    card = GateCard.model_validate(made.manifest.statistics["card"])
    rows = [
        ("training scans in the index", str(card.train_scans), ""),
        ("refused from a likeness of", f"{card.tau:.4f}", f"calibrated on {card.calibration_patients} patients"),
        ("held-out scans refused", str(card.held_out), f"of {card.held_out_scans}, of other patients"),
        *((f"planted: {one.plant}", str(one.refused), f"of {one.copies} copies") for one in card.power),
    ]
    console.result_table(f"gate: {seconds:.0f} s, {made.uri}", ("what", "figure", "of"), rows)


if __name__ == "__main__":
    raise SystemExit(run_recipe(gate, "gate", __doc__ or "", None))
