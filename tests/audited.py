"""A dataset of given images and its audit, measured in this process by the functions that the job runs on Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scanloom.artefact import Artefact, publish
from scanloom.audit.measuring import ENCODER, AuditJob, make_audit, write_report
from scanloom.audit.report import Copies, Report
from scanloom.audit.scans import spread, square
from scanloom.models.copy_encoder import weights_of
from scanloom.recipe import Generate
from scanloom.recipe_audit import Audit
from scanloom.sampling.dataset import rows_to_bytes, write_shard
from scanloom.sampling.plan import compile_plan, specify
from scanloom.shards.commit import ShardCommit
from scanloom.store import Store
from scanloom.training.copy_encoder import fit

Pixels = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Audited:
    """A dataset, its audit, and what that says."""

    dataset: Artefact
    audit: Artefact
    report: Report

    @property
    def copies(self) -> Copies:
        assert self.report.copies is not None
        return self.report.copies


def publish_dataset(
    uri: str, of: Artefact, corpus: Artefact, image: Callable[[int], Pixels], images: int, **changes: Any
) -> Artefact:
    """A dataset whose image n is `image(n)`, uint8 [S, S]; `changes` to the recipe's section."""
    settings = Generate(images=images, images_per_shard=40, slots=4, steps=2, **changes)
    plan = compile_plan(specify(settings, "tiny", of.digest, corpus.manifest.statistics))
    store, files = Store(uri), []
    for shard in range(plan.shards):
        rows = plan.rows(shard)
        pixels = np.stack([image(index) for index in rows["index"].to_pylist()])
        height, width = pixels.shape[1:]
        told = {"shard": shard, "rows": rows_to_bytes(rows), "pixels": pixels.tobytes(), "height": height}
        row = write_shard(told | {"width": width, "engine_s": 0.0, "environment": {}}, plan.spec, store)
        files += list(ShardCommit.model_validate_json(row["commit"]).files.values())
    statistics = {"spec": plan.spec.model_dump(mode="json"), "rows": images}
    return publish(store, kind="dataset", name="d", recipe={}, inputs=[of], files=files, statistics=statistics)


def encoder_weights(corpus: Artefact, settings: Audit, seed: int = 0) -> bytes:
    """Of the copy encoder of a corpus."""
    size_px = min(settings.copies.size_px, int(corpus.manifest.statistics["size_px"]))
    rows = spread(corpus, "train", settings.copies.max_scans)
    squares = np.stack([square(row, "train", size_px) for row in rows])
    return weights_of(fit(settings.copies, torch.from_numpy(squares)[:, None] * 2.0 - 1.0, seed))


def audited(dataset: Artefact, corpus: Artefact, settings: Audit, encoder: bytes) -> Audited:
    """The audit beside a dataset, by an encoder of its corpus."""
    store = Store(f"{dataset.uri}-audit")
    store.write(ENCODER, encoder)
    job = AuditJob.of(settings, corpus, dataset, store)
    measured = make_audit(job.model_dump(mode="json"))
    files = write_report(measured, measured.report, store)
    made = publish(
        store, kind="audit", name="d", recipe={}, inputs=[dataset, corpus], files=files, statistics={}
    )  # fmt: skip
    return Audited(dataset, made, measured.report)
