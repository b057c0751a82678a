"""LitServe's part of `serve_peers`: a class of a module of its own, since its workers are spawned and must find it."""

from __future__ import annotations

import base64
from typing import Any

import litserve

from tests.benchmarks.serve_peers import WAIT_S, Pipeline


class Peer(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._pipeline = Pipeline()

    # LitServe makes a route of this signature: without an annotation it hands over the body as it is.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, asked: list[dict[str, Any]]) -> list[bytes]:
        return self._pipeline(asked)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> dict[str, str]:
        return {"png": base64.b64encode(output).decode()}


def run(port: int, batch: int) -> None:
    server = litserve.LitServer(Peer(max_batch_size=batch, batch_timeout=WAIT_S), accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")
