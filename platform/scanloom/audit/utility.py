"""What a dataset is worth for training: classifiers learn from real, synthetic or both, and read held-out scans.

`read_material` reads once what they learn from and are tested on; `scanloom.training.utility.train_and_score` is one
classifier; `utility_of` says what all of them together show. Esteban et al. 2017 call the second arm TSTR: train on
synthetic, test on real.

Legend of shape suffixes: K seeds, M held-out scans, L labels, R replicates, G cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import t as students_t

from scanloom.artefact import Artefact, open_artefact
from scanloom.attributes import Attributes, AttributeSchema
from scanloom.audit.groups import EVERYONE, LEAST_IMAGES, Grouping, widest_gap, within
from scanloom.audit.intervals import Estimate, multiplicities, percentile
from scanloom.audit.report import Gain, Gap, Interval, Usefulness, Utility
from scanloom.audit.scans import held_out_splits, in_batches, owner_of, spread, squares
from scanloom.audit.verdicts import MEAN
from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.backbone import Backbone, load_backbone
from scanloom.models.classifier import DEFAULT, ON_VECTORS
from scanloom.models.probe_card import Output, outputs_of, said_by
from scanloom.recipe import LabelsAttribute, nearest
from scanloom.recipe_audit import ARMS, Arm, Audit, UtilityStudy
from scanloom.sampling.dataset import IMAGES
from scanloom.training.utility import Material, Part, Scores

Floats = NDArray[np.float64]
_BATCH = 64


class UtilityJob(BaseModel):
    """What whoever reads the material is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: UtilityStudy
    corpus_uri: str
    dataset_uri: str


def require_known(settings: Audit, schema: AttributeSchema) -> None:
    """Raise RecipeError for a group or a label that the corpus does not declare, before anything is trained."""
    Grouping.of(schema, [], settings.fairness.groups)
    if settings.utility is not None:
        _asked(settings.utility, schema)


# --- what is learned from -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    inputs_NX: NDArray[Any]
    rows: list[Attributes]
    patients: list[str]


def read_material(config: Mapping[str, Any]) -> Material:
    """Read what classifiers learn from and are tested on. `config` is a UtilityJob as a dict.

    At most `settings.images` of each part are held, 8 KB each at 64 px. RecipeError for a label that nobody declared,
    ArtefactError where there is nothing to learn from or to test on, or a patient is on both sides.
    """
    job = UtilityJob.model_validate(config)
    settings = job.settings
    corpus, dataset = open_artefact(job.corpus_uri, "corpus"), open_artefact(job.dataset_uri, "dataset")
    schema = AttributeSchema.model_validate(corpus.manifest.statistics["schema"])
    made_schema = AttributeSchema.model_validate(dataset.manifest.statistics["spec"]["attributes"])
    device = "cuda" if settings.use_gpu else "cpu"
    backbone = None if settings.backbone is None else load_backbone(settings.backbone, device)
    size_px = min(settings.size_px, corpus.manifest.statistics["size_px"]) if backbone is None else backbone.size_px

    def read(artefact: Artefact, folders: Sequence[str], of: AttributeSchema) -> _Read:
        return _read(artefact, folders, of, settings.images, size_px, backbone)

    train, made = read(corpus, ["train"], schema), read(dataset, [IMAGES], made_schema)
    held_out = read(corpus, held_out_splits(corpus), schema)
    for one, what in ((train, "train scans"), (held_out, "held-out scans"), (made, "images")):
        if not one.rows:
            raise ArtefactError(f"{(dataset if one is made else corpus).uri}: holds no {what} to measure usefulness by")
    if set(train.patients) & set(held_out.patients):
        raise ArtefactError(f"{corpus.uri}: patients are both trained on and held out; prepare it again")
    outputs = _asked(settings, schema)
    left_out = _left_out(outputs, train, made, held_out, settings.least_patients)
    labels = [output for output in outputs if output.name not in left_out]

    def part(of: _Read) -> Part:
        return Part(of.inputs_NX, said_by(labels, of.rows).astype(np.float32))

    return Material(
        schema=schema, labels=tuple(label.name for label in labels), train=part(train), synthetic=part(made),
        held_out=part(held_out), patients=held_out.patients, attributes=held_out.rows, left_out=left_out,
        classifier=f"{DEFAULT}, {size_px} px" if backbone is None else f"{ON_VECTORS} {backbone.name}",
    )  # fmt: skip


