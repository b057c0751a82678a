"""kill -9 of training workers at random moments, many times a run: the generator is that of an undisturbed run."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs.encode import encode
from jobs.finetune import finetune
from scanloom.artefact import Artefact, open_artefact, verify
from scanloom.recipe import Recipe
from tests.phantom_corpus import publish_corpus
from tests.test_job_finetune import recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]
KILLS = 6


def long_recipe(store: str) -> Recipe:
    """A run of 24 steps, each of which reports, so that a kill falls into one of them."""
    return recipe(store, steps=24, checkpoint_every_steps=3, log_every_steps=1, samples=0, max_failures=2 * KILLS)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    store = str(tmp_path_factory.mktemp("undisturbed"))
    publish_corpus(f"{store}/corpus")
    encode(long_recipe(store))
    finetune(long_recipe(store))
    return open_artefact(f"{store}/generator", "generator")


@contextlib.contextmanager
def _killing(store: Path, chance: random.Random) -> Iterator[list[int]]:
    """Kill one worker after another, each after up to two checkpoints more; how many there were at each kill."""
    ended = threading.Event()
    kills: list[int] = []

    def kill() -> None:
        seen: set[str] = set()
        wanted = chance.randrange(3)
        while len(kills) < KILLS and not ended.wait(0.05):
            seen |= {found.name for found in store.glob("runs/*/checkpoint_*")}
            workers = [p for p in psutil.Process().children(recursive=True) if _trains(p)]
            if len(seen) < wanted or len(workers) < 2 or ended.wait(chance.uniform(0, 1)):
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
                kills.append(len(seen))
                wanted = len(seen) + chance.randrange(3)
                psutil.wait_procs(workers, timeout=60)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        yield kills
    finally:
        ended.set()
        killer.join()


def _trains(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


@pytest.mark.parametrize("seed", [0, 1])
def test_workers_killed_at_random_moments_end_in_the_same_weights(
    undisturbed: Artefact, tmp_path: Path, seed: int
) -> None:
    for name in ("corpus", "autoencoder", "latents"):
        (tmp_path / name).symlink_to(Path(undisturbed.uri).parent / name)
    with _killing(tmp_path, random.Random(seed)) as kills:
        finetune(long_recipe(str(tmp_path)))
    made = open_artefact(f"{tmp_path}/generator", "generator")
    assert len(kills) >= KILLS - 1, kills
    assert made.digest == undisturbed.digest
    assert list(verify(made)) == []
