"""What an audit found, as report.json holds it: typed, so that a policy can be held against it. torch-free.

A part that is None was not measured. Nothing in it names a training scan or a patient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import ValidationError

from scanloom.audit.fidelity import Compared
from scanloom.audit.intervals import Estimate
from scanloom.errors import ArtefactError
from scanloom.models.gate_card import Calibration, Record
from scanloom.recipe_audit import Arm

REPORT = "report.json"
PAGE = "report.html"
PRIVATE = "private"
"""Folder of an audit that never leaves with a release: it shows training scans."""
SCHEMA_VERSION = 1


class Interval(Record):
    """A figure with its 95 % interval; None where it cannot be told."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, estimate: Estimate) -> Interval:
        """Without what JSON cannot hold."""
        value, low, high = (
            end if math.isfinite(end) else None for end in (estimate.value, estimate.low, estimate.high)
        )
        return cls(value=value, low=low, high=high)

    def __str__(self) -> str:
        if self.value is None:
            return "not known"
        ends = " to ".join("?" if end is None else f"{end:.3g}" for end in (self.low, self.high))
        return f"{self.value:.3g} ({ends})"


class Subject(Record):
    """What was audited: by digest, so that it cannot be another one."""

    name: str
    dataset: str
    corpus: str
    images: int
    """In the dataset."""
    looked_at: int


class PlantedRecall(Record):
    """How many planted copies of one kind are found."""

    plant: str
    strength: Literal["slight", "strong"]
    recall: Interval
    traced: float
    """Share that is found and leads to the right patient."""
    copies: int


class Peer(Record):
    """Another detector at the same rule of threshold, on the same planted copies and images."""

    name: str
    lowest_slight_recall: float
    copy_rate: Interval
    held_out_rate: Interval


class Canaries(Record):
    """Training scans that the generator saw equally often, and how near its images came to them."""

    times: int
    """How often each was in the training set; 1: all that were no canaries."""
    scans: int
    copied: int
    """Those with an image above tau."""
    likeness: float
    """To the most similar image, the median over these scans."""


class Copies(Calibration):
    """Copies of training scans: the threshold, its proven power, and what lies above it."""

    train_scans: int
    """Looked up."""
    corpus_scans: int
    """In the train split."""
    power: tuple[PlantedRecall, ...]
    synthetic_rate: Interval
    synthetic_copies: int
    copied_scans: int
    held_out_rate: Interval
    held_out_scans: int
    excess: bool
    """Whether copies are more frequent than among held-out patients, beyond both intervals."""
    same_patient_found: float | None
    """Share of training scans whose patient has another one above tau: how far it sees the patient, not the scan."""
    other_patient_found: float | None
    """Share of training scans with one of another patient above tau: copies within the corpus, or too low a tau."""
    peers: tuple[Peer, ...] = ()
    canaries: tuple[Canaries, ...] = ()
    """Where the generator was trained with some."""

    @property
    def lowest_slight_recall(self) -> float:
        """Of the slight plants, that which is found least often."""
        return min((one.recall.value or 0.0 for one in self.power if one.strength == "slight"), default=0.0)


class Beside(Record):
    """A figure of synthetic images against held-out scans, and of as many training scans against the same."""

    synthetic: Interval
    baseline: Interval
    images: int

    @classmethod
    def of(cls, one: Compared) -> Beside:
        """Without what JSON cannot hold."""
        return cls(synthetic=Interval.of(one.synthetic), baseline=Interval.of(one.baseline), images=one.images)


class Reading(Record):
    """What a probe reads of images beside what was asked for, of one value, label or number."""

    name: str
    cell: str
    """All, or the part of the dataset that it is of."""
    asked: Interval
    achieved: Interval
    held_out_truth: float | None
    """Of held-out scans: how often it is true; None where nobody knows."""
    held_out_read: float | None
    """And how often it is read: where that differs, it is the probe's own error."""
    excess: Interval | None = None
    """Read less asked, image by image."""
    held_out_excess: Interval | None = None
    """Read less true of held-out scans of the cell."""
    share: bool
    """Whether these are shares of images; else means of a number in its unit."""
    images: int
    small: bool
    """Too few images for the figure to mean much."""

    @property
    def gap(self) -> float | None:
        """What is read less what was asked, away from what is read of real scans less what is true; None: not known."""
        if self.asked.value is None or self.achieved.value is None:
            return None
        error = (self.held_out_read or 0.0) - (self.held_out_truth or 0.0)
        return abs(self.achieved.value - self.asked.value - error)

    @property
    def sure_gap(self) -> float | None:
        """The least that the gap is, beyond chance too: of the many cells some lie apart by chance alone.

        The lower end of how far `excess` lies from `held_out_excess`, by the intervals of both (MOVER: Zou & Donner
        2008); 0 where they agree, None where it cannot be told.
        """
        known = [one for one in (self.excess, self.held_out_excess) if one is not None]
        if self.excess is None or any(one.value is None or one.low is None for one in known):
            return None
        values = [one.value or 0.0 for one in known]
        # The interval of an excess reaches as far to both sides.
        half = math.sqrt(sum((value - (one.low or 0.0)) ** 2 for value, one in zip(values, known, strict=True)))
        apart = values[0] - (values[1] if len(values) > 1 else 0.0)
        return max(0.0, abs(apart) - half)


