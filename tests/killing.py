"""A dataset made by jobs that die: hosts of a Ray cluster, jobs on it, and what must be true whatever was killed.

The engine is one that costs nothing, so that a trial takes seconds; all around it is the job as it is.
"""

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
from typing import Any, Literal

import yaml

from scanloom.artefact import Artefact, find_artefact, open_artefact
from scanloom.shards.commit import committed, orphans
from scanloom.shards.reader import read_file, read_parquet, rows
from scanloom.shards.writer import image_pixels
from scanloom.store import Store
from tests.free_engine import publish_free_generator, stamp
from tests.processes import kill, named

ROOT = Path(__file__).resolve().parents[1]
SHARDS, PER_SHARD, SIZE_PX = 30, 4, 16
ATTRIBUTES = [{"name": "sex", "kind": "category", "values": ["F", "M"], "source": "PatientSex"}]
LONGEST_S = 300

Victim = Literal["driver", "engine", "writer", "host"]
WORKERS = {"engine": "FreeEngine", "writer": "write_shard"}
"""What Ray calls a worker that does it."""


class Hosts:
    """A Ray cluster of a head that runs nothing and two hosts, any of which may be lost: `with Hosts() as hosts`."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._hosts: list[Any] = []

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def fill(self) -> None:
        """Start hosts until there are two."""
        while len(self._hosts) < 2:
            self._hosts.append(self._cluster.add_node(num_cpus=3))

    def lose(self, number: int) -> None:
        """Kill a host with all that runs on it."""
        self._cluster.remove_node(self._hosts.pop(number), allow_graceful=False)


@dataclass
class Trial:
    """A store with a generator, and the recipe of a dataset in it."""

    folder: Path
    store: str
    environment: dict[str, str]
    """What its jobs see beside this process's environment."""
    kills: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        publish_free_generator(f"{self.store}/generator", SIZE_PX)
        tree = {
            "name": "free",
            "store": self.store,
            "attributes": ATTRIBUTES,
            "generate": {"images": SHARDS * PER_SHARD - 1, "images_per_shard": PER_SHARD, "bits_stored": 12},
        }
        self.recipe = self.folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")

    def start(self) -> subprocess.Popen[str]:
        path = f"{ROOT / 'platform'}{os.pathsep}{ROOT}"
        return subprocess.Popen(
            [sys.executable, "-m", "tests.free_engine", str(self.recipe)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self) -> None:
        """Run the job undisturbed."""
        require_success(self.start())

    def commits(self) -> int:
        return len(Store(self.store).list("dataset/commits"))

    def disturb(self, victim: Victim, chance: random.Random, hosts: Hosts) -> None:
        """Run the job and, after a random number of commits and a random moment more, kill -9 the victim.

        Engines that cost nothing are far ahead of the commits: theirs is a random moment after one is there. A job
        whose driver lives must end well.
        """
        process, moment = self.start(), chance.uniform(0.0, 0.2)
        if victim == "engine":
            _wait(process, lambda: bool(named(os.getpid(), WORKERS[victim])))
            moment *= 5
        else:
            wanted = self.commits() + chance.randrange(max(1, SHARDS - self.commits()))
            _wait(process, lambda: self.commits() >= wanted)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        killed = _strike(process, victim, chance, hosts)
        self.kills[victim] += killed
        if victim == "driver" and killed:
            process.communicate(timeout=LONGEST_S)
        else:
            require_success(process)

    def dataset(self) -> Artefact:
        return open_artefact(f"{self.store}/dataset", "dataset")

    def finished(self) -> bool:
        return find_artefact(f"{self.store}/dataset", "dataset") is not None


def _strike(process: subprocess.Popen[str], victim: Victim, chance: random.Random, hosts: Hosts) -> bool:
    if victim == "driver":
        return process.poll() is None and kill(process.pid)
    if victim == "host":
        alive = process.poll() is None
        hosts.lose(chance.randrange(2))
        return alive
    # A writer is there for a moment only.
    _wait(process, lambda: bool(named(os.getpid(), WORKERS[victim])))
    return process.poll() is None and any(kill(found) for found in named(os.getpid(), WORKERS[victim])[:1])


def _wait(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.01)


def require_success(process: subprocess.Popen[str]) -> None:
    """Wait for a job that must end well."""
    output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, output[-4000:]


def require_readable(trial: Trial) -> None:
    """What a reader sees who goes by the commits, at any time: whole files, each image of its shard once.

    And no manifest, or one of all shards.
    """
    store = Store(f"{trial.store}/dataset")
    if not store.exists("plan.json"):
        return
    finished = trial.finished()
    commits = committed(store, yaml.safe_load(store.read("plan.json"))["plan"])
    assert len(commits) == SHARDS or not finished
    for number, commit in commits.items():
        for entry in commit.files.values():
            read_file(store, entry)
        made = [stamp(image_pixels(row)) for row in read_parquet(store, commit.files["images"]).to_pylist()]
        assert made == list(range(number * PER_SHARD, min((number + 1) * PER_SHARD, SHARDS * PER_SHARD - 1)))


def require_equal(made: Artefact, undisturbed: Artefact) -> None:
    """Image for image the same; none lost, none twice; every file as its manifest says, and no other."""
    pixels = {row["id"]: row["image"]["bytes"] for row in rows(undisturbed, "images", ["id", "image"])}
    found = [(row["id"], row["image"]["bytes"]) for row in rows(made, "images", ["id", "image"])]
    assert len(found) == len(pixels) == undisturbed.manifest.statistics["rows"]
    assert dict(found) == pixels
    assert made.manifest.files == undisturbed.manifest.files
    assert made.manifest.statistics["cells"] == undisturbed.manifest.statistics["cells"]
    for entry in made.manifest.files:
        read_file(made.store, entry)
    assert orphans(made.store, grace_s=0.0) == []
    there = {found.key for folder in ("images", "dicom", "rejects") for found in made.store.list(folder)}
    assert there == {entry.path for entry in made.manifest.files}