def _read(
    artefact: Artefact, folders: Sequence[str], schema: AttributeSchema, most: int, size_px: int,
    backbone: Backbone | None,
) -> _Read:  # fmt: skip
    inputs: list[NDArray[Any]] = []
    rows: list[Attributes] = []
    patients: list[str] = []
    for folder in folders:
        for batch in in_batches(spread(artefact, folder, max(1, most // len(folders))), _BATCH):
            shown = squares(batch, folder, size_px)
            inputs.append(shown.astype(np.float16) if backbone is None else backbone(shown))
            rows += [schema.from_row(row) for row in batch]
            patients += [owner_of(row, folder) for row in batch]
    return _Read(np.concatenate(inputs) if inputs else np.zeros((0, size_px, size_px), np.float16), rows, patients)


def _asked(settings: UtilityStudy, schema: AttributeSchema) -> list[Output]:
    """The labels that the recipe names; else all labels, or, of a schema without any, values of categories."""
    able = {output.name: output for output in outputs_of(schema) if output.value is not None}
    for name in settings.labels or ():
        if name not in able:
            raise RecipeError(f"audit.utility.labels: the corpus declares no {name!r}{nearest(name, able)}")
    if settings.labels is not None:
        return [able[name] for name in settings.labels]
    found = [one for one in able.values() if isinstance(schema[one.attribute], LabelsAttribute)]
    return found or list(able.values())


def _left_out(outputs: Sequence[Output], train: _Read, made: _Read, held_out: _Read, least: int) -> dict[str, str]:
    """Labels that too few of those tested, or of those learned from, have or have not, each with the reason."""
    found: dict[str, str] = {}
    for output in outputs:
        tested = said_by([output], held_out.rows)[:, 0]
        for said, count in (("have it", tested == 1), ("have it not", tested == 0)):
            patients = len({held_out.patients[place] for place in np.flatnonzero(count)})
            if patients < least:
                found.setdefault(output.name, f"{patients} held-out patients {said}; needs {least}")
        for part, what in ((train, "train scans"), (made, "synthetic images")):
            told = said_by([output], part.rows)
            if not (told == 1).any() or not (told == 0).any():
                found.setdefault(output.name, f"the {what} have it everywhere or nowhere")
    return found


# --- what it shows --------------------------------------------------------------------------------------------


_Key = tuple[Arm, str, str]
"""Arm, label and cell."""


@dataclass(frozen=True)
class _Area:
    """The AUC of one arm, label and cell, or its mean over labels."""

    by_seed_K: Floats
    by_patients_R: Floats
    """Mean over the seeds, in resampled patients."""
    fewest: int
    """Patients of the rarer kind."""
    scans: int
    positives: int
    seed: int

    @property
    def value(self) -> float:
        return float(self.by_seed_K.mean())

    @property
    def replicates(self) -> Floats:
        """With what the seeds differ by."""
        seeds = len(self.by_seed_K)
        if seeds == 1:
            return self.by_patients_R
        # Of few seeds little is known of how far they spread: Student's distribution, not the normal one.
        random = np.random.default_rng(self.seed)
        drawn = students_t.rvs(seeds - 1, size=len(self.by_patients_R), random_state=random)
        spread: Floats = self.by_patients_R + drawn * self.by_seed_K.std(ddof=1) / math.sqrt(seeds)
        return spread

    @property
    def estimate(self) -> Estimate:
        """Within 0 to 1; of a perfect separation at least as wide as for that many successes of as many patients."""
        replicates = self.replicates
        known = replicates[~np.isnan(replicates)]
        if math.isnan(self.value) or not len(known):
            return Estimate(self.value, 0.0, 1.0)
        found, bound = percentile(self.value, known), 0.025 ** (1.0 / max(1, self.fewest))
        low = min(found.low, bound) if self.value == 1.0 else found.low
        high = max(found.high, 1.0 - bound) if self.value == 0.0 else found.high
        return Estimate(self.value, max(0.0, low), min(1.0, high))


def utility_of(
    material: Material, scores: Sequence[Scores], groups: Sequence[str] | None, least_patients: int, seed: int = 0
) -> Utility:
    """What all classifiers together show, by arm, label and cell; `groups` are those of `Fairness`.

    An interval is that of a bootstrap over held-out patients, with what the seeds differ by added: their mean's t
    distribution. It says nothing of what another dataset, or other training scans, would give. The same patients are
    drawn for every arm, so that a gain is compared on the same scans.
    """
    grouping = Grouping.of(material.schema, material.attributes, groups)
    areas = _areas(material, scores, grouping, seed)
    figures = [_figure(key, area, least_patients) for key, area in areas.items()]
    return Utility(
        classifier=material.classifier, train_scans=len(material.train), synthetic_images=len(material.synthetic),
        figures=tuple(figures), held_out_scans=len(material.held_out), held_out_patients=len(set(material.patients)),
        gains=tuple(_gains(areas)), gaps=_gaps(figures, grouping), left_out=dict(material.left_out),
        seconds=sum(one.seconds for one in scores),
    )  # fmt: skip


def _areas(material: Material, scores: Sequence[Scores], grouping: Grouping, seed: int) -> dict[_Key, _Area]:
    """Cell by cell, the means over all labels last."""
    weights_RM = multiplicities(material.patients, seed=seed)
    codes, owners = grouping.codes(material.attributes), np.asarray(material.patients)
    by_arm: dict[Arm, Floats] = {arm: _stacked(scores, arm) for arm in ARMS if any(one.arm == arm for one in scores)}
    found: dict[_Key, _Area] = {}
    for cell in (EVERYONE, *grouping.singles()):
        inside_M = within(cell, codes)
        for column, (label, wanted_M) in enumerate(zip(material.labels, material.held_out.wanted_NL.T, strict=True)):
            chosen_M = inside_M & ~np.isnan(wanted_M)
            if not chosen_M.any():
                continue
            has_M, whose_M, drawn_RM = wanted_M[chosen_M] == 1, owners[chosen_M], weights_RM[:, chosen_M]
            for number, (arm, read_KML) in enumerate(by_arm.items()):
                read_KM = read_KML[:, chosen_M, column]
                found[arm, label, cell.name] = _area(read_KM, has_M, whose_M, drawn_RM, seed + number)
    # None of a single label.
    if len(material.labels) > 1:
        found |= {(arm, MEAN, EVERYONE.name): _mean(arm, material, found) for arm in by_arm}
    return found


def _figure(key: _Key, area: _Area, least_patients: int) -> Usefulness:
    arm, label, cell = key
    few = area.fewest < least_patients or (cell != EVERYONE.name and area.scans < LEAST_IMAGES)
    return Usefulness(
        arm=arm, label=label, cell=cell, auc=Interval.of(area.estimate), scans=area.scans, positives=area.positives,
        seeds=len(area.by_seed_K), small=few and label != MEAN,
    )  # fmt: skip


def _gains(areas: Mapping[_Key, _Area]) -> Iterator[Gain]:
    for (arm, label, cell), area in areas.items():
        real = areas.get(("real", label, cell))
        if cell == EVERYONE.name and arm != "real" and real is not None:
            yield Gain(arm=arm, label=label, over_real=_less(area, real), share=_share(area, real))


def _stacked(scores: Sequence[Scores], arm: Arm) -> Floats:
    chosen = sorted((one for one in scores if one.arm == arm), key=lambda one: one.seed)
    return np.stack([one.likelihood_ML.astype(np.float64) for one in chosen])


def _area(
    read_KM: Floats, has_M: NDArray[np.bool_], owners_M: NDArray[np.str_], weights_RM: Floats, seed: int
) -> _Area:
    fewest = min(len(set(owners_M[has_M])), len(set(owners_M[~has_M])))
    if fewest:
        plain = np.ones((1, len(has_M)))
        by_seed_K = np.array([weighted_auc(read_M, has_M, plain)[0] for read_M in read_KM])
        by_patients_R = np.mean([weighted_auc(read_M, has_M, weights_RM) for read_M in read_KM], axis=0)
    else:
        by_seed_K, by_patients_R = np.full(len(read_KM), math.nan), np.full(len(weights_RM), math.nan)
    return _Area(by_seed_K, by_patients_R, fewest, len(has_M), int(has_M.sum()), seed)


def weighted_auc(read_M: Floats, has_M: NDArray[np.bool_], weights_RM: Floats) -> Floats:
    """The chance that one that has it is read higher than one that has not, ties half, float64 [R], by weight.

    NaN where a replicate holds only one kind.
    """
    order = np.argsort(read_M, kind="stable")
    read, has, weights = read_M[order], has_M[order], weights_RM[:, order]
    starts = np.flatnonzero(np.concatenate([[True], read[1:] != read[:-1]]))
    with_RV = np.add.reduceat(weights * has, starts, axis=1)
    without_RV = np.add.reduceat(weights * ~has, starts, axis=1)
    below_RV = np.cumsum(without_RV, axis=1) - without_RV / 2.0
    pairs_R = with_RV.sum(axis=1) * without_RV.sum(axis=1)
    area: Floats = np.divide(
        (with_RV * below_RV).sum(axis=1), pairs_R, out=np.full(len(weights), math.nan), where=pairs_R > 0
    )
    return area


def _mean(arm: Arm, material: Material, areas: Mapping[_Key, _Area]) -> _Area:
    """Over all labels, of all held-out scans."""
    parts, wanted = [areas[arm, label, EVERYONE.name] for label in material.labels], material.held_out.wanted_NL
    return _Area(
        np.mean([one.by_seed_K for one in parts], axis=0), np.mean([one.by_patients_R for one in parts], axis=0),
        min(one.fewest for one in parts), int((~np.isnan(wanted)).any(axis=1).sum()),
        int((wanted == 1).any(axis=1).sum()), parts[0].seed,
    )  # fmt: skip


def _less(area: _Area, other: _Area) -> Interval:
    gained_R = area.replicates - other.replicates
    known = gained_R[~np.isnan(gained_R)]
    value = area.value - other.value
    if not len(known) or math.isnan(value):
        return Interval(value=None, low=None, high=None)
    return Interval.of(percentile(value, known))


def _share(area: _Area, other: _Area) -> Interval | None:
    """Of what another teaches beyond guessing; None where its interval holds guessing, or either is not known."""
    if math.isnan(area.value) or math.isnan(other.value) or other.estimate.low <= 0.5:
        return None
    # A replicate in which the other teaches next to nothing would make the share as large as one likes.
    shares_R = (area.replicates - 0.5) / np.maximum(other.replicates - 0.5, other.estimate.low - 0.5)
    known = shares_R[~np.isnan(shares_R)]
    return Interval.of(percentile((area.value - 0.5) / (other.value - 0.5), known)) if len(known) else None


def _gaps(figures: Sequence[Usefulness], grouping: Grouping) -> tuple[Gap, ...]:
    """Between the values of each category, of classifiers that saw no real scan beside those that saw only such."""
    told = {(one.arm, one.label, one.cell): one.auc for one in figures if not one.small}
    found = []
    for axis in grouping.axes:
        for label in dict.fromkeys(one.label for one in figures if one.label != MEAN):
            by_arm = {
                arm: {name: told[arm, label, name] for name in axis.names if (arm, label, name) in told}
                for arm in ("synthetic", "real")
            }
            found.append(widest_gap(
                f"AUC of {label}, trained on synthetic", axis.attribute, by_arm["synthetic"], low_is_worse=True,
                real=by_arm["real"],
            ))  # fmt: skip
    return tuple(gap for gap in found if gap is not None)
