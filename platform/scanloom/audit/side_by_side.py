"""Real scans beside synthetic images: what was asked for, measured in the pictures and shown on a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from scanloom.artefact import Artefact
from scanloom.attributes import AttributeSchema
from scanloom.audit.cardiothoracic import HeldOut, auc, cardiothoracic_ratio, fit_probe
from scanloom.audit.contact_sheet import SheetRow, Tile, contact_sheet
from scanloom.audit.report import PAGE, REPORT, read_report
from scanloom.audit.verdicts import in_one_line, verdicts
from scanloom.sampling.dataset import IMAGES
from scanloom.shards.reader import rows
from scanloom.shards.writer import image_pixels

SHEET = "contact-sheet.png"
NORMAL = "No finding"


@dataclass(frozen=True)
class Separation:
    """How well the cardiothoracic ratio, measured in the pictures, tells a finding from no finding."""

    finding: str
    auc: float
    """Chance that a picture with the finding measures wider than one without; nan without measured pictures."""
    with_finding: int
    without: int
    mean_with: float
    mean_without: float
    unmeasured: int
    """Pictures of either kind that the probe could not read; they are in no other figure."""

    def __str__(self) -> str:
        groups = ((self.finding, self.with_finding, self.mean_with), ("no finding", self.without, self.mean_without))
        said = [f"{mean:.3f} with {name} ({count} pictures)" for name, count, mean in groups if count]
        said += [f"AUC {self.auc:.3f}"] if len(said) == len(groups) else []
        said += [f"{self.unmeasured} pictures not measurable"] if self.unmeasured else []
        return f"cardiothoracic ratio: {', '.join(said) or 'nothing to measure'}"


@dataclass(frozen=True)
class Comparison:
    """A dataset beside the train split of the corpus that its generator learned from."""

    real: Separation
    synthetic: Separation
    probe: HeldOut
    contact_sheet: bytes
    """PNG."""

    @property
    def figures(self) -> dict[str, dict[str, object]]:
        """Everything but the picture, for JSON: what is not measured is None."""
        parts = {"real": asdict(self.real), "synthetic": asdict(self.synthetic), "probe": asdict(self.probe)}
        return {
            name: {key: None if value != value else value for key, value in part.items()}
            for name, part in parts.items()
        }

    def __str__(self) -> str:
        return f"real:      {self.real}\nsynthetic: {self.synthetic}"


def leave(corpus: Artefact, dataset: Artefact, audit: Artefact, folder: Path, title: str) -> str:
    """Write contact sheet, its figures and the audit's page into a local folder; what they say, in a few lines."""
    comparison = compare(corpus, dataset, title)
    (folder / SHEET).write_bytes(comparison.contact_sheet)
    (folder / SHEET).with_suffix(".json").write_text(json.dumps(comparison.figures, indent=2) + "\n")
    (folder / PAGE).write_bytes(audit.store.read(PAGE))
    report = read_report(audit.store.read(REPORT), audit.store.uri_of(REPORT))
    said = f"the audit says: {in_one_line(verdicts(report))}"
    return f"{comparison}\n  {said}\n  open {folder / PAGE} in a browser: it says why"


def compare(corpus: Artefact, dataset: Artefact, title: str) -> Comparison:
    """Measure both and draw them side by side under a title; the corpus must declare the attribute `findings`."""
    schema = AttributeSchema.model_validate(corpus.manifest.statistics["schema"])
    schema["findings"]
    real, synthetic = (list(_tiles(a, f, schema)) for a, f in ((corpus, "train"), (dataset, IMAGES)))
    sheet = contact_sheet(title, sheet_rows(real, synthetic))
    return Comparison(separation(real), separation(synthetic), fit_probe().held_out, sheet)


def separation(pictures: Sequence[Tile], finding: str = "Cardiomegaly") -> Separation:
    """Over the pictures whose findings are exactly `finding`, against those that say that they have none."""
    both = [picture for picture in pictures if picture.attributes["findings"] in ((finding,), ())]
    has = np.array([bool(picture.attributes["findings"]) for picture in both], dtype=bool)
    ratios = np.array([cardiothoracic_ratio(picture.pixels) for picture in both])
    measured = ~np.isnan(ratios)
    high, low = ratios[has & measured], ratios[~has & measured]
    return Separation(
        finding=finding,
        auc=auc(high, low),
        with_finding=len(high),
        without=len(low),
        mean_with=float(high.mean()) if len(high) else float("nan"),
        mean_without=float(low.mean()) if len(low) else float("nan"),
        unmeasured=int((~measured).sum()),
    )


def sheet_rows(real: Sequence[Tile], synthetic: Sequence[Tile], per_side: int = 4) -> list[SheetRow]:
    """One row per set of findings that was generated, the most frequent first, `per_side` pictures on each side."""
    cells = _by_findings(synthetic)
    scans = _by_findings(real)
    found = sorted(cells, key=lambda findings: (bool(findings), -len(cells[findings]), findings))
    return [
        SheetRow(
            cell=" + ".join(findings) or NORMAL,
            real=_spread(scans.get(findings, []), per_side),
            synthetic=_spread(cells[findings], per_side),
            note=f"{len(cells[findings])} generated",
        )
        for findings in found
    ]


def _tiles(artefact: Artefact, folder: str, schema: AttributeSchema) -> Iterator[Tile]:
    """The pictures of an artefact's Parquet shards below `folder`, in shard order."""
    columns = ["image", "width", "height", "bits_stored", *schema.names]
    for row in rows(artefact, folder, columns):
        yield Tile(image_pixels(row), schema.from_row(row), row["bits_stored"])


def _by_findings(pictures: Sequence[Tile]) -> dict[tuple[str, ...], list[Tile]]:
    """Pictures by their set of findings; those whose findings are unknown are in none."""
    cells: dict[tuple[str, ...], list[Tile]] = {}
    for tile in pictures:
        findings = tile.attributes["findings"]
        if isinstance(findings, tuple):
            cells.setdefault(findings, []).append(tile)
    return cells


def _spread(pictures: Sequence[Tile], count: int) -> list[Tile]:
    """The first pictures of each sex and view before second ones of any, in the order of sex and view."""
    seen: dict[tuple[object, object], int] = {}
    ranked = []
    for place, tile in enumerate(pictures):
        kind = (tile.attributes.get("sex"), tile.attributes.get("view"))
        ranked.append((seen.get(kind, 0), place))
        seen[kind] = seen.get(kind, 0) + 1
    chosen = [pictures[place] for _, place in sorted(ranked)[:count]]
    return sorted(chosen, key=lambda t: (str(t.attributes.get("view")), str(t.attributes.get("sex"))), reverse=True)