class MembershipAttack(Record):
    """How well one attack tells scans that the generator learned from from those of held-out patients."""

    name: str
    auc: Interval
    """0.5 where nothing is betrayed."""
    tpr: Interval
    """Share of members found where at most one in a hundred others is taken for one; see `guessed_tpr`."""


class Membership(Record):
    """What whoever holds the generator could tell of a scan that they hold too."""

    generator: str
    """Its digest."""
    members: int
    others: int
    member_patients: int
    other_patients: int
    attacks: tuple[MembershipAttack, ...]

    @property
    def guessed_tpr(self) -> float:
        """The share of members found where nothing is betrayed: of few others the threshold is a coarse rank."""
        return (math.floor(0.01 * self.others + 1e-9) + 1) / (self.others + 1)


class Subgroup(Record):
    """Figures of the images of one cell alone, each beside that of real scans of the same cell."""

    cell: str
    images: int
    held_out_scans: int
    figures: Mapping[str, Beside]
    small: bool
    """Too few images or scans for the figures to mean much."""


class Gap(Record):
    """How far two cells lie apart in one figure: those of a category that lie furthest apart."""

    figure: str
    of: str
    """The category whose values the cells are."""
    worst: str
    best: str
    gap: Interval
    """Holds for every two of the cells at once, because these two were chosen after looking."""
    baseline: Interval | None = None
    """The same two cells' gap of real scans; None where the figure stands beside real ones already."""

    @property
    def beyond_chance(self) -> bool:
        return self.gap.low is not None and self.gap.low > 0


class Usefulness(Record):
    """How well classifiers that learned in one way read a label of held-out real scans."""

    arm: Arm
    label: str
    """Or the mean of all."""
    cell: str
    """All, or the part of the held-out scans that it is of."""
    auc: Interval
    """0.5 where nothing was learned. Its interval is over the seeds and the held-out patients."""
    scans: int
    positives: int
    seeds: int
    small: bool


class Gain(Record):
    """What learning in another way changes, on the same held-out patients."""

    arm: Arm
    label: str
    over_real: Interval
    """AUC less that of classifiers that learned from real scans alone."""
    share: Interval | None = None
    """Of what real scans teach beyond guessing, (AUC - 0.5) / (their AUC - 0.5); None where they may teach nothing."""


class Utility(Record):
    """What the images are worth for training."""

    classifier: str
    train_scans: int
    synthetic_images: int
    figures: tuple[Usefulness, ...]
    held_out_scans: int = 0
    held_out_patients: int = 0
    gains: tuple[Gain, ...] = ()
    gaps: tuple[Gap, ...] = ()
    left_out: Mapping[str, str] = {}
    """Labels that could not be tested, each with the reason."""
    seconds: float = 0.0
    """Of all trainings together."""


class GivenFidelity(Record):
    """Fidelity as a given network or radiomic features see it, beside that of the audit's own encoder."""

    backbone: str
    """Name without its place."""
    digest: str
    """SHA-256 over its files, or over what versions of a library decide."""
    figures: Mapping[str, Beside]


class Contents(Record):
    """What the dataset holds of what was ordered, and whether it says of each image what it shows."""

    requested: int
    infeasible: int
    """Images that no draw could fill."""
    rejected_draws: Mapping[str, int]
    """Draws that a check turned down, by reason; others took their place."""
    unknown: Mapping[str, float]
    """Of each attribute the share of images that do not say it."""
    outside: int
    """Images looked at of which an attribute lies outside of what the corpus's train split holds."""
    gate: str
    """What looked for copies while the images were made."""


class Finding(Record):
    """One thing that was measured, in words."""

    what: str
    found: str


class Criterion(Record):
    """One of the seven criteria of the scorecard for synthetic medical data (Zamzmi et al. 2025)."""

    name: str
    asks: str
    measured: tuple[Finding, ...]
    not_measured: tuple[str, ...]


class Report(Record):
    """All that an audit found."""

    schema_version: int = SCHEMA_VERSION
    subject: Subject
    copies: Copies | None = None
    fidelity: Mapping[str, Beside] | None = None
    fidelity_given: tuple[GivenFidelity, ...] = ()
    appearance: Mapping[str, Beside] | None = None
    membership: Membership | None = None
    fairness: tuple[Reading, ...] | None = None
    subgroups: tuple[Subgroup, ...] | None = None
    gaps: tuple[Gap, ...] | None = None
    utility: Utility | None = None
    contents: Contents | None = None
    scorecard: tuple[Criterion, ...] = ()
    """All of it once more, by what the scorecard asks."""
    probe: str | None = None
    """Digest of the probe that read for it."""
    seconds: float
    """That the measuring took, without training the encoder."""


class Likenesses(Record):
    """How alike images and their nearest training scans are: for a picture."""

    tau: float
    held_out: tuple[float, ...]
    synthetic: tuple[float, ...]
    planted: tuple[float, ...]
    """Of training scans changed in all of the slight ways at once."""


def read_report(data: bytes, where: str) -> Report:
    """The report in a file. ArtefactError where it is none, or of newer code."""
    try:
        report = Report.model_validate_json(data)
    except ValidationError as error:
        raise ArtefactError(f"{where}: is no audit report that this code reads; make the audit again") from error
    if report.schema_version > SCHEMA_VERSION:
        raise ArtefactError(f"{where}: was made by newer code; upgrade scanloom")
    return report
