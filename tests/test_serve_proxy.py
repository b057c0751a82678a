"""What Serve's proxy says by itself, as clients see it: a problem that tells them what to do."""

from __future__ import annotations

import asyncio
import importlib
import threading
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from scanloom.api import PROBLEM_JSON, Problem
from serve.local import PROXY_CALLBACK
from serve.proxy import OwnWords, middlewares
from tests.processes import kill
from tests.running_service import RunningService, config, free_port, wait_until, written
from tests.served_images import problem
from tests.tiny_generator import publish_generator

ID = {"X-Request-ID": "of-serve"}
ROOT = Path(__file__).resolve().parents[1]


def answered(answer: ASGIApp, path: str = "/v1/images") -> httpx.Response:
    """What a client gets where the proxy's own application answers so."""

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(OwnWords(answer))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.get(path)

    return asyncio.run(asked())


@pytest.mark.parametrize(
    ("status", "headers", "told", "kind", "retry_after"),
    [
        (404, {}, 503, "unavailable", "2"), (429, {"Retry-After": "7"}, 429, "busy", "7"), (429, {}, 429, "busy", "1"),
        (500, {}, 503, "unavailable", "2"), (503, {}, 503, "unavailable", "2"), (408, {}, 503, "deadline", None),
    ],
)  # fmt: skip
def test_what_the_proxy_says_is_a_problem(
    status: int, headers: dict[str, str], told: int, kind: str, retry_after: str | None
) -> None:
    answer = answered(PlainTextResponse("Path '/v1/images' not found.", status, headers | ID))
    found = problem(answer, told, kind)
    assert found.instance == "of-serve"
    assert answer.headers.get("Retry-After") == retry_after
    assert "Path" not in found.detail


def test_an_answer_that_comes_in_pieces_and_has_no_id_is_one_problem() -> None:
    answer = answered(StreamingResponse(iter([b"Internal ", b"Server ", b"Error"]), 500))
    assert len(problem(answer, 503, "unavailable").instance) == 16


@pytest.mark.parametrize(
    "response",
    [
        Response(b"{}", 200, media_type="application/json"), Response(b"{}", 404, media_type=PROBLEM_JSON),
        Response(b"{}", 500, media_type=PROBLEM_JSON), PlainTextResponse("what?", 400), Response(status_code=304),
        StreamingResponse(iter([b"one", b"two"]), 206),
    ],
    ids=lambda response: f"{response.status_code} {response.media_type}",
)  # fmt: skip
def test_what_gateways_answer_passes_as_it_is(response: Response) -> None:
    answer = answered(response)
    assert answer.status_code == response.status_code
    assert answer.content == (b"onetwo" if isinstance(response, StreamingResponse) else response.body)


def test_what_asks_for_the_proxy_itself_gets_its_own_words() -> None:
    assert answered(PlainTextResponse("draining", 503), "/-/healthz").text == "draining"


def test_pieces_pass_before_the_last_one_is_there() -> None:
    sent: list[bytes] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        assert sent == [b"first"]
        await send({"type": "http.response.body", "body": b"last"})

    async def asked() -> None:
        async def send(message: object) -> None:
            assert isinstance(message, dict)
            sent.extend([message["body"]] if "body" in message else [])

        scope = {"type": "http", "path": "/v1/images", "headers": []}
        await OwnWords(application)(scope, _nothing, send)

    asyncio.run(asked())
    assert sent == [b"first", b"last"]


async def _nothing() -> dict[str, str]:
    return {"type": "http.disconnect"}


def test_scanloom_serve_and_the_image_name_it_to_the_proxy() -> None:
    module, _, name = "serve.proxy:middlewares".partition(":")
    assert getattr(importlib.import_module(module), name) is middlewares
    for file in ("Dockerfile", "docs/serving.md"):
        assert f"{PROXY_CALLBACK}={module}:{name}" in (ROOT / file).read_text(encoding="utf-8")
    assert f'PROXY_CALLBACK, "{module}:{name}"' in (ROOT / "serve" / "local.py").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_while_a_service_starts_and_while_its_gateway_is_gone_every_refusal_is_a_problem(tmp_path: Path) -> None:
    generator, port = publish_generator(str(tmp_path / "generator")).uri, free_port()
    told: list[tuple[int, str, bytes]] = []
    over = threading.Event()
    asking = threading.Thread(target=_ask_on, args=(f"http://127.0.0.1:{port}/v1/generators", told, over))
    asking.start()
    try:
        settings = {"generators": [{"name": "tiny", "uri": generator}], "replicas": {"slots": 4}}
        with RunningService(tmp_path, written(tmp_path, config(settings, port))) as service:
            starting = list(told)
            [before] = service.workers("gateway")
            assert kill(before)
            wait_until(lambda: service.workers("gateway") not in ([], [before]), 120, "another gateway")
            wait_until(lambda: told[-1][0] == 401, 60, "the gateway's own refusal of whoever has no key")
    finally:
        over.set()
        asking.join()
    # Nobody had a key: 401 is the gateway's word, all others are the proxy's.
    assert {status for status, _, _ in told} == {401, 503}
    assert 503 in {status for status, _, _ in starting}
    for status, media_type, body in told:
        assert (media_type, Problem.model_validate_json(body).status) == (PROBLEM_JSON, status)


def _ask_on(url: str, told: list[tuple[int, str, bytes]], over: threading.Event) -> None:
    while not over.wait(0.02):
        try:
            answer = httpx.get(url, timeout=20.0, trust_env=False)
        except httpx.TransportError:
            continue
        told.append((answer.status_code, answer.headers["Content-Type"], answer.content))
