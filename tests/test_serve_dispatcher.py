"""Ordered datasets on a real Ray cluster with its Jobs API: made once, whoever dies, at a priority of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from scanloom.api import DatasetRequest
from scanloom.artefact import Artefact, open_artefact
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.shards.reader import rows
from serve.config import Service
from serve.dispatcher import Dispatcher
from serve.ledger import Ledger
from serve.ray_jobs import RayJobs
from tests.free_engine import publish_free_generator
from tests.killing import require_equal
from tests.processes import kill, named
from tests.served_datasets import service

pytestmark = [pytest.mark.ray, pytest.mark.s3]
PROGRAM = "tests.free_engine"
NICENESS = 17
LONGEST_S = 240.0
SIZE_PX = 16
ROOT = Path(__file__).resolve().parents[1]

# A dispatcher in a process of its own, to be killed.
LOOP = """
import sys, threading
from serve.config import Service
from serve.dispatcher import Dispatcher
from serve.ray_jobs import RayJobs
settings = Service.model_validate_json(sys.argv[1])
dispatcher = Dispatcher(settings, RayJobs(settings.datasets, sys.argv[2], sys.argv[3]))
while True:
    print(dispatcher.reconcile(), flush=True)
    threading.Event().wait(0.1)
"""


class Head:
    """A Ray cluster of one host with its dashboard, beside whatever other Ray runs on the machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        ports = {"dashboard_port": _free_port(), "dashboard_agent_listen_port": _free_port()}
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 5, "include_dashboard": True, **ports}
        )
        node: Any = self._cluster.head_node
        self.address = f"http://{node.webui_url}"
        self.session = Path(node.get_session_dir_path())

    def lose(self) -> None:
        """Kill all of it, with the drivers of its jobs."""
        drivers = named(os.getpid(), PROGRAM)
        self._cluster.shutdown()
        for process in drivers:
            kill(process)

    def jobs(self) -> list[Any]:
        """All that were ever submitted."""
        return [job for job in JobSubmissionClient(self.address).list_jobs() if job.submission_id]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(s3: EmbeddedS3) -> Iterator[Head]:
    cluster = Head()
    yield cluster
    cluster.lose()


class Orderer:
    """A service's datasets in a store of their own."""

    def __init__(self, store_uri: str, images: int, **datasets: Any) -> None:
        publish_free_generator(f"{store_uri}/generator", SIZE_PX)
        settings = service(f"{store_uri}/datasets", f"{store_uri}/generator", niceness=NICENESS, **datasets)
        self.settings: Service = settings
        self.ledger = Ledger(settings)
        self.request = DatasetRequest.model_validate({"images": images, "bits_stored": 12, "seed": 3})

    def order(self, tenant: str = "acme", request_id: str = "request-1") -> str:
        return self.ledger.place(tenant, self.request, request_id)[0].id

    def dispatcher(self, head: Head) -> Dispatcher:
        assert self.settings.datasets is not None
        return Dispatcher(self.settings, RayJobs(self.settings.datasets, head.address, PROGRAM))

    def state(self, id: str) -> str:
        return self.ledger.find(None, id).state

    def dataset(self, id: str, tenant: str = "acme") -> Artefact:
        return open_artefact(self.ledger.orders.store.uri_of(f"{tenant}/{id}/dataset"), "dataset")

    def commits(self, id: str, tenant: str = "acme") -> int:
        return len(self.ledger.orders.store.list(f"{tenant}/{id}/dataset/commits"))

    def until(self, dispatcher: Dispatcher | None, condition: Callable[[], object]) -> None:
        """Reconcile until the condition holds."""
        deadline = time.monotonic() + LONGEST_S
        while not condition():
            assert time.monotonic() < deadline, self.ledger.jobs(None, 20)
            if dispatcher is not None:
                dispatcher._pass()
            threading.Event().wait(0.05)

    def until_finished(self, dispatcher: Dispatcher | None, *ids: str) -> None:
        self.until(dispatcher, lambda: all(self.state(id) == "finished" for id in ids))


