"""kill -9 of the generate job at random points: a rerun ends with the dataset of an undisturbed run, once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from jobs.generate import generate
from scanloom.artefact import Artefact, open_artefact
from scanloom.recipe import load_recipe
from scanloom.shards.commit import orphans
from scanloom.shards.reader import read_file, rows
from scanloom.store import Store
from tests.processes import kill, named
from tests.tiny_generator import ATTRIBUTES, publish_generator

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[1]
SHARDS, PER_SHARD, STEPS = 10, 3, 16
TRIALS = 6
DRIVER, ENGINE, WRITER = "driver", "EngineActor", "write_shard"


@dataclass
class Place:
    """A store with a generator, and the recipe file of a dataset in it."""

    store: str
    recipe: Path
    kills: Counter[str] = field(default_factory=Counter)

    def start(self) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"}
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.generate", str(self.recipe)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self) -> None:
        process = self.start()
        output, _ = process.communicate(timeout=1800)
        assert process.returncode == 0, output[-4000:]

    def commits(self) -> int:
        return len(Store(self.store).list("dataset/commits"))

    def dataset(self) -> Artefact:
        return open_artefact(f"{self.store}/dataset", "dataset")


def place(folder: Path, store: str) -> Place:
    publish_generator(f"{store}/generator")
    tree = {
        "name": "tiny",
        "store": store,
        "attributes": [a.model_dump(mode="json") for a in ATTRIBUTES],
        "generate": {"images": SHARDS * PER_SHARD, "images_per_shard": PER_SHARD, "slots": 6, "steps": STEPS},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return Place(store, recipe)


def disturbed(where: Place, victim: str, chance: random.Random) -> None:
    """Run the job; once it has made a random number of commits, and a random moment later, kill -9 the victim."""
    process = where.start()
    wanted = chance.randrange(SHARDS)
    _wait(process, lambda: where.commits() >= wanted)
    with suppress(subprocess.TimeoutExpired):
        process.wait(chance.uniform(0.0, 0.3))
    # A writer is there for a moment only, and an engine not before its actor starts.
    _wait(process, lambda: victim == DRIVER or bool(named(process.pid, victim)))
    target = [process.pid] if victim == DRIVER else named(process.pid, victim)
    killed = process.poll() is None and any(kill(p) for p in target[:1])
    where.kills[victim] += killed
    output, _ = process.communicate(timeout=1800)
    if killed and victim != DRIVER:
        assert process.returncode == 0, output[-4000:]


def _wait(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.01)


def finished(where: Place) -> Artefact:
    if not Store(where.store).exists("dataset/manifest.json"):
        where.run()
    return where.dataset()


def require_equal(made: Artefact, undisturbed: Artefact) -> None:
    """Image for image the same; nothing twice; every file as its manifest says."""
    pixels = {row["id"]: row["image"]["bytes"] for row in rows(undisturbed, "images", ["id", "image"])}
    found = [(row["id"], row["image"]["bytes"]) for row in rows(made, "images", ["id", "image"])]
    assert len(found) == len(pixels) == SHARDS * PER_SHARD
    assert dict(found) == pixels
    assert made.manifest.files == undisturbed.manifest.files
    for entry in made.manifest.files:
        read_file(made.store, entry)
    assert orphans(made.store, grace_s=0.0) == []
    there = {found.key for folder in ("images", "dicom") for found in made.store.list(folder)}
    assert there == {entry.path for entry in made.manifest.files}


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    folder = tmp_path_factory.mktemp("undisturbed")
    where = place(folder, str(folder / "store"))
    generate(load_recipe(where.recipe))
    return where.dataset()


def test_a_killed_driver_and_a_killed_engine_lose_and_repeat_nothing(tmp_path: Path, undisturbed: Artefact) -> None:
    where = place(tmp_path, str(tmp_path / "store"))
    chance = random.Random(0)
    for victim in (DRIVER, ENGINE):
        if not Store(where.store).exists("dataset/manifest.json"):
            disturbed(where, victim, chance)
    require_equal(finished(where), undisturbed)
    assert where.kills[DRIVER] == 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("backend", ["folder", "s3"])
def test_kills_at_random_points_lose_and_repeat_nothing(
    tmp_path: Path, undisturbed: Artefact, backend: str, request: pytest.FixtureRequest
) -> None:
    kills: Counter[str] = Counter()
    for trial in range(TRIALS):
        chance = random.Random(1000 * trial + (backend == "s3"))
        folder = tmp_path / str(trial)
        folder.mkdir()
        store = str(folder / "store")
        if backend == "s3":
            store = f"s3://{request.getfixturevalue('bucket')}/kill-{os.getpid()}-{trial}"
        where = place(folder, store)
        victim = (DRIVER, ENGINE, WRITER)[trial % 3]
        disturbed(where, victim, chance)
        require_equal(finished(where), undisturbed)
        kills += where.kills
    # Trials whose victim had ended by itself prove nothing.
    assert kills.total() >= TRIALS - 1, kills
    assert set(kills) == {DRIVER, ENGINE, WRITER}
