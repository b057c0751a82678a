"""From the pixels of a shard to its Parquet and DICOM objects, and from an image's id back to its row.

Parquet's PNG and DICOM hold the same integers, so that they are equal by construction. torch-free, so that a writer
starts fast and stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scanloom.artefact import Artefact
from scanloom.attributes import Attributes
from scanloom.dicom.synthetic import InstanceDescription, instance_uid
from scanloom.dicom.template import render
from scanloom.errors import RecipeError
from scanloom.sampling.plan import Plan, PlanSpec, cell_counts, compile_plan
from scanloom.shards.commit import ShardPart, commit_shard, part_key
from scanloom.shards.reader import read_parquet
from scanloom.shards.schemas import dataset_schema
from scanloom.shards.writer import parquet_bytes, png_bytes, tar_bytes
from scanloom.store import Store

Pixels = NDArray[Any]
"""uint8 for 8 bits stored, uint16 for more."""
Place = tuple[int, int] | None
"""Offset and length of a DICOM file in its tar shard, in bytes."""

IMAGES, DICOM = "images", "dicom"
"""Folder of the dataset and role in the commits of each kind of shard."""

_KEYWORDS = (("sex", "PatientSex"), ("age", "PatientAge"), ("view", "ViewPosition"))


class EngineActor:
    """The engine of one generation actor: of a shard's number its pixels, a pure function of the plan.

    Plan and engine are made by the first call, not on construction. So the driver starts without importing torch, no
    row travels through Ray, and what is wrong with a generator is an error of that call, which ends a job at once and
    by name, while an actor that merely died while it started is started again.
    """

    def __init__(
        self, spec: PlanSpec, generator_uri: str, device: str, threads: int, probe_uri: str | None = None
    ) -> None:
        self._spec = spec
        self._arguments: tuple[Any, ...] = (spec, generator_uri, device, threads)
        if probe_uri is not None:
            self._arguments += (probe_uri,)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        number = int(shard["shard"])
        return self._engine({"shard": number, "rows": rows_to_bytes(self._plan.rows(number))})

    @cached_property
    def _plan(self) -> Plan:
        return compile_plan(self._spec)

    @cached_property
    def _engine(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        from scanloom.sampling.production import ShardEngine

        return ShardEngine(*self._arguments)


def write_shard(shard: dict[str, Any], spec: PlanSpec, store: Store) -> dict[str, Any]:
    """Encode and commit what `ShardEngine` made; shard, rows, and the commit (ours or a rival's) as JSON."""
    rows = rows_from_bytes(shard["rows"])
    dtype = np.uint8 if spec.bits_stored == 8 else np.uint16
    pixels = np.frombuffer(shard["pixels"], dtype).reshape(len(rows), shard["height"], shard["width"])
    parts = shard_parts(spec, shard["shard"], rows, pixels)
    statistics = {
        "cells": cell_counts(rows), "engine_s": shard["engine_s"], "environment": shard["environment"]
    }  # fmt: skip
    commit = commit_shard(store, spec.digest, shard["shard"], parts, len(rows), statistics)
    return {"shard": commit.shard, "rows": commit.rows, "commit": commit.model_dump_json()}


def shard_parts(spec: PlanSpec, shard: int, rows: pa.Table, pixels: Pixels) -> list[ShardPart]:
    """The data objects of a shard with pixels [N, H, W]: Parquet, and a tar of DICOM files that it points into."""
    parts: list[ShardPart] = []
    places: Sequence[Place] = [None] * len(rows)
    if spec.dicom.enabled:
        tar, places = _dicom_tar(spec, rows, pixels)
        parts.append(ShardPart(DICOM, DICOM, "tar", tar, len(rows)))
    key = part_key(shard, parts[0]) if parts else None
    table = _table(spec, rows, pixels, key, places)
    return [*parts, ShardPart(IMAGES, IMAGES, "parquet", parquet_bytes(table), len(rows))]


def describe_instance(spec: PlanSpec, image_id: str, attributes: Attributes) -> InstanceDescription:
    """What an image says in DICOM; attributes are recognised by name or by the DICOM keyword they were read from."""
    told = {declaration.source: attributes[declaration.name] for declaration in spec.attributes.declarations}
    told |= attributes
    sex, age, view = (told.get(n, told.get(k)) for n, k in _KEYWORDS)
    findings = told.get("findings")
    return InstanceDescription(
        image_id=image_id,
        dataset_name=spec.dataset,
        plan_digest=spec.digest,
        generator_name=spec.generator_name,
        generator_digest=spec.generator,
        bits_stored=spec.bits_stored,
        spacing_mm=spec.spacing_mm,
        content_date=spec.dicom.content_date,
        sex=sex if isinstance(sex, str) else None,
        age_years=age if isinstance(age, float) else None,
        view=view if isinstance(view, str) else None,
        findings=findings if isinstance(findings, tuple) else None,
    )


def stored_row(dataset: Artefact, spec: PlanSpec, image_id: str) -> dict[str, Any]:
    """The row of one image, image bytes and all. RecipeError naming the range of ids where there is none."""
    try:
        index = int(image_id[8:], 16)
    except ValueError:
        index = -1
    if not 0 <= index < spec.images or spec.image_id(index) != image_id:
        raise RecipeError(
            f"{dataset.uri}: holds no image {image_id!r}; its ids run from {spec.image_id(0)} to "
            f"{spec.image_id(spec.images - 1)}"
        )
    name = f"{IMAGES}/shard-{index // spec.images_per_shard:06d}-"
    entry = next(file for file in dataset.files(IMAGES) if file.path.startswith(name))
    rows = read_parquet(dataset.store, entry)
    row: dict[str, Any] = rows.slice(index % spec.images_per_shard, 1).to_pylist()[0]
    return row


def rows_to_bytes(rows: pa.Table) -> bytes:
    """A table as one Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def rows_from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _dicom_tar(spec: PlanSpec, rows: pa.Table, pixels: Pixels) -> tuple[bytes, list[Place]]:
    members = [
        (f"{row['id']}.dcm", render(image, describe_instance(spec, row["id"], spec.attributes.from_row(row))))
        for row, image in zip(rows.to_pylist(), pixels, strict=True)
    ]
    tar, places = tar_bytes(members)
    return tar, list(places)


def _table(
    spec: PlanSpec, rows: pa.Table, pixels: Pixels, dicom_shard: str | None, places: Sequence[Place]
) -> pa.Table:
    ids = rows["id"].to_pylist()
    schema = dataset_schema(spec.attributes)
    same = {
        "width": pixels.shape[2], "height": pixels.shape[1], "bits_stored": spec.bits_stored,
        "spacing_mm": spec.spacing_mm, "seed": spec.seed, "solver": spec.solver, "steps": spec.steps,
        "guidance_scale": spec.guidance_scale, "generator": spec.generator, "dicom_shard": dicom_shard,
    }  # fmt: skip
    own = {
        "image": [{"bytes": png_bytes(p), "path": f"{i}.png"} for i, p in zip(ids, pixels, strict=True)],
        "sop_instance_uid": [instance_uid(spec.digest, image_id, "instance") for image_id in ids],
        "dicom_offset": [place and place[0] for place in places],
        "dicom_length": [place and place[1] for place in places],
    }
    columns = {name: pa.repeat(pa.scalar(value, schema.field(name).type), len(ids)) for name, value in same.items()}
    columns |= {name: pa.array(values, schema.field(name).type) for name, values in own.items()}
    columns |= {name: rows[name] for name in ("id", "index", *spec.attributes.names)}
    return pa.table([columns[name] for name in schema.names], schema=schema)
