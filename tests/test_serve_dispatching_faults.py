"""The dispatcher where processes die, things are down, and dispatchers and a cancel come at once."""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import StoreError
from scanloom.store import Store
from serve.dispatcher import MOST_LOSSES, Dispatcher
from serve.orders import Ticket, new_id
from serve.ray_jobs import JobState, JobsUnavailable
from tests.dispatched_orders import Place, name, places
from tests.fault_proxy import FaultProxy
from tests.interleaving import ANY_ORDER, Killed, interleaved
from tests.served_datasets import FakeCluster, finish


@pytest.fixture
def new_place(tmp_path: Path, bare_generator: str) -> Callable[..., Place]:
    return places(tmp_path, bare_generator)


# --- who dies and what is down --------------------------------------------------------------------------------


def test_a_new_dispatcher_adopts_a_job_that_still_runs(new_place: Callable[..., Place]) -> None:
    place = new_place()
    id = place.order()
    place.dispatcher().reconcile()
    assert place.dispatcher().reconcile().live == 1
    assert place.cluster.log == [("submit", name(id))]


def test_a_new_cluster_gets_the_same_attempt_again(new_place: Callable[..., Place]) -> None:
    place = new_place(attempts=1)
    id = place.order()
    place.dispatcher().reconcile()
    for _ in range(3):
        place.cluster = FakeCluster()
        place.dispatcher().reconcile()
        assert place.cluster.live == [name(id)]
    place.finish(id)
    place.dispatcher().reconcile()
    assert place.state(id) == "finished"


def lose_clusters(place: Place, id: str, number: int, images_done: Callable[[int], int]) -> None:
    for lost in range(number):
        place.dispatcher().reconcile()
        progress = f'{{"images_done": {images_done(lost)}}}'.encode()
        place.ledger.orders.store.write(f"acme/{id}/dataset/progress.json", progress)
        place.cluster = FakeCluster()
    place.dispatcher().reconcile()


def test_an_order_that_loses_cluster_after_cluster_without_an_image_fails(new_place: Callable[..., Place]) -> None:
    place = new_place()
    id = place.order()
    lose_clusters(place, id, MOST_LOSSES, lambda _: 0)
    assert place.cluster.live == [name(id)]
    lose_clusters(place, id, 1, lambda _: 0)
    assert place.cluster.live == []
    assert "6 clusters were lost" in (place.ledger.find("acme", id).problem or "")


def test_an_order_that_makes_images_may_lose_any_number_of_clusters(new_place: Callable[..., Place]) -> None:
    place = new_place()
    id = place.order()
    lose_clusters(place, id, 3 * MOST_LOSSES, lambda lost: 1 + lost)
    assert place.cluster.live == [name(id)]


def test_what_was_called_cancelled_stays_so_and_its_late_job_is_stopped(
    new_place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = new_place()
    id, other = place.order(), place.dispatcher()
    submit = place.cluster.submit

    def late(job: str, recipe: str) -> None:
        # Another dispatcher sees the attempt, the wish to cancel it, and no job.
        place.ledger.cancel("acme", id)
        other.reconcile()
        assert place.state(id) == "cancelled"
        submit(job, recipe)

    monkeypatch.setattr(place.cluster, "submit", late)
    place.dispatcher().reconcile()
    assert place.cluster.log == [("submit", name(id)), ("stop", name(id))]
    finish(place.settings, "acme", id)
    assert place.state(id) == "cancelled"


def test_a_job_that_makes_nothing_any_more_is_stopped_and_counts_as_failed(new_place: Callable[..., Place]) -> None:
    place = new_place(stalled_s=100.0, attempts=1)
    id, dispatcher = place.order(), place.dispatcher()
    dispatcher.reconcile()
    place.now += 1000
    dispatcher.reconcile()  # it waits for a host, which is no fault
    place.cluster.jobs[name(id)] = JobState(live=True, running=True)
    for done in (0, 4, 8):
        place.ledger.orders.store.write(f"acme/{id}/dataset/progress.json", f'{{"images_done": {done}}}'.encode())
        for _ in range(2):
            dispatcher.reconcile()
            place.now += 99
            assert place.cluster.live == [name(id)]
            place.now -= 40
    place.now += 101
    dispatcher.reconcile()
    assert place.cluster.log[-1] == ("stop", name(id))
    dispatcher.reconcile()
    assert place.state(id) == "failed"


def test_what_nobody_has_placed_in_a_day_is_looked_at_no_more(new_place: Callable[..., Place]) -> None:
    place = new_place()
    old, young = (Ticket("acme", new_id(time.time() * 1000 - hours * 3_600_000)) for hours in (25, 23))
    for ticket in (old, young):
        place.ledger.orders.store.write(f"_open/{ticket.folder}", b"{}")
    place.dispatcher().reconcile()
    assert place.ledger.orders.open() == [young]


def test_a_refusal_of_the_cluster_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(JobsUnavailable("no answer")))
    assert (type(error), str(error), error.retry_after_s) == (JobsUnavailable, "no answer", 30.0)


