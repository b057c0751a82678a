"""Orders of datasets: what is accepted is what is made, told to its tenant alone, wherever it stands."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from scanloom.api import DatasetRequest
from scanloom.artefact import open_artefact
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import ArtefactError, RecipeError, ScanloomError, StoreError
from scanloom.progress import Meter
from scanloom.sampling.plan import specify
from scanloom.shards.commit import claimed_plan
from scanloom.store import Store
from scanloom.stored_recipe import recipe_at
from serve.config import Service
from serve.ledger import Conflict, Ledger, NotFound
from serve.orders import ID, Attempt, Orders, Ticket, new_id
from tests.fault_proxy import FaultProxy
from tests.served_datasets import REQUEST, finish, ledgers, service


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def settings(request: pytest.FixtureRequest, tmp_path: Path, bare_generator: str) -> Service:
    store = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("store_uri")
    return service(store, bare_generator)


@pytest.fixture
def ledger(settings: Service) -> Ledger:
    return Ledger(settings)


@pytest.fixture
def folder_ledger(tmp_path: Path, bare_generator: str) -> Iterator[Ledger]:
    return ledgers(tmp_path, bare_generator)


# --- an order -------------------------------------------------------------------------------------------------


def test_an_accepted_order_says_all_that_is_made_of_it(ledger: Ledger, bare_generator: str) -> None:
    job, new = ledger.place("acme", REQUEST, "request-1")
    assert new
    assert (job.state, job.images, job.seed, job.generator, job.request) == ("accepted", 10, 7, "tiny", "request-1")
    assert job.generator_digest == open_artefact(bare_generator).digest
    assert job.progress.images_total == 10
    assert job.progress.images_done == 0
    assert ledger.find("acme", job.id) == ledger.find(None, job.id) == job
    folder = ledger.orders.store.at(f"acme/{job.id}")
    recipe = recipe_at(folder.uri_of("recipe.yaml"))
    assert recipe.generate is not None
    assert recipe.generator_uri == bare_generator
    assert recipe.uri(recipe.generate.dataset) == folder.uri_of("dataset")
    assert recipe.generate.order == "request-1"
    known = open_artefact(bare_generator)
    spec = specify(recipe.generate, "tiny", known.digest, known.manifest.statistics)
    assert spec.digest == job.plan == claimed_plan(folder.at("dataset"))
    assert (spec.steps, spec.seed, spec.images, spec.images_per_shard) == (2, 7, 10, 4)


def test_another_tenant_finds_nothing(ledger: Ledger) -> None:
    job, _ = ledger.place("acme", REQUEST, "r")
    methods: list[Callable[[str, str], Any]] = [
        ledger.find, ledger.cancel, ledger.result, lambda t, id: ledger.file(t, id, "manifest.json")
    ]  # fmt: skip
    for method in methods:
        for tenant, id in (("other", job.id), ("acme", new_id()), ("acme", "../" + job.id), ("acme", "order.json")):
            with pytest.raises(NotFound):
                method(tenant, id)
    assert ledger.jobs("other", 10).datasets == []
    assert ledger.open_jobs("other") == 0


@pytest.mark.parametrize("tenant", ["", ".", "..", "../x", "a/b", "_open", "_keys", "-x", "x" * 65, "a b", "ä"])
def test_a_name_that_could_leave_a_tenants_folder_is_refused(folder_ledger: Any, tenant: str) -> None:
    ledger = next(folder_ledger)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: ledger.place(tenant, REQUEST, "r"), lambda: ledger.find(tenant, new_id()),
        lambda: ledger.jobs(tenant, 5), lambda: ledger.open_jobs(tenant), lambda: ledger.ordered(tenant, "k"),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(RecipeError, match="tenant's name"):
            call()
    assert ledger.orders.store.list() == []


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (
            {"cohort": {"kind": "cells", "cells": [{"age": 95}]}},
            ArtefactError,
            "age=95 is outside the trained envelope",
        ),
        ({"cohort": {"kind": "cells", "cells": [{"view": "AP"}]}}, ArtefactError, "view='AP' is outside"),
        ({"cohort": {"kind": "cells", "cells": [{"sexx": "F"}]}}, RecipeError, "no attribute 'sexx'"),
        ({"cohort": {"kind": "marginals", "marginals": {"sex": {"F": 0}}}}, RecipeError, "sum to 0"),
        ({"generator": "tinny"}, RecipeError, "did you mean 'tiny'"),
        ({"dicom": {"sop_class": "CT"}}, RecipeError, "CT images hold 12 or 16 bits"),
        ({"images": 2_000_001}, RecipeError, "images: 2000000 at most"),
        ({"cohort": {"kind": "cells", "cells": [{"sex": "F"}] * 2001}}, RecipeError, "2001 cells"),
        (
            {"cohort": {"kind": "marginals", "marginals": {n: {str(v): 1 for v in range(45)} for n in ("age", "sex")}}},
            RecipeError,
            "2025 cells or combinations",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(
    folder_ledger: Any, change: dict[str, Any], error: type[Exception], told: str
) -> None:
    ledger = next(folder_ledger)
    request = DatasetRequest.model_validate(REQUEST.model_dump(mode="json") | change)
    with pytest.raises(error, match=told):
        ledger.place("acme", request, "r", "key")
    assert ledger.orders.store.list() == []


def test_a_generator_that_is_gone_is_no_fault_of_the_request(tmp_path: Path) -> None:
    ledger = Ledger(service(str(tmp_path / "store"), str(tmp_path / "nowhere")))
    with pytest.raises(ScanloomError, match="generator tiny cannot be used now") as caught:
        ledger.place("acme", REQUEST, "r")
    assert not isinstance(caught.value, (ArtefactError, RecipeError))


@given(
    share=st.floats(1e-9, 1e9), age=st.floats(22, 87), guidance=st.floats(1, 30), seed=st.integers(0, 2**63 - 1),
    images=st.integers(1, 2_000_000),
)  # fmt: skip
@examples(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_recipe_in_the_store_is_of_the_plan_that_was_accepted(
    folder_ledger: Any, bare_generator: str, share: float, age: float, guidance: float, seed: int, images: int
) -> None:
    ledger = next(folder_ledger)
    cells = [{"sex": "F", "share": share}, {"age": [21, age], "share": 1}]
    request = DatasetRequest.model_validate(
        {"images": images, "seed": seed, "guidance_scale": guidance, "cohort": {"kind": "cells", "cells": cells}}
    )
    job, _ = ledger.place("acme", request, "r")
    recipe = recipe_at(str(Path(ledger.orders.store.uri) / "acme" / job.id / "recipe.yaml"))
    assert recipe.generate is not None
    known = open_artefact(bare_generator)
    assert specify(recipe.generate, "tiny", known.digest, known.manifest.statistics).digest == job.plan


# --- lists ----------------------------------------------------------------------------------------------------


def test_ids_of_later_orders_come_first() -> None:
    ids = [new_id(milliseconds) for milliseconds in (0, 1, 1_700_000_000_000, 1_700_000_000_001, 4_000_000_000_000)]
    assert ids == sorted(ids, reverse=True)
    assert all(ID.fullmatch(id) for id in ids)
    assert len({new_id(5) for _ in range(1000)}) == 1000


def test_lists_are_newest_first_page_by_page_and_of_one_tenant_or_all(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(range(1_700_000_000_000, 1_700_000_000_100))
    monkeypatch.setattr("serve.ledger.new_id", lambda: new_id(next(moments)))
    placed = [(tenant, ledger.place(tenant, REQUEST, f"r-{n}")[0].id) for n, tenant in enumerate("abbabcabab")]
    newest = [id for _, id in reversed(placed)]
    assert [job.id for job in ledger.jobs(None, 50).datasets] == newest
    assert [job.id for job in ledger.jobs("a", 50).datasets] == [id for t, id in reversed(placed) if t == "a"]
    found: list[str] = []
    after: str | None = None
    while True:
        page = ledger.jobs(None, 3, after)
        found += [job.id for job in page.datasets]
        assert len(page.datasets) == 3 or page.next is None
        if (after := page.next) is None:
            break
    assert found == newest
    with pytest.raises(NotFound):
        ledger.jobs("a", 3, "../b")


@pytest.mark.slow
@pytest.mark.s3
def test_a_page_of_thousands_costs_what_a_page_of_few_does(s3: EmbeddedS3, store_uri: str, bare_generator: str) -> None:
    ledger = Ledger(service(store_uri, bare_generator))
    job, _ = ledger.place("acme", REQUEST, "r")
    template = ledger.orders.read(Ticket("acme", job.id))
    assert template is not None
    ids = [new_id(1_600_000_000_000 + n) for n in range(3000)]

    def copy(id: str) -> None:
        text = template.model_copy(update={"id": id}).model_dump_json().encode()
        ledger.orders.store.write(f"acme/{id}/order.json", text)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(copy, ids))
    with FaultProxy(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        page = ledger.jobs("acme", 20)
        first = len(proxy.requests)
        older = ledger.jobs("acme", 20, page.next)
        assert [j.id for j in page.datasets] == [job.id, *sorted(ids)[:19]]
        assert [j.id for j in older.datasets] == sorted(ids)[19:39]
        assert first <= 1 + 4 * 20  # a list; of each order itself, its folder, its manifest and its progress
        assert len(proxy.requests) <= 2 * first


def test_orders_that_have_not_ended_are_counted(ledger: Ledger, settings: Service) -> None:
    ids = [ledger.place("acme", REQUEST, f"r-{n}")[0].id for n in range(3)]
    assert ledger.open_jobs("acme") == 3
    finish(settings, "acme", ids[0])
    ledger.cancel("acme", ids[1])
    assert ledger.open_jobs("acme") == 1


# --- where it stands ------------------------------------------------------------------------------------------


def test_a_state_follows_from_what_is_there(ledger: Ledger, settings: Service) -> None:
    job, _ = ledger.place("acme", REQUEST, "r")
    ticket = Ticket("acme", job.id)
    assert ledger.orders.begin_attempt(ticket, Attempt(1, 0))
    assert ledger.find("acme", job.id).state == "running"
    meter = Meter(job.plan, 10, None)
    meter.count(6, 5, {"blank": 2}, 1.0)
    report = meter.read()
    ledger.orders.store.write(f"acme/{job.id}/dataset/progress.json", report.model_dump_json().encode())
    told = ledger.find("acme", job.id).progress
    assert (told.images_done, told.images_total, told.rejects) == (6, 10, {"blank": 2})
    assert told.images_per_s == pytest.approx(report.images_per_s)
    stale = report.model_copy(update={"updated": "2020-01-01T00:00:00+00:00"})
    ledger.orders.store.write(f"acme/{job.id}/dataset/progress.json", stale.model_dump_json().encode())
    assert ledger.find("acme", job.id).progress.images_per_s is None
    finish(settings, "acme", job.id)
    finished = ledger.find("acme", job.id)
    assert (finished.state, finished.progress.images_done, finished.progress.eta_s) == ("finished", 10, None)


def test_a_failed_order_says_why(ledger: Ledger) -> None:
    job, _ = ledger.place("acme", REQUEST, "r")
    ledger.orders.failed(Ticket("acme", job.id), "the generator has no weights")
    assert ledger.find("acme", job.id).problem == "the generator has no weights"
    assert ledger.find("acme", job.id).state == "failed"
    with pytest.raises(Conflict, match="has failed"):
        ledger.cancel("acme", job.id)


def test_an_order_that_nobody_works_on_is_cancelled_at_once_and_another_when_its_job_is_stopped(
    ledger: Ledger, settings: Service
) -> None:
    waiting, running, ended = (ledger.place("acme", REQUEST, f"r-{n}")[0].id for n in range(3))
    assert ledger.cancel("acme", waiting).state == "cancelled"
    assert ledger.cancel("acme", waiting).state == "cancelled"
    ledger.orders.begin_attempt(Ticket("acme", running), Attempt(1, 0))
    assert ledger.cancel("acme", running).state == "running"
    assert ledger.cancel(None, running).state == "running"
    ledger.orders.cancelled(Ticket("acme", running))
    assert ledger.find("acme", running).state == "cancelled"
    finish(settings, "acme", ended)
    with pytest.raises(Conflict, match="has finished"):
        ledger.cancel("acme", ended)


# --- results --------------------------------------------------------------------------------------------------


def test_a_result_names_every_file_with_a_url_that_reads_it(ledger: Ledger, settings: Service) -> None:
    job, _ = ledger.place("acme", REQUEST, "r")
    with pytest.raises(Conflict, match="is accepted"):
        ledger.result("acme", job.id)
    content = {"images/shard-000000-0a1b2c3d4e5f.parquet": bytes(range(256)) * 9000, "dicom/empty.tar": b""}
    dataset = finish(settings, "acme", job.id, content)
    result = ledger.result("acme", job.id)
    assert (result.digest, result.rows, result.gate) == (dataset.digest, 10, "ungated")
    assert result.files[0].path == "manifest.json"
    assert {f.path for f in result.files[1:]} == set(content)
    for file in result.files:
        if ledger.orders.store.is_local:
            assert file.url == f"/v1/datasets/{job.id}/files/{file.path}"
            data = b"".join(ledger.file("acme", job.id, file.path).pieces(0, file.bytes))
        else:
            data = urllib.request.urlopen(file.url, timeout=30).read()
            assert data == b"".join(ledger.file(None, job.id, file.path).pieces(0, file.bytes))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)


@pytest.mark.parametrize(
    "path", ["order.json", "../order.json", "../../other/x", "/etc/passwd", "", ".", "progress.json", "images/", "a//b"]
)
def test_no_file_but_the_manifests_can_be_had(ledger: Ledger, settings: Service, path: str) -> None:
    job, _ = ledger.place("acme", REQUEST, "r")
    finish(settings, "acme", job.id)
    ledger.orders.store.write(f"acme/{job.id}/dataset/progress.json", b"{}")
    with pytest.raises(NotFound, match="has no file"):
        ledger.file("acme", job.id, path)


# --- a store that fails ---------------------------------------------------------------------------------------


@pytest.mark.s3
def test_a_store_that_is_down_is_a_retryable_error_and_nothing_is_lost(
    s3: EmbeddedS3, store_uri: str, bare_generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: threading.Event().wait(0.001))  # botocore's pauses
    ledger = Ledger(service(store_uri, bare_generator))
    before, _ = ledger.place("acme", REQUEST, "r", "key")
    with FaultProxy(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.inject("503", times=-1)
        for call in (
            lambda: ledger.place("acme", REQUEST, "r", "key-2"), lambda: ledger.find("acme", before.id),
            lambda: ledger.jobs("acme", 5), lambda: ledger.cancel("acme", before.id),
        ):  # fmt: skip
            with pytest.raises(StoreError) as caught:
                call()
            assert caught.value.retryable
        proxy.heal()
        assert ledger.place("acme", REQUEST, "r", "key-2")[1]
        assert ledger.find("acme", before.id) == before
    assert len(ledger.jobs("acme", 9).datasets) == 2


def test_a_damaged_order_is_named_and_hides_no_other(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    job, other = (ledger.place("acme", REQUEST, "r")[0] for _ in range(2))
    ledger.orders.store.write(f"acme/{job.id}/order.json", json.dumps({"id": job.id}).encode())
    with pytest.raises(ArtefactError, match=f"acme/{job.id}/order.json: is no order"):
        ledger.find("acme", job.id)
    assert [j.id for j in ledger.jobs("acme", 5).datasets] == [other.id]
    assert f"acme/{job.id}/order.json" in caplog.text


def test_a_service_without_a_place_for_datasets_has_no_ledger(bare_generator: str) -> None:
    settings = Service.model_validate({"generators": [{"name": "tiny", "uri": bare_generator}]})
    with pytest.raises(RecipeError, match="say where datasets are to be kept"):
        Ledger(settings)


def test_orders_are_named_by_their_places(tmp_path: Path) -> None:
    orders = Orders(Store(str(tmp_path)))
    assert orders.open() == []
    assert orders.tenants() == []
    assert orders.standing(Ticket("acme", new_id())) is None