def drivers() -> list[int]:
    return named(os.getpid(), PROGRAM)


def test_an_order_becomes_a_dataset_whose_rows_name_it_and_gives_way_and_tells_no_secret(
    head: Head, s3: EmbeddedS3, store_uri: str
) -> None:
    orderer = Orderer(store_uri, images=42)
    id, dispatcher = orderer.order(request_id="ask-7"), orderer.dispatcher(head)
    seen: dict[str, set[int]] = {}

    def watched() -> bool:
        for what in (PROGRAM, "FreeEngine", "write_shard"):
            for process in named(os.getpid(), what):
                with suppress(ProcessLookupError):
                    seen.setdefault(what, set()).add(os.getpriority(os.PRIO_PROCESS, process))
        return orderer.state(id) == "finished"

    orderer.until(dispatcher, watched)
    made = list(rows(orderer.dataset(id), "images", ["index", "order"]))
    assert sorted(row["index"] for row in made) == list(range(42))
    assert {row["order"] for row in made} == {"ask-7"}
    assert orderer.dataset(id).manifest.statistics["plan"] == orderer.ledger.find("acme", id).plan
    assert seen.keys() >= {PROGRAM, "FreeEngine"}
    assert {niceness for found in seen.values() for niceness in found} == {min(19, os.nice(0) + NICENESS)}
    secret = s3.environment["AWS_SECRET_ACCESS_KEY"].encode()
    told = [file for file in head.session.rglob("*") if file.is_file() and secret in file.read_bytes()]
    assert told == []
    assert all(secret.decode() not in job.model_dump_json() for job in head.jobs())


# --- slow -----------------------------------------------------------------------------------------------------

IMAGES = 400


@pytest.fixture(scope="module")
def place(bucket: str) -> str:
    return f"s3://{bucket}/dispatcher-{os.getpid()}"


@pytest.fixture(scope="module")
def undisturbed(head: Head, place: str) -> Artefact:
    orderer = Orderer(f"{place}/undisturbed", IMAGES)
    id = orderer.order()
    orderer.until_finished(orderer.dispatcher(head), id)
    return orderer.dataset(id)


def _reached(orderer: Orderer, id: str, goal: int) -> bool:
    return orderer.commits(id) >= goal


@pytest.mark.slow
def test_a_killed_driver_is_followed_by_one_that_goes_on(head: Head, store_uri: str, undisturbed: Artefact) -> None:
    orderer = Orderer(store_uri, IMAGES)
    id, dispatcher = orderer.order(), orderer.dispatcher(head)
    for goal in (5, 30):
        orderer.until(dispatcher, partial(_reached, orderer, id, goal))
        assert [kill(process) for process in drivers()]
        orderer.until(dispatcher, lambda: not drivers())
    orderer.until_finished(dispatcher, id)
    require_equal(orderer.dataset(id), undisturbed)
    attempts = [job for job in head.jobs() if id in job.submission_id]
    assert sorted(job.submission_id[-4:] for job in attempts) == ["0001", "0002", "0003"]


@pytest.mark.slow
def test_a_killed_dispatcher_is_followed_by_one_that_adopts_the_job(
    head: Head, store_uri: str, undisturbed: Artefact
) -> None:
    orderer = Orderer(store_uri, IMAGES)
    id = orderer.order()
    command = [sys.executable, "-c", LOOP, orderer.settings.model_dump_json(), head.address, PROGRAM]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}"}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        orderer.until(None, lambda: orderer.commits(id) >= 5)
    finally:
        first.kill()
        first.wait()
    assert drivers()
    orderer.until_finished(orderer.dispatcher(head), id)
    require_equal(orderer.dataset(id), undisturbed)
    assert len([job for job in head.jobs() if id in job.submission_id]) == 1


