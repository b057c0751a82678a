"""jobs.audit on real Ray: changed training scans are caught and refused release, an honest dataset may leave."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from jobs.audit import audit
from scanloom.artefact import Artefact, open_artefact, verify
from scanloom.audit.bundle import KeyFile, check
from scanloom.audit.measuring import ENCODER, PAIRS
from scanloom.audit.policy import read_policy
from scanloom.audit.release import Request, release
from scanloom.audit.report import PAGE, REPORT, Report, read_report
from scanloom.errors import ArtefactError, RecipeError, ReleaseRefused
from scanloom.recipe import Recipe
from scanloom.scans.phantoms import phantom
from scanloom.store import Store
from tests.audited import audited as measured_here
from tests.audited import publish_dataset
from tests.phantom_corpus import SIZE, phantom_recipe, publish_corpus
from tests.released import POLICY, generator

pytestmark = pytest.mark.ray
SCANS, IMAGES = 480, 90
COPIES = {"size_px": SIZE, "channels": [16, 32, 64], "width": 64, "steps": 150, "batch_size": 48, "planted_scans": 100}


UTILITY = {"labels": ["findings=Cardiomegaly"], "seeds": 1, "steps": 4, "size_px": 32, "images": 60}


def recipe(store: Path, dataset: str, utility: dict[str, Any] | None = None) -> Recipe:
    # The generator behind these datasets is no network that could be attacked.
    settings = {"copies": COPIES, "membership": None, "utility": utility}
    return phantom_recipe(store, audit=settings, generate={"dataset": dataset, "images": IMAGES})


def memorised(index: int) -> np.ndarray[Any, Any]:
    """Of every two images one is a training scan, mirrored."""
    if index % 2:
        return honest(index)
    # Every fourth scan of the corpus is held out.
    return np.ascontiguousarray(phantom(11, index // 2 * 4, SIZE).pixels[:, ::-1])


def honest(index: int) -> np.ndarray[Any, Any]:
    return phantom(77, index, SIZE).pixels


@pytest.fixture(scope="module")
def audited(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the audits of a memorising and of an honest dataset."""
    folder = tmp_path_factory.mktemp("audited")
    corpus = publish_corpus(f"{folder}/corpus", scans=SCANS)
    of = generator(f"{folder}/generator", corpus)
    publish_dataset(f"{folder}/honest", of, corpus, honest, IMAGES)
    audit(recipe(folder, "honest", UTILITY))
    # One encoder is enough: of the same corpus and seed the job would train the same again.
    encoder = Store(f"{folder}/honest-audit").read(ENCODER)
    copied = publish_dataset(f"{folder}/memorised", of, corpus, memorised, IMAGES)
    measured_here(copied, corpus, recipe(folder, "memorised").audit, encoder)
    return folder


def told(folder: Path, name: str) -> Report:
    made = open_artefact(f"{folder}/{name}-audit", "audit")
    return read_report(made.store.read(REPORT), "report")


def test_an_audit_is_an_artefact_of_its_dataset_and_corpus(audited: Path) -> None:
    made = open_artefact(f"{audited}/honest-audit", "audit")
    inputs = {entry.role: entry.digest for entry in made.manifest.inputs}
    assert inputs["dataset"] == open_artefact(f"{audited}/honest").digest
    assert inputs["corpus"] == open_artefact(f"{audited}/corpus").digest
    assert list(verify(made)) == []
    audit(recipe(audited, "honest", UTILITY))
    assert open_artefact(made.uri).manifest.created_at == made.manifest.created_at


def test_copies_are_counted_and_an_honest_dataset_is_told_apart(audited: Path) -> None:
    bad, good = told(audited, "memorised").copies, told(audited, "honest").copies
    assert bad is not None
    assert good is not None
    assert bad.excess
    assert IMAGES // 2 <= bad.synthetic_copies <= IMAGES // 2 + 3
    assert bad.copied_scans >= IMAGES // 2
    assert not good.excess
    assert good.synthetic_copies <= 3
    assert good.train_scans == SCANS * 3 // 4
    assert good.calibration_patients + good.held_out_scans == SCANS // 4
    recalls = {one.plant: one.recall.value for one in good.power}
    assert recalls["as it is"] == recalls["mirrored"] == 1.0
    assert {peer.name for peer in good.peers} == {"pixel L2", "Pearson", "Carlini ratio"}


