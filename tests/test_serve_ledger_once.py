"""Orders of datasets: what is accepted is never lost and never doubled, whoever dies between any two writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scanloom.api import DatasetJob
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.shards.commit import claimed_plan
from scanloom.store import Store
from serve.ledger import Conflict, Ledger
from serve.orders import Ticket
from tests.fault_proxy import FaultProxy
from tests.interleaving import ANY_ORDER, Killed, interleaved
from tests.served_datasets import OTHER, REQUEST, ledgers, publish_bare_generator, service

CREATES = 5
"""Objects that placing an order with an Idempotency-Key creates."""


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def ledger(request: pytest.FixtureRequest, tmp_path: Path, bare_generator: str) -> Ledger:
    store = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("store_uri")
    return Ledger(service(store, bare_generator))


@pytest.fixture
def folder_ledger(tmp_path: Path, bare_generator: str) -> Iterator[Ledger]:
    return ledgers(tmp_path, bare_generator)


def test_the_same_key_and_request_are_the_same_order(ledger: Ledger) -> None:
    assert ledger.ordered("acme", "key") is None
    first, new = ledger.place("acme", REQUEST, "request-1", "key")
    again, newer = ledger.place("acme", REQUEST, "request-2", "key")
    assert (new, newer) == (True, False)
    assert again == first == ledger.ordered("acme", "key")
    assert ledger.place("acme", REQUEST, "r", "another key")[0].id != first.id
    assert ledger.place("other", REQUEST, "r", "key")[0].id != first.id
    with pytest.raises(Conflict, match="Idempotency-Key"):
        ledger.place("acme", OTHER, "request-3", "key")
    assert len(ledger.jobs("acme", 50).datasets) == 2


def test_a_known_key_is_answered_though_the_generator_is_gone(tmp_path: Path) -> None:
    generator = publish_bare_generator(str(tmp_path / "generator"))
    ledger = Ledger(service(str(tmp_path / "store"), generator.uri))
    first, _ = ledger.place("acme", REQUEST, "r", "key")
    generator.store.delete(["manifest.json"])
    assert ledger.place("acme", REQUEST, "r", "key") == (first, False)


def require_exactly_one(ledger: Ledger, job: DatasetJob) -> None:
    """One order, which dispatchers find and whose job has all that it reads."""
    assert [j.id for j in ledger.jobs(None, 50).datasets] == [job.id]
    assert Ticket("acme", job.id) in ledger.orders.open()
    folder = Path(ledger.orders.store.uri) / "acme" / job.id
    order = ledger.orders.read(Ticket("acme", job.id))
    assert order is not None
    assert ledger.orders.prepare(order) == str(folder / "recipe.yaml")
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["generate"]["order"] == job.request
    assert claimed_plan(Store(str(folder / "dataset"))) == job.plan
    assert ledger.place("acme", REQUEST, "later", "key") == (job, False)


class Died(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(CREATES))
def test_whoever_dies_at_any_write_the_order_is_there_once_or_not_at_all(
    folder_ledger: Any, monkeypatch: pytest.MonkeyPatch, number: int, applied: bool
) -> None:
    ledger, create = next(folder_ledger), Store.create
    seen: list[str] = []

    def dying(store: Store, key: str, data: bytes) -> bool:
        seen.append(key)
        if len(seen) == number + 1:
            if applied:
                create(store, key, data)
            raise Died
        return create(store, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", dying)
        with pytest.raises(Died):
            ledger.place("acme", REQUEST, "request-1", "key")
    there = ledger.ordered("acme", "key")
    assert (there is not None) == ((number, applied) >= (2, True))
    if there is not None:
        assert there.request == "request-1"
        assert Ticket("acme", there.id) in ledger.orders.open()
    if number or applied:
        with pytest.raises(Conflict):
            ledger.place("acme", OTHER, "request-2", "key")
    job, new = ledger.place("acme", REQUEST, "request-2", "key")
    assert new == (there is None)
    require_exactly_one(ledger, job)


def test_the_crash_points_are_all_there_are(folder_ledger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, create = next(folder_ledger), Store.create
    seen: list[str] = []

    def noting(store: Store, key: str, data: bytes) -> bool:
        seen.append(key)
        return create(store, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", noting)
        patch.setattr(Store, "write", lambda *_: pytest.fail("an object of an order is replaced"))
        ledger.place("acme", REQUEST, "r", "key")
    assert len(seen) == CREATES


@given(data=st.data())
@ANY_ORDER
def test_however_two_callers_interleave_and_die_a_key_is_one_order(folder_ledger: Any, data: st.DataObject) -> None:
    ledger = next(folder_ledger)
    calls = [lambda n=n: ledger.place("acme", REQUEST, f"request-{n}", "key") for n in range(2)]
    results = interleaved(data, calls, kills=1, one_in=16)
    answers = [result for result in results if not isinstance(result, Killed)]
    assert all(isinstance(answer, tuple) for answer in answers), answers
    job, _ = ledger.place("acme", REQUEST, "last", "key")
    assert {answer[0].id for answer in answers} <= {job.id}
    assert sum(answer[1] for answer in answers) <= 1
    require_exactly_one(ledger, job)


@given(data=st.data())
@ANY_ORDER
def test_however_two_requests_race_for_a_key_one_of_them_wins(folder_ledger: Any, data: st.DataObject) -> None:
    ledger = next(folder_ledger)
    calls = [lambda r=request: ledger.place("acme", r, "r", "key") for request in (REQUEST, OTHER)]
    results = interleaved(data, calls)
    assert sorted(type(result).__name__ for result in results) == ["Conflict", "tuple"]
    assert len(ledger.jobs(None, 9).datasets) == 1


@pytest.mark.s3
def test_an_order_survives_lost_acknowledgements(
    s3: EmbeddedS3, store_uri: str, bare_generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: threading.Event().wait(0.001))  # botocore's pauses
    ledger = Ledger(service(store_uri, bare_generator))
    with FaultProxy(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for _ in range(CREATES):
            proxy.inject("lost_ack", method="PUT")
        job, new = ledger.place("acme", REQUEST, "r", "key")
        assert len(proxy.injected) == CREATES
    assert new
    assert [j.id for j in ledger.jobs("acme", 9).datasets] == [job.id]
