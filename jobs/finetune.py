"""Latents -> generator: train the denoiser on Ray Train with DeepSpeed; rerun to go on after any interruption.

python -m jobs.finetune RECIPE [--set KEY=VALUE ...]
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.cluster import connected, interruptible, require_room, run_recipe
from scanloom import console
from scanloom.artefact import Artefact, FileEntry, find_artefact, lineage, open_artefact, plan_digest, publish
from scanloom.attributes import AttributeSchema, Envelope
from scanloom.errors import ArtefactError, ScanloomError
from scanloom.models.card import GeneratorCard, conditioning
from scanloom.models.generator import read_latent_shape, require_continuable
from scanloom.recipe import Finetune, Recipe
from scanloom.sampling.gate import corpora_of
from scanloom.shards.commit import begin
from scanloom.store import Store
from scanloom.training.loop import FinetuneJob, train_denoiser
from scanloom.training.reports import following
from scanloom.training.runs import forget, outcome, run_config, run_name

# Where a step runs does not change what it makes.
PLACE = {
    "workers", "cpus_per_worker", "use_gpu", "max_failures", "checkpoint_every_steps", "keep_checkpoints",
    "log_every_steps", "samples", "zero_stage", "offload_optimizer", "offload_parameters", "gradient_accumulation",
    "gradient_checkpointing", "compile", "channels_last",
}  # fmt: skip


def finetune(recipe: Recipe) -> None:
    """Make the recipe's generator artefact, or what is left of it."""
    started = time.monotonic()
    store = Store(recipe.uri("generator"))
    store.require_writable()
    latents = open_artefact(recipe.uri("latents"), "latents")
    autoencoder = open_artefact(recipe.uri("autoencoder"), "autoencoder")
    job = _job(recipe, latents, autoencoder)
    plan = plan_digest(
        "generator", latents.digest, autoencoder.digest, recipe.seed, recipe.name,
        recipe.finetune.model_dump(mode="json", exclude=PLACE), _start_digest(recipe, job.card, autoencoder),
    )  # fmt: skip
    begin(store, "generator", plan)
    generator = find_artefact(store.uri, "generator")
    if generator is None:
        runs, name = Store(recipe.uri("runs")), run_name("generator", plan)
        runs.require_writable()
        with connected():
            metrics = _train(recipe.finetune, job, runs, name)
        generator = publish(
            store, kind="generator", name=recipe.name, recipe=recipe.model_dump(mode="json"),
            inputs=[lineage("latents", latents), lineage("autoencoder", autoencoder)],
            files=[FileEntry.model_validate(entry) for entry in metrics.pop("files")],
            statistics={"plan": plan, "training": metrics} | _carried(latents, recipe.finetune.start_from),
        )  # fmt: skip
        forget(runs, name)
    training = generator.manifest.statistics["training"]
    row = (
        "generator", generator.uri, f"{training['step']} steps", f"{training['images_per_s']:.1f} images/s",
        f"held-out loss {training['held_out_loss']:.4f}", generator.digest[:12],
    )  # fmt: skip
    seconds = time.monotonic() - started
    console.result_table(f"finetune: {seconds:.0f} s", ("what", "where", "trained", "rate", "loss", "digest"), [row])


def _job(recipe: Recipe, latents: Artefact, autoencoder: Artefact) -> FinetuneJob:
    statistics = latents.manifest.statistics
    schema = AttributeSchema.model_validate(statistics["schema"])
    if schema.declarations != recipe.attributes:
        raise ArtefactError(
            f"{latents.uri}: encoded with attributes {', '.join(schema.names)}; recipe {recipe.name!r} declares "
            f"{', '.join(a.name for a in recipe.attributes)}, or other values of them; prepare again"
        )
    size = statistics["size_px"]
    card = GeneratorCard(
        **conditioning(recipe.finetune.denoiser), name=recipe.name, attributes=schema,
        envelope=Envelope.model_validate(statistics["envelope"]),
        latent_shape=read_latent_shape(autoencoder, size), image_shape=(1, size, size),
        spacing_mm=statistics["spacing_mm"], trained_steps=recipe.finetune.steps,
    )  # fmt: skip
    return FinetuneJob(
        recipe=recipe.finetune, seed=recipe.seed, card=card,
        autoencoder_uri=autoencoder.uri, latents_uri=latents.uri, generator_uri=recipe.uri("generator"),
    )  # fmt: skip


def _start_digest(recipe: Recipe, card: GeneratorCard, autoencoder: Artefact) -> str | None:
    section = recipe.finetune
    if section.start_from is None:
        return None
    start = open_artefact(section.start_from, "generator")
    require_continuable(start, card, section.objective, autoencoder)
    return start.digest


def _carried(latents: Artefact, start_from: str | None) -> dict[str, object]:
    known = {key: latents.manifest.statistics[key] for key in ("schema", "envelope", "cells", "spacing_mm", "size_px")}
    # So that a gate still fits where these are gone; what cannot be followed even now, the gate will say.
    with suppress(ScanloomError):
        start = corpora_of(open_artefact(start_from, "generator")) if start_from else set()
        known["corpora"] = sorted(corpora_of(latents) | start)
    return known


def _train(section: Finetune, job: FinetuneJob, runs: Store, name: str) -> dict[str, Any]:
    least, _ = section.worker_range
    require_room(least * section.cpus_per_worker, least * section.use_gpu, "finetune.workers")
    with (
        console.progress("finetune", section.steps, "steps") as advance,
        following(console.step_follower(advance)) as reports,
    ):
        # Checkers see the classes of Ray Tune's time, which know neither a result nor a range of workers.
        scaling: dict[str, Any] = {"num_workers": section.workers}
        work: Any = train_denoiser
        trainer = TorchTrainer(
            work,
            train_loop_config=job.model_dump(mode="json"),
            scaling_config=ScalingConfig(
                use_gpu=section.use_gpu, resources_per_worker={"CPU": section.cpus_per_worker}, **scaling,
            ),
            run_config=run_config(
                runs, name, max_failures=section.max_failures, keep_checkpoints=section.keep_checkpoints,
                reports=reports,
            ),
        )  # fmt: skip
        return outcome(interruptible(trainer.fit))


if __name__ == "__main__":
    raise SystemExit(run_recipe(finetune, "finetune", __doc__ or "", None))
