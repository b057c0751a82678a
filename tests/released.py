"""A corpus, a generator, a dataset with DICOM files and its audit, all tiny, as a release needs them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scanloom.artefact import Artefact, FileEntry, publish
from scanloom.audit.report import PAGE, PRIVATE, REPORT, Copies, Interval, PlantedRecall, Report, Subject
from scanloom.recipe import Generate
from scanloom.sampling.dataset import rows_to_bytes, write_shard
from scanloom.sampling.plan import compile_plan, specify
from scanloom.shards.commit import ShardCommit
from scanloom.store import Store
from tests.tiny_generator import STATISTICS

POLICY = """
name: hospital
target: research
licences:
  - {of: phantoms, terms: CC0-1.0, allows: [research, commercial]}
"""
IMAGES = 10


def put(store: Store, files: dict[str, bytes]) -> list[FileEntry]:
    """Write objects; their entries."""
    for path, data in files.items():
        store.write(path, data)
    return [FileEntry(path=p, bytes=len(d), sha256=hashlib.sha256(d).hexdigest()) for p, d in files.items()]


def corpus(uri: str, content: bytes = b"scans") -> Artefact:
    """A corpus of no scans but with a digest of its own."""
    store = Store(uri)
    files = put(store, {"train/shard.parquet": content})
    return publish(store, kind="corpus", name="phantoms", recipe={}, inputs=[], files=files, statistics={})


def generator(uri: str, of: Artefact) -> Artefact:
    store = Store(uri)
    files = put(store, {"generator.json": b"{}"})
    return publish(store, kind="generator", name="tiny", recipe={}, inputs=[of], files=files, statistics={})


def dataset(uri: str, of: Artefact, **changes: Any) -> Artefact:
    """Ten images of noise in three shards, with DICOM."""
    settings: dict[str, Any] = {"images": IMAGES, "images_per_shard": 4, "slots": 4, "steps": 2}
    plan = compile_plan(specify(Generate(**settings | changes), "tiny", of.digest, STATISTICS))
    store, files = Store(uri), []
    for shard in range(plan.shards):
        rows = plan.rows(shard)
        pixels = np.random.default_rng(shard).integers(0, 256, (len(rows), 24, 20)).astype(np.uint8)
        told = {"shard": shard, "rows": rows_to_bytes(rows), "pixels": pixels.tobytes(), "height": 24, "width": 20}
        row = write_shard(told | {"engine_s": 0.0, "environment": {}}, plan.spec, store)
        files += list(ShardCommit.model_validate_json(row["commit"]).files.values())
    statistics = {"spec": plan.spec.model_dump(mode="json"), "rows": IMAGES}
    return publish(store, kind="dataset", name="d", recipe={}, inputs=[of], files=files, statistics=statistics)


def copies(**changes: Any) -> Copies:
    """Copies as they are where all is well, but for the changes."""
    found: dict[str, Any] = {
        "tau": 0.9, "asked": 0.01, "promised": 0.01, "at_most": 0.03, "calibration_patients": 99,
        "calibration_scans": 140, "train_scans": 400, "corpus_scans": 400,
        "power": [PlantedRecall(
            plant="as it is", strength="slight", recall=Interval(value=1.0, low=0.99, high=1.0), traced=1.0, copies=400,
        )],
        "synthetic_rate": Interval(value=0.0, low=0.0, high=0.005), "synthetic_copies": 0, "copied_scans": 0,
        "held_out_rate": Interval(value=0.0, low=0.0, high=0.03), "held_out_scans": 100, "excess": False,
        "same_patient_found": 0.1, "other_patient_found": 0.0,
    }  # fmt: skip
    return Copies.model_validate(found | changes)


def report(of: Artefact, against: Artefact, **parts: Any) -> Report:
    """A report in which all is well, with these parts."""
    subject = Subject(name="d", dataset=of.digest, corpus=against.digest, images=IMAGES, looked_at=IMAGES)
    return Report(subject=subject, seconds=1.0, **{"copies": copies(), **parts})


def audit(uri: str, of: Artefact, against: Artefact, told: Report | None = None) -> Artefact:
    store = Store(uri)
    told = told or report(of, against)
    pages = {
        REPORT: told.model_dump_json().encode(), PAGE: b"<!doctype html>", f"{PRIVATE}/pairs.png": b"real scans",
    }  # fmt: skip
    files = put(store, pages)
    return publish(store, kind="audit", name="d", recipe={}, inputs=[of, against], files=files, statistics={})


@dataclass(frozen=True)
class Chain:
    """Everything from corpus to audit in one folder."""

    folder: Path
    corpus: Artefact
    generator: Artefact
    dataset: Artefact
    audit: Artefact

    @classmethod
    def made(cls, folder: Path, told: Callable[[Artefact, Artefact], Report] = report, **changes: Any) -> Chain:
        scans = corpus(str(folder / "corpus"))
        model = generator(str(folder / "generator"), scans)
        images = dataset(str(folder / "dataset"), model, **changes)
        return cls(folder, scans, model, images, audit(str(folder / "audit"), images, scans, told(images, scans)))
