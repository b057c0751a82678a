"""API v1 over HTTP: what is asked for is what is made, and what cannot be made is refused by name."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PilImage

from scanloom.api import ImagesAnswer
from scanloom.artefact import open_artefact
from scanloom.attributes import Attributes
from scanloom.errors import (
    ArtefactError,
    BusyError,
    DeadlineError,
    DeadlineTooShort,
    QualityError,
    RecipeError,
    StoreError,
)
from scanloom.models.generator import load_generator
from scanloom.sampling.engine import Engine, ImageRequest
from scanloom.sampling.image_order import ImageOrder, MadeImages
from scanloom.sampling.production import quantise
from scanloom.shards.writer import png_pixels
from scanloom.store import Store
from serve.audit_log import AuditLog
from serve.config import Service
from serve.engines import UnavailableError
from serve.gateway import gateway
from serve.replica import Replica
from tests.served_images import Asked, applications, bearer, blank, listening, parts_of, problem, settings
from tests.tiny_generator import ENVELOPE, SIZE, publish_generator

WANTED = {"sex": "F", "age": 50, "view": "PA", "findings": ["Effusion"]}
QUICK = {"attributes": WANTED, "steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_generator(str(tmp_path_factory.mktemp("generator"))).uri


@pytest.fixture(scope="module")
def service(generator: str, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return settings(generator, str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="module")
def replica(service: Service) -> Iterator[Replica]:
    made = Replica(service)
    yield made
    made.drain(0.0)


@pytest.fixture(scope="module")
def ask(service: Service, replica: Replica) -> Iterator[Asked]:
    with applications(service) as opened:
        yield opened(replica.make)


@pytest.fixture
def asked_of(service: Service) -> Iterator[Any]:
    with applications(service) as opened:
        yield opened


def raising(error: Exception) -> Any:
    async def make(order: ImageOrder) -> MadeImages:
        raise error

    return make


# --- images ---------------------------------------------------------------------------------------------------


def test_the_images_of_a_request_are_those_that_an_engine_makes(ask: Asked, generator: str) -> None:
    answer = ask("POST", "/v1/images", json=QUICK | {"count": 3, "first_index": 5, "steps": 4, "bits_stored": 12})
    told = ImagesAnswer.model_validate_json(answer.content)
    known: Attributes = {"sex": "F", "age": 50.0, "view": "PA", "findings": ("Effusion",)}
    wanted = [ImageRequest(index, 7, known, 4, 2.0) for index in (5, 6, 7)]
    made = {m.request.index: quantise(m.image, 12) for m in Engine(load_generator(generator), 8).run(wanted)}
    assert [image.index for image in told.images] == [5, 6, 7]
    for image in told.images:
        assert np.array_equal(png_pixels(base64.b64decode(image.png)), made[image.index])
    assert dict(told.attributes) == {"sex": "F", "age": 50.0, "view": "PA", "findings": ["Effusion"]}
    assert (told.seed, told.steps, told.generator, told.gate) == (7, 4, "tiny", "ungated")
    assert told.generator_digest == open_artefact(generator).digest
    assert told.request == answer.headers["X-Request-ID"]


def test_a_curl_line_without_headers_leaves_a_picture_on_the_disk(ask: Asked) -> None:
    # curl calls a body of -d a form.
    headers = {"Accept": "image/png", "Content-Type": "application/x-www-form-urlencoded"}
    answer = ask("POST", "/v1/images", content=json.dumps(QUICK), headers=headers)
    assert answer.status_code == 200
    assert PilImage.open(io.BytesIO(answer.content)).size == (SIZE, SIZE)
    assert answer.headers["X-Seed"] == "7"


def test_an_image_of_another_size_is_made(ask: Asked) -> None:
    answer = ask("POST", "/v1/images", json=QUICK | {"size_px": [24, 32]})
    [image] = ImagesAnswer.model_validate_json(answer.content).images
    assert (image.height, image.width) == (24, 32)


def test_without_a_seed_images_differ_and_a_retry_with_its_key_gives_the_same(ask: Asked) -> None:
    def asked(holder: str = "lab", **headers: str) -> ImagesAnswer:
        answer = ask("POST", "/v1/images", json={"steps": 2}, headers=bearer(holder) | headers)
        return ImagesAnswer.model_validate_json(answer.content)

    drawn, again = asked(), asked()
    assert drawn.seed != again.seed
    first, retry = asked(**{"Idempotency-Key": "k-1"}), asked(**{"Idempotency-Key": "k-1"})
    assert first.seed == retry.seed
    assert first.images == retry.images
    assert asked("rival", **{"Idempotency-Key": "k-1"}).seed != first.seed


def test_an_image_keeps_its_id_and_another_has_another(ask: Asked) -> None:
    def ids(**changes: Any) -> list[str]:
        answer = ask("POST", "/v1/images", json=QUICK | changes)
        return [image.id for image in ImagesAnswer.model_validate_json(answer.content).images]

    [first, second] = ids(count=2)
    assert ids() == [first]
    assert ids(first_index=1) == [second]
    others = [
        ids(seed=8), ids(steps=3), ids(guidance_scale=3.0), ids(bits_stored=12), ids(size_px=[32, 32]),
        ids(attributes=WANTED | {"sex": "M"}),
    ]  # fmt: skip
    assert len({first, second, *(image for made in others for image in made)}) == 8


@pytest.mark.parametrize(
    "change, field, words",
    [
        ({"stpes": 3}, "stpes", "did you mean 'steps'"),
        ({"dicom": {"hu_rang": 1}}, "dicom.hu_rang", "did you mean 'hu_range'"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"count": 17}, "count", "over the 16 images"),
        ({"count": "many"}, "count", "integer"),
        ({"generator": "tinny"}, "generator", "did you mean 'tiny'"),
        ({"generator": "../../etc/passwd"}, "generator", "pattern"),
        ({"attributes": {"sexx": "F"}}, "attributes.sexx", "did you mean 'sex'"),
        ({"attributes": {"sex": "X"}}, "attributes.sex", "known: F, M"),
        ({"attributes": {"findings": "Nodule"}}, "attributes.findings", "list of labels"),
        ({"attributes": {"age": True}}, "attributes.age", "expected a number"),
        ({"attributes": {"age": 10**400}}, "attributes.age", "beyond all that a field holds"),
        ({"attributes": {"sex": "F\0"}}, "attributes.sex", "did you mean 'F'"),
        ({"attributes": {"sex": "F" * 5000}}, "attributes.sex", "a text of 5000 characters"),
        ({"size_px": [17, 16]}, "size_px", "multiples of 2"),
        ({"size_px": [4096, 4096]}, "size_px", "32 x 32 px at most"),
        ({"deadline_s": 301}, "deadline_s", "over the 300 s"),
        ({"first_index": 2**32 - 1, "count": 2}, "first_index", "below"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"dicom": {"content_date": "20259999"}}, "dicom.content_date", "no date"),
    ],
)
def test_what_is_wrong_in_a_request_is_named_by_its_field(
    ask: Asked, change: dict[str, Any], field: str, words: str
) -> None:
    told = problem(ask("POST", "/v1/images", json=QUICK | change), 422, "invalid")
    assert [fault.field for fault in told.errors] == [field]
    assert words in told.errors[0].message
    assert words in told.detail


def test_a_number_beyond_floating_point_is_refused_where_it_stands(ask: Asked) -> None:
    body = b'{"attributes": {"sex": "F", "findings": ["Effusion", -1e999]}}'
    told = problem(ask("POST", "/v1/images", content=body), 422, "invalid")
    assert [fault.field for fault in told.errors] == ["attributes.findings.1"]


def test_all_wrong_attributes_are_told_at_once_with_what_was_trained_on(ask: Asked) -> None:
    wrong = {"sex": "X", "age": 5, "view": "AP", "findings": ["Nodule", "Effusion"]}
    told = problem(ask("POST", "/v1/images", json={"attributes": wrong}), 422, "invalid")
    assert {fault.field for fault in told.errors} == {f"attributes.{name}" for name in wrong}
    assert told.envelope == ENVELOPE.model_dump(mode="json")


@pytest.mark.parametrize(
    "wrong",
    [{f"sex{number:06d}": "F" for number in range(45_000)}, {"findings": [f"Nodule{n:06d}" for n in range(45_000)]}],
    ids=["names", "labels"],
)
def test_a_body_full_of_faults_costs_no_more_than_the_few_that_are_told(ask: Asked, wrong: dict[str, Any]) -> None:
    def cost(body: dict[str, Any]) -> float:
        started = time.process_time()
        told = problem(ask("POST", "/v1/images", json=body), 422, "invalid")
        assert 1 <= len(told.errors) <= 8
        return time.process_time() - started

    # After which the engine, whose time would count, too, has nothing to do.
    assert ask("POST", "/v1/images", json=QUICK).status_code == 200
    # Refused before its attributes are looked at. Searched for what each may have meant, they take 17 times as long.
    unread = [cost({"generator": "nobody", "attributes": wrong}) for _ in range(3)]
    assert min(cost({"attributes": wrong}) for _ in range(3)) < 5 * min(unread)


def test_what_was_not_trained_on_is_told_with_the_envelope(ask: Asked) -> None:
    told = problem(ask("POST", "/v1/images", json={"attributes": {"age": 20.5}}), 422, "outside-envelope")
    assert told.errors[0].field == "attributes.age"
    assert "trained on 21 to 88" in told.detail
    assert told.envelope == ENVELOPE.model_dump(mode="json")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b"nope", b'{"attributes": {"age": NaN}}', b'{"guidance_scale": -Infinity}',
        b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"attributes": {"sex": "\\ud800"}}',
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b'{"attributes": {"sex": "\xed\xa0\x80"}}', b'{"steps": 01}', b"{'steps': 1}", b'{"steps": 1} {"steps": 1}',
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_what_is_no_json_is_a_bad_request(ask: Asked, body: bytes) -> None:
    assert "not JSON" in problem(ask("POST", "/v1/images", content=body), 400, "bad-request").detail


@pytest.mark.parametrize("body", [b"[]", b"null", b"7", b'"x"', b"[[[[]]]]"])
def test_json_that_is_no_object_is_invalid(ask: Asked, body: bytes) -> None:
    assert "object" in problem(ask("POST", "/v1/images", content=body), 422, "invalid").detail


def test_a_body_of_too_many_values_is_refused_before_they_are_looked_at(ask: Asked) -> None:
    many = b'{"attributes": {"findings": [' + b"0," * 200_000 + b"0]}}"
    assert "more than 50000 values" in problem(ask("POST", "/v1/images", content=many), 422, "invalid").detail


@pytest.mark.parametrize(
    "accept, media_type",
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("text/html, application/json;q=0.5", "application/json"),
        ("image/*", "image/png"),
        ("application/json;q=0.2, image/png", "image/png"),
        ("application/dicom", "application/dicom"),
        ('multipart/related; type="application/dicom"; transfer-syntax=*', "multipart/related"),
        ("multipart/related;type=application/dicom;transfer-syntax=1.2.840.10008.1.2.1", "multipart/related"),
        ("application/vnd.apache.parquet", "application/vnd.apache.parquet"),
    ],
)
def test_the_answer_comes_in_the_format_that_is_liked_best(ask: Asked, accept: str | None, media_type: str) -> None:
    headers = {} if accept is None else {"Accept": accept}
    answer = ask("POST", "/v1/images", json=QUICK, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].partition(";")[0] == media_type


@pytest.mark.parametrize(
    "accept, count",
    [
        ("text/html", 1),
        ("image/png", 2),
        ("application/dicom", 2),
        ('multipart/related; type="image/jpeg"', 1),
        ("multipart/related; type=application/dicom; transfer-syntax=1.2.840.10008.1.2.4.50", 1),
        ("application/json;q=0", 1),
        (";;;", 1),
    ],
)
def test_a_format_that_there_is_not_is_refused_before_images_are_made(asked_of: Any, accept: str, count: int) -> None:
    ask = asked_of(raising(AssertionError("images were made")))
    answer = ask("POST", "/v1/images", json={"count": count}, headers={"Accept": accept})
    assert "application/json" in problem(answer, 406, "unacceptable").detail


def test_what_dicom_cannot_hold_is_refused_before_images_are_made(asked_of: Any) -> None:
    ask = asked_of(raising(AssertionError("images were made")))
    answer = ask("POST", "/v1/images", json={"dicom": {"sop_class": "CT"}}, headers={"Accept": "application/dicom"})
    told = problem(answer, 422, "invalid")
    assert told.errors[0].field == "dicom"
    assert "12 or 16 bits" in told.detail


@pytest.mark.parametrize(
    "error, status, kind, retry",
    [
        (BusyError("full", 2.2), 429, "busy", "3"),
        (DeadlineError("late", 0.4), 503, "deadline", "1"),
        (UnavailableError("gone", 5.0), 503, "unavailable", "5"),
        (DeadlineTooShort("takes 9 s"), 422, "invalid", None),
        (QualityError("no attempt of 8 passed"), 422, "invalid", None),
        (RecipeError("tiny: cannot make latents of 4x7x7"), 422, "invalid", None),
        (StoreError("s3://secret-bucket/x: refused"), 503, "store-unavailable", "5"),
        (ArtefactError("s3://secret-bucket/x: damaged"), 500, "internal", None),
        (ValueError("patient 4711"), 500, "internal", None),
    ],
)
def test_each_failure_of_the_engines_has_its_problem(
    asked_of: Any, caplog: pytest.LogCaptureFixture, error: Exception, status: int, kind: str, retry: str | None
) -> None:
    answer = asked_of(raising(error))("POST", "/v1/images", json={})
    told = problem(answer, status, kind)
    assert answer.headers.get("Retry-After") == retry
    hidden = kind in ("internal", "store-unavailable")
    assert (str(error) in answer.text) is not hidden
    if hidden:
        [line] = [r for r in caplog.records if r.name == "scanloom.serve" and told.instance in r.getMessage()]
        assert line.exc_info is not None
        assert "secret" not in answer.text
        assert "4711" not in answer.text
        assert "Traceback" not in answer.text


def test_an_order_that_outlives_its_deadline_is_given_up_and_told(
    asked_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = threading.Event()

    async def never(order: ImageOrder) -> MadeImages:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    monkeypatch.setattr("serve.images._LATE_S", 0.0)
    answer = asked_of(never)("POST", "/v1/images", json={"deadline_s": 0.05})
    problem(answer, 503, "deadline")
    assert answer.headers["Retry-After"] == "1"
    assert cancelled.wait(10.0)


def test_an_answer_names_the_generator_that_made_it_though_the_gateway_knows_another(asked_of: Any) -> None:
    # What is published anew at the same place is loaded by the next engine that starts.
    for accept in ("image/png", "application/dicom", "application/json"):
        answer = asked_of(blank)("POST", "/v1/images", json={}, headers={"Accept": accept})
        assert answer.headers["X-Generator-Digest"] == "0" * 64


def test_the_audit_log_is_written_when_the_service_stops(service: Service, tmp_path: Path) -> None:
    app = gateway(parts_of(service, blank, audit=AuditLog(Store(str(tmp_path)))))

    async def live() -> None:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                await client.post("/v1/images", json={"seed": 4711}, headers=bearer("lab"))

    asyncio.run(live())
    [line] = [json.loads(file.read_text()) for file in tmp_path.rglob("*") if file.is_file()]
    assert (line["seed"], line["outcome"], line["generator_digest"]) == (4711, "done", "0" * 64)


def test_an_order_says_when_it_was_asked_and_is_due(asked_of: Any) -> None:
    orders: list[ImageOrder] = []

    async def note(order: ImageOrder) -> MadeImages:
        orders.append(order)
        return await blank(order)

    ask = asked_of(note)
    before = time.time()
    for told in ({}, {"deadline_s": 7.5}):
        assert ask("POST", "/v1/images", json=told).status_code == 200
    assert before <= (orders[0].asked or 0) <= time.time()
    assert [round(order.due - (order.asked or 0), 3) for order in orders] == [60.0, 7.5]


# --- who leaves, and who asks too much ------------------------------------------------------------------------


class Waiting:
    """Makes no image until it is told to, and counts what it is asked for and who gave up."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun, self.cancelled = threading.Semaphore(0), threading.Semaphore(0)

    async def make(self, order: ImageOrder) -> MadeImages:
        self.begun.release()
        try:
            await asyncio.to_thread(self.go.wait, 30.0)
        except asyncio.CancelledError:
            self.cancelled.release()
            raise
        return await blank(order)


