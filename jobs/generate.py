"""Generator -> dataset: a cohort of images as Parquet and DICOM shards; rerun to go on after any interruption.

python -m jobs.generate RECIPE [--set KEY=VALUE ...]
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from jobs.cluster import connected, require_room, run_recipe
from scanloom import console
from scanloom.artefact import Artefact, find_artefact, publish
from scanloom.errors import RecipeError, StoreError
from scanloom.overview import cohort_report
from scanloom.progress import Meter, Reporter
from scanloom.recipe import Generate, Recipe
from scanloom.sampling.dataset import EngineActor, write_shard
from scanloom.sampling.gate import UNGATED
from scanloom.sampling.inputs import Inputs, open_inputs
from scanloom.sampling.plan import PlanSpec
from scanloom.sampling.tally import Tally, planned
from scanloom.shards.commit import ShardCommit, begin, clean_orphans, committed_shards, read_commits
from scanloom.store import Store

CPUS_PER_WRITER = 1
# Engines may die while they start, too (a lost node, a kill); Ray Data's default ends the job at the first.
ENGINE_START_DEATHS = 5
# Other than an engine's, or Ray Data would count in the engines: one call of an engine would be all shards.
CPUS_TO_COUNT = 0.01
MEMORY_TO_COUNT = 256 << 20  # what a bare worker takes; Ray Data warns of stages that ask for none


def generate(recipe: Recipe, engine: type[EngineActor] = EngineActor) -> None:
    """Make the recipe's dataset artefact, or what is left of it, with actors of the class `engine`."""
    if recipe.generate is None:
        raise RecipeError(f"recipe {recipe.name!r} has no section 'generate'; it says what to generate")
    section, started = recipe.generate, time.monotonic()
    store = Store(recipe.uri(section.dataset))
    store.require_writable()
    inputs = open_inputs(recipe.generator_uri, section.quality)
    spec = inputs.specify(section)
    begin(store, "dataset", spec.digest)
    present = committed_shards(store)
    before = sum(planned(spec, shard) for shard in present)
    dataset = find_artefact(store.uri, "dataset")
    if dataset is not None:
        console.LOG.info("%s: finished before; nothing to do", dataset.uri)
    else:
        meter = Meter(spec.digest, spec.images, section.cost_per_hour, before)
        with Reporter(store, meter):
            tally = _make(section, spec, inputs, store, present, engine, meter)
            clean_orphans(store, grace_s=0, wanted=tally.keys())  # so that a reader of the folder finds what is named
            dataset = _publish(recipe, spec, inputs, store, tally)
    _report(dataset, spec.images - before, time.monotonic() - started)


def _make(
    section: Generate, spec: PlanSpec, inputs: Inputs, store: Store, present: set[int],
    engine: type[EngineActor], meter: Meter,
) -> Tally:  # fmt: skip
    """Make and commit the shards that are not present; the sums over all commits.

    What earlier runs committed is read meanwhile: work starts as soon as the names of its commits are known.
    """
    tally, missing = Tally(spec), [shard for shard in range(spec.shards) if shard not in present]
    done = sum(planned(spec, shard) for shard in present)
    progress = console.progress("generate", spec.images, "images", done=done)
    with ThreadPoolExecutor(1) as pool:
        earlier = pool.submit(lambda: [tally.add(commit) for commit in read_commits(store, spec.digest, present)])
        if missing:
            with connected(), progress as advance:
                for row in program(section, spec, inputs, store, missing, engine).iter_rows():
                    settled = tally.add(ShardCommit.model_validate_json(row["commit"]))
                    done += settled
                    meter.count(done, tally.images, tally.rejects, tally.engine_s)
                    advance(settled, **meter.figures)
                    if earlier.done():
                        earlier.result()  # a damaged commit ends the job now, not when all the rest is made
        earlier.result()
        meter.count(done, tally.images, tally.rejects, tally.engine_s)
    if tally.missing:
        raise StoreError(f"{store.uri}: {len(tally.missing)} shards were not committed; run the same command again")
    return tally


def program(
    section: Generate, spec: PlanSpec, inputs: Inputs, store: Store, missing: list[int], engine: type[EngineActor]
) -> ray.data.Dataset:
    """One row a shard: engines make pixels, writers encode, upload and commit them; only a few shards lie between."""
    require_room(
        section.engines * section.cpus_per_engine,
        section.engines * section.gpus_per_engine,
        f"generate.engines {section.engines} x {section.cpus_per_engine} CPUs",
    )
    # One task counts the shards out while engines work: to make a block for each before would take seconds.
    numbers = ray.data.from_items([{"missing": missing}])
    numbers.context.target_max_block_size = 1  # so that at every stage a shard is a block, and moves on by itself
    numbers.context.max_consecutive_actor_init_deaths = ENGINE_START_DEATHS
    shards = numbers.flat_map(
        lambda row: [{"shard": n} for n in row["missing"]], num_cpus=CPUS_TO_COUNT, memory=MEMORY_TO_COUNT
    )
    actor: Any = engine  # Ray's annotation of `map` leaves out the classes that it takes
    return shards.map(
        actor,
        fn_constructor_args=(
            spec, inputs.generator.uri, "cuda" if section.gpus_per_engine else "cpu", section.cpus_per_engine,
            *inputs.uris,
        ),
        num_cpus=section.cpus_per_engine,
        num_gpus=section.gpus_per_engine,
        compute=ActorPoolStrategy(size=min(section.engines, len(missing))),
    ).map(
        partial(write_shard, spec=spec, store=store),
        num_cpus=CPUS_PER_WRITER,
        compute=TaskPoolStrategy(size=section.writers),
    )  # fmt: skip


def _publish(recipe: Recipe, spec: PlanSpec, inputs: Inputs, store: Store, tally: Tally) -> Artefact:
    return publish(
        store, kind="dataset", name=spec.dataset, recipe=recipe.model_dump(mode="json"),
        inputs=inputs.artefacts, files=tally.files(),
        statistics={
            "plan": spec.digest, "spec": spec.model_dump(mode="json"), "gate": spec.gate or UNGATED,
            **tally.statistics(),
        },
    )  # fmt: skip


def _report(dataset: Artefact, made: int, seconds: float) -> None:
    statistics = dataset.manifest.statistics
    row = (
        dataset.uri, statistics["rows"], made, f"{made / seconds:.2f}", f"{statistics['images_per_engine_s']:.2f}",
        statistics["plan"][:12], dataset.digest[:12], statistics["gate"][:12],
    )  # fmt: skip
    columns = ("where", "images", "made now", "images/s", "images/engine-s", "plan", "digest", "gate")
    console.result_table(f"generate: {seconds:.0f} s", columns, [row])
    for part in cohort_report(statistics):
        console.show(part)


if __name__ == "__main__":
    raise SystemExit(run_recipe(generate, "generate", __doc__ or "", None))
