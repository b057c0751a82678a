"""From a dataset and the corpus behind it to an audit's files: read once in pieces, embedded, compared, told.

What is kept of an image is its embedding, its spectrum and its grey levels; pixels only of samples. So memory grows by
about 2 KB an image, whatever its size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from scanloom.artefact import Artefact, FileEntry, find_artefact, open_artefact
from scanloom.attributes import Attributes, AttributeSchema, Envelope, describe
from scanloom.audit.appearance import (
    LEVELS,
    Curves,
    grey_levels,
    level_distance,
    likeness,
    pairs_within,
    radial_power,
    spectral_distance,
)
from scanloom.audit.contact_sheet import SheetRow, Tile, contact_sheet
from scanloom.audit.copies import (
    PEERS,
    Embeddings,
    Found,
    Recall,
    Threshold,
    calibrate,
    copy_rates,
    most_alike,
    power,
    reproduced,
)
from scanloom.audit.fairness import Group, gaps, readings, subgroups
from scanloom.audit.fidelity import Compared, Embedded, fidelity
from scanloom.audit.groups import Grouping
from scanloom.audit.intervals import clustered_share, share
from scanloom.audit.page import page
from scanloom.audit.plants import SLIGHT, STRONG
from scanloom.audit.report import (
    PAGE,
    PRIVATE,
    REPORT,
    Beside,
    Canaries,
    Contents,
    Copies,
    Interval,
    Likenesses,
    Peer,
    PlantedRecall,
    Reading,
    Report,
    Subgroup,
    Subject,
)
from scanloom.audit.scans import (
    Row,
    calibration_and_check,
    count,
    in_batches,
    owner_of,
    pixels_of,
    spread,
    spread_count,
    square,
    squares,
)
from scanloom.audit.scorecard import scorecard
from scanloom.errors import ArtefactError
from scanloom.models.attribute_probe import Probe, load_probe
from scanloom.models.copy_encoder import EMBED_ROWS, embedding, kept_views, levels, load_copy_encoder
from scanloom.recipe_audit import Audit
from scanloom.recipe_train import Canaries as CanariesSection
from scanloom.sampling.dataset import IMAGES, INFEASIBLE
from scanloom.store import Store
from scanloom.training.views import times_trained

ENCODER = "copies/encoder.safetensors"
PAIRS = f"{PRIVATE}/pairs.png"
TRAIN = "train"
_SAMPLE = 512
_LIKENESS_PAIRS = 200
_SHOWN, _COLUMNS = 24, 8
_TILE_PX = 96

Embed = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class AuditJob(BaseModel):
    """What whoever measures is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Audit
    corpus_uri: str
    dataset_uri: str
    audit_uri: str
    size_px: int
    channels: tuple[int, ...]
    probe_uri: str | None = None
    """Reads what images show; None: fairness is not measured."""

    @classmethod
    def of(
        cls, settings: Audit, corpus: Artefact, dataset: Artefact, audit: Store, probe: Artefact | None = None
    ) -> Self:
        """The job of an audit that is written into a folder."""
        size_px = min(settings.copies.size_px, corpus.manifest.statistics["size_px"])
        return cls(
            settings=settings, corpus_uri=corpus.uri, dataset_uri=dataset.uri, audit_uri=audit.uri, size_px=size_px,
            channels=levels(settings.copies.channels, size_px), probe_uri=None if probe is None else probe.uri,
        )  # fmt: skip


class Measured(BaseModel):
    """What `make_audit` found, and what is shown of it; JSON holds all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    report: Report
    likenesses: Likenesses
    sheet_png: bytes
    """Synthetic images."""
    files: tuple[FileEntry, ...]
    """Written into the audit's folder already."""


