"""Measuring without training or Ray: what is read of a dataset, spread over it, and told in the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save

from scanloom.artefact import Artefact, open_artefact, publish
from scanloom.audit.measuring import ENCODER, AuditJob, make_audit, write_report
from scanloom.audit.report import PAGE, REPORT, Report, read_report
from scanloom.audit.seen import see
from scanloom.errors import ArtefactError
from scanloom.models.attribute_probe import ProbeNetwork
from scanloom.models.copy_encoder import CopyEncoder, weights_of
from scanloom.models.probe_card import CARD, WEIGHTS, ProbeCard, Reading, outputs_of
from scanloom.recipe_audit import Audit, CopyDetection
from scanloom.store import Store
from tests.audited import publish_dataset
from tests.phantom_corpus import SCHEMA, SIZE, publish_corpus
from tests.released import generator, put
from tests.test_job_audit import IMAGES, honest

CHANNELS, WIDTH = (8, 16), 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("measured")
    corpus = publish_corpus(f"{place}/corpus", scans=96)
    publish_dataset(f"{place}/dataset", generator(f"{place}/generator", corpus), corpus, honest, IMAGES)
    publish_probe(f"{place}/probe")
    return place


def publish_probe(uri: str) -> Artefact:
    """A probe of random weights that says of itself that it reads findings."""
    told = [
        Reading(
            name=output.name, figure="auc", estimate=0.9, low=0.8, high=1.0, chance=0.5, scans=9, with_it=4,
            better_than_chance=output.attribute == "findings",
        )
        for output in outputs_of(SCHEMA)
    ]  # fmt: skip
    card = ProbeCard(
        name="made", attributes=SCHEMA, size_px=SIZE, channels=(8,), scales={"age": (50.0, 10.0)},
        false_reject_share=0.02, trained_scans=1, held_out_scans=1, readings=tuple(told),
    )  # fmt: skip
    weights = save(dict(ProbeNetwork((8,), len(card.outputs)).state_dict()))
    store = Store(uri)
    files = put(store, {CARD: card.model_dump_json().encode(), WEIGHTS: weights})
    return publish(store, kind="probe", name="made", recipe={}, inputs=[], files=files, statistics={})


def measured(folder: Path, name: str, *, probe: bool = False, images: int = 1000) -> Report:
    store = Store(f"{folder}/{name}")
    store.write(ENCODER, weights_of(CopyEncoder(CHANNELS, WIDTH)))
    settings = Audit(images=images, copies=CopyDetection(channels=CHANNELS, width=WIDTH, planted_scans=8))
    corpus, dataset = open_artefact(f"{folder}/corpus"), open_artefact(f"{folder}/dataset")
    job = AuditJob.of(settings, corpus, dataset, store, open_artefact(f"{folder}/probe") if probe else None)
    found = make_audit(job.model_dump(mode="json"))
    entries = write_report(found, found.report, store)
    assert {entry.path for entry in entries} == {REPORT, PAGE, ENCODER, "private/pairs.png"}
    assert all(store.digest(entry.path).sha256 == entry.sha256 for entry in entries)
    return read_report(store.read(REPORT), "report")


def test_a_probe_adds_what_was_asked_and_what_is_read(folder: Path) -> None:
    report = measured(folder, "with", probe=True)
    assert report.fairness is not None
    assert {one.name.partition("=")[0] for one in report.fairness} == {"findings"}
    everywhere = [one for one in report.fairness if one.cell == "all"]
    assert [one.images for one in everywhere] == [IMAGES] * len(everywhere)
    assert all(one.held_out_truth is not None for one in everywhere)
    assert {one.cell.partition("=")[0].partition(" ")[0] for one in report.fairness} == {"all", "sex", "age", "view"}
    assert report.subgroups is not None
    by_sex = [one for one in report.subgroups if one.cell in ("sex=F", "sex=M")]
    assert [sum(one.images for one in by_sex), sum(one.held_out_scans for one in by_sex)] == [IMAGES, 24]
    assert all("kid" in one.figures and one.small for one in by_sex)
    assert report.gaps is not None
    page = Path(f"{folder}/with/{PAGE}").read_text()
    assert "Does it show what was asked for, in every group?" in page
    without = measured(folder, "without")
    assert without.fairness is None
    assert "fairness" in Path(f"{folder}/without/{PAGE}").read_text()


def test_a_part_of_the_images_is_spread_over_all_shards(folder: Path) -> None:
    dataset = open_artefact(f"{folder}/dataset", "dataset")
    means = lambda squares: squares.mean(axis=(1, 2))[:, None].astype(np.float32)  # noqa: E731
    everything = see(dataset, "images", SCHEMA, means, SIZE, 1000)
    part = see(dataset, "images", SCHEMA, means, SIZE, 20, sample=5)
    assert len(everything) == IMAGES
    # Ninety images, at most twenty: every fifth.
    assert part.owners == everything.owners[::5]
    assert (part.vectors == everything.vectors[::5]).all()
    assert part.sample == list(range(0, 18, 4))
    assert measured(folder, "part", images=20).subject.looked_at == 18


def test_a_corpus_without_held_out_patients_is_refused(folder: Path, tmp_path: Path) -> None:
    publish_corpus(f"{tmp_path}/corpus", scans=6, shards=1)
    (tmp_path / "dataset").symlink_to(folder / "dataset")
    with pytest.raises(ArtefactError, match="fewer than two held-out patients"):
        measured(tmp_path, "audit")
