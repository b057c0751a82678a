"""The service as it runs: Ray Serve on loopback, real HTTP, a tiny generator."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.parser import BytesParser
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from scanloom.models.generator import load_generator
from scanloom.sampling.engine import Engine, ImageRequest
from scanloom.sampling.production import fix_arithmetic, quantise
from tests.running_service import RunningService, config, wait_until, written
from tests.tiny_generator import SCHEMA, SIZE, publish_generator

ATTRIBUTES = {"sex": "F", "age": 60, "view": "PA", "findings": ["Effusion"]}
ASKED = {"attributes": ATTRIBUTES, "seed": 7, "steps": 4, "count": 2}
LONG = {"attributes": ATTRIBUTES, "seed": 1, "steps": 1000, "count": 4, "deadline_s": 250}
"""Half a minute of one engine: three of them are accepted on a host that is half as fast, too."""
# Untrained, so that its images are what they are.
LENIENT = {"least_contrast": 0.0, "most_white": 1.0, "most_black": 1.0}


def settings(generator: str, **more: Any) -> dict[str, Any]:
    """One small engine that is soon full."""
    replicas = {"slots": 4, "requests": 3, "queued": 4, "upscale_delay_s": 1, "drain_s": 20}
    served = [{"name": "tiny", "uri": generator, "quality": LENIENT}]
    return {"generators": served, "replicas": replicas, "limits": {"longest_deadline_s": 300}} | more


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_generator(str(tmp_path_factory.mktemp("store") / "generator")).uri


@pytest.fixture(scope="module")
def service(generator: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("service")
    with RunningService(folder, written(folder, config(settings(generator)))) as running:
        yield running


@pytest.fixture
def client(service: RunningService) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


def images(client: httpx.Client, accept: str = "application/json", **changes: Any) -> httpx.Response:
    return client.post("/v1/images", json=ASKED | changes, headers={"Accept": accept})


def pixels_of(answer: httpx.Response) -> NDArray[Any]:
    """[N, H, W] of an answer in JSON."""
    found = [Image.open(io.BytesIO(base64.b64decode(image["png"]))) for image in answer.json()["images"]]
    return np.stack([np.asarray(image) for image in found])


def require_problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The body of a refusal."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    problem: dict[str, Any] = answer.json()
    assert problem["type"] == f"urn:scanloom:problem:{kind}"
    assert problem["instance"] == answer.headers["X-Request-ID"]
    return problem


def test_a_service_that_has_started_is_ready_and_says_what_it_serves(client: httpx.Client) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200
    [told] = client.get("/v1/generators").json()["generators"]
    assert (told["name"], told["width"], told["height"]) == ("tiny", SIZE, SIZE)


def test_every_format_holds_the_same_images(client: httpx.Client) -> None:
    expected = pixels_of(images(client))
    assert expected.shape == (2, SIZE, SIZE)
    alone = images(client, "image/png", count=1)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(alone.content))), expected[0])
    table = pq.read_table(io.BytesIO(images(client, "application/vnd.apache.parquet").content))
    stored = [Image.open(io.BytesIO(row["bytes"])) for row in table.column("image").to_pylist()]
    assert np.array_equal(np.stack([np.asarray(image) for image in stored]), expected)
    several = images(client, 'multipart/related; type="application/dicom"')
    head = f"Content-Type: {several.headers['Content-Type']}\r\n\r\n".encode()
    parts: Any = BytesParser().parsebytes(head + several.content).get_payload()
    instances = [pydicom.dcmread(io.BytesIO(part.get_payload(decode=True))) for part in parts]
    assert np.array_equal(np.stack([instance.pixel_array for instance in instances]), expected)


def test_an_image_is_the_one_that_the_engine_makes_alone(client: httpx.Client, generator: str) -> None:
    fix_arithmetic(1)
    wanted = [ImageRequest(index, 7, SCHEMA.check(ATTRIBUTES), 4, 2.0) for index in range(2)]
    made = {done.request.index: done.image for done in Engine(load_generator(generator, "cpu"), slots=4).run(wanted)}
    found = pixels_of(images(client)).astype(int)
    assert abs(found - np.stack([quantise(made[index], 8) for index in range(2)])).max() <= 1


def test_without_a_key_nothing_is_told(service: RunningService, client: httpx.Client) -> None:
    for path in ("/v1/generators", "/metrics"):
        require_problem(client.get(path, headers={"Authorization": ""}), 401, "unauthenticated")
    assert "Bearer" in client.get("/metrics", headers={"Authorization": "Bearer wrong"}).headers["WWW-Authenticate"]


class Visitor:
    """A client that asks for what takes long, and leaves without the answer at the end of the block."""

    def __init__(self, service: RunningService) -> None:
        url, body = httpx.URL(service.url), json.dumps(LONG).encode()
        head = (
            f"POST /v1/images HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer {service.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._connection = socket.create_connection((url.host, url.port or 80), timeout=30)
        self._connection.sendall(head.encode() + body)

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


@pytest.fixture
def full(service: RunningService, client: httpx.Client) -> Iterator[None]:
    """All that the engine takes at once is taken."""
    with Visitor(service), Visitor(service), Visitor(service):
        wait_until(lambda: images(client).status_code == 429, 30, "three long requests are taken")
        yield


def test_a_full_service_refuses_at_once_and_says_when_to_come_back(full: None, client: httpx.Client) -> None:
    began = time.monotonic()
    answer = images(client)
    took_s = time.monotonic() - began
    problem = require_problem(answer, 429, "busy")
    assert int(answer.headers["Retry-After"]) >= 1
    assert problem["retry_after_s"] > 0
    assert took_s < 1.0


def test_a_client_that_leaves_frees_its_slots(service: RunningService, client: httpx.Client) -> None:
    with Visitor(service):
        wait_until(lambda: sample(client, "ray_scanloom_engine_slots_used") > 0, 30, "slots are used")
    wait_until(lambda: sample(client, "ray_scanloom_engine_slots_used") == 0, 30, "slots are free")


def test_what_cannot_be_made_in_time_is_refused_at_once(client: httpx.Client) -> None:
    deadline_s, began = 5.0, time.monotonic()
    answer = client.post("/v1/images", json=LONG | {"deadline_s": deadline_s})
    assert time.monotonic() - began < deadline_s
    assert answer.status_code in (422, 503), answer.text
    assert "deadline" in answer.json()["detail"]


def test_a_request_outside_the_envelope_names_field_and_envelope(client: httpx.Client) -> None:
    answer = images(client, attributes=ATTRIBUTES | {"age": 110})
    problem = require_problem(answer, 422, "outside-envelope")
    assert problem["errors"][0]["field"] == "attributes.age"
    assert problem["envelope"]["ranges"]["age"] == {"low": 21.0, "high": 88.0}


def sample(client: httpx.Client, name: str) -> float:
    """The sum of a metric's samples; -1 where there is none."""
    page = client.get("/metrics")
    assert page.status_code == 200
    found = [
        value.value
        for family in text_string_to_metric_families(page.text)
        for value in family.samples
        if value.name == name
    ]
    return sum(found) if found else -1.0


