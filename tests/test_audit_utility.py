"""What images are worth: real ones given as synthetic are worth as much, those with shuffled labels nothing."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scanloom.attributes import Attributes
from scanloom.audit.intervals import multiplicities
from scanloom.audit.report import Interval, Usefulness, Utility
from scanloom.audit.utility import UtilityJob, read_material, require_known, utility_of, weighted_auc
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import LabelsAttribute
from scanloom.recipe_audit import ARMS, Arm, Audit, Fairness, UtilityStudy
from scanloom.training.calibration import auc
from scanloom.training.utility import Material, Part, Scores, lessons, train_and_score
from tests.audited import publish_dataset
from tests.phantom_corpus import SIZE, publish_corpus
from tests.released import generator
from tests.test_job_audit import IMAGES, honest
from tests.tiny_generator import SCHEMA

Array = np.ndarray[Any, Any]
LABELS = ("findings=Cardiomegaly", "findings=Effusion")
SETTINGS = UtilityStudy(seeds=1, steps=50, batch_size=16)


def drawn(count: int, seed: int) -> tuple[Array, Array]:
    """Squares of patches and noise, brighter on the left or right where the labels say so; one in ten is not known.

    Without the patches the signs would be all that differs, and a network that learned nothing would see little else.
    """
    random = np.random.default_rng(seed)
    wanted = (random.random((count, 2)) < 0.5).astype(np.float32)
    patches = np.kron(random.normal(0.5, 0.15, (count, 4, 4)), np.ones((1, SIZE // 4, SIZE // 4)))
    squares = patches + random.normal(0.0, 0.1, (count, SIZE, SIZE))
    for label, columns in enumerate((slice(2, 10), slice(22, 30))):
        squares[wanted[:, label] == 1, 10:20, columns] += 0.3
    wanted[random.random((count, 2)) < 0.1] = np.nan
    return squares.clip(0, 1).astype(np.float16), wanted


def shuffled(part: Part, seed: int) -> Part:
    """The same images with each other's labels."""
    return Part(part.inputs_NX, np.random.default_rng(seed).permutation(part.wanted_NL))


