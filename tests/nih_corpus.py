"""Real chest X-rays as a small corpus artefact, split by patient as a test asks for it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from scanloom.artefact import Artefact, publish
from scanloom.attributes import Attributes, AttributeSchema, Envelope
from scanloom.recipe import CategoryAttribute, LabelsAttribute, NumberAttribute
from scanloom.shards.commit import ShardPart, begin, commit_shard
from scanloom.shards.schemas import corpus_schema
from scanloom.shards.writer import parquet_bytes, png_bytes
from scanloom.store import Store
from tests.nih_squares import square

PLAN = "d" * 64
FINDINGS = ("Pneumonia", "Infiltration", "Atelectasis", "Edema", "Effusion")
SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", values=("F", "M"), source="PatientSex"),
        NumberAttribute(name="age", unit="years", minimum=0, maximum=90, cap=90, source="PatientAge"),
        CategoryAttribute(name="view", values=("PA", "AP"), source="ViewPosition"),
        LabelsAttribute(name="findings", values=FINDINGS, source="ImageComments"),
    )
)


@dataclass(frozen=True)
class Scan:
    """One of the real scans, uint8 [S, S]."""

    patient: str
    pixels_SS: np.ndarray[Any, Any]
    attributes: Attributes


def nih_scans(folder: Path, size_px: int) -> list[Scan]:
    """All of them, in the order of the table."""
    with (folder / "labels.csv").open() as table:
        rows = list(csv.DictReader(table))
    return [
        Scan(
            row["Patient ID"],
            np.round(square(folder / "images" / row["Image Index"], size_px) * 255).astype(np.uint8),
            {
                "sex": row["Patient Gender"], "age": min(90, int(row["Patient Age"])), "view": row["View Position"],
                "findings": tuple(name for name in FINDINGS if name in row["Finding Labels"].split("|")),
            },
        )
        for row in rows
    ]  # fmt: skip


def dealt(scans: Sequence[Scan], shares: Sequence[float], seed: int = 0) -> list[list[Scan]]:
    """The scans in parts that share no patient, of about these shares of the patients."""
    patients = np.unique([scan.patient for scan in scans])
    np.random.default_rng(seed).shuffle(patients)
    ends = np.round(np.cumsum(shares) * len(patients)).astype(int)
    parts = [set(part.tolist()) for part in np.split(patients, ends)[: len(shares)]]
    return [[scan for scan in scans if scan.patient in part] for part in parts]


def publish_nih(uri: str, splits: Mapping[str, Sequence[Scan]]) -> Artefact:
    """A finished corpus at `uri` of these scans, in one shard."""
    store, size_px = Store(uri), len(splits["train"][0].pixels_SS)
    begin(store, "corpus", PLAN)
    numbered = {
        split: [_row(split, number, scan) for number, scan in enumerate(part)] for split, part in splits.items()
    }
    parts = [
        ShardPart(
            split, split, "parquet", parquet_bytes(pa.Table.from_pylist(rows, corpus_schema(SCHEMA))), len(rows)
        )
        for split, rows in numbered.items()
    ]  # fmt: skip
    commit = commit_shard(store, PLAN, 0, parts, sum(map(len, numbered.values())), {})
    envelope = Envelope.of(SCHEMA, [scan.attributes for scan in splits["train"]])
    statistics = {
        "plan": PLAN, "schema": SCHEMA.model_dump(mode="json"), "envelope": envelope.model_dump(mode="json"),
        "cells": [{"sex": sex, "age": [20, 80], "view": "AP", "findings": [], "count": 10} for sex in ("F", "M")],
        "spacing_mm": 4.0, "size_px": size_px,
    }  # fmt: skip
    files = list(commit.files.values())
    return publish(store, kind="corpus", name="chests", recipe={}, inputs=[], files=files, statistics=statistics)


def _row(split: str, number: int, scan: Scan) -> dict[str, object]:
    size_px, name = len(scan.pixels_SS), f"{split}-{number:06d}"
    return {
        "id": name, "patient": scan.patient, "study": name, "width": size_px, "height": size_px, "bits_stored": 8,
        "image": {"bytes": png_bytes(scan.pixels_SS), "path": f"{name}.png"}, "spacing_mm": 4.0, "unit": 0,
        "member": number, **scan.attributes,
    }  # fmt: skip
