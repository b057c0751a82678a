"""Datasets over HTTP: ordered once, seen by their tenant, and refused at once where they cannot be made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

import pytest

from scanloom.errors import StoreError
from serve.config import Service
from serve.ledger import NotFound
from serve.turns import MOST_RUNNING, MOST_WAITING
from tests.served_datasets import finish
from tests.served_images import ORDER, Asked, applications, bearer, problem, settings
from tests.tiny_generator import ENVELOPE, publish_generator


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_generator(str(tmp_path_factory.mktemp("generator"))).uri


@pytest.fixture(scope="module")
def service(generator: str, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return settings(generator, str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="module")
def ask(service: Service) -> Iterator[Asked]:
    with applications(service) as opened:
        yield opened()


@pytest.fixture
def asked_of(service: Service) -> Iterator[Any]:
    with applications(service) as opened:
        yield opened


def test_a_dataset_is_ordered_found_and_read_from_the_url_of_its_result(ask: Asked, service: Service) -> None:
    placed = ask("POST", "/v1/datasets", json=ORDER)
    assert placed.status_code == 202, placed.text
    job = placed.json()
    assert (job["state"], job["images"], job["request"]) == ("accepted", 8, placed.headers["X-Request-ID"])
    assert ask("GET", placed.headers["Location"]).json()["id"] == job["id"]
    problem(ask("GET", f"/v1/datasets/{job['id']}/result"), 409, "conflict")
    content = {"images/shard-000000-0a1b2c3d4e5f.parquet": b"PAR1" * 700_000}
    finish(service, "clinic-a", job["id"], content)
    result = ask("GET", f"/v1/datasets/{job['id']}/result").json()
    assert result["rows"] == 10
    files = {file["path"]: file for file in result["files"]}
    for path, data in content.items():
        answer = ask("GET", files[path]["url"])
        assert answer.content == data
        assert answer.headers["Content-Type"] == "application/vnd.apache.parquet"
    problem(ask("GET", f"/v1/datasets/{job['id']}/files/images/other.parquet"), 404, "not-found")


def test_the_same_key_orders_once_and_another_body_under_it_is_a_conflict(ask: Asked) -> None:
    headers = {"Idempotency-Key": "order-1"}
    first, again = (ask("POST", "/v1/datasets", json=ORDER, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"]
    problem(ask("POST", "/v1/datasets", json=ORDER | {"images": 9}, headers=headers), 409, "conflict")
    problem(ask("POST", "/v1/datasets", json=ORDER, headers={"Idempotency-Key": "a b"}), 422, "invalid")


def test_a_retry_is_answered_by_its_own_job_where_the_quota_is_used_up(
    asked_of: Any, generator: str, tmp_path: Path
) -> None:
    limited = settings(generator, str(tmp_path), everyone={"datasets_at_once": 1})
    ask = asked_of(service=limited)
    headers = {"Idempotency-Key": "order-1"}
    first = ask("POST", "/v1/datasets", json=ORDER, headers=headers)
    assert first.status_code == 202
    problem(ask("POST", "/v1/datasets", json=ORDER), 429, "quota")
    again = ask("POST", "/v1/datasets", json=ORDER, headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])


def test_of_orders_at_the_same_time_no_more_are_taken_than_the_quota(
    asked_of: Any, generator: str, tmp_path: Path
) -> None:
    ask = asked_of(service=settings(generator, str(tmp_path), everyone={"datasets_at_once": 3}))
    placing = [ask.begin("POST", "/v1/datasets", json=ORDER) for _ in range(8)]
    assert sorted(answer.result(60.0).status_code for answer in placing) == [202] * 3 + [429] * 5


@pytest.mark.parametrize(
    "change, status, kind, words",
    [
        ({"images": 0}, 422, "invalid", "images"),
        ({"cohort": {"kind": "table", "uri": "/etc/passwd.csv"}}, 422, "invalid", "cohort"),
        ({"cohort": {"kind": "cells", "cells": []}}, 422, "invalid", "cohort.cells"),
        ({"cohort": {"kind": "cells", "cells": [{"age": [5, 9], "share": 1}]}}, 422, "outside-envelope", "trained"),
        ({"cohort": {"kind": "cells", "cells": [{"sexx": "F", "share": 1}]}}, 422, "invalid", "sexx"),
        ({"generator": "none"}, 422, "invalid", "generator"),
        ({"store": "s3://elsewhere"}, 422, "invalid", "store"),
    ],
)
def test_a_dataset_that_cannot_be_made_is_refused_when_it_is_ordered(
    ask: Asked, change: dict[str, Any], status: int, kind: str, words: str
) -> None:
    told = problem(ask("POST", "/v1/datasets", json=ORDER | change), status, kind)
    assert words in told.detail
    if kind == "outside-envelope":
        assert told.envelope == ENVELOPE.model_dump(mode="json")
    if words == "cohort.cells":
        assert [fault.field for fault in told.errors] == ["cohort.cells"]


def test_datasets_are_listed_by_pages_and_cancelled(asked_of: Any, generator: str, tmp_path: Path) -> None:
    ask = asked_of(service=settings(generator, str(tmp_path)))
    ids = [ask("POST", "/v1/datasets", json=ORDER).json()["id"] for _ in range(3)]
    page = ask("GET", "/v1/datasets?limit=2").json()
    assert [job["id"] for job in page["datasets"]] == ids[:0:-1]
    rest = ask("GET", "/v1/datasets", params={"limit": 2, "after": page["next"]}).json()
    assert [job["id"] for job in rest["datasets"]] == ids[:1]
    assert rest["next"] is None
    assert ask("POST", f"/v1/datasets/{ids[0]}/cancel").status_code == 200
    for bad in ("limit=0", "limit=x", "limit=201", "after=../..", "after=%00"):
        problem(ask("GET", f"/v1/datasets?{bad}"), 422, "invalid")


def test_a_service_without_datasets_says_so(asked_of: Any, generator: str) -> None:
    ask = asked_of(service=settings(generator))
    assert "no orders" in problem(ask("POST", "/v1/datasets", json=ORDER), 404, "not-found").detail
    assert "no orders" in problem(ask("GET", "/v1/datasets"), 404, "not-found").detail


class Slow:
    """A ledger whose store takes its time."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Semaphore(0)

    def find(self, tenant: str | None, id: str) -> Any:
        self.begun.release()
        if tenant == "clinic-a":
            assert self.go.wait(30.0)
        raise NotFound("there is no such dataset")


