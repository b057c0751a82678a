"""From a dataset and the corpus behind it to an audit's files: read once in pieces, embedded, compared, told."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from scanloom.artefact import Artefact, FileEntry, find_artefact, open_artefact
from scanloom.attributes import Attributes, AttributeSchema, Envelope, describe
from scanloom.audit.appearance import level_distance, likeness, pairs_within, spectral_distance
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
from scanloom.audit.scans import calibration_and_check, count, spread, square
from scanloom.audit.scorecard import scorecard
from scanloom.audit.seen import TRAIN, Embed, Seen, see
from scanloom.errors import ArtefactError
from scanloom.models.attribute_probe import Probe, load_probe
from scanloom.models.copy_encoder import embedding, levels, load_copy_encoder
from scanloom.recipe_audit import Audit, CopyDetection
from scanloom.recipe_train import Canaries as CanariesSection
from scanloom.sampling.dataset import IMAGES, INFEASIBLE
from scanloom.store import Store
from scanloom.training.views import times_trained

ENCODER = "copies/encoder.safetensors"
PAIRS = f"{PRIVATE}/pairs.png"
_LIKENESS_PAIRS = 200
_SHOWN, _COLUMNS = 24, 8
_TILE_PX = 96


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
class _Sets:
    """The scans and images that are held against each other."""

    train: Seen
    calibration: Seen
    """Held-out scans that the threshold follows from."""
    check: Seen
    """Scans of other held-out patients."""
    images: Seen

    @property
    def held_out_owners(self) -> list[str]:
        """Of all held-out scans, those of the threshold first."""
        return [*self.calibration.owners, *self.check.owners]

    @property
    def held_out_attributes(self) -> list[Attributes]:
        return [*self.calibration.attributes, *self.check.attributes]


@dataclass(frozen=True)
class _Lookup:
    """The images and the scans of `_Sets.check`, looked up among the training scans."""

    detector: Embeddings
    threshold: Threshold
    found: Found
    """Of the images."""
    held_out: Found

    @classmethod
    def of(cls, sets: _Sets, embed: Embed, asked: float) -> Self:
        detector = Embeddings(embed, list(sets.train.views_NVD.swapaxes(0, 1)))
        calibration = detector.look_up(sets.calibration.vectors).likeness_N
        threshold = calibrate(calibration, sets.calibration.owners, asked, detector.scale)
        return cls(detector, threshold, detector.look_up(sets.images.vectors), detector.look_up(sets.check.vectors))


def make_audit(config: Mapping[str, Any]) -> Measured:
    """Measure a dataset beside its corpus. `config` is an AuditJob as a dict.

    The encoder lies at ENCODER in the audit's folder already. ArtefactError where the corpus has too few held-out
    patients to calibrate and to check, or the dataset holds no images.
    """
    started = time.monotonic()
    job = AuditJob.model_validate(config)
    corpus, dataset = open_artefact(job.corpus_uri, "corpus"), open_artefact(job.dataset_uri, "dataset")
    target = Store(job.audit_uri)
    probe = None if job.probe_uri is None else load_probe(job.probe_uri)
    network = load_copy_encoder(target.read(ENCODER), job.channels, job.settings.copies.width, target.uri_of(ENCODER))
    embed = embedding(network)
    sets = _looked_at(job, corpus, dataset, embed, probe)
    lookup = _Lookup.of(sets, embed, job.settings.copies.false_positive_share)
    grouping = Grouping.of(_schema(corpus), sets.train.attributes, job.settings.fairness.groups)
    fairness = None if probe is None else _fairness(probe, grouping, sets)
    alike = _subgroups(grouping, sets)
    statistics = dataset.manifest.statistics
    report = Report(
        subject=Subject(
            name=dataset.manifest.name, dataset=dataset.digest, corpus=corpus.digest, images=statistics["rows"],
            looked_at=len(sets.images),
        ),
        copies=_copies(job.settings.copies, sets, lookup, count(corpus, TRAIN), _canaries_of(dataset)),
        fidelity=_fidelity(sets), appearance=_appearance(sets), fairness=fairness, subgroups=alike,
        gaps=gaps(grouping, fairness or (), alike),
        contents=_contents(statistics, corpus.manifest.statistics, sets.images.attributes),
        probe=None if probe is None else probe.digest, seconds=time.monotonic() - started,
    )  # fmt: skip
    pairs = _pairs(job, corpus, dataset, lookup.found)
    target.write(PAIRS, pairs)
    files = (FileEntry.of(target.digest(ENCODER)), FileEntry.of_bytes(PAIRS, pairs))
    sheet = _sheet(dataset.manifest.name, sets.images)
    return Measured(report=report, likenesses=_likenesses(sets, lookup), sheet_png=sheet, files=files)


def _looked_at(job: AuditJob, corpus: Artefact, dataset: Artefact, embed: Embed, probe: Probe | None) -> _Sets:
    schema, most = _schema(corpus), job.settings.copies.max_scans

    def real(split: str) -> Seen:
        # Nothing is compared with what a probe reads of the scans that it learned from.
        return see(corpus, split, schema, embed, job.size_px, most, None if split == TRAIN else probe)

    train, (calibration, check) = real(TRAIN), calibration_and_check(corpus, real)
    asked = AttributeSchema.model_validate(dataset.manifest.statistics["spec"]["attributes"])
    images = see(dataset, IMAGES, asked, embed, job.size_px, job.settings.images, probe)
    if not len(images):
        raise ArtefactError(f"{dataset.uri}: holds no images to audit")
    return _Sets(train, calibration, check, images)


def _schema(corpus: Artefact) -> AttributeSchema:
    return AttributeSchema.model_validate(corpus.manifest.statistics["schema"])


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
    settings: CopyDetection, sets: _Sets, lookup: _Lookup, scans: int, canaries: CanariesSection | None
) -> Copies:
    train, detector, threshold = sets.train, lookup.detector, lookup.threshold
    planted = slice(0, settings.planted_scans)
    recalls = power(
        detector, threshold, train.sample_MSS[planted], train.sample[planted], train.owners, (*SLIGHT, *STRONG)
    )
    rates = copy_rates(threshold, lookup.found, lookup.held_out, sets.check.owners)
    same, other = detector.among_train(train.owners)
    company = np.isfinite(same)
    return Copies(
        **threshold.told, train_scans=len(train), corpus_scans=scans,
        power=tuple(_recall(one) for one in recalls), synthetic_rate=Interval.of(rates.synthetic),
        synthetic_copies=rates.copies, copied_scans=rates.copied_scans, held_out_rate=Interval.of(rates.held_out),
        held_out_scans=rates.held_out_scans, excess=rates.excess,
        same_patient_found=float((same[company] > threshold.tau).mean()) if company.any() else None,
        other_patient_found=float((other > threshold.tau).mean()),
        peers=_peers(sets, settings.false_positive_share),
        canaries=() if canaries is None else _canaries(canaries, sets, lookup),
    )  # fmt: skip


def _canaries(section: CanariesSection, sets: _Sets, lookup: _Lookup) -> tuple[Canaries, ...]:
    times = [times_trained(section, name) for name in sets.train.ids]
    told = reproduced(lookup.detector, lookup.threshold, sets.images.vectors, times)
    return tuple(Canaries(**asdict(one)) for one in told)


def _recall(found: Recall) -> PlantedRecall:
    return PlantedRecall(
        plant=found.plant, strength=found.strength, recall=Interval.of(found.recall), traced=found.traced,
        copies=found.copies,
    )  # fmt: skip


def _peers(sets: _Sets, asked: float) -> tuple[Peer, ...]:
    """What others would have found, on the samples alone: they need pixels."""
    told: list[Peer] = []
    train, calibration, check, images = sets.train, sets.calibration, sets.check, sets.images
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


def _fidelity(sets: _Sets) -> dict[str, Beside] | None:
    """None where there are too few images or patients for neighbourhoods."""
    try:
        told = fidelity(sets.images.embedded, sets.train.embedded, sets.check.embedded)
    except ValueError:
        return None
    return {name: Beside.of(one) for name, one in told.items()}


def _appearance(sets: _Sets) -> dict[str, Beside]:
    images, train, check = sets.images, sets.train, sets.check
    spectra = [spectral_distance(one.curves(one.spectra_NK), check.curves(check.spectra_NK)) for one in (images, train)]
    levels = [level_distance(one.curves(one.levels_NL), check.curves(check.levels_NL)) for one in (images, train)]
    told = {
        "spectrum (dB)": Beside.of(Compared(spectra[0], spectra[1], len(images))),
        "grey levels (share of range)": Beside.of(Compared(levels[0], levels[1], len(images))),
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


def _fairness(probe: Probe, grouping: Grouping, sets: _Sets) -> tuple[Reading, ...]:
    images, read_NO = sets.images, np.concatenate([sets.calibration.read_NO, sets.check.read_NO])
    held_out = Group(sets.held_out_attributes, sets.held_out_owners, read_NO)
    return readings(probe.card, grouping, Group(images.attributes, images.owners, images.read_NO), held_out)


def _subgroups(grouping: Grouping, sets: _Sets) -> tuple[Subgroup, ...]:
    images, train = sets.images, sets.train
    vectors_ND = np.concatenate([sets.calibration.vectors, sets.check.vectors])
    held_out = Embedded.of(vectors_ND, sets.held_out_owners)
    return subgroups(
        grouping, images.embedded, images.attributes, train.embedded, train.attributes, held_out,
        sets.held_out_attributes,
    )  # fmt: skip


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


def _likenesses(sets: _Sets, lookup: _Lookup) -> Likenesses:
    planted = lookup.detector(SLIGHT[-1].change(sets.train.sample_MSS)).likeness_N
    return Likenesses(
        tau=lookup.threshold.tau, held_out=_floats(lookup.held_out.likeness_N),
        synthetic=_floats(lookup.found.likeness_N), planted=_floats(planted),
    )  # fmt: skip


def _floats(values_N: NDArray[np.floating[Any]]) -> tuple[float, ...]:
    return tuple(float(value) for value in values_N)


def _pairs(job: AuditJob, corpus: Artefact, dataset: Artefact, found: Found) -> bytes:
    """The images most alike to a training scan beside it, as a PNG for those who may see scans."""
    pairs = most_alike(found, job.settings.pairs)
    images = _squares_at(dataset, IMAGES, job.settings.images, [image for image, _, _ in pairs], job.size_px)
    scans = _squares_at(corpus, TRAIN, job.settings.copies.max_scans, [scan for _, scan, _ in pairs], job.size_px)
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


def _sheet(name: str, images: Seen) -> bytes:
    tiles = [_tile(images, place) for place in range(min(_SHOWN, len(images.sample)))]
    rows = [SheetRow("", tiles[start : start + _COLUMNS], []) for start in range(0, len(tiles), _COLUMNS)]
    return contact_sheet(f"{name}: synthetic images", rows, tile_px=_TILE_PX)


def _plain(square_SS: NDArray[np.float32]) -> Tile:
    return Tile(np.round(square_SS * 255).astype(np.uint8), {})


def _tile(seen: Seen, place: int) -> Tile:
    pixels = np.round(seen.sample_MSS[place] * 255).astype(np.uint8)
    return Tile(pixels, seen.attributes[seen.sample[place]])
