"""Generator -> dataset: a cohort of images as Parquet and DICOM shards; rerun to go on after any interruption.

python -m jobs.generate RECIPE [--set KEY=VALUE ...]
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from jobs.cluster import connected, require_room, run_recipe
from scanloom import console
from scanloom.artefact import Artefact, find_artefact, lineage, open_artefact, publish
from scanloom.errors import RecipeError
from scanloom.recipe import Generate, Recipe
from scanloom.sampling.dataset import EngineActor, rows_to_bytes, write_shard
from scanloom.sampling.plan import PlanSpec, achieved, compile_plan, specify
from scanloom.shards.commit import ShardCommit, begin, clean_orphans, committed
from scanloom.store import Store

CPUS_PER_WRITER = 1
# Engines may die while they start, too (a lost node, a kill); Ray Data's default ends the job at the first.
ENGINE_START_DEATHS = 5


def generate(recipe: Recipe) -> None:
    """Make the recipe's dataset artefact, or what is left of it."""
    if recipe.generate is None:
        raise RecipeError(f"recipe {recipe.name!r} has no section 'generate'; it says what to generate")
    section, started = recipe.generate, time.monotonic()
    store = Store(recipe.uri(section.dataset))
    store.require_writable()
    generator = open_artefact(recipe.uri("generator"), "generator")
    spec = specify(section, generator.manifest.name, generator.digest, generator.manifest.statistics)
    begin(store, "dataset", spec.digest)
    done = committed(store, spec.digest)
    before = sum(commit.rows for commit in done.values())
    dataset = find_artefact(store.uri, "dataset")
    if dataset is not None:
        console.LOG.info("%s: finished before; nothing to do", dataset.uri)
    else:
        commits = _make(section, spec, generator, store, done)
        clean_orphans(store, grace_s=0)  # so that a reader who lists the folder finds what the manifest names
        dataset = _publish(recipe, spec, generator, store, commits)
    _report(dataset, spec.images - before, time.monotonic() - started)


def _make(
    section: Generate, spec: PlanSpec, generator: Artefact, store: Store, done: dict[int, ShardCommit]
) -> dict[int, ShardCommit]:
    """Make and commit the shards that are missing; all commits by shard."""
    plan = compile_plan(spec)
    missing = [shard for shard in range(plan.shards) if shard not in done]
    if not missing:
        return done
    with connected():
        require_room(
            section.engines * section.cpus_per_engine,
            section.engines * section.gpus_per_engine,
            f"generate.engines {section.engines} x {section.cpus_per_engine} CPUs",
        )
        ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = ENGINE_START_DEATHS
        shards: ray.data.Dataset = ray.data.from_items(
            [{"shard": shard, "rows": rows_to_bytes(plan.rows(shard))} for shard in missing],
            override_num_blocks=len(missing),
        )
        engine: Any = EngineActor  # Ray's annotation of `map` leaves out the classes that it takes
        written = shards.map(
            engine,
            fn_constructor_args=(
                spec, generator.uri, "cuda" if section.gpus_per_engine else "cpu", section.cpus_per_engine,
            ),
            num_cpus=section.cpus_per_engine,
            num_gpus=section.gpus_per_engine,
            compute=ActorPoolStrategy(size=min(section.engines, len(missing))),
        ).map(
            partial(write_shard, spec=spec, store=store),
            num_cpus=CPUS_PER_WRITER,
            compute=TaskPoolStrategy(size=section.writers),
        )  # fmt: skip
        with console.progress("generate", spec.images, "images", done=sum(c.rows for c in done.values())) as advance:
            for row in written.iter_rows():
                done[row["shard"]] = ShardCommit.model_validate_json(row["commit"])
                advance(row["rows"])
    return done


def _publish(
    recipe: Recipe, spec: PlanSpec, generator: Artefact, store: Store, commits: dict[int, ShardCommit]
) -> Artefact:
    figures = [commit.statistics for commit in commits.values()]
    environments = {str(sorted(f["environment"].items())): f["environment"] for f in figures}
    engine_s = sum(f["engine_s"] for f in figures)
    return publish(
        store, kind="dataset", name=spec.dataset, recipe=recipe.model_dump(mode="json"),
        inputs=[lineage("generator", generator)],
        files=[entry for commit in commits.values() for entry in commit.files.values()],
        statistics={
            "plan": spec.digest,
            "spec": spec.model_dump(mode="json"),
            "rows": sum(commit.rows for commit in commits.values()),
            "cells": achieved(spec, [f["cells"] for f in figures]),
            "images_per_engine_s": spec.images / engine_s if engine_s else 0.0,
            "environments": list(environments.values()),
            "gate": "ungated",
        },
    )  # fmt: skip


def _report(dataset: Artefact, made: int, seconds: float) -> None:
    statistics = dataset.manifest.statistics
    row = (
        dataset.uri, statistics["rows"], made, f"{made / seconds:.2f}", f"{statistics['images_per_engine_s']:.2f}",
        statistics["plan"][:12], dataset.digest[:12], statistics["gate"],
    )  # fmt: skip
    columns = ("where", "images", "made now", "images/s", "images/engine-s", "plan", "digest", "gate")
    console.result_table(f"generate: {seconds:.0f} s", columns, [row])


if __name__ == "__main__":
    raise SystemExit(run_recipe(generate, "generate", __doc__ or "", None))
