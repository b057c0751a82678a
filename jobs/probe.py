"""Corpus -> probe: train a small network that reads attributes off scans, against which datasets are checked.

python -m jobs.probe RECIPE [--set KEY=VALUE ...]
"""

from __future__ import annotations

import time
from typing import Any

from jobs.cluster import connected, run_recipe
from jobs.training import require_workers, scans_of, train
from scanloom import console
from scanloom.artefact import Artefact, FileEntry, find_artefact, open_artefact, publish
from scanloom.models.probe_card import Check, ProbeCard, Reading
from scanloom.recipe import Recipe
from scanloom.shards.commit import begin
from scanloom.store import Store
from scanloom.training.attribute_probe import ProbeJob, plan_probe, train_probe
from scanloom.training.runs import forget, run_name


def probe(recipe: Recipe) -> None:
    """Make the recipe's probe artefact, or what is left of it."""
    started = time.monotonic()
    store = Store(recipe.uri("probe"))
    store.require_writable()
    corpus = open_artefact(recipe.uri("corpus"), "corpus")
    plan = plan_probe(recipe, corpus)
    begin(store, "probe", plan)
    made = find_artefact(store.uri, "probe")
    if made is None:
        runs, name = Store(recipe.uri("runs")), run_name("probe", plan)
        runs.require_writable()
        with connected():
            metrics = _train(recipe, corpus, runs, name)
        files, card = metrics.pop("files"), metrics.pop("card")
        made = publish(
            store, kind="probe", name=recipe.name, recipe=recipe.model_dump(mode="json"), inputs=[corpus],
            files=[FileEntry.model_validate(entry) for entry in files],
            statistics={"plan": plan, "training": metrics, "card": card},
        )  # fmt: skip
        forget(runs, name)
    _report(made, time.monotonic() - started)


def _train(recipe: Recipe, corpus: Artefact, runs: Store, name: str) -> dict[str, Any]:
    section, job = recipe.probe, ProbeJob.of(recipe, corpus)
    require_workers(section, "probe")
    columns = ["id", "image", *job.attributes.names]
    scans = scans_of(corpus, ("train", "validation"), columns, section.max_scans)
    return train("probe", section, train_probe, job, scans, runs, name)


def _report(made: Artefact, seconds: float) -> None:
    card = ProbeCard.model_validate(made.manifest.statistics["card"])
    rows = [(reading.name, _figure(reading), reading.with_it, _checked(card, reading)) for reading in card.readings]
    title = (
        f"probe: {seconds:.0f} s, {made.uri}, {card.held_out_scans} held-out scans, at most "
        f"{card.false_reject_share:.1%} of real ones refused for an attribute"
    )
    console.result_table(title, ("reads", "held-out figure (95 %)", "scans with it", "disagreement"), rows)


def _figure(reading: Reading) -> str:
    if reading.estimate is None or reading.low is None or reading.high is None:
        return "no held-out scans tell"
    what = "AUC" if reading.figure == "auc" else "mean error"
    return f"{what} {reading.estimate:.3g} ({reading.low:.3g} to {reading.high:.3g}), chance {reading.chance or 0:.3g}"


def _checked(card: ProbeCard, reading: Reading) -> str:
    """What is refused, or why nothing is."""
    told = []
    for check in card.checks:
        if check.reading == reading.name:
            told.append(f"{'' if check.present else 'absent: '}{_limit(check)}")
    return "; ".join(dict.fromkeys(told))


def _limit(check: Check) -> str:
    if check.limit is None:
        return f"not checked: {check.reason}"
    return f"below {check.limit:.3g}" if check.value is not None else f"over {-check.limit:.3g} away"


if __name__ == "__main__":
    raise SystemExit(run_recipe(probe, "probe", __doc__ or "", None))
