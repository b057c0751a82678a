"""What every request passes through: bodies too large and too slow, one log line each, and nothing that ends it all."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import psutil
import pytest

from scanloom.sampling.image_order import ImageOrder, MadeImages
from serve.config import Service
from serve.gateway import gateway
from serve.metrics import Metrics
from tests.served_images import KEYS, Asked, bearer, blank, listening, parts_of, problem, settings
from tests.tiny_generator import publish_generator

LIMIT_BYTES, LIMIT_S = 4096, 0.5
Address = tuple[str, int]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    uri = publish_generator(str(tmp_path_factory.mktemp("generator"))).uri
    return settings(uri, limits={"body_bytes": LIMIT_BYTES, "body_s": LIMIT_S})


class Counted(Metrics):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[tuple[str, str, int]] = []
        self.reasons: list[str] = []
        self.images = 0

    def answered(self, route: str, tenant: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.answers.append((route, tenant, status))

    def refused(self, reason: str) -> None:
        self.reasons.append(reason)

    def asked(self, images: int) -> None:
        self.images += images


@pytest.fixture
def measure() -> Counted:
    return Counted()


@pytest.fixture
def ask(service: Service, measure: Counted) -> Iterator[Asked]:
    asked = Asked(gateway(parts_of(service, blank, measure=measure)))
    yield asked
    asked.close()


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[Address]:
    with listening(gateway(parts_of(service, blank))) as found:
        yield found


def head(*lines: str, key: str | None = "lab", path: str = "/v1/images") -> bytes:
    shown = [f"Authorization: Bearer {KEYS[key]}"] if key else []
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: service", *shown, *lines, "", ""]).encode()


def answered(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the one answer that comes before the server closes the connection."""
    connection.settimeout(20.0)
    received = b""
    while piece := connection.recv(65536):
        received += piece
    top, _, body = received.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)


# --- bodies ---------------------------------------------------------------------------------------------------


def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(address: Address) -> None:
    with closing(socket.create_connection(address)) as connection:
        connection.sendall(head(f"Content-Length: {LIMIT_BYTES + 1}"))
        status, told = answered(connection)
    assert (status, told["type"]) == (413, "urn:scanloom:problem:too-large")


@pytest.mark.parametrize("length", ["9" * 18, "9" * 30])
def test_a_length_beyond_all_measure_is_refused(address: Address, length: str) -> None:
    with closing(socket.create_connection(address)) as connection:
        connection.sendall(head(f"Content-Length: {length}"))
        connection.settimeout(20.0)
        top = connection.recv(65536)
    # The longer one the server itself does not take for a number.
    assert top.split()[1] in (b"400", b"413")


def test_an_endless_body_without_a_length_is_cut_off_in_bounded_memory(address: Address) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    piece = b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16))
    sent = 0
    with closing(socket.create_connection(address)) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        connection.settimeout(20.0)
        try:
            while sent < 64 << 20:
                connection.sendall(piece)
                sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
    # The server hung up long before the end, and kept nothing.
    assert sent < 32 << 20
    assert process.memory_info().rss - before < 16 << 20


def test_a_body_that_trickles_in_is_given_up_when_its_time_is_over(address: Address) -> None:
    with closing(socket.create_connection(address)) as connection:
        started = time.monotonic()
        connection.sendall(head("Content-Length: 100") + b'{"st')
        status, told = answered(connection)
    assert (status, told["type"]) == (408, "urn:scanloom:problem:too-slow")
    assert LIMIT_S <= time.monotonic() - started < 20 * LIMIT_S


def test_many_slow_clients_keep_nobody_else_waiting(address: Address) -> None:
    slow = [socket.create_connection(address) for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(head("Content-Length: 100") + b"{")
        with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", headers=bearer("lab")) as client:
            assert client.post("/v1/images", json={}).status_code == 200
        assert {answered(connection)[0] for connection in slow} == {408}
    finally:
        for connection in slow:
            connection.close()


def test_who_has_no_key_is_refused_before_any_body_is_read(address: Address) -> None:
    with closing(socket.create_connection(address)) as connection:
        connection.sendall(head("Content-Length: 100", key=None))
        connection.settimeout(10.0)
        # Not a byte of the body was sent, and the time for it is not over.
        started = time.monotonic()
        top = connection.recv(65536)
    assert b" 401 " in top.split(b"\r\n")[0]
    assert b"www-authenticate: bearer" in top.lower()
    assert time.monotonic() - started < LIMIT_S


def test_who_hangs_up_within_its_body_ends_nothing_but_its_request(address: Address) -> None:
    for _ in range(20):
        with closing(socket.create_connection(address)) as connection:
            connection.sendall(head("Content-Length: 100") + b"{")
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}") as client:
        assert client.get("/healthz").status_code == 200


