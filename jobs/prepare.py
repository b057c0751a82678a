"""Source -> corpus: read, decode, de-identify and split every scan; what cannot be used is in the quarantine table.

python -m jobs.prepare RECIPE [--set KEY=VALUE ...]
python -m jobs.prepare RECIPE --locate UNIT:MEMBER     name the source file of a quarantine row, on this screen only
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import ray

from jobs.cluster import connected, run_recipe
from scanloom import console
from scanloom.artefact import Artefact, find_artefact, publish
from scanloom.errors import RecipeError, ScanloomError
from scanloom.recipe import Recipe
from scanloom.scans import curate
from scanloom.scans.corpus_plan import STAGING, CurationPlan, claim, plan_curation
from scanloom.scans.near_duplicates import report_near_duplicates
from scanloom.scans.quarantine import CODES
from scanloom.scans.sources import locate
from scanloom.scans.tally import SPLITS
from scanloom.shards.commit import ShardCommit, committed, committed_shards
from scanloom.store import Store


def prepare(recipe: Recipe) -> None:
    """Make the recipe's corpus, what is left of it, or its next version where the source has grown."""
    started = time.monotonic()
    Store(recipe.store).require_bucket()
    plan = plan_curation(recipe)
    corpus = plan.curation.store
    corpus.require_writable()
    claim(plan)
    finished = find_artefact(corpus.uri, "corpus")
    if finished is None:
        with connected():
            _settle(plan, stage(plan))
    artefact = finished or _publish(plan, recipe)
    curate.clean(plan.curation)
    _report(artefact, plan, recipe, "was finished before" if finished else f"{time.monotonic() - started:.0f} s")


def stage(plan: CurationPlan) -> dict[int, ShardCommit]:
    """Read every unit that is not staged yet, or take it over from the version before; all the staged shards."""
    present = committed_shards(plan.curation.store.at(STAGING))
    missing = [unit for unit in plan.units if unit.index not in present]
    # The largest first: at the end no worker is left with much of one while the others have nothing to do.
    missing.sort(key=lambda unit: sum(file.bytes for file in unit.files), reverse=True)
    rows = [{"unit": unit.model_dump_json(), "taken_over": plan.taken_over_json(unit.index)} for unit in missing]
    _distribute("read", rows, curate.stage_unit, plan)
    return curate.staged(plan.curation)


def _settle(plan: CurationPlan, shards: Mapping[int, ShardCommit]) -> None:
    """Commit every shard that is not yet, without the scans that are duplicates of earlier ones."""
    losers = curate.duplicates(shards)
    if refusal := curate.too_few_left(shards, losers, plan.section.max_rejected_share):
        _show_quarantine(curate.rejections(shards, losers))
        raise ScanloomError(refusal)
    missing = shards.keys() - committed(plan.curation.store, plan.curation.plan).keys()
    rows = [{"staged": shards[unit].model_dump_json(), "losers": losers.get(unit, [])} for unit in sorted(missing)]
    _distribute("commit", rows, curate.settle_unit, plan)


def _distribute(
    what: str, rows: Sequence[Mapping[str, Any]], work: Callable[..., dict[str, int]], plan: CurationPlan
) -> None:
    """Run a function of the library on each row on Ray's workers; it returns counts for the progress line.

    Units flow nowhere: what Ray Data does many times a second for data that does, workers on every core would pay for.
    """
    unit: Any = ray.remote(num_cpus=1, max_retries=-1, scheduling_strategy="SPREAD")(work)
    left = (unit.remote(row, plan.curation) for row in rows)
    running = list(islice(left, plan.section.workers))
    totals: Counter[str] = Counter()
    with console.progress(what, len(plan.listing.units), "units", done=len(plan.listing.units) - len(rows)) as advance:
        try:
            while running:
                done, running = ray.wait(running)
                # First the next units: a worker waits for them.
                running += islice(left, len(done))
                for counts in ray.get(done):
                    totals.update(counts)
                    advance(1, **totals)
        finally:
            for task in running:
                ray.cancel(task)


def _publish(plan: CurationPlan, recipe: Recipe) -> Artefact:
    store = plan.curation.store
    commits = committed(store, plan.curation.plan)
    pairs, counts = report_near_duplicates(store, commits.values(), plan.section.near_duplicate_bits)
    files = [file for commit in commits.values() for file in commit.files.values()]
    statistics = curate.finished_statistics(commits.values(), plan.curation) | counts | {"version": plan.version}
    made_by = recipe.model_copy(update={"corpus_version": plan.version})
    return publish(
        store, kind="corpus", name=recipe.name, recipe=made_by.model_dump(mode="json"), inputs=plan.lineage,
        files=[*files, *pairs], statistics=statistics,
    )  # fmt: skip


def _report(corpus: Artefact, plan: CurationPlan, recipe: Recipe, how: str) -> None:
    statistics = corpus.manifest.statistics
    rows = [
        (split, f"{corpus.uri}/{split}", statistics["scans"][split], statistics["patients"][split]) for split in SPLITS
    ]
    rows.append(("quarantine", f"{corpus.uri}/quarantine", sum(statistics["quarantined"].values()), ""))
    title = f"corpus {corpus.digest[:12]} of {statistics['rows']} scans: {how}"
    console.result_table(title, ("what", "where", "scans", "patients"), rows)
    if statistics["quarantined"]:
        _show_quarantine(statistics["quarantined"])
    for remark in plan.remarks(statistics, recipe.corpus_version):
        console.show(remark)


def _show_quarantine(rejected: Mapping[str, int]) -> None:
    rows = [(code, count, CODES.get(code, "")) for code, count in rejected.items()]
    console.result_table("quarantine (docs/quarantine.md)", ("code", "files", "reason"), rows)


def _locate(recipe: Recipe, place: str) -> None:
    """Print the source's name of UNIT:MEMBER. Names can identify, so they stand in no artefact and no log."""
    plan = plan_curation(recipe)
    try:
        unit, member = (int(part) for part in place.split(":"))
        name = locate(plan.curation.source, plan.unit(unit), member)
    except (ValueError, IndexError) as error:
        raise RecipeError(f"--locate {place}: no such UNIT:MEMBER; the source may have changed since") from error
    console.result_table(f"unit {unit}, member {member}", ("source",), [(name,)])


def main(argv: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--locate", metavar="UNIT:MEMBER")
    known, rest = own.parse_known_args(argv)
    work = (lambda recipe: _locate(recipe, known.locate)) if known.locate else prepare
    return run_recipe(work, "prepare", __doc__ or "", rest)


if __name__ == "__main__":
    sys.exit(main())
