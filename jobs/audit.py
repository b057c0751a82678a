"""Dataset -> audit: whose scans are in it, what it betrays, how real, fair and useful it is. Evidence for a release.

python -m jobs.audit RECIPE [--set KEY=VALUE ...]     run it again to go on after an interruption
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from pydantic import TypeAdapter

from jobs.cluster import connected, interruptible, require_room, run_recipe
from jobs.training import train_encoder
from scanloom import console
from scanloom.artefact import Artefact, FileEntry, find_artefact, open_artefact, plan_digest, publish
from scanloom.attributes import AttributeSchema
from scanloom.audit.given import GivenJob, look_again
from scanloom.audit.measuring import ENCODER, AuditJob, Measured, make_audit, write_report
from scanloom.audit.membership import MembershipJob, attack
from scanloom.audit.report import PAGE, REPORT, GivenFidelity, Membership, Utility, read_report
from scanloom.audit.utility import UtilityJob, read_material, require_known, utility_of
from scanloom.audit.verdicts import verdicts
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import Recipe
from scanloom.shards.commit import begin
from scanloom.store import Store
from scanloom.training.copy_encoder import CopyEncoderJob, plan_copy_encoder
from scanloom.training.runs import forget, run_name
from scanloom.training.utility import lessons, train_and_score


def audit(recipe: Recipe) -> None:
    """Make the audit of the recipe's dataset, or what is left of it."""
    started = time.monotonic()
    if recipe.generate is None:
        raise RecipeError("the recipe has no `generate` section, which names the dataset to audit; add one")
    corpus = open_artefact(recipe.uri("corpus"), "corpus")
    require_known(recipe.audit, AttributeSchema.model_validate(corpus.manifest.statistics["schema"]))
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
            _require_gpus(recipe, parts := runs.at(f"{name}/parts"))
            metrics = train_encoder(CopyEncoderJob.of(recipe, corpus, store, ENCODER), corpus, runs, name)
            files = _measure(recipe, corpus, dataset, probe, store, parts)
        made = publish(
            store, kind="audit", name=dataset.manifest.name, recipe=recipe.model_dump(mode="json"),
            inputs=[dataset, corpus, *([probe] if probe else [])], files=files,
            statistics={"plan": plan, "training": metrics},
        )  # fmt: skip
        forget(runs, name)
    _report(made, time.monotonic() - started)


def _require_gpus(recipe: Recipe, parts: Store) -> None:
    """Refuse now what would wait for a GPU once the encoder is trained; a part that is kept needs none."""
    for name, kept in {"membership": "membership", "fidelity": "given", "utility": "utility"}.items():
        needed = getattr(getattr(recipe.audit, name), "use_gpu", False) and not parts.exists(f"{kept}.json")
        require_room(1, needed, f"audit.{name}.use_gpu")


def _measure(
    recipe: Recipe, corpus: Artefact, dataset: Artefact, probe: Artefact | None, store: Store, parts: Store
) -> list[FileEntry]:
    """On the cluster, where the data is near; a part that an earlier run finished is not measured again."""
    section = recipe.audit
    job = AuditJob.of(section, corpus, dataset, store, probe).model_dump(mode="json")
    made = _kept(parts, "measured", Measured, lambda: ray.get(_task(make_audit).remote(job)))
    told: dict[str, Any] = {}
    if section.membership is not None:
        told["membership"] = _kept(parts, "membership", Membership, lambda: _attack(recipe, corpus, dataset))
    if section.utility is not None:
        told["utility"] = _kept(parts, "utility", Utility, lambda: _learn(recipe, corpus, dataset))
    if section.fidelity.backbone or section.fidelity.radiomics:
        looks = tuple[GivenFidelity, ...]
        told["fidelity_given"] = _kept(parts, "given", looks, lambda: _look_again(recipe, corpus, dataset))
    return write_report(made, made.report.model_copy(update=told), store)


def _attack(recipe: Recipe, corpus: Artefact, dataset: Artefact) -> Any:
    settings = recipe.audit.membership
    assert settings is not None
    generator = dataset.manifest.used_as("generator")
    if generator is None:
        raise ArtefactError(f"{dataset.uri}: names no generator to attack; set audit.membership=null")
    job = MembershipJob(settings=settings, seed=recipe.seed, corpus_uri=corpus.uri, generator_uri=generator.uri)
    return ray.get(_task(attack, settings.use_gpu).remote(job.model_dump(mode="json")))


def _look_again(recipe: Recipe, corpus: Artefact, dataset: Artefact) -> Any:
    settings = recipe.audit.fidelity
    job = GivenJob(settings=settings, corpus_uri=corpus.uri, dataset_uri=dataset.uri)
    return ray.get(_task(look_again, settings.use_gpu).remote(job.model_dump(mode="json")))


def _learn(recipe: Recipe, corpus: Artefact, dataset: Artefact) -> Any:
    """One task reads the images, one more for every classifier trains it on them."""
    settings = recipe.audit.utility
    assert settings is not None
    job = UtilityJob(settings=settings, corpus_uri=corpus.uri, dataset_uri=dataset.uri)
    material = _task(read_material, settings.use_gpu).remote(job.model_dump(mode="json"))
    trainings = [
        _task(train_and_score, settings.use_gpu).remote(one, material) for one in lessons(settings, recipe.seed)
    ]
    left = trainings
    with console.progress("classifiers", len(trainings), "trained") as advance:
        while left:
            done, left = ray.wait(left)
            advance(len(done))
    groups = recipe.audit.fairness.groups
    scores, least = ray.get(trainings), settings.least_patients
    return ray.get(_task(utility_of).remote(material, scores, groups, least, recipe.seed))


def _task(work: Callable[..., Any], use_gpu: bool = False) -> Any:
    return ray.remote(num_cpus=1, num_gpus=int(use_gpu), max_retries=3)(work)


def _kept(parts: Store, name: str, kind: Any, make: Callable[[], Any]) -> Any:
    """A part of the audit: as an earlier run left it, or made now and kept for a later one."""
    key, spelled = f"{name}.json", TypeAdapter(kind)
    if parts.exists(key):
        return spelled.validate_json(parts.read(key))
    made = interruptible(make)
    parts.write(key, spelled.dump_json(made))
    return made


def _report(made: Artefact, seconds: float) -> None:
    report = read_report(made.store.read(REPORT), made.store.uri_of(REPORT))
    title = f"audit: {seconds:.0f} s, {report.subject.looked_at} of {report.subject.images} images"
    rows = [(one.question, one.answer, one.because) for one in verdicts(report)]
    console.result_table(title, ("question", "answer", "why"), rows)
    console.result_table("audit", ("where", "digest"), [(made.store.uri_of(PAGE), made.digest[:12])])


if __name__ == "__main__":
    raise SystemExit(run_recipe(audit, "audit", __doc__ or "", None))
