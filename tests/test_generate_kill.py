"""kill -9 of anything, a failing network, rivals: what a rerun ends with is the dataset of an undisturbed run, once."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from scanloom.artefact import Artefact
from scanloom.embedded_s3 import EmbeddedS3
from tests.fault_proxy import FaultProxy
from tests.killing import Hosts, Trial, Victim, require_equal, require_readable, require_success

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]
TRIALS = 54
MOST_ATTEMPTS = 4
VICTIMS: tuple[Victim, ...] = ("driver", "engine", "writer", "host")


@pytest.fixture(scope="module")
def hosts(s3: EmbeddedS3) -> Iterator[Hosts]:
    with Hosts() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(hosts: Hosts, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    trial = _trial(tmp_path_factory.mktemp("undisturbed"), hosts, bucket)
    trial.run()
    return trial.dataset()


def _trial(folder: Path, hosts: Hosts, bucket: str | None, **environment: str) -> Trial:
    hosts.fill()
    store = f"s3://{bucket}/kill-{os.getpid()}-{folder.name}" if bucket else str(folder / "store")
    return Trial(folder, store, {"RAY_ADDRESS": hosts.address} | environment)


def _kill(folder: Path, hosts: Hosts, bucket: str | None, undisturbed: Artefact, seed: int) -> None:
    """A driver is killed or not, then the seed's victim; what is left is made by a job that nobody disturbs.

    Again where a victim had ended by itself before it was found: such a trial proves nothing.
    """
    chance = random.Random(seed)
    for attempt in range(MOST_ATTEMPTS):
        place = folder / f"{folder.name}-{attempt}"
        place.mkdir()
        # Some drivers have a cluster of their own, which dies with them.
        trial = _trial(place, hosts, bucket, **({"RAY_ADDRESS": ""} if seed % 8 == 0 else {}))
        victims: list[Victim] = [VICTIMS[0]] * chance.randrange(2) + [VICTIMS[seed % len(VICTIMS)]]
        for victim in victims:
            if not trial.finished():
                trial.disturb(victim, chance, hosts)
                require_readable(trial)
        if not trial.finished():
            hosts.fill()
            trial.run()
        require_equal(trial.dataset(), undisturbed)
        if trial.kills[VICTIMS[seed % len(VICTIMS)]]:
            return
    pytest.fail(f"no {VICTIMS[seed % len(VICTIMS)]} was ever found alive")


def _fail_network(folder: Path, hosts: Hosts, bucket: str, s3: EmbeddedS3, undisturbed: Artefact, seed: int) -> None:
    with FaultProxy(s3.endpoint, seed) as proxy:
        trial = _trial(folder, hosts, bucket, AWS_ENDPOINT_URL=proxy.url)
        proxy.inject("lost_ack", method="PUT", times=-1, share=0.05)
        proxy.inject("reset", times=-1, share=0.04)
        proxy.inject("503", times=-1, share=0.04)
        proxy.inject("truncate", method="GET", times=-1, share=0.05, at=20)
        trial.run()
        require_readable(trial)
        require_equal(trial.dataset(), undisturbed)
        assert len(proxy.injected) >= 5


def _rival(folder: Path, hosts: Hosts, bucket: str | None, undisturbed: Artefact) -> None:
    trial = _trial(folder, hosts, bucket)
    jobs = [trial.start() for _ in range(2)]
    for job in jobs:
        require_success(job)
    require_readable(trial)
    require_equal(trial.dataset(), undisturbed)


def test_a_lost_host_loses_and_repeats_nothing(
    tmp_path: Path, hosts: Hosts, bucket: str, undisturbed: Artefact
) -> None:
    _kill(tmp_path, hosts, bucket, undisturbed, seed=3)


def test_two_drivers_at_once_make_one_dataset(tmp_path: Path, hosts: Hosts, bucket: str, undisturbed: Artefact) -> None:
    _rival(tmp_path, hosts, bucket, undisturbed)


@pytest.mark.parametrize("seed", range(TRIALS))
def test_whatever_dies_the_dataset_is_the_undisturbed_one(
    tmp_path: Path, hosts: Hosts, bucket: str, s3: EmbeddedS3, undisturbed: Artefact, seed: int
) -> None:
    place = bucket if seed % 3 == 0 else None  # the others into a folder
    if seed % 6 == 4:
        _fail_network(tmp_path, hosts, bucket, s3, undisturbed, seed)
    elif seed % 6 == 5:
        _rival(tmp_path, hosts, place, undisturbed)
    else:
        _kill(tmp_path, hosts, place, undisturbed, seed)
