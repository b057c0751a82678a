"""An HTTP proxy before an S3 server that breaks chosen requests the way networks and servers do.

Every connection carries one request, so that one injected fault breaks exactly one request.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

Fault = Literal[
    "503",  # refused, not forwarded
    "429",
    "403",
    "507",
    "reset",  # connection reset, not forwarded
    "lost_ack",  # forwarded and applied; the connection breaks before the client hears of it
    "truncate",  # the response ends cleanly after `at` bytes of its body
    "stall",  # the response stops after `at` bytes of its body, and the connection stays open
    "corrupt",  # one bit of the response's body byte `at` flips
    "accept",  # answered as done without being looked at, as by a server that ignores conditions
]
_ANSWERS = {
    "accept": "200 OK|",
    "503": "503 Slow Down|SlowDown",
    "429": "429 Too Many Requests|TooManyRequests",
    "403": "403 Forbidden|AccessDenied",
    "507": "507 Insufficient Storage|InsufficientStorage",
}


@dataclass
class _Rule:
    fault: Fault
    method: str
    path: str
    times: int
    share: float
    at: int


class FaultProxy:
    """`with FaultProxy(s3.endpoint) as proxy: proxy.inject("reset", method="PUT", times=2)`."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._rules: list[_Rule] = []
        self._random = random.Random(seed)
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._serving: set[asyncio.Task[None] | None] = set()
        self.injected: list[str] = []
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request, in order."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def inject(
        self, fault: Fault, *, method: str = ".*", path: str = "", times: int = 1, share: float = 1.0, at: int = 0
    ) -> None:
        """Break the next `times` requests that match (regular expressions), each with probability `share`."""
        self._rules.append(_Rule(fault, method, path, times, share, at))

    def heal(self) -> None:
        """Break nothing any more."""
        self._rules.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20), self._loop
        ).result(5)
        self._port = server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _pick(self, method: str, path: str) -> _Rule | None:
        for rule in self._rules:
            fits = rule.times and re.fullmatch(rule.method, method) and re.search(rule.path, path)
            if fits and self._random.random() < rule.share:
                rule.times -= 1
                self.injected.append(rule.fault)
                return rule
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The event loop holds tasks weakly: without this one, a handler can be collected while it waits.
        self._serving.add(task := asyncio.current_task())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            self.requests.append((method, path))
            rule = self._pick(method, path)
            if rule is not None and rule.fault in _ANSWERS:
                await _answer_alone(reader, writer, rule.fault, method)
            elif rule is not None and rule.fault == "reset":
                _reset(writer)
            else:
                await self._forward(head, reader, writer, rule)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._serving.discard(task)
            writer.close()

    async def _forward(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rule: _Rule | None
    ) -> None:
        answer, upstream = await asyncio.open_connection(*self._upstream, limit=1 << 20)
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
        upstream.write(head[:-2] + b"Connection: close\r\n\r\n")
        upload = asyncio.create_task(_pump(reader, upstream))
        try:
            if rule is not None and rule.fault == "lost_ack":
                await answer.read(-1)
                _reset(writer)
            else:
                await _pass_back(answer, writer, rule)
            if rule is not None and rule.fault == "stall":
                await upload  # it ends when the client gives up and closes
        finally:
            upload.cancel()
            upstream.close()


async def _pass_back(answer: asyncio.StreamReader, writer: asyncio.StreamWriter, rule: _Rule | None) -> None:
    while True:  # interim 1xx heads come first
        head = await answer.readuntil(b"\r\n\r\n")
        writer.write(head)
        await writer.drain()
        if not head.startswith(b"HTTP/1.1 1"):
            break
    seen = 0
    while data := await answer.read(1 << 16):
        end = seen + len(data)
        if rule is not None and rule.fault in ("truncate", "stall") and end > rule.at:
            writer.write(data[: rule.at - seen])
            await writer.drain()
            return
        if rule is not None and rule.fault == "corrupt" and seen <= rule.at < end:
            place = rule.at - seen
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        seen = end
        writer.write(data)
        await writer.drain()


async def _answer_alone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault, method: str) -> None:
    status, code = _ANSWERS[fault].split("|")
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    body = b"" if method == "HEAD" or not code else body
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    await writer.drain()
    writer.write_eof()
    await asyncio.wait_for(reader.read(-1), 5)  # take the upload, or the client sees a reset instead of the answer


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
