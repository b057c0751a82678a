"""Dataset -> audit: does it hold copies of training scans, and does it look like them? Evidence for a release.

python -m jobs.audit RECIPE [--set KEY=VALUE ...]
"""

from __future__ import annotations

import time
from typing import Any

import ray
import ray.data
from ray.train import DataConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.cluster import connected, interruptible, require_room, run_recipe
from scanloom import console
from scanloom.artefact import Artefact, FileEntry, find_artefact, open_artefact, plan_digest, publish
from scanloom.audit.measuring import ENCODER, AuditJob, Measured, make_audit, write_report
from scanloom.audit.report import REPORT, read_report
from scanloom.errors import RecipeError
from scanloom.recipe import Recipe
from scanloom.shards.commit import begin
from scanloom.shards.reader import parquet_paths
from scanloom.store import Store
from scanloom.training.copy_encoder import CopyEncoderJob, levels, plan_copy_encoder, train_copy_encoder
from scanloom.training.reports import following
from scanloom.training.runs import forget, outcome, run_config, run_name


def audit(recipe: Recipe) -> None:
    """Make the audit of the recipe's dataset, or what is left of it."""
    started = time.monotonic()
    if recipe.generate is None:
        raise RecipeError("the recipe has no `generate` section, which names the dataset to audit; add one")
    corpus = open_artefact(recipe.uri("corpus"), "corpus")
    dataset = open_artefact(recipe.uri(recipe.generate.dataset), "dataset")
    # Whoever has a probe of this recipe gets the fairness of the dataset too.
    probe = find_artefact(recipe.uri("probe"), "probe")
    store = Store(f"{dataset.uri}-audit")
    store.require_writable()
    encoder = plan_copy_encoder(recipe, corpus)
    plan = plan_digest("audit", encoder, dataset.digest, recipe.audit.model_dump(mode="json"), probe and probe.digest)
    begin(store, "audit", plan)
    made = find_artefact(store.uri, "audit")
    if made is None:
        runs, name = Store(recipe.uri("runs")), run_name("copy-encoder", plan)
        runs.require_writable()
        with connected():
            metrics = _train(recipe, corpus, store, runs, name)
            files = _measure(recipe, corpus, dataset, probe, store)
        made = publish(
            store, kind="audit", name=dataset.manifest.name, recipe=recipe.model_dump(mode="json"),
            inputs=[dataset, corpus, *([probe] if probe else [])], files=files,
            statistics={"plan": plan, "training": metrics},
        )  # fmt: skip
        forget(runs, name)
    _report(made, time.monotonic() - started)


def _train(recipe: Recipe, corpus: Artefact, store: Store, runs: Store, name: str) -> dict[str, Any]:
    section = recipe.audit.copies
    require_room(section.workers * section.cpus_per_worker, section.workers * section.use_gpu, "audit.copies.workers")
    job = CopyEncoderJob.of(recipe, corpus, store, ENCODER)
    paths = parquet_paths(corpus, "train", section.max_scans)
    scans = ray.data.read_parquet(paths, filesystem=corpus.store.filesystem).select_columns(["id", "image"])
    with (
        console.progress("copy encoder", section.steps, "steps") as advance,
        following(console.step_follower(advance)) as reports,
    ):
        work: Any = train_copy_encoder  # Checkers see the class of Ray Tune's time, whose loops return nothing.
        trainer = TorchTrainer(
            work,
            train_loop_config=job.model_dump(mode="json"),
            datasets={"train": scans},
            # Every worker holds all scans; which ones it trains on follows from the step and its rank.
            dataset_config=DataConfig(datasets_to_split=[]),
            scaling_config=ScalingConfig(
                num_workers=section.workers, use_gpu=section.use_gpu,
                resources_per_worker={"CPU": section.cpus_per_worker},
            ),
            run_config=run_config(runs, name, max_failures=section.max_failures, keep_checkpoints=1, reports=reports),
        )  # fmt: skip
        return outcome(interruptible(trainer.fit))


def _measure(
    recipe: Recipe, corpus: Artefact, dataset: Artefact, probe: Artefact | None, store: Store
) -> list[FileEntry]:
    """On the cluster, where the data is near."""
    size_px = min(recipe.audit.copies.size_px, corpus.manifest.statistics["size_px"])
    job = AuditJob(
        settings=recipe.audit, seed=recipe.seed, corpus_uri=corpus.uri, dataset_uri=dataset.uri, audit_uri=store.uri,
        size_px=size_px, channels=levels(recipe.audit.copies, size_px), probe_uri=None if probe is None else probe.uri,
    )  # fmt: skip
    work: Any = ray.remote(num_cpus=1, max_retries=3)(make_audit)
    measured: Measured = interruptible(lambda: ray.get(work.remote(job.model_dump(mode="json"))))
    return write_report(measured, measured.report, store)


def _report(made: Artefact, seconds: float) -> None:
    report = read_report(made.store.read(REPORT), made.store.uri_of(REPORT))
    copies = report.copies
    rows: list[tuple[str, str, str]] = []
    if copies is not None:
        rows += [
            ("images that count as copies", str(copies.synthetic_rate), f"held-out scans: {copies.held_out_rate}"),
            ("slight planted copies found, at least", f"{copies.lowest_slight_recall:.3f}", f"tau {copies.tau:.4f}"),
        ]
    for name, beside in {**(report.fidelity or {}), **(report.appearance or {})}.items():
        rows.append((name, str(beside.synthetic), f"real against real: {beside.baseline}"))
    title = f"audit: {seconds:.0f} s, {made.uri}, {report.subject.looked_at} of {report.subject.images} images"
    console.result_table(title, ("figure", "this dataset", "beside"), rows)


if __name__ == "__main__":
    raise SystemExit(run_recipe(audit, "audit", __doc__ or "", None))
