"""A small corpus artefact made of phantoms, for tests of what comes after curation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from scanloom.artefact import Artefact, publish
from scanloom.attributes import AttributeSchema, Envelope
from scanloom.recipe import CategoryAttribute, LabelsAttribute, NumberAttribute, Recipe, parse_recipe
from scanloom.scans.phantoms import phantom
from scanloom.shards.commit import ShardPart, begin, commit_shard
from scanloom.shards.schemas import corpus_schema
from scanloom.shards.writer import parquet_bytes, png_bytes
from scanloom.store import Store

PLAN = "c" * 64
SIZE = 32
ATTRIBUTES = (
    CategoryAttribute(name="sex", values=("F", "M"), source="PatientSex"),
    NumberAttribute(name="age", unit="years", minimum=0, maximum=90, cap=90, source="PatientAge"),
    CategoryAttribute(name="view", values=("PA", "AP"), source="ViewPosition"),
    LabelsAttribute(
        name="findings",
        values=("Cardiomegaly", "Effusion", "Nodule", "Pneumothorax", "Consolidation"),
        source="ImageComments",
    ),
)
SCHEMA = AttributeSchema(declarations=ATTRIBUTES)


def phantom_recipe(store: Path | str, **sections: Any) -> Recipe:
    """The recipe of what is made of the corpus in `store`."""
    tree = {
        "name": "tiny", "store": str(store), "seed": 3,
        "attributes": [attribute.model_dump(mode="json") for attribute in ATTRIBUTES],
    }  # fmt: skip
    return parse_recipe(tree | sections, "test")


def publish_corpus(uri: str, scans: int = 48, shards: int = 2, distinct: int | None = None) -> Artefact:
    """A finished corpus at `uri`: phantoms of SIZE px, three quarters train and a quarter validation.

    With `distinct` there are but so many different phantoms, in turn.
    """
    store = Store(uri)
    begin(store, "corpus", PLAN)
    files, trained = [], []
    for shard in range(shards):
        members = range(shard * scans // shards, (shard + 1) * scans // shards)
        rows = [_row(shard, member, distinct or scans) for member in members]
        parts = []
        for split, wanted in (("train", (0, 1, 2)), ("validation", (3,))):
            chosen = [row for number, row in enumerate(rows) if number % 4 in wanted]
            trained += chosen if split == "train" else []
            data = parquet_bytes(pa.Table.from_pylist(chosen, corpus_schema(SCHEMA)))
            parts.append(ShardPart(split, split, "parquet", data, len(chosen)))
        commit = commit_shard(store, PLAN, shard, parts, len(rows), {})
        files += list(commit.files.values())
    envelope = Envelope.of(SCHEMA, [SCHEMA.from_row(row) for row in trained])
    cells = [
        {"sex": sex, "age": [20, 89], "view": "PA", "findings": findings, "count": 10}
        for sex in ("F", "M")
        for findings in ([], ["Cardiomegaly"])
    ]
    statistics = {
        "plan": PLAN,
        "schema": SCHEMA.model_dump(mode="json"),
        "envelope": envelope.model_dump(mode="json"),
        "cells": cells,
        "spacing_mm": 4.0,
        "size_px": SIZE,
    }
    return publish(store, kind="corpus", name="phantoms", recipe={}, inputs=[], files=files, statistics=statistics)


def _row(shard: int, member: int, distinct: int) -> dict[str, object]:
    drawn = phantom(11, member % distinct, SIZE)
    image = {"bytes": png_bytes(drawn.pixels), "path": f"{member}.png"}
    return {
        "id": f"{member:016x}",
        "patient": f"{member:08x}",
        "study": f"{member:08x}",
        "image": image,
        "width": SIZE,
        "height": SIZE,
        "bits_stored": 8,
        "spacing_mm": 4.0,
        "unit": shard,
        "member": member,
        **drawn.attributes,
    }