@dataclass(frozen=True)
class Seen:
    """What is kept of some images, in the order of their ids."""

    views_NVD: NDArray[np.float32]
    """Embeddings of training scans as they are and in the other views that they are looked up by; of others V is 1."""
    spectra_NK: NDArray[np.float64]
    levels_NL: NDArray[np.float64]
    ids: list[str]
    owners: list[str]
    """Patients; of synthetic images their own ids."""
    attributes: list[Attributes]
    sample_MSS: NDArray[np.float32]
    sample: list[int]
    """Which of the images the sample's are."""
    read_NO: NDArray[np.float32]
    """What a probe reads; no columns without one."""

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Embeddings [N, D] of images as they are."""
        return self.views_NVD[:, 0]

    @property
    def embedded(self) -> Embedded:
        return Embedded.of(self.vectors, self.owners)

    def curves(self, rows_NK: NDArray[np.float64]) -> Curves:
        return Curves(rows_NK, self.owners)

    def of(self, chosen: NDArray[np.bool_]) -> Seen:
        """The part of it that is chosen."""
        places = np.flatnonzero(chosen).tolist()
        number = {place: number for number, place in enumerate(places)}
        kept = [place in number for place in self.sample]
        return Seen(
            self.views_NVD[chosen], self.spectra_NK[chosen], self.levels_NL[chosen],
            [self.ids[place] for place in places], [self.owners[place] for place in places],
            [self.attributes[place] for place in places],
            self.sample_MSS[kept], [number[place] for place in self.sample if place in number],
            self.read_NO[chosen],
        )  # fmt: skip


def see(
    artefact: Artefact, folder: str, schema: AttributeSchema, embed: Embed, size_px: int, most: int,
    probe: Probe | None = None, sample: int = _SAMPLE,
) -> Seen:  # fmt: skip
    """At most `most` images of an artefact's folder, spread over all of it; ArtefactError for a damaged shard."""
    kept_every = max(1, math.ceil(spread_count(artefact, folder, most) / sample))
    parts: list[list[Any]] = [[], [], []]
    ids: list[str] = []
    owners: list[str] = []
    attributes: list[Attributes] = []
    kept: list[NDArray[np.float32]] = []
    places: list[int] = []
    told: list[NDArray[np.float32]] = []
    for batch in in_batches(spread(artefact, folder, most), EMBED_ROWS):
        shown = squares(batch, folder, size_px)
        views = np.stack([embed(view) for view in (kept_views(shown) if folder == TRAIN else [shown])], axis=1)
        for part, value in zip(parts, (views, radial_power(shown), grey_levels(shown)), strict=True):
            part.append(value)
        told.append(_read(probe, batch, folder))
        for row, seen in zip(batch, shown, strict=True):
            if len(owners) % kept_every == 0:
                kept.append(seen)
                places.append(len(owners))
            ids.append(row["id"])
            owners.append(owner_of(row, folder))
            attributes.append(schema.from_row(row))
    if not owners:
        empty, unread = np.zeros((0, size_px, size_px), np.float32), np.zeros((0, 0), np.float32)
        spectra, levels = np.zeros((0, size_px // 2 - 1)), np.zeros((0, LEVELS))
        return Seen(embed(empty)[:, None], spectra, levels, [], [], [], empty, [], unread)
    views, spectra, levels = (np.concatenate(part) for part in parts)
    return Seen(views, spectra, levels, ids, owners, attributes, np.stack(kept), places, np.concatenate(told))


def make_audit(config: Mapping[str, Any]) -> Measured:
    """Measure a dataset beside its corpus. `config` is an AuditJob as a dict.

    The encoder lies at ENCODER in the audit's folder already. ArtefactError where the corpus has too few held-out
    patients to calibrate and to check.
    """
    job = AuditJob.model_validate(config)
    started = time.monotonic()
    corpus, dataset = open_artefact(job.corpus_uri, "corpus"), open_artefact(job.dataset_uri, "dataset")
    target = Store(job.audit_uri)
    network = load_copy_encoder(target.read(ENCODER), job.channels, job.settings.copies.width, target.uri_of(ENCODER))
    embed = embedding(network)
    schema = AttributeSchema.model_validate(corpus.manifest.statistics["schema"])
    asked = AttributeSchema.model_validate(dataset.manifest.statistics["spec"]["attributes"])

    probe = None if job.probe_uri is None else load_probe(job.probe_uri)

    def real(split: str) -> Seen:
        reader = None if split == "train" else probe
        return see(corpus, split, schema, embed, job.size_px, job.settings.copies.max_scans, reader)

    train = real("train")
    calibration, check = calibration_and_check(corpus, real)
    images = see(dataset, IMAGES, asked, embed, job.size_px, job.settings.images, probe)
    if not len(images):
        raise ArtefactError(f"{dataset.uri}: holds no images to audit")
    detector = Embeddings(embed, list(train.views_NVD.swapaxes(0, 1)))
    threshold = calibrate(
        detector.look_up(calibration.vectors).likeness_N, calibration.owners,
        job.settings.copies.false_positive_share, detector.scale,
    )  # fmt: skip
    found, held_out = detector.look_up(images.vectors), detector.look_up(check.vectors)
    copies = _copies(
        job, detector, threshold, train, calibration, check, images, found, held_out, count(corpus, "train")
    )
    if canaries := _canaries_of(dataset):
        times = [times_trained(canaries, name) for name in train.ids]
        repeated = reproduced(detector, threshold, images.vectors, times)
        copies = copies.model_copy(update={"canaries": tuple(Canaries(**asdict(one)) for one in repeated)})
    grouping = Grouping.of(schema, train.attributes, job.settings.fairness.groups)
    fairness = None if probe is None else _fairness(probe, grouping, images, calibration, check)
    alike = _subgroups(grouping, images, train, calibration, check)
    report = Report(
        subject=Subject(
            name=dataset.manifest.name, dataset=dataset.digest, corpus=corpus.digest,
            images=dataset.manifest.statistics["rows"], looked_at=len(images),
        ),
        copies=copies, fidelity=_fidelity(images, train, check), appearance=_appearance(images, train, check),
        fairness=fairness, subgroups=alike, gaps=gaps(grouping, fairness or (), alike),
        contents=_contents(dataset.manifest.statistics, corpus.manifest.statistics, images.attributes),
        probe=None if probe is None else probe.digest,
        seconds=time.monotonic() - started,
    )  # fmt: skip
    planted = detector(SLIGHT[-1].change(train.sample_MSS)).likeness_N
    sheet = contact_sheet(
        f"{dataset.manifest.name}: synthetic images",
        _rows([_tile(images, place) for place in range(min(_SHOWN, len(images.sample)))]),
        tile_px=_TILE_PX,
    )
    pairs = _pairs(job, corpus, dataset, found)
    target.write(PAIRS, pairs)
    likenesses = Likenesses(
        tau=threshold.tau, held_out=_floats(held_out.likeness_N), synthetic=_floats(found.likeness_N),
        planted=_floats(planted),
    )  # fmt: skip
    files = (FileEntry.of(target.digest(ENCODER)), FileEntry.of_bytes(PAIRS, pairs))
    return Measured(report=report, likenesses=likenesses, sheet_png=sheet, files=files)


def write_report(measured: Measured, report: Report, target: Store) -> list[FileEntry]:
    """Write what is to be read, of `measured` with the parts that others added; the entries of all files."""
    report = report.model_copy(update={"scorecard": scorecard(report)})
    told = page(report, measured.likenesses, measured.sheet_png)
    files = {REPORT: report.model_dump_json(indent=1).encode(), PAGE: told.encode()}
    for path, data in files.items():
        target.write(path, data)
    return [*measured.files, *(FileEntry.of_bytes(path, data) for path, data in files.items())]


def _canaries_of(dataset: Artefact) -> CanariesSection | None:
    """What a dataset's generator was trained with; None too where it is not there any more, or another is."""
    entry = dataset.manifest.used_as("generator")
    generator = find_artefact(entry.uri, "generator") if entry else None
    if entry is None or generator is None or generator.digest != entry.digest:
        return None
    found = generator.manifest.recipe.get("encode", {}).get("canaries")
    return CanariesSection.model_validate(found) if found else None


def _copies(
    job: AuditJob, detector: Embeddings, threshold: Threshold, train: Seen, calibration: Seen, check: Seen,
    images: Seen, found: Found, held_out: Found, scans: int,
) -> Copies:  # fmt: skip
    settings = job.settings.copies
    planted = slice(0, settings.planted_scans)
    recalls = power(
        detector, threshold, train.sample_MSS[planted], train.sample[planted], train.owners, (*SLIGHT, *STRONG)
    )
    rates = copy_rates(threshold, found, held_out, check.owners)
    same, other = detector.among_train(train.owners)
    company = np.isfinite(same)
    return Copies(
        **threshold.told, train_scans=len(train), corpus_scans=scans,
        power=tuple(_recall(one) for one in recalls), synthetic_rate=Interval.of(rates.synthetic),
        synthetic_copies=rates.copies, copied_scans=rates.copied_scans, held_out_rate=Interval.of(rates.held_out),
        held_out_scans=rates.held_out_scans, excess=rates.excess,
        same_patient_found=float((same[company] > threshold.tau).mean()) if company.any() else None,
        other_patient_found=float((other > threshold.tau).mean()),
        peers=_peers(train, calibration, check, images, settings.false_positive_share),
    )  # fmt: skip


def _recall(found: Recall) -> PlantedRecall:
    return PlantedRecall(
        plant=found.plant, strength=found.strength, recall=Interval.of(found.recall), traced=found.traced,
        copies=found.copies,
    )  # fmt: skip


def _peers(train: Seen, calibration: Seen, check: Seen, images: Seen, asked: float) -> tuple[Peer, ...]:
    """What others would have found, on the samples alone: they need pixels."""
    told: list[Peer] = []
    if not all(one.sample for one in (train, calibration, check, images)):
        return ()
    owners = [train.owners[place] for place in train.sample]
    for name, peer in PEERS.items():
        detector = peer(train.sample_MSS)
        theirs = [calibration.owners[place] for place in calibration.sample]
        threshold = calibrate(detector(calibration.sample_MSS).likeness_N, theirs, asked, detector.scale)
        recalls = power(detector, threshold, train.sample_MSS, range(len(owners)), owners, SLIGHT)
        others = [check.owners[place] for place in check.sample]
        copies = detector(images.sample_MSS).likeness_N > threshold.tau
        false = clustered_share(detector(check.sample_MSS).likeness_N > threshold.tau, others)
        told.append(Peer(
            name=name, lowest_slight_recall=min(one.recall.value for one in recalls),
            copy_rate=Interval.of(share(int(copies.sum()), len(copies))), held_out_rate=Interval.of(false),
        ))  # fmt: skip
    return tuple(told)


def _fidelity(images: Seen, train: Seen, check: Seen) -> dict[str, Beside] | None:
    """None where there are too few images or patients for neighbourhoods."""
    try:
        told = fidelity(images.embedded, train.embedded, check.embedded)
    except ValueError:
        return None
    return {name: Beside.of(one) for name, one in told.items()}


def _appearance(images: Seen, train: Seen, check: Seen) -> dict[str, Beside]:
    spectra = [spectral_distance(one.curves(one.spectra_NK), check.curves(check.spectra_NK)) for one in (images, train)]
    levels = [level_distance(one.curves(one.levels_NL), check.curves(check.levels_NL)) for one in (images, train)]
    told = {
        "spectrum (dB)": Beside.of(Compared(*spectra, len(images))),
        "grey levels (share of range)": Beside.of(Compared(*levels, len(images))),
    }
    for name, by_cell in (("MS-SSIM of any two", False), ("MS-SSIM of two of a cell", True)):
        alike = []
        for one in (images, train):
            owners = [one.owners[place] for place in one.sample]
            cells = [describe(one.attributes[place]) if by_cell else "" for place in one.sample]
            pairs = pairs_within(cells, owners, _LIKENESS_PAIRS)
            alike.append(likeness(one.sample_MSS, pairs) if len(pairs) else None)
        if alike[0] is not None and alike[1] is not None:
            told[name] = Beside.of(Compared(alike[0], alike[1], len(images.sample)))
    return told


def _fairness(probe: Probe, grouping: Grouping, images: Seen, calibration: Seen, check: Seen) -> tuple[Reading, ...]:
    held_out = Group(
        [*calibration.attributes, *check.attributes], [*calibration.owners, *check.owners],
        np.concatenate([calibration.read_NO, check.read_NO]),
    )  # fmt: skip
    return readings(probe.card, grouping, Group(images.attributes, images.owners, images.read_NO), held_out)


def _subgroups(grouping: Grouping, images: Seen, train: Seen, calibration: Seen, check: Seen) -> tuple[Subgroup, ...]:
    held_out = Embedded.of(np.concatenate([calibration.vectors, check.vectors]), [*calibration.owners, *check.owners])
    truth = [*calibration.attributes, *check.attributes]
    return subgroups(grouping, images.embedded, images.attributes, train.embedded, train.attributes, held_out, truth)


def _contents(dataset: Mapping[str, Any], corpus: Mapping[str, Any], asked: Sequence[Attributes]) -> Contents:
    """Of the manifests' statistics, and of what was asked of the images that are looked at."""
    envelope = Envelope.model_validate(corpus["envelope"])
    outside = 0
    for attributes in asked:
        try:
            envelope.require(attributes)
        except ArtefactError:
            outside += 1
    names = asked[0] if asked else {}
    rejects = dataset.get("rejects", {})
    return Contents(
        requested=dataset["spec"]["images"], infeasible=rejects.get(INFEASIBLE, 0),
        rejected_draws={reason: count for reason, count in rejects.items() if reason != INFEASIBLE},
        unknown={name: sum(one[name] is None for one in asked) / len(asked) for name in names},
        outside=outside, gate=str(dataset.get("gate", "ungated")),
    )  # fmt: skip


def _floats(values_N: NDArray[np.floating[Any]]) -> tuple[float, ...]:
    return tuple(float(value) for value in values_N)


def _pairs(job: AuditJob, corpus: Artefact, dataset: Artefact, found: Found) -> bytes:
    """The images most alike to a training scan beside it, as a PNG for those who may see scans."""
    pairs = most_alike(found, job.settings.pairs)
    images = _squares_at(dataset, IMAGES, job.settings.images, [image for image, _, _ in pairs], job.size_px)
    scans = _squares_at(corpus, "train", job.settings.copies.max_scans, [scan for _, scan, _ in pairs], job.size_px)
    rows = [
        SheetRow(f"likeness {alike:.3f}", [_plain(scans[scan])], [_plain(images[image])])
        for image, scan, alike in pairs
    ]
    return contact_sheet("training scan and the image most alike to it: never hand this out", rows, tile_px=_TILE_PX)


def _squares_at(
    artefact: Artefact, folder: str, most: int, places: Sequence[int], size_px: int
) -> dict[int, NDArray[np.float32]]:
    wanted, chosen = set(places), enumerate(spread(artefact, folder, most))
    return {place: square(row, folder, size_px) for place, row in chosen if place in wanted}


def _rows(tiles: Sequence[Tile]) -> list[SheetRow]:
    return [SheetRow("", tiles[start : start + _COLUMNS], []) for start in range(0, len(tiles), _COLUMNS)]


def _plain(square_SS: NDArray[np.float32]) -> Tile:
    return Tile(np.round(square_SS * 255).astype(np.uint8), {})


def _tile(seen: Seen, place: int) -> Tile:
    pixels = np.round(seen.sample_MSS[place] * 255).astype(np.uint8)
    return Tile(pixels, seen.attributes[seen.sample[place]])


# --- reading --------------------------------------------------------------------------------------------------


def _read(probe: Probe | None, batch: Sequence[Row], folder: str) -> NDArray[np.float32]:
    if probe is None:
        return np.zeros((len(batch), 0), np.float32)
    # Scans of a corpus may differ in their type; each is read by itself, with the same result.
    pixels, bits = zip(*(pixels_of(row, folder) for row in batch), strict=True)
    if len({(one.shape, depth) for one, depth in zip(pixels, bits, strict=True)}) == 1:
        return probe.read(np.stack(pixels), bits[0])
    return np.concatenate([probe.read(one[None], depth) for one, depth in zip(pixels, bits, strict=True)])