def test_who_hangs_up_has_its_order_cancelled_and_its_quota_back(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = Waiting()
    limited = service.model_copy(update={"everyone": service.everyone.model_copy(update={"images_at_once": 4})})
    with (
        caplog.at_level(logging.INFO, "scanloom.access"),
        listening(gateway(parts_of(limited, waiting.make))) as (host, port),
        httpx.Client(base_url=f"http://{host}:{port}", headers=bearer("lab"), timeout=30.0) as client,
    ):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/images", json={"count": 4}, timeout=httpx.Timeout(30.0, read=0.3))
        assert waiting.begun.acquire(timeout=10.0)
        # Nobody makes images: only the hang-up can have ended it.
        assert waiting.cancelled.acquire(timeout=10.0)
        waiting.go.set()
        assert client.post("/v1/images", json={"count": 4}).status_code == 200
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "scanloom.access"]
    assert [line["status"] for line in lines] == [499, 200]


def test_a_tenant_that_has_its_images_at_once_waits_and_others_do_not(asked_of: Any, service: Service) -> None:
    waiting = Waiting()
    everyone = service.everyone.model_copy(update={"images_at_once": 4})
    ask = asked_of(waiting.make, service=service.model_copy(update={"everyone": everyone}))
    first = ask.begin("POST", "/v1/images", json={"count": 3})
    assert waiting.begun.acquire(timeout=10.0)
    refused = ask("POST", "/v1/images", json={"count": 2})
    problem(refused, 429, "quota")
    assert int(refused.headers["Retry-After"]) >= 1
    problem(ask("POST", "/v1/images", json={"count": 5}), 422, "invalid")
    others = ask.begin("POST", "/v1/images", json={"count": 4}, headers=bearer("rival"))
    assert waiting.begun.acquire(timeout=10.0)
    waiting.go.set()
    wait([first, others], 30.0)
    assert [first.result().status_code, others.result().status_code] == [200, 200]
    assert ask("POST", "/v1/images", json={"count": 4}).status_code == 200


