"""jobs.gate and jobs.generate behind it on real Ray: no training scan enters a dataset, whoever dies meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from jobs.gate import gate
from jobs.generate import generate
from scanloom.artefact import Artefact, open_artefact, verify
from scanloom.errors import ArtefactError
from scanloom.models.privacy_gate import load_gate
from scanloom.recipe import Recipe
from scanloom.shards.reader import rows
from scanloom.shards.writer import image_pixels
from scanloom.store import Store
from tests.made_gate import SCANS, publish_chain, publish_learner, recipe
from tests.phantom_corpus import publish_corpus
from tests.processes import kill, named
from tests.remembering_engine import AllRemembering, HalfRemembering

pytestmark = [pytest.mark.ray, pytest.mark.slow]
IMAGES = 24


@pytest.fixture(scope="module")
def store(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated")
    publish_chain(folder)
    gate(recipe(folder))
    return folder


@pytest.fixture(scope="module")
def made(store: Path) -> Artefact:
    return open_artefact(f"{store}/gate", "gate")


@pytest.fixture(scope="module")
def dataset(store: Path, made: Artefact) -> Artefact:
    generate(behind(made, store, store), HalfRemembering)
    return open_artefact(f"{store}/dataset", "dataset")


def behind(gate: Artefact, store: Path, of: Path, **changes: Any) -> Recipe:
    """The recipe of a dataset in `store` by the generator in `of`."""
    section: dict[str, Any] = {
        "images": IMAGES, "images_per_shard": 8, "slots": 4, "steps": 1, "guidance_scale": 1.0,
        "generator": f"{of}/generator", "quality": {"gate": gate.uri},
    }  # fmt: skip
    tree = recipe(store).model_dump(mode="json") | {"generate": section | changes}
    return Recipe.model_validate(tree)


def test_a_gate_is_made_once_of_its_corpus(store: Path, made: Artefact, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(verify(made)) == []
    assert made.manifest.statistics["training"]["step"] == 60
    card = load_gate(made.uri).card
    assert (card.train_scans, card.calibration_patients + card.held_out_scans) == (SCANS * 3 // 4, SCANS // 4)
    before = {(found.key, found.modified) for found in made.store.list()}
    gate(recipe(store))
    assert "training scans in the index" in capsys.readouterr().out
    assert {(found.key, found.modified) for found in made.store.list()} == before
    with pytest.raises(ArtefactError, match="another plan"):
        gate(recipe(store, steps=61))


def test_no_training_scan_enters_a_dataset(dataset: Artefact, made: Artefact) -> None:
    statistics, looking = dataset.manifest.statistics, load_gate(made.uri)
    assert statistics["gate"] == made.digest
    assert {entry.role: entry.digest for entry in dataset.manifest.inputs}["gate"] == made.digest
    assert (statistics["rows"], statistics["infeasible"]) == (IMAGES, 0)
    refused = list(rows(dataset, "rejects"))
    assert statistics["rejects"] == {"gate": len(refused)}
    assert len(refused) == sum(row["attempt"] for row in rows(dataset, "images", ["attempt"])) > IMAGES // 4
    assert all(dict(row["figures"])["likeness"] > looking.card.tau for row in refused)
    for row in rows(dataset, "images"):
        assert looking.likeness(image_pixels(row)[None], 8)[0] <= looking.card.tau


def test_a_generator_that_only_remembers_fills_nothing(store: Path, made: Artefact) -> None:
    generate(behind(made, store, store, dataset="remembered"), AllRemembering)
    statistics = open_artefact(f"{store}/remembered", "dataset").manifest.statistics
    assert (statistics["rows"], statistics["infeasible"]) == (0, IMAGES)
    assert set(statistics["rejects"]) == {"gate", "infeasible"}


def test_a_resumed_dataset_is_the_same_byte_for_byte(
    store: Path, made: Artefact, dataset: Artefact, tmp_path: Path
) -> None:
    shutil.copytree(f"{store}/dataset", tmp_path / "dataset")
    for lost in ("manifest.json", "commits/shard-000001.json"):
        (tmp_path / "dataset" / lost).unlink()
    generate(behind(made, tmp_path, store), HalfRemembering)
    again = open_artefact(f"{tmp_path}/dataset", "dataset")
    assert (again.digest, again.manifest.files) == (dataset.digest, dataset.manifest.files)


def test_killed_engines_lose_and_repeat_nothing(store: Path, made: Artefact, dataset: Artefact, tmp_path: Path) -> None:
    over, kills = Event(), list[int]()

    def killing() -> None:
        while not kills and not over.wait(0.01):
            kills.extend(filter(kill, named(os.getpid(), "HalfRemembering")))

    killer = Thread(target=killing)
    killer.start()
    try:
        generate(behind(made, tmp_path, store), HalfRemembering)
    finally:
        over.set()
        killer.join()
    assert kills
    assert open_artefact(f"{tmp_path}/dataset", "dataset").digest == dataset.digest


def test_a_gate_of_another_corpus_starts_nothing(made: Artefact, tmp_path: Path) -> None:
    publish_learner(tmp_path, publish_corpus(f"{tmp_path}/corpus", scans=8))
    with pytest.raises(ArtefactError, match="is a gate of corpus"):
        generate(behind(made, tmp_path, tmp_path))
    assert Store(f"{tmp_path}/dataset").list() == []
