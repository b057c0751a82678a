"""From the pixels of a shard to its Parquet and tar objects, and from an image's id back to its row.

Every object of a shard holds the same integers, so that they are equal by construction. torch-free, so that a writer
starts fast and stays small.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scanloom.artefact import Artefact
from scanloom.attributes import Attributes, AttributeSchema
from scanloom.dicom.synthetic import InstanceDescription, instance_uid
from scanloom.dicom.template import pieces
from scanloom.errors import RecipeError
from scanloom.recipe import Dicom, NumberAttribute
from scanloom.sampling.plan import Plan, PlanSpec, cell_counts, compile_plan
from scanloom.shards.commit import ShardCommit, ShardPart, commit_uploaded, part_key, upload_parts
from scanloom.shards.reader import read_parquet
from scanloom.shards.schemas import IMAGE, dataset_schema, rejects_schema
from scanloom.shards.writer import SUFFIXES, image_bytes, parquet_bytes, tar_bytes
from scanloom.store import Store

Pixels = NDArray[Any]
"""uint8 for 8 bits stored, uint16 for more."""
Place = tuple[int, int] | None
"""Offset and length of a DICOM file in its tar shard, in bytes."""

IMAGES, DICOM, WEBDATASET, REJECTS = "images", "dicom", "webdataset", "rejects"
"""Folder of the dataset and role in the commits of each kind of shard."""
INFEASIBLE = "infeasible"
"""Reason of the reject that says of an image, not of a draw, that it is not in the dataset."""

# Codecs leave the interpreter to others: while one thread hashes or talks to the store, another encodes.
_ENCODERS = 2
_UPLOADS = 2

_AGE = {"age", "PatientAge"}
_KEYWORDS = (("sex", "PatientSex"), ("age", "PatientAge"), ("view", "ViewPosition"))


class Origin(Protocol):
    """What images say in DICOM of where they come from: a plan, or whatever else made them."""

    @property
    def dataset(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def generator(self) -> str:
        """Its digest."""
        ...

    @property
    def generator_name(self) -> str: ...
    @property
    def attributes(self) -> AttributeSchema: ...
    @property
    def bits_stored(self) -> Literal[8, 12, 16]: ...
    @property
    def spacing_mm(self) -> float: ...
    @property
    def dicom(self) -> Dicom: ...


class EngineActor:
    """The engine of one generation actor: of a shard's number its pixels, a pure function of the plan.

    Plan and engine are made by the first call, not on construction. So the driver starts without importing torch, no
    row travels through Ray, and what is wrong with a generator is an error of that call, which ends a job at once and
    by name, while an actor that merely died while it started is started again.
    """

    def __init__(
        self, spec: PlanSpec, generator_uri: str, device: str, threads: int, probe_uri: str | None = None,
        gate_uri: str | None = None,
    ) -> None:  # fmt: skip
        self._spec = spec
        self._arguments: tuple[Any, ...] = (spec, generator_uri, device, threads, probe_uri, gate_uri)

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
    """Encode and commit what `ShardEngine` made; shard, rows, and the commit (ours or a rival's) as JSON.

    `shard` has the plan's `rows` of the shard; `rejects`, each with `index`, `attempt`, `reason` and `figures`; and
    of every row that no reject declares infeasible, in order, its pixels and the attempt that entered.
    """
    number, planned = shard["shard"], rows_from_bytes(shard["rows"])
    rejects = shard.get("rejects", [])
    lost = [reject["index"] for reject in rejects if reject["reason"] == INFEASIBLE]
    rows = planned.filter(pa.array(~np.isin(planned["index"].to_numpy(), np.array(lost, np.int64))))
    attempts = shard.get("attempts") or [0] * len(rows)
    dtype = np.uint8 if spec.bits_stored == 8 else np.uint16
    pixels = np.frombuffer(shard["pixels"], dtype).reshape(len(rows), shard["height"], shard["width"])
    statistics = {
        "cells": cell_counts(rows),
        "attempts": {str(attempt): images for attempt, images in sorted(Counter(attempts).items())},
        **_reject_counts(planned, rejects),
        "engine_s": shard["engine_s"],
        "environment": shard["environment"],
    }
    parts = shard_parts(spec, number, rows, pixels, attempts)
    with ThreadPoolExecutor(_UPLOADS) as pool:
        # While one part travels the next is made.
        uploads = [pool.submit(upload_parts, store, number, [part]) for part in parts]
        if rejects:
            uploads.append(pool.submit(upload_parts, store, number, [_rejects_part(spec, planned, rejects)]))
        files = {role: entry for upload in uploads for role, entry in upload.result().items()}
    ours = ShardCommit(shard=number, plan=spec.digest, rows=len(rows), files=files, statistics=statistics)
    commit = commit_uploaded(store, ours)
    return {"shard": commit.shard, "rows": commit.rows, "commit": commit.model_dump_json()}


def shard_parts(
    spec: PlanSpec, shard: int, rows: pa.Table, pixels: Pixels, attempts: Sequence[int] | None = None
) -> Iterator[ShardPart]:
    """The data objects of a shard with pixels [N, H, W], as they are made.

    A tar of DICOM files, the Parquet that points into it, and a tar for WebDataset readers; the tars where the plan
    asks for them. `attempts`: of each image, how often it was drawn and rejected before (None: never).
    """
    told = rows.to_pylist()
    attempts = attempts or [0] * len(told)
    with ThreadPoolExecutor(_ENCODERS) as pool:
        encoded = pool.map(lambda image: image_bytes(image, spec.image_format), pixels)
        places: Sequence[Place] = [None] * len(told)
        key = None
        if spec.dicom.enabled and told:
            tar, places = _dicom_tar(spec, told, pixels, pool)
            part = ShardPart(DICOM, DICOM, "tar", tar, len(told))
            key = part_key(shard, part)
            yield part
        images = list(encoded)
    table = _table(spec, rows, pixels, images, attempts, key, places)
    yield ShardPart(IMAGES, IMAGES, "parquet", parquet_bytes(table, stored=("image.bytes",)), len(told))
    if spec.webdataset and told:
        tar, _ = tar_bytes(_webdataset_members(spec, table, images, pixels))
        yield ShardPart(WEBDATASET, WEBDATASET, "tar", tar, len(told))


def describe_instance(spec: Origin, image_id: str, attributes: Attributes) -> InstanceDescription:
    """What an image says in DICOM; attributes are recognised by name or by the DICOM keyword they were read from."""
    told = {declaration.source: attributes[declaration.name] for declaration in spec.attributes.declarations}
    told |= attributes
    sex, age, view = (told.get(n, told.get(k)) for n, k in _KEYWORDS)
    findings = told.get("findings")
    units = {
        d.unit for d in spec.attributes.declarations if isinstance(d, NumberAttribute) and _AGE & {d.name, d.source}
    }
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
        # PatientAge of another unit would be another statement.
        age_years=age if isinstance(age, float) and units == {"years"} else None,
        view=view if isinstance(view, str) else None,
        findings=findings if isinstance(findings, tuple) else None,
        sop_class=spec.dicom.sop_class,
        transfer_syntax=spec.dicom.transfer_syntax,
        hu_range=spec.dicom.hu_range,
    )


def instance_path(spec: PlanSpec, image_id: str, layout: Literal["flat", "study"]) -> str:
    """The name of an image's DICOM file: its UID, below folders of patient, study and series where they are wanted."""
    study, series, instance = (instance_uid(spec.digest, image_id, kind) for kind in ("study", "series", "instance"))
    return f"{instance}.dcm" if layout == "flat" else f"SYN-{image_id}/{study}/{series}/{instance}.dcm"


def stored_row(dataset: Artefact, spec: PlanSpec, image_id: str) -> dict[str, Any]:
    """The row of one image, image bytes and all.

    RecipeError naming the range of ids where there is none, or saying that it could not be made.
    """
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
    found: list[dict[str, Any]] = rows.filter(pa.array(rows["index"].to_numpy() == index)).to_pylist()
    if not found:
        raise RecipeError(f"{dataset.uri}: image {image_id} is not in it: no attempt passed, or its cell was given up")
    return found[0]


def rows_to_bytes(rows: pa.Table) -> bytes:
    """A table as one Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def rows_from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _dicom_tar(
    spec: PlanSpec, told: Sequence[Mapping[str, Any]], pixels: Pixels, pool: ThreadPoolExecutor
) -> tuple[bytes, list[Place]]:
    def content(row: Mapping[str, Any], image: Pixels) -> tuple[bytes | memoryview, ...]:
        return pieces(image, describe_instance(spec, row["id"], spec.attributes.from_row(row)))

    # Native files are made in the interpreter, which threads would only pass to and fro.
    made = (map if spec.dicom.transfer_syntax == "native" else pool.map)(content, told, pixels)
    names = [instance_path(spec, row["id"], spec.dicom.layout) for row in told]
    tar, places = tar_bytes(list(zip(names, made, strict=True)))
    return tar, list(places)


def _table(
    spec: PlanSpec,
    rows: pa.Table,
    pixels: Pixels,
    images: Sequence[bytes],
    attempts: Sequence[int],
    dicom_shard: str | None,
    places: Sequence[Place],
) -> pa.Table:
    ids = rows["id"].to_pylist()
    schema = dataset_schema(spec.attributes, spec.image_format, order=spec.order is not None)
    same = {
        "width": pixels.shape[2], "height": pixels.shape[1], "bits_stored": spec.bits_stored,
        "spacing_mm": spec.spacing_mm, "seed": spec.seed, "solver": spec.solver, "steps": spec.steps,
        "guidance_scale": spec.guidance_scale, "generator": spec.generator, "dicom_shard": dicom_shard,
    }  # fmt: skip
    own = {
        "attempt": attempts,
        "sop_instance_uid": [instance_uid(spec.digest, image_id, "instance") for image_id in ids],
        "dicom_offset": [place and place[0] for place in places],
        "dicom_length": [place and place[1] for place in places],
    }
    paths = [f"{image_id}.{SUFFIXES[spec.image_format]}" for image_id in ids]
    if spec.order is not None:
        same["order"] = spec.order
    columns = {name: pa.repeat(pa.scalar(value, schema.field(name).type), len(ids)) for name, value in same.items()}
    columns |= {name: pa.array(values, schema.field(name).type) for name, values in own.items()}
    columns |= {name: rows[name] for name in ("id", "index", *spec.attributes.names)}
    columns["image"] = pa.StructArray.from_arrays(
        [pa.array(images, pa.binary()), pa.array(paths, pa.string())], fields=list(IMAGE)
    )
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _webdataset_members(
    spec: PlanSpec, table: pa.Table, images: Sequence[bytes], pixels: Pixels
) -> list[tuple[str, bytes]]:
    """Per image `<id>.<suffix>` and `<id>.json` with its row: readers join what precedes the first dot."""
    labels = table.drop_columns(["image", "dicom_shard", "dicom_offset", "dicom_length"]).to_pylist()
    members = []
    for label, image, array in zip(labels, images, pixels, strict=True):
        told = label | {"plan": spec.digest, "synthetic": True}
        if spec.image_format == "raw":
            # Readers of a tar have no row that tells the shape.
            image, suffix = _npy(array), "npy"
        else:
            suffix = SUFFIXES[spec.image_format]
        members += [
            (f"{label['id']}.{suffix}", image),
            (f"{label['id']}.json", json.dumps(told, sort_keys=True, ensure_ascii=False).encode()),
        ]
    return members


def _npy(pixels: Pixels) -> bytes:
    sink = io.BytesIO()
    np.save(sink, pixels.astype(pixels.dtype.newbyteorder("<"), copy=False), allow_pickle=False)
    return sink.getvalue()


def _reject_counts(planned: pa.Table, rejects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rejects by reason, and by cell the rejected draws and the images that are not in the dataset."""
    place = {index: n for n, index in enumerate(planned["index"].to_pylist())}
    lost = [place[reject["index"]] for reject in rejects if reject["reason"] == INFEASIBLE]
    drawn = [place[reject["index"]] for reject in rejects if reject["reason"] != INFEASIBLE]
    return {
        "rejects": dict(sorted(Counter(reject["reason"] for reject in rejects).items())),
        "rejected": cell_counts(planned.take(pa.array(drawn, pa.int64()))),
        "infeasible": cell_counts(planned.take(pa.array(lost, pa.int64()))),
    }


def _rejects_part(spec: PlanSpec, planned: pa.Table, rejects: Sequence[Mapping[str, Any]]) -> ShardPart:
    told = {row["index"]: row for row in planned.select(["index", "id", *spec.attributes.names]).to_pylist()}
    rows = [
        told[reject["index"]]
        | {"attempt": reject["attempt"], "reason": reject["reason"], "figures": list(reject["figures"].items())}
        for reject in rejects
    ]
    table = pa.Table.from_pylist(rows, schema=rejects_schema(spec.attributes))
    return ShardPart(REJECTS, REJECTS, "parquet", parquet_bytes(table), len(rows))