def test_a_body_of_just_the_limit_is_read(ask: Asked) -> None:
    body = b'{"steps": 2}'
    assert ask("POST", "/v1/images", content=body + b" " * (LIMIT_BYTES - len(body))).status_code == 200
    problem(ask("POST", "/v1/images", content=body + b" " * (LIMIT_BYTES - len(body) + 1)), 413, "too-large")


def test_a_request_that_brings_a_body_where_none_belongs_is_bounded_too(ask: Asked) -> None:
    problem(ask("GET", "/v1/generators", content=b" " * (LIMIT_BYTES + 1)), 413, "too-large")
    assert ask("GET", "/v1/generators", content=b"ignored").status_code == 200


# --- logs and numbers -----------------------------------------------------------------------------------------


def test_a_request_leaves_one_line_of_json(ask: Asked, measure: Counted, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "scanloom.access"):
        answer = ask("POST", "/v1/images", json={"steps": 2, "count": 3}, headers={"X-Request-ID": "r-1"})
        ask("GET", "/v1/datasets/../../etc?key=secret", headers={"Authorization": "Bearer nobody"})
        ask("GET", "/v1/generators/tiny")
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "scanloom.access"]
    assert len(lines) == 3
    expected = {
        "request": "r-1", "tenant": "clinic-a", "who": "lab", "method": "POST", "route": "/v1/images", "status": 200,
        "bytes_out": len(answer.content),
    }  # fmt: skip
    assert lines[0] | expected == lines[0]
    assert lines[0]["bytes_in"] == len(b'{"steps":2,"count":3}')
    assert (lines[1]["status"], lines[1]["tenant"]) == (401, "")
    assert lines[2]["route"] == "/v1/generators/{name}"
    # The client is in this process, too, and may log what it asks for.
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("scanloom")]
    assert not any(word in line for line in ours for word in ("secret", KEYS["lab"]))
    assert measure.answers == [
        ("/v1/images", "clinic-a", 200), ("", "", 401), ("/v1/generators/{name}", "clinic-a", 200),
    ]  # fmt: skip
    assert measure.images == 3
    assert measure.reasons == ["unauthenticated"]


def test_nothing_that_a_client_sends_can_forge_a_line(ask: Asked, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "scanloom.access"):
        ask("GET", '/v1/generators/a%0A{"status":200}%22%00\u202e')
    [record] = [r for r in caplog.records if r.name == "scanloom.access"]
    assert record.getMessage().isascii()
    assert record.getMessage().isprintable()
    assert json.loads(record.getMessage())["status"] == 404


def test_a_fault_of_the_service_is_told_without_its_insides_and_logged_with_them(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(order: ImageOrder) -> MadeImages:
        raise KeyError("patient 4711")

    ask = Asked(gateway(parts_of(service, broken)))
    try:
        answer = ask("POST", "/v1/images", json={})
        assert ask("GET", "/healthz").status_code == 200
    finally:
        ask.close()
    told = problem(answer, 500, "internal")
    assert "4711" not in answer.text
    [line] = [r for r in caplog.records if r.name == "scanloom.serve"]
    assert told.instance in line.getMessage()
    assert line.exc_info is not None
    assert line.exc_info[2] is not None


def test_encoding_leaves_the_event_loop_to_others(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, go = threading.Event(), threading.Event()
    from serve import pictures

    real = pictures.FORMATS["application/json"]

    def slow(shown: pictures.Pictures) -> pictures.Encoded:
        encoding.set()
        assert go.wait(20.0)
        return real(shown)

    monkeypatch.setattr(pictures, "FORMATS", dict(pictures.FORMATS) | {"application/json": slow})
    ask = Asked(gateway(parts_of(service, blank)))
    try:
        waiting = ask.begin("POST", "/v1/images", json={})
        assert encoding.wait(10.0)
        # While a thread encodes, the loop answers.
        assert ask("GET", "/healthz").status_code == 200
        go.set()
        assert waiting.result(20.0).status_code == 200
    finally:
        go.set()
        ask.close()
