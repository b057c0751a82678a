"""What clients see when parts of the service die, when its store is away, when it is started anew.

Each test prints its figures (`pytest -s`); docs/serving.md states those of one run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scanloom.artefact import open_artefact, verify
from scanloom.client import Client, Dataset
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.shards.reader import rows
from scanloom.store import Store
from tests.fault_proxy import FaultProxy
from tests.processes import descendants, kill, named
from tests.running_service import RunningService, config, wait_until, written
from tests.tiny_generator import publish_generator
from tests.traffic import Traffic

pytestmark = [pytest.mark.slow, pytest.mark.s3, pytest.mark.timeout(1200)]

LENIENT = {"least_contrast": 0.0, "most_white": 1.0, "most_black": 1.0}
IMAGES, PER_SHARD = 64, 4
ORDER: dict[str, Any] = {"cohort": {"kind": "cells", "cells": [{"sex": "F", "share": 1}]}, "steps": 60, "seed": 3}


def settings(store: str) -> dict[str, Any]:
    """Two small engines, and datasets in a bucket."""
    return {
        "generators": [{"name": "tiny", "uri": f"{store}/generator", "quality": LENIENT}],
        "replicas": {"least": 2, "most": 2, "slots": 4, "requests": 8, "queued": 8, "drain_s": 20},
        "limits": {"longest_deadline_s": 300},
        "datasets": {"store": f"{store}/served", "images_per_shard": PER_SHARD, "poll_s": 0.5, "jobs_at_once": 1},
    }


@pytest.fixture(scope="module")
def proxy(s3: EmbeddedS3) -> Iterator[FaultProxy]:
    """Between the service and its store."""
    with FaultProxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def store(bucket: str) -> str:
    uri = f"s3://{bucket}/faults-{time.time_ns()}"
    publish_generator(f"{uri}/generator")
    return uri


@pytest.fixture(scope="module")
def reaching_store(s3: EmbeddedS3, proxy: FaultProxy) -> dict[str, str]:
    """The environment of a service whose store may fail."""
    return s3.environment | {"AWS_ENDPOINT_URL": proxy.url}


@pytest.fixture(scope="module")
def service(
    store: str, reaching_store: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("service")
    with RunningService(folder, written(folder, config(settings(store))), environment=reaching_store) as running:
        yield running


@pytest.fixture
def client(service: RunningService) -> Iterator[Client]:
    with Client(service.url, service.key) as client:
        yield client


def require_made_once(served: str, job: Dataset) -> None:
    """The dataset is there, whole, each of its images once."""
    assert job.state == "finished", job.job.problem
    found = open_artefact(f"{served}/local/{job.id}/dataset", "dataset")
    assert list(verify(found)) == []
    assert sorted(row["index"] for row in rows(found, "images", ["index"])) == list(range(IMAGES))


def say(figures: str) -> None:
    print(figures)  # noqa: T201


def require_kept(traffic: Traffic, what: str) -> None:
    """Nobody was let down: every call ended well, in the end."""
    say(traffic.told(what))
    assert traffic.failures == []
    assert traffic.calls > 0


@pytest.mark.parametrize("part", ["engine", "controller", "gateway"])
def test_a_part_that_is_killed_while_clients_ask_lets_no_call_fail(service: RunningService, part: str) -> None:
    before = service.workers(part)
    with Traffic(service) as traffic:
        traffic.await_more(8)
        assert kill(before[0])
        traffic.await_more(12)
        wait_until(lambda: len(set(service.workers(part)) - {before[0]}) >= len(before), 120, f"another {part}")
        traffic.await_more(8)
    require_kept(traffic, f"{part} killed")


def test_the_proxy_that_speaks_http_is_killed_while_clients_ask(service: RunningService) -> None:
    [before] = named(service.process.pid, "ProxyActor")
    with Traffic(service) as traffic:
        traffic.await_more(8)
        assert kill(before)
        wait_until(lambda: named(service.process.pid, "ProxyActor") not in ([], [before]), 120, "another proxy")
        traffic.await_more(12)
    require_kept(traffic, "proxy killed")


def test_both_engines_are_killed_at_once_while_clients_ask(service: RunningService) -> None:
    before = service.workers("engine")
    with Traffic(service) as traffic:
        traffic.await_more(8)
        assert all(kill(engine) for engine in before)
        traffic.await_more(12)
    require_kept(traffic, "both engines killed")


def test_a_dataset_whose_dispatcher_and_gateway_die_is_made_once(
    service: RunningService, client: Client, store: str
) -> None:
    job = client.datasets.create(IMAGES, **ORDER)
    wait_until(lambda: begun(job), 120, "the first images of the dataset")
    parts = [*service.workers("dispatcher"), *service.workers("gateway")]
    assert len(parts) == 2
    assert all(kill(part) for part in parts)
    began = time.monotonic()
    job.wait(timeout_s=300)
    say(f"dispatcher and gateway killed during a dataset: finished {time.monotonic() - began:.0f} s later")
    require_made_once(f"{store}/served", job)


def begun(job: Dataset) -> bool:
    """Some of it is made, and not all."""
    progress = job.refresh().progress
    assert job.state in ("accepted", "running"), job.job
    return 0 < progress.images_done < IMAGES


def test_a_store_that_is_away_for_half_a_minute_stops_neither_images_nor_datasets(
    service: RunningService, client: Client, store: str, proxy: FaultProxy
) -> None:
    job = client.datasets.create(IMAGES, **(ORDER | {"seed": 4}))
    wait_until(lambda: begun(job), 120, "the first images of the dataset")
    away = time.monotonic()
    proxy.inject("reset", times=10**9)
    with Traffic(service, clients=2) as traffic, service.client() as bare:
        refused = bare.post("/v1/datasets", json={"images": 4} | ORDER, headers={"Idempotency-Key": "while-away"})
        wait_until(lambda: time.monotonic() - away > 30, 60, "half a minute")
        proxy.heal()
        traffic.await_more(4)
    assert refused.status_code == 503
    assert refused.json()["type"] == "urn:scanloom:problem:store-unavailable"
    assert int(refused.headers["Retry-After"]) >= 1
    require_kept(traffic, "store away for 30 s")
    job.wait(timeout_s=400)
    say(f"the dataset was finished {time.monotonic() - away:.0f} s after the store went")
    require_made_once(f"{store}/served", job)


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_a_service_that_is_started_anew_goes_on_with_its_datasets(
    store: str, reaching_store: dict[str, str], tmp_path: Path, how: str
) -> None:
    served = f"{store}/served-{how}"
    tree = settings(store)
    tree["replicas"] |= {"least": 1, "most": 1}
    tree["datasets"]["store"] = served
    place = written(tmp_path, config(tree))
    with RunningService(tmp_path, place, environment=reaching_store) as first:
        with Client(first.url, first.key) as client:
            running = client.datasets.create(IMAGES, **ORDER)
            waiting = client.datasets.create(IMAGES, **(ORDER | {"seed": 4}))
            wait_until(lambda: begun(running), 120, "the first images of the dataset")
        if how == "killed":
            everything = [first.process.pid, *descendants(first.process.pid)]
            assert kill(everything[0])
            for process in everything[1:]:
                kill(process)
        else:
            assert first.end() == 0
    made = len(Store(f"{served}/local/{running.id}/dataset").list("commits"))
    assert 0 < made < IMAGES // PER_SHARD
    began = time.monotonic()
    with (
        RunningService(tmp_path, place, environment=reaching_store) as second,
        Client(second.url, second.key) as client,
    ):
        again = [client.datasets.get(job.id) for job in (running, waiting)]
        for job in again:
            job.wait(timeout_s=400)
        say(
            f"service {how} with {made} of {IMAGES // PER_SHARD} shards made: both datasets finished "
            f"{time.monotonic() - began:.0f} s after it was started again"
        )
    for job in again:
        require_made_once(served, job)