def test_the_numbers_of_gateway_and_engine_are_on_one_page(client: httpx.Client) -> None:
    images(client)
    wait_until(lambda: sample(client, "ray_scanloom_engine_images_total") > 0, 30, "an engine's numbers")
    wait_until(lambda: sample(client, "ray_scanloom_requests_total") > 0, 30, "a gateway's numbers")
    assert sample(client, "ray_scanloom_engine_slots") == 4
    assert sample(client, "ray_scanloom_request_seconds_count") > 0
    assert sample(client, "ray_scanloom_images_asked_total") >= 2
    page = client.get("/metrics").text
    for label in ('route="/v1/images"', 'tenant="local"', 'status="200"'):
        assert label in page


def test_many_requests_at_once_are_all_answered_or_refused_properly(service: RunningService) -> None:
    def ask(number: int) -> int:
        with service.client() as client:
            answer = images(client, seed=number, count=1)
        if answer.status_code != 200:
            require_problem(answer, 429, "busy")
        return answer.status_code

    with ThreadPoolExecutor(24) as pool:
        statuses = list(pool.map(ask, range(96)))
    assert statuses.count(200) >= 24
    assert set(statuses) <= {200, 429}


def test_the_documents_examples_are_those_of_the_generator(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert "/v1/images" in document["paths"]
    assert '"sex": "F"' in json.dumps(document)


def test_every_request_is_a_line_of_the_access_log_and_nothing_went_wrong(
    service: RunningService, client: httpx.Client
) -> None:
    request = "a-request-of-this-test"
    answer = client.post("/v1/images", json=ASKED, headers={"X-Request-ID": request})
    assert answer.headers.get_list("X-Request-ID") == [request]
    assert answer.json()["request"] == request
    wait_until(lambda: request in service.logs(), 10, "the request's line")
    lines = [json.loads(line) for line in service.logs().splitlines() if line.startswith("{") and request in line]
    assert any(line.get("route") == "/v1/images" and line.get("status") == 200 for line in lines), lines
    assert "Traceback" not in service.errors()
