"""What an order comes to, before anything is started: images by cell, time, cost and storage.

Rates and sizes are measured ones or none: what nobody has measured is said to be so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from scanloom.artefact import Artefact, find_artefact, open_artefact
from scanloom.errors import RecipeError
from scanloom.overview import readable_bytes
from scanloom.recipe import Generate, Recipe
from scanloom.sampling.cell import Cell, shown
from scanloom.sampling.draw import quotas
from scanloom.sampling.inputs import open_inputs
from scanloom.sampling.plan import Order, PlanSpec

_MOST_SHOWN = 60
_OF_SPEED = ("generator", "size_px", "solver", "steps", "precision", "compiled", "slots")
_OF_SIZE = ("size_px", "bits_stored", "image_format", "webdataset")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class PlannedCell(_Record):
    """A cell of the cohort."""

    table: int
    attributes: dict[str, Any]
    share: float
    """Of all images."""
    images: int
    scans: float
    """About how many scans of the corpus have these values."""
    unseen: float
    """Of the cell's images, the expected share with combinations that no scan has."""

    @property
    def text(self) -> str:
        """The cell as a person reads it."""
        return shown(Cell.model_validate({"values": self.attributes, "share": 0}).values)


class Estimate(_Record):
    """What a recipe's `generate` section orders and what it takes; None: nobody has measured, or no price is given."""

    dataset: str
    generator: str
    plan: str
    """Digest of the plan."""
    images: int
    shards: int
    cells: tuple[PlannedCell, ...]
    told: tuple[str, ...]
    """What a person should know of the order."""
    engines: int
    images_per_engine_s: float | None
    rate_from: str
    engine_hours: float | None
    hours: float | None
    """With all engines at work and writers that keep up."""
    cost: float | None
    """Of the engines, in the currency of `generate.cost_per_hour`."""
    storage_bytes: int
    storage_from: str


def estimate(recipe: Recipe, rate: float | None = None, like: str | None = None) -> Estimate:
    """The estimate for a recipe. `rate`: images an engine makes in a second; `like`: URI of a dataset to take rate and
    size from, default the recipe's own where it was made before.

    Reads manifests alone. Raises RecipeError or ArtefactError for what cannot be ordered.
    """
    section = recipe.generate
    if section is None:
        raise RecipeError(f"recipe {recipe.name!r} has no section 'generate'; it says what to generate")
    inputs = open_inputs(recipe.generator_uri, section.quality)
    generator, ordered = inputs.generator, inputs.order(section)
    dataset = recipe.uri(section.dataset)
    earlier = open_artefact(like, "dataset") if like else find_artefact(dataset, "dataset")
    per_s, rate_from = (rate, "given by --rate") if rate else _rate(section, ordered.spec, generator, earlier)
    engine_hours = section.images / per_s / 3600 if per_s else None
    size, storage_from = _storage(ordered.spec, earlier)
    return Estimate(
        dataset=dataset,
        generator=generator.uri,
        plan=ordered.spec.digest,
        images=section.images,
        shards=ordered.spec.shards,
        cells=tuple(_cells(ordered)),
        told=ordered.told,
        engines=section.engines,
        images_per_engine_s=per_s,
        rate_from=rate_from,
        engine_hours=engine_hours,
        hours=engine_hours / section.engines if engine_hours is not None else None,
        cost=engine_hours * section.cost_per_hour if engine_hours and section.cost_per_hour is not None else None,
        storage_bytes=size,
        storage_from=storage_from,
    )


