"""What a cluster must have at once for each job of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from scanloom.errors import RecipeError
from scanloom.recipe import Recipe
from scanloom.section import DataParallel


@dataclass(frozen=True)
class Need:
    """What Ray must have at once, and the largest part of it that must be in one place."""

    cpus: float = 0
    gpus: float = 0
    cpus_of_one: float = 0
    gpus_of_one: float = 0
    gpus_to_start: float | None = None
    """Where it begins with fewer than it can use; None: with all of them."""


def need(job: str, recipe: Recipe) -> Need:
    """Of a job; RecipeError where the recipe has nothing for it to do."""
    return NEEDS[job](recipe)


def gpus_needed(recipe: Recipe) -> float:
    """GPUs that the most demanding step of a recipe holds at once before it can start."""
    steps = [need(job, recipe) for job in NEEDS if not (job == "prepare" and recipe.prepare is None)]
    return float(max(step.gpus if step.gpus_to_start is None else step.gpus_to_start for step in steps))


def _prepare(recipe: Recipe) -> Need:
    if recipe.prepare is None:
        raise RecipeError("the recipe has no section prepare")
    return Need(recipe.prepare.workers, 0, 1)


def _encode(recipe: Recipe) -> Need:
    training, encoding = recipe.autoencoder, recipe.encode
    trains = training.path is None
    return Need(
        max(trains * training.workers * training.cpus_per_worker, encoding.workers) + 1,
        max(trains * training.workers * training.use_gpu, encoding.workers * encoding.gpus_per_worker),
        trains * training.cpus_per_worker, max(trains * training.use_gpu, encoding.gpus_per_worker),
    )  # fmt: skip


def _finetune(recipe: Recipe) -> Need:
    section = recipe.finetune
    least, most = section.worker_range
    return Need(
        most * section.cpus_per_worker + 1, most * section.use_gpu, section.cpus_per_worker, float(section.use_gpu),
        least * section.use_gpu,
    )  # fmt: skip


def _generate(recipe: Recipe) -> Need:
    section = recipe.generate
    if section is None:
        raise RecipeError("the recipe has no section generate")
    return Need(
        section.engines * section.cpus_per_engine + section.writers, section.engines * section.gpus_per_engine,
        section.cpus_per_engine, section.gpus_per_engine,
    )  # fmt: skip


def _training(section: DataParallel) -> Need:
    return Need(
        section.workers * section.cpus_per_worker + 1, section.workers * section.use_gpu,
        section.cpus_per_worker, float(section.use_gpu),
    )  # fmt: skip


def _audit(recipe: Recipe) -> Need:
    section = recipe.audit
    encoder, others = _training(section.copies), (section.membership, section.utility, section.fidelity)
    # Their tasks take a GPU each, and one after the other where there is but one.
    gpu = max((float(part.use_gpu) for part in others if part is not None), default=0.0)
    return replace(encoder, gpus=max(encoder.gpus, gpu), gpus_of_one=max(encoder.gpus_of_one, gpu))


def _release(recipe: Recipe) -> Need:
    if recipe.generate is None:
        raise RecipeError("the recipe has no section generate, which names the dataset to release")
    return Need(1, 0, 1)


NEEDS: Mapping[str, Callable[[Recipe], Need]] = {
    "prepare": _prepare, "encode": _encode, "finetune": _finetune, "generate": _generate,
    "probe": lambda recipe: _training(recipe.probe), "gate": lambda recipe: _training(recipe.gate),
    "audit": _audit, "release": _release,
}  # fmt: skip
