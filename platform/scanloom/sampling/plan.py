"""Plans: all that determines a dataset, and the one row per image that follows from it.

A shard is a pure function of (plan digest, shard number). How many engines and writers work on it, on which hosts and
how often they die, is no part of the plan.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from scanloom.artefact import plan_digest
from scanloom.attributes import AttributeSchema, Envelope, Value
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import Dicom, Generate, Quality
from scanloom.recipe_generate import ImageFormat, Solver
from scanloom.sampling.cell import CohortTables, ends
from scanloom.sampling.cohort import resolve
from scanloom.sampling.corpus_table import Coverage
from scanloom.sampling.draw import CELL_PREFIX, Drawn, draw, quotas

LOG = logging.getLogger("scanloom")
FALLBACK_SPACING_MM = 1.0
# A shard travels from engine to writer as one Arrow value, which ends at 2 GiB.
MAX_SHARD_BYTES = 2**30


class PlanSpec(BaseModel):
    """Everything that determines the pixels and files of a dataset, and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    dataset: str
    generator: str
    """Digest of the generator artefact."""
    generator_name: str
    attributes: AttributeSchema
    cohort: CohortTables
    images: int
    seed: int
    solver: Solver
    steps: int
    guidance_scale: float
    precision: Literal["fp32", "bf16", "fp16"]
    compiled: bool
    slots: int
    images_per_shard: int
    bits_stored: Literal[8, 12, 16]
    size_px: int
    spacing_mm: float
    quality: Quality
    """Without the places of probe and gate: where an artefact lies is no part of what is made."""
    probe: str | None = None
    """Digest of the probe artefact."""
    gate: str | None = None
    """Digest of the privacy gate's artefact; None: ungated."""
    order: str | None = None
    """What the rows' column `order` says; None: there is none."""
    image_format: ImageFormat
    webdataset: bool
    dicom: Dicom

    @property
    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        # Plans of before there were orders and gates keep their digests.
        absent = {name for name in ("order", "gate") if getattr(self, name) is None}
        return plan_digest("dataset", self.model_dump(mode="json", exclude=absent))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        copied = super().model_copy(update=update, deep=deep)
        vars(copied).pop("_digest", None)  # another plan's
        return copied

    @property
    def shards(self) -> int:
        return -(-self.images // self.images_per_shard)

    def image_id(self, index: int) -> str:
        """16 hex digits: whose plan and which image; unique in a dataset and telling across datasets."""
        return f"{self.digest[:8]}{index:08x}"


@dataclass(frozen=True)
class Plan:
    """A compiled plan: about ten bytes an image, from which the rows of any shard are made when asked for."""

    spec: PlanSpec
    drawn: Drawn

    @property
    def digest(self) -> str:
        return self.spec.digest

    @property
    def shards(self) -> int:
        return self.spec.shards

    def rows(self, shard: int) -> pa.Table:
        """The rows of one shard: index int64, id string, the attributes, and `cell#n` int32."""
        start = shard * self.spec.images_per_shard
        return self._rows(start, start + self.spec.images_per_shard)

    @property
    def table(self) -> pa.Table:
        """The rows of all shards, for looking at small plans."""
        return self._rows(0, self.spec.images)

    def _rows(self, start: int, stop: int) -> pa.Table:
        stop = min(stop, self.spec.images)
        rows = self.drawn.rows(start, stop).add_column(0, "id", image_ids(self.spec.digest, start, stop))
        return rows.add_column(0, "index", pa.array(np.arange(start, stop)))


def image_ids(plan_digest: str, start: int, stop: int) -> pa.StringArray:
    """The ids of images [start, stop), as `PlanSpec.image_id` has them: 16 bytes each, so 2**27 of them at most."""
    count = max(0, stop - start)
    text = np.empty((count, 16), dtype=np.uint8)
    text[:, :8] = np.frombuffer(plan_digest[:8].encode(), np.uint8)
    octets = np.arange(start, start + count).astype(">u4").view(np.uint8).reshape(count, 4)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text[:, 8::2], text[:, 9::2] = digits[octets >> 4], digits[octets & 15]
    offsets = np.arange(0, 16 * count + 1, 16, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(text))


@dataclass(frozen=True)
class Order:
    """What a recipe orders of a generator: the plan, and how much of that the corpus has."""

    spec: PlanSpec
    coverage: Coverage
    told: tuple[str, ...]
    """What a person should know of the order, a sentence each."""


def specify(
    section: Generate, name: str, digest: str, statistics: Mapping[str, Any], probe: str | None = None,
    gate: str | None = None,
) -> PlanSpec:  # fmt: skip
    """The plan of a recipe's `generate` section for a generator of this name, digest and manifest statistics.

    `probe`, `gate`: digests of these artefacts. What a person should know of the order is logged. Raises as `order`.
    """
    ordered = order(section, name, digest, statistics, probe, gate)
    for sentence in ordered.told:
        LOG.warning("generate.cohort: %s", sentence)
    return ordered.spec


def order(
    section: Generate, name: str, digest: str, statistics: Mapping[str, Any], probe: str | None = None,
    gate: str | None = None,
) -> Order:  # fmt: skip
    """The order of a recipe's `generate` section, as `specify` has it.

    Raises RecipeError or ArtefactError for a request that the generator cannot meet, naming its envelope.
    """
    if section.images >= 2**32:
        raise RecipeError(f"generate.images={section.images}: a dataset holds fewer than 2**32; order several")
    if section.guidance_scale > 1.0 and section.slots < 2:
        raise RecipeError("generate.slots=1: a guided image takes two slots; set slots to 2 or more")
    for key in ("schema", "envelope", "cells", "size_px"):
        if key not in statistics:
            raise ArtefactError(f"generator {name}: its manifest has no {key!r}; finetune it with this version")
    fitting = MAX_SHARD_BYTES // (statistics["size_px"] ** 2 * (1 if section.bits_stored == 8 else 2))
    if section.images_per_shard > fitting:
        raise RecipeError(f"generate.images_per_shard={section.images_per_shard}: {fitting} of these images at most")
    schema = AttributeSchema.model_validate(statistics["schema"])
    envelope = Envelope.model_validate(statistics["envelope"])
    cohort = resolve(section.cohort, schema, envelope, statistics["cells"], section.images)
    settings = section.model_dump(include=set(PlanSpec.model_fields) - {"cohort", "dicom", "generator", "quality"})
    spec = PlanSpec(
        **settings,
        generator=digest,
        generator_name=name,
        attributes=schema,
        cohort=cohort.tables,
        size_px=statistics["size_px"],
        spacing_mm=section.dicom.pixel_spacing_mm or statistics.get("spacing_mm") or FALLBACK_SPACING_MM,
        quality=section.quality.model_copy(update={"probe": None, "gate": None}),
        probe=probe,
        gate=gate,
        dicom=section.dicom,
    )
    if spec.dicom.enabled:
        _require_held_by_dicom(spec)
    return Order(spec, cohort.coverage, cohort.told)


def _require_held_by_dicom(spec: PlanSpec) -> None:
    """Raise RecipeError for what an instance cannot say, before images are made of it: each value of a cell by itself,
    of spans both ends."""
    # Describing instances takes a plan, so that its module imports this one.
    from scanloom.sampling.dataset import describe_instance

    asked: dict[tuple[str, Value], None] = {("", None): None}
    for name, value in (item for table in spec.cohort.tables for cell in table for item in cell.known.items()):
        asked |= dict.fromkeys((name, end) for end in ends(value))
    for name, value in asked:
        attributes = dict.fromkeys(spec.attributes.names) | ({name: value} if name else {})
        try:
            describe_instance(spec, spec.image_id(0), attributes)
        except ArtefactError as error:
            what = f"generate.cohort: {name}={value!r}" if name else "generate"
            raise RecipeError(f"{what} {error}; ask for another, or set generate.dicom.enabled: false") from error


def compile_plan(spec: PlanSpec) -> Plan:
    """The plan with its rows: exact quotas, shuffled; the same spec gives the same rows."""
    return Plan(spec, draw(spec.cohort, spec.attributes, spec.images, spec.seed))


def cell_counts(rows: pa.Table) -> dict[str, dict[str, int]]:
    """Table number -> cell number -> images among these rows; both as text, as JSON keys are."""
    counts = {}
    for name in rows.column_names:
        if name.startswith(CELL_PREFIX):
            cells, images = np.unique(rows[name].to_numpy(), return_counts=True)
            counts[name.removeprefix(CELL_PREFIX)] = {str(c): int(n) for c, n in zip(cells, images, strict=True)}
    return counts


def achieved(spec: PlanSpec, made: Sequence[Mapping[str, Mapping[str, int]]]) -> list[dict[str, Any]]:
    """Per cell of the cohort: table, attributes, images requested, images made (summed over `cell_counts`)."""
    rows = []
    for number, table in enumerate(spec.cohort.tables):
        requested = quotas([cell.share for cell in table], spec.images)
        for place, cell in enumerate(table):
            count = sum(counts[str(number)].get(str(place), 0) for counts in made)
            values = cell.model_dump(mode="json")["values"]
            rows.append({"table": number, "attributes": values, "requested": requested[place], "made": count})
    return rows