def test_figures_stand_beside_real_against_real(audited: Path) -> None:
    report = told(audited, "honest")
    assert report.fidelity is not None
    assert report.appearance is not None
    assert {"frechet", "kid", "precision", "recall", "density", "coverage"} == set(report.fidelity)
    assert "spectrum (dB)" in report.appearance
    kid = report.fidelity["kid"]
    assert kid.baseline.low is not None
    assert kid.baseline.high is not None
    assert kid.baseline.low < 0.05
    assert (report.subject.looked_at, report.subject.images) == (IMAGES, IMAGES)


def test_the_page_says_first_what_matters_and_needs_nothing_else(audited: Path) -> None:
    page = Path(f"{audited}/memorised-audit/{PAGE}").read_text()
    assert page.index("Does it contain anybody's scan?") < page.index("Yes, it seems to") < page.index("<table>")
    assert "://" not in page
    assert page.count("data:image/png;base64,") == 3
    assert "Use for training" in Path(f"{audited}/honest-audit/{PAGE}").read_text()
    assert Path(f"{audited}/memorised-audit/{PAIRS}").read_bytes().startswith(b"\x89PNG")


def test_a_memorising_dataset_is_refused_and_an_honest_one_leaves(audited: Path) -> None:
    # A tiny encoder of tiny phantoms: what it must find is set to what it can.
    text = (POLICY + "copies: {least_recall: 0.0, most_copy_rate: 0.1}\n").encode()
    key = KeyFile(Ed25519PrivateKey.generate())

    def bundle(name: str, text: bytes = text) -> Artefact:
        dataset = open_artefact(f"{audited}/{name}", "dataset")
        target = Store(f"{audited}/{name}-bundle")
        return release(Request(dataset, f"{dataset.uri}-audit", read_policy(text, "p"), text, target), key)

    with pytest.raises(
        ReleaseRefused, match=r"copies.more than among held-out patients: yes, the policy's limit is no"
    ):
        bundle("memorised")
    # Without that, an audit that would not have found copies proves nothing.
    with pytest.raises(ReleaseRefused, match=r"copies.recall of planted copies: 0\.\d+, the policy's limit is 0.95"):
        bundle("honest", POLICY.encode())
    made = bundle("honest")
    assert check(made.store, key.public_key).problems == ()
    assert not made.store.exists(f"audit/{PAIRS}")


@pytest.mark.slow
def test_a_part_that_an_earlier_run_finished_is_not_measured_again(
    audited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_artefact(f"{audited}/honest", "dataset")
    for folder in ("honest-audit", "runs"):
        shutil.move(f"{audited}/{folder}", f"{audited}/{folder}-before") if Path(
            f"{audited}/{folder}"
        ).exists() else None

    def killed(*arguments: object) -> None:
        raise RuntimeError("killed while it wrote the report")

    with monkeypatch.context() as patched:
        patched.setattr("jobs.audit.write_report", killed)
        with pytest.raises(RuntimeError, match="killed while"):
            audit(recipe(audited, "honest", UTILITY))
    assert open_artefact(dataset.uri).digest == dataset.digest
    monkeypatch.setattr("jobs.audit.make_audit", killed)
    monkeypatch.setattr("jobs.audit.read_material", killed)
    audit(recipe(audited, "honest", UTILITY))
    first = read_report((Path(f"{audited}/honest-audit-before") / REPORT).read_bytes(), "report")
    again = told(audited, "honest")
    assert again.copies == first.copies
    assert Store(f"{audited}/runs").list() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_before_anything_is_trained(ray_cluster: None, tmp_path: Path) -> None:
    corpus = publish_corpus(f"{tmp_path}/corpus", scans=96)
    publish_dataset(f"{tmp_path}/d", generator(f"{tmp_path}/generator", corpus), corpus, honest, 4)
    for part in ("membership", "fidelity", "utility"):
        settings = {"membership": None, "utility": None} | {part: {"use_gpu": True}}
        with pytest.raises(RecipeError, match=rf"audit\.{part}\.use_gpu: needs 1 GPUs"):
            audit(phantom_recipe(tmp_path, audit=settings, generate={"dataset": "d", "images": 4}))
        assert Store(f"{tmp_path}/runs").list() == []
        shutil.rmtree(tmp_path / "d-audit")


def test_what_cannot_be_audited_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no `generate` section"):
        audit(recipe(tmp_path, "d").model_copy(update={"generate": None}))
    publish_corpus(f"{tmp_path}/corpus", scans=8)
    with pytest.raises(ArtefactError, match="no artefact here"):
        audit(recipe(tmp_path, "d"))