# --- generators, state, document ------------------------------------------------------------------------------


def test_generators_are_told_with_their_attributes_envelope_and_card(ask: Asked, generator: str) -> None:
    told = ask("GET", "/v1/generators/tiny").json()
    assert ask("GET", "/v1/generators").json() == {"generators": [told]}
    assert told["envelope"] == ENVELOPE.model_dump(mode="json")
    assert told["attributes"][1] == {"name": "age", "kind": "number", "unit": "years", "minimum": 0.0, "maximum": 120.0}
    assert told["attributes"][0] == {"name": "sex", "kind": "category", "values": ["F", "M"]}
    assert (told["width"], told["height"], told["digest"]) == (SIZE, SIZE, open_artefact(generator).digest)
    assert "did you mean 'tiny'" in problem(ask("GET", "/v1/generators/tinny"), 404, "not-found").detail


def test_the_embedded_generator_shows_its_model_card(asked_of: Any) -> None:
    told = asked_of(blank, service=settings("embedded://base"))("GET", "/v1/generators/tiny").json()
    assert told["card"].startswith("# ")


def test_it_is_ready_when_an_engine_is(asked_of: Any) -> None:
    state = {"ready": False}

    async def ready() -> bool:
        return state["ready"]

    ask = asked_of(blank, ready=ready)
    problem(ask("GET", "/readyz"), 503, "unavailable")
    assert ask("GET", "/healthz").json() == {"status": "ok"}
    assert (ask("HEAD", "/healthz").status_code, ask("HEAD", "/readyz").status_code) == (200, 503)
    state["ready"] = True
    assert ask("GET", "/readyz").json() == {"status": "ready"}


def test_every_address_and_method_that_there_is_not_is_a_problem(ask: Asked) -> None:
    problem(ask("GET", "/v1/nothing"), 404, "not-found")
    problem(ask("GET", "/v1/images/"), 404, "not-found")
    told = ask("PUT", "/v1/datasets")
    problem(told, 405, "not-allowed")
    assert told.headers["Allow"] == "GET, POST"


def test_the_examples_of_the_document_work(ask: Asked) -> None:
    document = ask("GET", "/openapi.json").json()
    tried = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            for example in content.get("examples", {}).values():
                answer = ask(method.upper(), path, json=example["value"])
                assert answer.status_code in (200, 202), answer.text
                tried += 1
    assert tried >= 6


def test_an_id_that_was_sent_is_kept_and_one_that_could_harm_a_log_is_not(ask: Asked) -> None:
    assert ask("GET", "/healthz", headers={"X-Request-ID": "abc-1.2_X"}).headers["X-Request-ID"] == "abc-1.2_X"
    for bad in ("a b", "x" * 65, "é", '"}', ""):
        made = ask("GET", "/healthz", headers={"X-Request-ID": bad.encode("latin-1")}).headers["X-Request-ID"]
        assert made != bad
        assert len(made) == 16