@pytest.fixture(scope="module")
def material() -> Material:
    """Synthetic images that are as good as real ones; two held-out scans a patient."""
    held_out, sexes = Part(*drawn(200, 2)), ["F", "M"]
    rows: list[Attributes] = [{"sex": sexes[n // 2 % 2], "age": 30.0 + n % 50, "view": "PA"} for n in range(200)]
    return Material(
        schema=SCHEMA, labels=LABELS, train=Part(*drawn(400, 0)), synthetic=Part(*drawn(400, 1)), held_out=held_out,
        patients=[str(n // 2) for n in range(200)], attributes=rows, classifier="tiny",
    )  # fmt: skip


def studied(material: Material, arms: tuple[Arm, ...] = ARMS, settings: UtilityStudy = SETTINGS) -> Utility:
    scores = [train_and_score(one, material) for one in lessons(settings, 5) if one.arm in arms]
    return utility_of(material, scores, None, settings.least_patients)


def figure(of: Utility, arm: Arm, label: str = LABELS[0], cell: str = "all") -> Usefulness:
    return next(one for one in of.figures if (one.arm, one.label, one.cell) == (arm, label, cell))


def told(one: Interval) -> tuple[float, float, float]:
    assert one.value is not None
    assert one.low is not None
    assert one.high is not None
    return one.value, one.low, one.high


def test_synthetic_images_as_good_as_real_ones_are_worth_as_much(material: Material) -> None:
    found = studied(material)
    for arm in ARMS:
        value, low, _ = told(figure(found, arm).auc)
        assert value > 0.75
        assert low > 0.65
    gain = next(one.over_real for one in found.gains if (one.arm, one.label) == ("synthetic", LABELS[0]))
    assert all(one.share is not None for one in found.gains)
    value, low, high = told(gain)
    assert abs(value) < 0.06
    assert low < 0.02
    assert high > -0.02
    assert (found.train_scans, found.synthetic_images, found.held_out_patients) == (400, 400, 100)
    assert figure(found, "real").seeds == 1
    known = int((~np.isnan(material.held_out.wanted_NL[:, 0])).sum())
    assert figure(found, "real").scans == known < 200


def test_synthetic_images_with_shuffled_labels_are_worth_nothing(material: Material) -> None:
    # One shuffling of a few hundred leaves a chance association, which is learned: so every seed has its own.
    settings = SETTINGS.model_copy(update={"seeds": 5})
    scores = [
        train_and_score(one, replace(material, synthetic=shuffled(material.synthetic, one.seed)))
        for one in lessons(settings, 5)
        if one.arm == "synthetic"
    ]
    found = utility_of(material, scores, None, 10)
    value, low, high = told(figure(found, "synthetic", "mean of labels").auc)
    assert value < 0.6
    assert low < 0.5 < high
    assert found.gains == ()


def test_a_lesson_gives_the_same_likelihoods_again_and_another_seed_others(material: Material) -> None:
    short = SETTINGS.model_copy(update={"steps": 3, "seeds": 2})
    first, *_, other = (one for one in lessons(short, 5) if one.arm == "synthetic, then real")
    again = [train_and_score(first, material).likelihood_ML for _ in range(2)]
    assert (again[0] == again[1]).all()
    assert (train_and_score(other, material).likelihood_ML != again[0]).any()
    assert len({one.seed for one in lessons(short, 5)} & {one.seed for one in lessons(short, 6)}) == 0


def test_a_group_that_is_read_worse_shows_as_the_worst_of_a_gap(material: Material) -> None:
    truth = material.held_out.wanted_NL
    random = np.random.default_rng(3)
    women = np.array([row["sex"] == "F" for row in material.attributes])
    scores = []
    for arm in ("real", "synthetic"):
        for seed in range(3):
            read = np.nan_to_num(truth, nan=0.5) + random.normal(0, 0.3, truth.shape)
            if arm == "synthetic":
                read[women] = random.normal(0.5, 0.3, (int(women.sum()), 2))
            scores.append(Scores(arm, seed, read.astype(np.float32), 1.0))
    found = utility_of(material, scores, ["sex"], 10)
    gap = next(one for one in found.gaps if LABELS[0] in one.figure)
    assert (gap.of, gap.worst, gap.best, gap.beyond_chance) == ("sex", "sex=F", "sex=M", True)
    assert gap.baseline is not None
    assert told(gap.baseline)[1] < 0.0 < told(gap.baseline)[2]
    assert told(figure(found, "synthetic", cell="sex=F").auc)[0] < 0.65
    assert not figure(found, "synthetic", cell="sex=F").small
    assert not [one for one in found.gaps if one.of != "sex"]


def test_what_real_scans_may_not_teach_has_no_share(material: Material) -> None:
    truth, random = np.nan_to_num(material.held_out.wanted_NL, nan=0.5), np.random.default_rng(3)

    def shares(real: float, made: float) -> list[Interval | None]:
        # Signal in deviations of the noise.
        signals = {"real": real, "synthetic": made}
        scores = [
            Scores(arm, seed, (signals[arm] * truth + random.standard_normal(truth.shape)).astype(np.float32), 0.0)
            for arm in ARMS[:2]
            for seed in range(5)
        ]
        return [one.share for one in utility_of(material, scores, [], 10).gains if one.label == "mean of labels"]

    assert shares(0.0, 0.0) == [None]
    (half,) = shares(2.0, 0.6)
    assert half is not None
    # (Phi(0.6 / sqrt 2) - 0.5) / (Phi(2 / sqrt 2) - 0.5)
    assert told(half)[1] < 0.390 < told(half)[2]
    assert told(half)[2] < 0.7


def test_weighted_areas_are_those_of_repeated_rows() -> None:
    random = np.random.default_rng(1)
    read, has = random.integers(0, 6, 40).astype(np.float64), random.random(40) < 0.4
    weights = multiplicities([str(n // 2) for n in range(40)], replicates=20)
    for area, row in zip(weighted_auc(read, has, weights), weights.astype(int), strict=True):
        repeated = np.repeat(np.arange(40), row)
        assert area == pytest.approx(auc(read[repeated], has[repeated])[0])
    assert math.isnan(weighted_auc(read, has, has[None].astype(np.float64))[0])


def test_intervals_hold_the_truth_of_other_patients_and_other_seeds(material: Material) -> None:
    random, held = np.random.default_rng(8), 0
    patients = [str(n // 2) for n in range(120)]
    few = replace(material, labels=LABELS[:1], patients=patients, attributes=material.attributes[:120])
    for _ in range(60):
        # A seed moves what separates the two kinds by 0.15 deviations, a patient's scans share half of their noise.
        has = np.repeat(random.random(60) < 0.5, 2)
        noise = np.repeat(random.standard_normal(60), 2) * math.sqrt(0.5) + random.standard_normal(120) * math.sqrt(0.5)
        reads = [(has * (1.0 + 0.15 * random.standard_normal()) + noise).astype(np.float32) for _ in range(3)]
        one = replace(few, held_out=Part(np.zeros((120, 1), np.float32), has[:, None].astype(np.float32)))
        scores = [Scores("real", seed, read[:, None], 0.0) for seed, read in enumerate(reads)]
        _, low, high = told(figure(utility_of(one, scores, [], 1), "real").auc)
        # Phi(1 / sqrt 2), but for what seeds bend.
        held += low <= 0.5 * math.erfc(-0.5) <= high
    assert held >= 53


# --- from artefacts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("useful")
    corpus = publish_corpus(f"{place}/corpus", scans=96)
    publish_dataset(f"{place}/dataset", generator(f"{place}/generator", corpus), corpus, honest, IMAGES)
    return place


def read(folder: Path, **settings: Any) -> Material:
    job = UtilityJob(
        settings=UtilityStudy(**({"size_px": SIZE, "least_patients": 4} | settings)), corpus_uri=f"{folder}/corpus",
        dataset_uri=f"{folder}/dataset",
    )  # fmt: skip
    return read_material(job.model_dump(mode="json"))


def test_material_is_read_by_patient_and_names_what_it_leaves_out(folder: Path) -> None:
    found = read(folder)
    assert (len(found.train), len(found.synthetic), len(found.held_out)) == (72, 90, 24)
    assert found.held_out.inputs_NX.shape == (24, SIZE, SIZE)
    assert found.held_out.inputs_NX.dtype == np.float16
    assert set(found.labels) | set(found.left_out) == {
        f"findings={value}" for one in found.schema.declarations if isinstance(one, LabelsAttribute)
        for value in one.values
    }  # fmt: skip
    assert found.labels
    assert found.left_out
    assert any("held-out patients have it; needs 4" in why for why in found.left_out.values()) or all(
        "everywhere or nowhere" in why for why in found.left_out.values()
    )
    assert len(read(folder, images=20).train) <= 20
    result = utility_of(found, [], None, 4)
    assert result.left_out == found.left_out


def test_labels_may_be_named_and_values_of_categories_too(folder: Path) -> None:
    assert read(folder, labels=["sex=F"]).labels == ("sex=F",)
    wrong: dict[str, Any] = {"labels": ("findings=Efusion",)}
    with pytest.raises(RecipeError, match="declares no 'findings=Efusion'; did you mean 'findings=Effusion'"):
        read(folder, **wrong)
    with pytest.raises(RecipeError, match="declares no 'findings=Efusion'"):
        require_known(Audit(utility=UtilityStudy(**wrong)), SCHEMA)
    with pytest.raises(RecipeError, match=r"audit.fairness.groups: 'sexes' is no category or number; did you mean"):
        require_known(Audit(fairness=Fairness(groups=("sexes",))), SCHEMA)
    require_known(Audit(), SCHEMA)


def test_a_patient_on_both_sides_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scanloom.audit.scans.HELD_OUT", ("train",))
    with pytest.raises(ArtefactError, match="patients are both trained on and held out"):
        read(folder)
    monkeypatch.setattr("scanloom.audit.scans.HELD_OUT", ("holdout",))
    with pytest.raises(ArtefactError, match="holds no held-out scans"):
        read(folder)


def test_nothing_to_read_is_told_without_training(folder: Path) -> None:
    found = read(folder, least_patients=1000)
    assert found.labels == ()
    assert set(found.left_out.values()) != set()
    scores = [train_and_score(one, found) for one in lessons(SETTINGS, 0)]
    assert utility_of(found, scores, None, 4).figures == ()


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_whose_worker_is_killed_is_made_again_to_the_same_likelihoods(
    ray_cluster: None, material: Material, tmp_path: Path
) -> None:
    import ray

    lesson = next(one for one in lessons(SETTINGS.model_copy(update={"steps": 5}), 5))
    died = tmp_path / "died"

    def dies_once(of: Material) -> Scores:
        # It has trained already when it dies: what it found is lost.
        found = train_and_score(lesson, of)
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    work: Any = ray.remote(max_retries=3)(dies_once)
    found: Scores = ray.get(work.remote(ray.put(material)), timeout=300)
    assert died.exists()
    assert (found.likelihood_ML == train_and_score(lesson, material).likelihood_ML).all()
