"""Source -> corpus: read, decode, de-identify and split every scan; what cannot be used is in the quarantine table.

python -m jobs.prepare RECIPE [--set KEY=VALUE ...]
python -m jobs.prepare RECIPE --locate UNIT:MEMBER     name the source file of a quarantine row, on this screen only
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray.data

from jobs.cluster import connected, run_recipe
from scanloom import console
from scanloom.artefact import Artefact, find_artefact, publish
from scanloom.errors import RecipeError, ScanloomError
from scanloom.recipe import Recipe
from scanloom.scans.curate import (
    CurationPlan,
    clean,
    duplicates,
    finished_statistics,
    plan_curation,
    rejections,
    settle_unit,
    stage_unit,
    staged,
    too_few_left,
)
from scanloom.scans.quarantine import CODES
from scanloom.scans.sources import locate
from scanloom.scans.tally import SPLITS
from scanloom.shards.commit import ShardCommit, begin, committed
from scanloom.store import Store

# A driver that tracks more tasks than this spends its time on them; units then share a task.
MOST_TASKS = 2000


def prepare(recipe: Recipe) -> None:
    """Make the recipe's corpus, or what is left of it."""
    started = time.monotonic()
    Store(recipe.store).require_bucket()
    plan = plan_curation(recipe)
    corpus = plan.curation.store
    corpus.require_writable()
    begin(corpus, "corpus", plan.curation.plan)
    finished = find_artefact(corpus.uri, "corpus")
    if finished is None:
        with connected():
            _settle(plan, _stage(plan))
    artefact = finished or _publish(plan, recipe)
    clean(plan.curation)
    _report(artefact, "was finished before" if finished else f"{time.monotonic() - started:.0f} s")


def _stage(plan: CurationPlan) -> dict[int, ShardCommit]:
    """Read every unit that is not staged yet; all the staged shards."""
    present = staged(plan.curation)
    rows = [{"unit": unit.model_dump_json()} for unit in plan.units if unit.index not in present]
    with console.progress("read", len(plan.units), "units", done=len(present)) as advance:
        totals: Counter[str] = Counter()
        for result in _distributed(rows, stage_unit, plan):
            totals.update(scans=result["scans"], rejected=result["rejected"])
            advance(1, **totals)
    return staged(plan.curation)


def _settle(plan: CurationPlan, shards: Mapping[int, ShardCommit]) -> None:
    """Commit every shard that is not yet, without the scans that are duplicates of earlier ones."""
    losers = duplicates(shards)
    rejected = rejections(shards, losers)
    if refusal := too_few_left(shards.values(), rejected, plan.section.max_rejected_share):
        _show_quarantine(rejected)
        raise ScanloomError(refusal)
    present = committed(plan.curation.store, plan.curation.plan)
    rows = [
        {"staged": shard.model_dump_json(), "losers": losers.get(unit, [])}
        for unit, shard in shards.items()
        if unit not in present
    ]
    with console.progress("commit", len(shards), "shards", done=len(present)) as advance:
        for _ in _distributed(rows, settle_unit, plan):
            advance(1)


def _distributed(
    rows: Sequence[Mapping[str, Any]], work: Callable[..., dict[str, int]], plan: CurationPlan
) -> Iterator[dict[str, Any]]:
    """The results of a function of the library on each row, as Ray's workers finish them."""
    if not rows:
        return iter(())
    units: ray.data.Dataset = ray.data.from_items(list(rows), override_num_blocks=min(len(rows), MOST_TASKS))
    pool = ray.data.TaskPoolStrategy(size=min(plan.section.workers, len(rows)))
    return iter(units.map(work, fn_kwargs={"curation": plan.curation}, num_cpus=1, compute=pool).iter_rows())


def _publish(plan: CurationPlan, recipe: Recipe) -> Artefact:
    commits = committed(plan.curation.store, plan.curation.plan)
    return publish(
        plan.curation.store, kind="corpus", name=recipe.name, recipe=recipe.model_dump(mode="json"),
        inputs=[plan.source], files=[file for commit in commits.values() for file in commit.files.values()],
        statistics=finished_statistics(commits.values(), plan.curation),
    )  # fmt: skip


def _report(corpus: Artefact, how: str) -> None:
    statistics = corpus.manifest.statistics
    rows = [
        (split, f"{corpus.uri}/{split}", statistics["scans"][split], statistics["patients"][split]) for split in SPLITS
    ]
    rows.append(("quarantine", f"{corpus.uri}/quarantine", sum(statistics["quarantined"].values()), ""))
    title = f"corpus {corpus.digest[:12]} of {statistics['rows']} scans: {how}"
    console.result_table(title, ("what", "where", "scans", "patients"), rows)
    if statistics["quarantined"]:
        _show_quarantine(statistics["quarantined"])


def _show_quarantine(rejected: Mapping[str, int]) -> None:
    rows = [(code, count, CODES.get(code, "")) for code, count in rejected.items()]
    console.result_table("quarantine (docs/quarantine.md)", ("code", "files", "reason"), rows)


def _locate(recipe: Recipe, place: str) -> None:
    """Print the source's name of UNIT:MEMBER. Names can identify, so they stand in no artefact and no log."""
    plan = plan_curation(recipe)
    try:
        unit, member = (int(part) for part in place.split(":"))
        name = locate(plan.curation.source, plan.units[unit], member)
    except (ValueError, IndexError) as error:
        raise RecipeError(f"--locate {place}: expected UNIT:MEMBER as the quarantine table gives them") from error
    console.result_table(f"unit {unit}, member {member}", ("source",), [(name,)])


def main(argv: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--locate", metavar="UNIT:MEMBER")
    known, rest = own.parse_known_args(argv)
    work = (lambda recipe: _locate(recipe, known.locate)) if known.locate else prepare
    return run_recipe(work, "prepare", __doc__ or "", rest)


if __name__ == "__main__":
    sys.exit(main())