def test_while_the_store_is_slow_no_tenant_takes_the_threads_of_others(asked_of: Any) -> None:
    slow = Slow()
    ask = asked_of(ledger=slow)
    theirs = [ask.begin("GET", "/v1/datasets/x") for _ in range(MOST_WAITING + 1)]
    try:
        assert all(slow.begun.acquire(timeout=10.0) for _ in range(MOST_RUNNING))
        [refused] = wait(theirs, 20.0, FIRST_COMPLETED).done
        problem(refused.result(), 429, "busy")
        assert not slow.begun.acquire(timeout=0.0)
        problem(ask("GET", "/v1/datasets/x", headers=bearer("rival")), 404, "not-found")
    finally:
        slow.go.set()
    assert sorted(answer.result(30.0).status_code for answer in theirs) == [404] * MOST_WAITING + [429]
    problem(ask("GET", "/v1/datasets/x"), 404, "not-found")


class Down:
    """A ledger whose store is away."""

    def find(self, tenant: str | None, id: str) -> Any:
        raise StoreError("s3://secret-bucket/orders: does not answer", retryable=True)


def test_a_store_that_is_down_is_told_as_something_that_passes(asked_of: Any) -> None:
    answer = asked_of(ledger=Down())("GET", "/v1/datasets/0123456789abcdef01234567")
    problem(answer, 503, "store-unavailable")
    assert answer.headers["Retry-After"] == "5"
    assert "secret" not in answer.text
