"""A small archive with everything in it, and its corpus made without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from scanloom import artefact
from scanloom.artefact import Artefact, open_artefact
from scanloom.recipe import Recipe, parse_recipe
from scanloom.scans.corpus_plan import CurationPlan, claim
from scanloom.scans.curate import (
    clean,
    duplicates,
    finished_statistics,
    settle_unit,
    stage_unit,
    staged,
)
from scanloom.scans.tally import SPLITS
from scanloom.shards.commit import committed
from scanloom.shards.reader import rows
from scanloom.shards.writer import png_pixels
from tests.made_dicom import UID_ROOT, file, radiograph, tar

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "jobs" / "recipes" / "nih-cxr.yaml"


def scan(number: int, patient: int, **elements: Any) -> bytes:
    uids = {"SOPInstanceUID": f"{UID_ROOT}1.{number}", "StudyInstanceUID": f"{UID_ROOT}2.{patient}"}
    identity = {"PatientID": f"MRN-{patient:08d}", "PatientAge": f"{20 + patient % 70:03d}Y"}
    return file(radiograph(8, (32, 32), number), **(uids | identity | elements))


def fill(folder: Path) -> dict[str, int]:
    """Five units: 27 files, 20 scans of 16 patients; how many files each code should refuse."""
    folder.mkdir(parents=True, exist_ok=True)
    scans = [scan(i, i * 4 // 5) for i in range(20)]
    again = scan(2, 99, PatientID="MRN-99999999")
    units = {
        "a.tar": tar([(f"MRN-{i}.dcm", scans[i]) for i in range(8)]),
        "b.tar.gz": tar([("x", scans[2]), *((f"{i}", scans[i]) for i in range(8, 14)), ("y", scans[9])], "w:gz"),
        "c.tar": tar([("z", again), *((f"{i}", scans[i]) for i in range(14, 20))]),
        "d.tar": tar([("letter", b"a letter"), ("lost", scan(77, 7, PatientID=None)), ("cut", scans[0][:900])]).rstrip(
            b"\0"
        ),
        "notes.txt": b"notes",
    }
    for name, data in units.items():
        (folder / name).write_bytes(data)
    return {"duplicate": 3, "not-dicom": 2} | dict.fromkeys(("broken-archive", "no-patient-id", "truncated"), 1)


def recipe(store: str, source: str, **prepare_keys: Any) -> Recipe:
    tree = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    # The waves of these tiny scans stand in rows like glyphs.
    section = {"source": {"kind": "dicom", "uri": source}, "size_px": 32, "max_rejected_share": 0.5}
    section["burned_in_text"] = "flag"
    return parse_recipe(tree | {"store": store, "prepare": section | prepare_keys}, "test")


def arguments(store: object, source: object, *more: str) -> list[str]:
    keys = {"store": store, "prepare.source.uri": source, "prepare.size_px": 32, "prepare.max_rejected_share": 0.5}
    overrides = [f"{key}={value}" for key, value in keys.items()] + list(more)
    return [str(RECIPE), *(part for override in overrides for part in ("--set", override))]


def curate(plan: CurationPlan, order: list[int] | None = None) -> dict[str, Any]:
    """What the job does, without Ray: the units in this order."""
    claim(plan)
    for index in order if order is not None else range(len(plan.units)):
        stage(plan, index)
    shards = staged(plan.curation)
    losers = duplicates(shards)
    for unit, shard in shards.items():
        settle_unit({"staged": shard.model_dump_json(), "losers": losers.get(unit, [])}, plan.curation)
    return contents(plan)


def stage(plan: CurationPlan, place: int) -> None:
    """Stage one of the plan's units as the job does."""
    unit = plan.units[place]
    row = {"unit": unit.model_dump_json(), "taken_over": plan.taken_over_json(unit.index)}
    stage_unit(row, plan.curation)


def contents(plan: CurationPlan) -> dict[str, Any]:
    """Every committed file with its hash, and the corpus's statistics."""
    commits = committed(plan.curation.store, plan.curation.plan)
    files = {f.path: f.sha256 for commit in commits.values() for f in commit.files.values()}
    return {"files": files, "statistics": finished_statistics(commits.values(), plan.curation)}


def scans_of(corpus: Artefact) -> dict[str, tuple[Any, ...]]:
    """Split, place and pixels by id, over all splits; no id twice."""
    found: dict[str, tuple[Any, ...]] = {}
    for split in SPLITS:
        for row in rows(corpus, split):
            assert row["id"] not in found
            pixels = png_pixels(row["image"]["bytes"]).tobytes()
            found[row["id"]] = (split, row["unit"], row["member"], row["patient"], pixels)
    return found


def quarantined(corpus: Artefact) -> list[tuple[Any, ...]]:
    return [(r["unit"], r["member"], r["code"]) for r in rows(corpus, "quarantine")]


def require_apart(corpus: Artefact) -> None:
    splits: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in rows(corpus, split, ["patient"]):
            splits.setdefault(row["patient"], set()).add(split)
    assert splits
    assert all(len(found) == 1 for found in splits.values())


def publish(plan: CurationPlan) -> None:
    """Finish a curated corpus as the job does."""
    commits = committed(plan.curation.store, plan.curation.plan)
    files = [file for commit in commits.values() for file in commit.files.values()]
    artefact.publish(
        plan.curation.store, kind="corpus", name="test", recipe={}, inputs=plan.lineage, files=files, statistics={}
    )
    clean(plan.curation)


def by_id(plan: CurationPlan) -> dict[str, tuple[Any, ...]]:
    """Split, patient and pixels of each scan by its id, wherever it stood in the source."""
    corpus = open_artefact(plan.curation.corpus)
    return {scan: (found[0], *found[3:]) for scan, found in scans_of(corpus).items()}