def report(found: Estimate) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Tables for the terminal (title, columns, rows): the cells, as many as fit a page or two; what they come to."""
    for number in sorted({cell.table for cell in found.cells}):
        cells = [cell for cell in found.cells if cell.table == number]
        rows: list[tuple[str, ...]] = [
            (cell.text, str(cell.images), f"{cell.scans:.0f}", f"{cell.unseen:.0%}" if cell.unseen else "")
            for cell in cells[:_MOST_SHOWN]
        ]
        if rest := cells[_MOST_SHOWN:]:
            rows.append((f"{len(rest)} more; --json prints them", str(sum(c.images for c in rest)), "", ""))
        rows.append(("all", str(found.images), "", ""))
        title = "cohort" if number == 0 else "and independently of it"
        yield title, ("cell", "images", "scans in the corpus", "of unseen combinations"), rows
    yield "plan", ("what", "value", "from"), list(_facts(found))


def _facts(found: Estimate) -> Iterator[tuple[str, ...]]:
    yield "dataset", found.dataset, f"plan {found.plan[:12]}"
    yield "generator", found.generator, ""
    yield "images", str(found.images), f"{found.shards} shards"
    for sentence in found.told:
        yield "to know", sentence, ""
    if found.images_per_engine_s is None:
        yield "time", "unknown", found.rate_from
    else:
        yield "rate", f"{found.images_per_engine_s:.3g} images/engine-s", found.rate_from
        yield "time", f"{found.hours:.3g} h", f"{found.engine_hours:.3g} engine-hours on {found.engines} engines"
    if found.cost is not None:
        yield "cost", f"{found.cost:.2f}", "engine-hours at generate.cost_per_hour"
    else:
        yield "cost", "unknown", "no time" if found.engine_hours is None else "generate.cost_per_hour is not set"
    yield "storage", readable_bytes(found.storage_bytes), found.storage_from


def _cells(ordered: Order) -> Iterator[PlannedCell]:
    spec, coverage = ordered.spec, ordered.coverage
    for number, cells in enumerate(spec.cohort.tables):
        images = quotas([cell.share for cell in cells], spec.images)
        for place, cell in enumerate(cells):
            yield PlannedCell(
                table=number,
                attributes=cell.model_dump(mode="json")["values"],
                share=images[place] / spec.images,
                images=images[place],
                scans=coverage.scans[number][place],
                unseen=coverage.unseen_by_cell[number][place],
            )


def _rate(section: Generate, spec: PlanSpec, generator: Artefact, earlier: Artefact | None) -> tuple[float | None, str]:
    """Images an engine makes in a second, as measured, and where; None and why not."""
    if earlier is not None and (measured := earlier.manifest.statistics.get("images_per_engine_s")):
        other = _differences(section, spec, earlier.manifest.statistics)
        if not other:
            return measured, f"measured when {earlier.uri} was made, {_devices(earlier)}"
        return None, f"measured for {earlier.uri} only, which differs in {', '.join(other)}; --rate sets it"
    if measured := generator.manifest.statistics.get("images_per_engine_s"):
        return measured, f"measured with the generator, {generator.uri}"
    return None, "nobody has measured images per engine-second; make a small dataset and name it by --like, or --rate"


def _differences(section: Generate, spec: PlanSpec, statistics: Mapping[str, Any]) -> list[str]:
    """What has a bearing on speed and is another in the earlier dataset."""
    there = statistics["spec"]
    found = [name for name in _OF_SPEED if there.get(name) != getattr(spec, name)]
    if (there["guidance_scale"] > 1) != (spec.guidance_scale > 1):
        found.append("guidance")
    on_gpu = {environment["device"] != "cpu" for environment in statistics["environments"]}
    if on_gpu and on_gpu != {section.gpus_per_engine > 0}:
        found.append("device")
    elif on_gpu == {False} and {environment["threads"] for environment in statistics["environments"]} != {
        section.cpus_per_engine
    }:
        # The threads of an engine, which is all that its speed on CPU comes from.
        found.append("cpus_per_engine")
    return found


def _devices(earlier: Artefact) -> str:
    environments = earlier.manifest.statistics["environments"]
    return "on " + ", ".join(sorted({f"{e['device']} with {e['threads']} threads" for e in environments}))


def _storage(spec: PlanSpec, earlier: Artefact | None) -> tuple[int, str]:
    if earlier is not None and (rows := earlier.manifest.statistics.get("rows")):
        there = earlier.manifest.statistics["spec"]
        same = all(there.get(name) == getattr(spec, name) for name in _OF_SIZE)
        dicom = spec.dicom.model_dump(mode="json")
        if same and all(there["dicom"].get(key) == dicom[key] for key in ("enabled", "transfer_syntax")):
            each = sum(file.bytes for file in earlier.manifest.files) / rows
            return round(each * spec.images), f"measured: {readable_bytes(round(each))} an image in {earlier.uri}"
    copies = 1 + spec.dicom.enabled + spec.webdataset
    each = spec.size_px**2 * (1 if spec.bits_stored == 8 else 2) * copies
    return each * spec.images, f"computed: {copies} copies of uncompressed pixels, without headers; nobody has measured"
