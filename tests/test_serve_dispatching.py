"""What the dispatcher does, on a cluster that is none: every accepted dataset gets the jobs it takes, and no more."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from scanloom.store import Store
from serve.config import Service
from serve.dispatcher import why
from serve.ray_jobs import RayJobs, _code
from tests.dispatched_orders import Place, name, places
from tests.served_datasets import FakeCluster, service


@pytest.fixture
def new_place(tmp_path: Path, bare_generator: str) -> Callable[..., Place]:
    return places(tmp_path, bare_generator)


# --- the way of an order --------------------------------------------------------------------------------------


def test_an_order_gets_a_job_and_ends_with_its_dataset(new_place: Callable[..., Place]) -> None:
    place = new_place()
    id, dispatcher = place.order(), place.dispatcher()
    done = dispatcher.reconcile()
    assert (done.live, done.waiting, done.submitted, done.ended) == (1, 0, 1, 0)
    assert place.cluster.recipes == {name(id): str(Path(place.ledger.orders.store.uri) / "acme" / id / "recipe.yaml")}
    assert place.state(id) == "running"
    assert dispatcher.reconcile().submitted == 0
    place.finish(id)
    assert dispatcher.reconcile().ended == 1
    assert place.state(id) == "finished"
    assert place.ledger.orders.open() == []
    assert dispatcher.reconcile() == dispatcher.reconcile()
    assert place.cluster.log == [("submit", name(id))]


def test_a_failed_job_is_followed_by_another_up_to_a_number_of_attempts(new_place: Callable[..., Place]) -> None:
    place = new_place(attempts=3)
    id, dispatcher = place.order(), place.dispatcher()
    for attempt in (1, 2, 3):
        dispatcher.reconcile()
        assert place.cluster.live == [name(id, attempt)]
        assert place.state(id) == "running"
        message = "Job entrypoint command failed with exit code -9, last available logs (truncated):\nloading\nimage 7"
        place.cluster.end(name(id, attempt), exit_code=-9, message=message)
    dispatcher.reconcile()
    assert place.state(id) == "failed"
    problem = "Job entrypoint command failed with exit code -9 / loading / image 7"
    assert place.ledger.find("acme", id).problem == problem
    assert dispatcher.reconcile().live == 0


def test_a_job_that_says_that_it_cannot_be_done_is_not_tried_again(new_place: Callable[..., Place]) -> None:
    place = new_place()
    id, dispatcher = place.order(), place.dispatcher()
    dispatcher.reconcile()
    message = (
        "failed with exit code 2, last available logs:\nwarning: x\nerror: generator g: is damaged; make it again\n"
    )
    place.cluster.end(name(id), exit_code=2, message=message)
    dispatcher.reconcile()
    assert place.ledger.find("acme", id).problem == "generator g: is damaged; make it again"


def test_a_job_that_lost_its_store_is_tried_again(new_place: Callable[..., Place]) -> None:
    place = new_place()
    id, dispatcher = place.order(), place.dispatcher()
    dispatcher.reconcile()
    place.cluster.end(name(id), exit_code=75, message="error: s3://b: no answer")
    dispatcher.reconcile()
    assert place.cluster.live == [name(id, 2)]


def test_a_job_for_which_the_cluster_had_no_room_is_no_failure(new_place: Callable[..., Place]) -> None:
    place = new_place(attempts=2)
    id, dispatcher = place.order(), place.dispatcher()
    for attempt in range(1, 6):
        dispatcher.reconcile()
        place.cluster.end(name(id, attempt), exit_code=None, message="no node with spot", started=False)
    dispatcher.reconcile()
    assert place.cluster.live == [name(id, 6)]
    place.cluster.end(name(id, 6), exit_code=-9)
    dispatcher.reconcile()
    place.cluster.end(name(id, 7), exit_code=-9)
    dispatcher.reconcile()
    assert place.state(id) == "failed"


def test_attempts_keep_a_distance_that_grows(new_place: Callable[..., Place]) -> None:
    place = new_place(poll_s=10.0)
    id, dispatcher = place.order(), place.dispatcher()
    dispatcher.reconcile()
    for attempt, distance_s in ((1, 10), (2, 20), (3, 40)):
        place.now += 1000
        place.cluster.end(name(id, attempt), exit_code=1)
        job = place.cluster.jobs[name(id, attempt)]
        place.cluster.jobs[name(id, attempt)] = type(job)(live=False, exit_code=1, ended=place.now)
        place.now += distance_s - 1
        dispatcher.reconcile()
        assert place.cluster.live == []
        place.now += 2
        dispatcher.reconcile()
        assert place.cluster.live == [name(id, attempt + 1)]


def test_a_job_that_ends_well_without_a_dataset_is_a_failure(new_place: Callable[..., Place]) -> None:
    place = new_place(attempts=1)
    id, dispatcher = place.order(), place.dispatcher()
    dispatcher.reconcile()
    place.cluster.end(name(id), exit_code=0)
    dispatcher.reconcile()
    assert place.ledger.find("acme", id).problem == "its job ended without a word"


# --- cancelling -----------------------------------------------------------------------------------------------


def test_a_running_order_is_cancelled_when_its_job_is_stopped(new_place: Callable[..., Place]) -> None:
    place = new_place()
    id, dispatcher = place.order(), place.dispatcher()
    dispatcher.reconcile()
    place.ledger.cancel("acme", id)
    assert dispatcher.reconcile().live == 1
    assert place.cluster.log[-1] == ("stop", name(id))
    assert place.state(id) == "running"
    dispatcher.reconcile()
    assert place.state(id) == "cancelled"
    assert place.ledger.orders.open() == []


def test_a_dataset_that_was_finished_before_its_job_could_be_stopped_is_finished(
    new_place: Callable[..., Place],
) -> None:
    place = new_place()
    id, dispatcher = place.order(), place.dispatcher()
    dispatcher.reconcile()
    place.ledger.cancel("acme", id)
    place.finish(id)
    dispatcher.reconcile()
    assert place.state(id) == "finished"


def test_a_cancelled_order_whose_cluster_is_gone_is_cancelled(new_place: Callable[..., Place]) -> None:
    place = new_place()
    id = place.order()
    place.dispatcher().reconcile()
    place.ledger.cancel("acme", id)
    place.cluster = FakeCluster()
    place.dispatcher().reconcile()
    assert place.state(id) == "cancelled"
    assert place.cluster.log == []


# --- whose turn it is -----------------------------------------------------------------------------------------


def test_no_more_jobs_than_there_may_be_oldest_first(new_place: Callable[..., Place]) -> None:
    place = new_place(jobs_at_once=2)
    ids, dispatcher = [place.order() for _ in range(5)], place.dispatcher()
    seen = []
    for _ in range(5):
        dispatcher.reconcile()
        assert len(place.cluster.live) <= 2
        if place.cluster.live:
            seen.append(place.cluster.live[0])
            place.finish(next(id for id in ids if name(id) == seen[-1]))
    assert seen == [name(id) for id in sorted(ids, reverse=True)]


@pytest.mark.parametrize("jobs_at_once", [1, 2])
def test_a_tenant_with_many_orders_does_not_hold_up_another(new_place: Callable[..., Place], jobs_at_once: int) -> None:
    place = new_place(jobs_at_once=jobs_at_once)
    many = {place.order("many"): "many" for _ in range(6)}
    few = {place.order("few"): "few" for _ in range(2)}
    tenants, dispatcher = many | few, place.dispatcher()
    turns = []
    for _ in range(8):
        place.now += 1
        dispatcher.reconcile()
        for id, tenant in tenants.items():
            if name(id) in place.cluster.live:
                turns.append(tenant)
                place.finish(id, tenant)
    assert sorted(turns[:4]) == ["few", "few", "many", "many"]
    assert len(turns) == 8


def test_what_was_begun_goes_before_what_waits(new_place: Callable[..., Place]) -> None:
    place = new_place(jobs_at_once=1)
    first, dispatcher = place.order(), place.dispatcher()
    dispatcher.reconcile()
    second = place.order("other")
    place.cluster.end(name(first), exit_code=1)
    dispatcher.reconcile()
    assert place.cluster.live == [name(first, 2)]
    place.finish(first, attempt=2)
    dispatcher.reconcile()
    assert place.cluster.live == [name(second)]


def test_a_waiting_order_costs_nothing_at_each_look(
    new_place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = new_place(jobs_at_once=1)
    for _ in range(30):
        place.order()
    dispatcher = place.dispatcher()
    dispatcher.reconcile()
    looks: list[str] = []
    names = Store.names

    def noting(store: Store, folder: str = "", after: str = "", limit: int = 1000) -> Sequence[str]:
        looks.append(folder)
        return names(store, folder, after, limit)

    monkeypatch.setattr(Store, "names", noting)
    dispatcher.reconcile()
    assert len(looks) == 2  # the running order's folder and its submissions


def test_a_damaged_order_holds_up_no_other(new_place: Callable[..., Place], caplog: pytest.LogCaptureFixture) -> None:
    place = new_place(jobs_at_once=1)
    bad, good = place.order(), place.order()
    place.ledger.orders.store.write(f"acme/{bad}/order.json", b"{}")
    dispatcher = place.dispatcher()
    for _ in range(3):
        dispatcher._pass()
    assert place.cluster.live == [name(good)]


def test_an_order_whose_folder_holds_another_plan_fails(new_place: Callable[..., Place]) -> None:
    place = new_place()
    id = place.order()
    place.ledger.orders.store.write(f"acme/{id}/dataset/plan.json", b'{"kind": "dataset", "plan": "0000"}')
    place.dispatcher().reconcile()
    assert "another plan" in (place.ledger.find("acme", id).problem or "")


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("niceness", [0, 15])
def test_a_job_is_a_plain_command_without_a_secret(bare_generator: str, niceness: int, tmp_path: Path) -> None:
    settings: Service = service(str(tmp_path), bare_generator, niceness=niceness)
    assert settings.datasets is not None
    command = RayJobs(settings.datasets).entrypoint("s3://a bucket/it's.yaml")
    words = shlex.split(command)
    assert words[1:4] == ["exec", "nice", "-n"]
    assert words[4] == str(niceness)
    assert words[6:] == ["-m", "jobs.generate", "s3://a bucket/it's.yaml"]
    assert words[0] == f"PYTHONPATH={Path(__file__).parents[1]}${{PYTHONPATH:+:$PYTHONPATH}}"


def test_a_job_gets_the_services_code_and_nothing_else_of_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"working_dir": "gcs://code.zip", "env_vars": {"AWS_SECRET_ACCESS_KEY": "x"}, "pip": None, "config": {}}
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(runtime_env=own))
    assert _code() == {"working_dir": "gcs://code.zip"}
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    assert _code() is None


def test_why_a_job_failed_is_its_error_or_its_last_words() -> None:
    assert why("") == ""
    assert why("Job supervisor actor died") == "Job supervisor actor died"
    assert why("exit code 2, last available logs (x):\nerror: first\nmore\nerror: second\nbye") == "second"
    assert len(why("error: " + "x" * 5000)) == 600
