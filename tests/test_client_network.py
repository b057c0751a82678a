"""The client against a server that misbehaves: a network that fails once goes unnoticed."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scanloom.client import AsyncClient, Client, ServiceDown
from scanloom.client import session as session_module
from tests.scripted_service import GENERATORS, KEY

Behaviour = bytes | str
"""An answer's bytes, or `reset` or `close` before any."""


def http(status: str, body: bytes, *headers: str, claimed: int | None = None) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if claimed is None else claimed}", "Connection: close"]
    return "\r\n".join([*head, *headers, "", ""]).encode() + body


class Misbehaving:
    """A server that does to each connection what the next entry of `script` says, the last to all that follow."""

    def __init__(self) -> None:
        self.script: list[Behaviour] = []
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        behaviour = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        request = b""
        while b"\r\n\r\n" not in request or len(request.partition(b"\r\n\r\n")[2]) < _length(request):
            if not (piece := connection.recv(1 << 16)):
                return
            request += piece
        self.requests.append(request)
        if behaviour == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif isinstance(behaviour, bytes):
            connection.sendall(behaviour)


def _length(request: bytes) -> int:
    lines = request.lower().partition(b"\r\n\r\n")[0].split(b"\r\n")
    return next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Misbehaving]:
    monkeypatch.setattr(session_module, "_FIRST_PAUSE_S", 0.02)
    found = Misbehaving()
    yield found
    found.close()


def ask_now(url: str, patience_s: float) -> Any:
    with Client(url, KEY, patience_s=patience_s) as client:
        return client.generators.list()


def ask_later(url: str, patience_s: float) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, KEY, patience_s=patience_s) as client:
            return await client.generators.list()

    return asyncio.run(ask())


OK = http("200 OK", json.dumps(GENERATORS).encode())


@pytest.mark.parametrize("ask", [ask_now, ask_later])
@pytest.mark.parametrize(
    "behaviour",
    [
        "reset",
        "close",
        http("429 Too Many Requests", b"", "Retry-After: 0"),
        http("503 Service Unavailable", b"<html>", "Retry-After: 0"),
        http("200 OK", OK[-9:], claimed=5000),  # cut
        http("200 OK", b'{"generators": ['),
        http("200 OK", b"\x1f\x8bno gzip", "Content-Encoding: gzip"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"gen",
        b"SSH-2.0-OpenSSH\r\n",
    ],
)  # fmt: skip
def test_a_network_that_fails_once_goes_unnoticed(
    server: Misbehaving, ask: Callable[[str, float], Any], behaviour: Behaviour
) -> None:
    server.script = [behaviour, OK]
    assert ask(server.url, 60.0) == []
    assert len(server.requests) == 2
    assert all(f"authorization: bearer {KEY}".encode() in request.lower() for request in server.requests)


@pytest.mark.parametrize("ask", [ask_now, ask_later])
def test_a_redirect_does_not_carry_the_key_elsewhere(server: Misbehaving, ask: Callable[[str, float], Any]) -> None:
    server.script = [http("307 Temporary Redirect", b"", f"Location: {server.url}/elsewhere")]
    with pytest.raises(ServiceDown, match="HTTP 307"):
        ask(server.url, 60.0)
    assert len(server.requests) == 1


@pytest.mark.parametrize("ask", [ask_now, ask_later])
def test_a_service_that_is_not_there_is_told_when_patience_ends(ask: Callable[[str, float], Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServiceDown, match=r"check the URL") as error:
        ask(url, 0.5)
    assert KEY not in str(error.value)


def test_a_cancelled_task_ends_its_request(server: Misbehaving) -> None:
    server.script = [http("503 Service Unavailable", b"", "Retry-After: 60")]

    async def run() -> None:
        async with AsyncClient(server.url, KEY) as client:
            asking = asyncio.create_task(client.generators.list())
            while not server.requests:
                await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(asyncio.wait_for(run(), 30))