def test_an_order_that_was_only_half_placed_is_left_to_whoever_places_it(new_place: Callable[..., Place]) -> None:
    place = new_place()
    id = place.order()
    text = place.ledger.orders.store.read(f"acme/{id}/order.json")
    place.ledger.orders.store.delete(
        [f"acme/{id}/order.json", f"acme/{id}/recipe.yaml", f"acme/{id}/dataset/plan.json"]
    )
    dispatcher = place.dispatcher()
    assert dispatcher.reconcile().submitted == 0
    place.ledger.orders.store.write(f"acme/{id}/order.json", text)
    assert dispatcher.reconcile().submitted == 1
    assert place.ledger.orders.store.exists(f"acme/{id}/recipe.yaml")


def test_a_store_that_deletes_nothing_costs_one_look(
    new_place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise StoreError("these credentials may not do this")

    monkeypatch.setattr(Store, "delete", refuse)
    place = new_place()
    id, dispatcher = place.order(), place.dispatcher()
    dispatcher.reconcile()
    place.finish(id)
    assert dispatcher.reconcile().ended == 1
    assert dispatcher.reconcile() == dispatcher.reconcile()
    assert dispatcher.reconcile().ended == 0
    assert place.dispatcher().reconcile().ended == 1


def test_a_cluster_that_does_not_answer_is_waited_for(
    new_place: Callable[..., Place], caplog: pytest.LogCaptureFixture
) -> None:
    place = new_place()
    id, dispatcher = place.order(), place.dispatcher()
    place.cluster.down = True
    with pytest.raises(JobsUnavailable):
        dispatcher.reconcile()
    with caplog.at_level(logging.INFO, "scanloom.serve"):
        for _ in range(3):
            dispatcher._pass()
        place.cluster.down = False
        dispatcher._pass()
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "does not answer" in line] == ["datasets: Ray's Jobs API does not answer"]
    assert "datasets: all is well again" in said
    assert place.cluster.live == [name(id)]


@pytest.mark.s3
def test_a_store_that_is_down_is_waited_for(
    s3: EmbeddedS3, store_uri: str, bare_generator: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(store_uri, bare_generator)
    id, dispatcher = place.order(), place.dispatcher()
    with FaultProxy(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.inject("403", times=-1)  # which is told at once, without the pauses of a 503
        with caplog.at_level(logging.INFO, "scanloom.serve"):
            dispatcher._pass()
        assert any("_open" in record.getMessage() for record in caplog.records)
        assert place.cluster.log == []
        proxy.heal()
        dispatcher._pass()
    assert place.cluster.live == [name(id)]


def test_the_loop_runs_until_it_is_closed_and_health_tells_when_it_ended(
    new_place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.dispatcher.log_to_stderr", lambda: None)  # of a process of its own
    place = new_place(poll_s=0.01)
    id, dispatcher = place.order(), place.dispatcher()

    async def serve() -> None:
        await dispatcher.check_health()
        async with asyncio.timeout(20):
            while name(id) not in place.cluster.live:
                await asyncio.sleep(0.01)
        await dispatcher.check_health()
        assert dispatcher._loop is not None
        dispatcher._loop.cancel()
        async with asyncio.timeout(20):
            while not dispatcher._loop.done():
                await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="has ended"):
            await dispatcher.check_health()

    asyncio.run(serve())


def test_an_error_that_nobody_foresaw_ends_no_loop(
    new_place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = new_place()
    dispatcher = place.dispatcher()
    monkeypatch.setattr(Dispatcher, "reconcile", lambda _: 1 / 0)
    dispatcher._pass()
    assert "ZeroDivisionError" in caplog.text


# --- at once --------------------------------------------------------------------------------------------------


def settle(place: Place, ids: list[str]) -> None:
    """Let jobs end well and dispatchers look until nothing is open."""
    for _ in range(20):
        place.dispatcher().reconcile()
        for job in place.cluster.live:
            id = next(id for id in ids if id in job)
            finish(place.settings, "acme", id)
            place.cluster.end(job)
    assert place.ledger.orders.open() == []


@given(data=st.data())
@ANY_ORDER
def test_however_dispatchers_and_a_cancel_interleave_and_die_every_order_ends_as_it_should(
    new_place: Callable[..., Place], data: st.DataObject
) -> None:
    place = new_place(jobs_at_once=2)
    wanted, unwanted = place.order(), place.order()
    calls: list[Callable[[], Any]] = [
        lambda: place.dispatcher().reconcile(), lambda: place.dispatcher().reconcile(),
        lambda: place.ledger.cancel("acme", unwanted),
    ]  # fmt: skip
    results = interleaved(data, calls, kills=2, one_in=21)
    assert not [error for error in results[:2] if isinstance(error, Exception)]
    asked = not isinstance(results[2], Killed)
    submitted = [job for what, job in place.cluster.log if what == "submit"]
    assert len(submitted) == len(set(submitted))
    if asked and results[2].state == "cancelled" and not any(isinstance(result, Killed) for result in results):
        assert name(unwanted) not in place.cluster.live
    settle(place, [wanted, unwanted])
    assert place.state(wanted) == "finished"
    assert place.state(unwanted) in ({"cancelled"} if asked else {"cancelled", "finished"})
    assert {job for what, job in place.cluster.log if what == "submit"} <= {name(wanted), name(unwanted)}