@pytest.mark.slow
def test_a_new_cluster_goes_on_with_every_order(store_uri: str, undisturbed: Artefact) -> None:
    orderer = Orderer(store_uri, IMAGES, attempts=1)
    running, waiting = orderer.order(), orderer.order()
    done = []
    for goal in (5, 40):
        head = Head()
        dispatcher = orderer.dispatcher(head)
        orderer.until(dispatcher, partial(_reached, orderer, running, goal))
        head.lose()
        done.append(orderer.commits(running))
        assert orderer.state(running) == "running"
    assert done[0] < IMAGES // 4
    head = Head()
    try:
        orderer.until_finished(orderer.dispatcher(head), running, waiting)
        require_equal(orderer.dataset(running), undisturbed)
        require_equal(orderer.dataset(waiting), undisturbed)
    finally:
        head.lose()


@pytest.mark.slow
def test_two_dispatchers_at_once_submit_every_job_once(head: Head, store_uri: str) -> None:
    orderer = Orderer(store_uri, images=20, jobs_at_once=2)
    tenants = ("a", "b", "a", "a", "b", "a")
    ids = [orderer.order(tenant, f"r-{n}") for n, tenant in enumerate(tenants)]
    live: list[int] = []

    def watched() -> bool:
        live.append(sum(job.status in ("PENDING", "RUNNING") for job in head.jobs()))
        return all(orderer.state(id) == "finished" for id in ids)

    with ThreadPoolExecutor(2) as pool:
        looks = [pool.submit(orderer.until, orderer.dispatcher(head), watched) for _ in range(2)]
        for look in looks:
            look.result()
    submitted = [job.submission_id for job in head.jobs() if any(id in job.submission_id for id in ids)]
    assert sorted(submitted) == sorted(f"dataset-{id}-0001" for id in ids)
    assert max(live) <= 4  # each keeps to two by what it saw when it looked
    for id, tenant in zip(ids, tenants, strict=True):
        assert sorted(row["index"] for row in rows(orderer.dataset(id, tenant), "images", ["index"])) == list(range(20))


@pytest.mark.slow
def test_one_dispatcher_never_runs_more_jobs_than_there_may_be(head: Head, store_uri: str) -> None:
    orderer = Orderer(store_uri, images=8, jobs_at_once=1)
    ids, dispatcher, most = [orderer.order("a", f"r-{n}") for n in range(3)], orderer.dispatcher(head), 0

    def watched() -> bool:
        nonlocal most
        live = [job.submission_id for job in head.jobs() if job.status in ("PENDING", "RUNNING")]
        # A driver lives on for a moment when its dataset is there.
        most = max(most, sum(any(id in job for job in live) and orderer.state(id) != "finished" for id in ids))
        return all(orderer.state(id) == "finished" for id in ids)

    orderer.until(dispatcher, watched)
    assert most == 1


@pytest.mark.slow
def test_a_cancelled_order_is_stopped_with_all_that_works_on_it(head: Head, store_uri: str) -> None:
    orderer = Orderer(store_uri, images=40_000)
    id, dispatcher = orderer.order(), orderer.dispatcher(head)
    orderer.until(dispatcher, lambda: orderer.commits(id) >= 3)
    [driver] = drivers()
    orderer.ledger.cancel("acme", id)
    orderer.until(dispatcher, lambda: orderer.state(id) == "cancelled")
    assert driver not in drivers()  # a zombie has no name
    orderer.until(None, lambda: not named(os.getpid(), "FreeEngine", "write_shard"))
    assert orderer.ledger.orders.open() == []
    assert not orderer.ledger.orders.store.exists(f"acme/{id}/dataset/manifest.json")


@pytest.mark.slow
def test_a_job_that_cannot_be_done_fails_with_its_own_words(head: Head, store_uri: str) -> None:
    orderer = Orderer(store_uri, images=8)
    id, dispatcher = orderer.order(), orderer.dispatcher(head)
    open_artefact(f"{store_uri}/generator").store.delete(["manifest.json"])
    orderer.until(dispatcher, lambda: orderer.state(id) == "failed")
    problem = orderer.ledger.find("acme", id).problem or ""
    assert problem.startswith(f"{store_uri}/generator: there is no artefact here")
    assert len([job for job in head.jobs() if id in job.submission_id]) == 1
