"""What a gateway of Kubernetes does, on this machine: each request goes to a pod that says it is ready."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

import httpx

_ASK_S = 0.5
_HEALTH_S = 2.0
_LONGEST_S = 330.0
_OF_A_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


class Balancer:
    """`with Balancer(["http://10.0.0.2:8000", ...]) as balancer:` listens on 127.0.0.1; `url` is its address.

    A request goes to the next server whose Serve proxy answered its health check last time, once: what breaks there
    is answered with 502.
    """

    def __init__(self, servers: list[str]) -> None:
        self._servers = servers
        self._ready: set[str] = set()
        self._turn = 0
        self._over = threading.Event()
        self._upstream = httpx.Client(timeout=_LONGEST_S, trust_env=False)
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._listener.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._listener.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()
        for server in self._servers:
            threading.Thread(target=self._watch, args=(server,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._upstream.close()

    @property
    def ready(self) -> set[str]:
        """Servers that get requests."""
        return set(self._ready)

    def _watch(self, server: str) -> None:
        while not self._over.wait(_ASK_S):
            try:
                healthy = httpx.get(f"{server}/-/healthz", timeout=_HEALTH_S, trust_env=False).status_code == 200
            except httpx.TransportError:
                healthy = False
            (self._ready.add if healthy else self._ready.discard)(server)

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> httpx.Response:
        """The answer of the next server that is ready; 502 where its connection breaks, 503 where none is."""
        servers = sorted(self._ready)
        if not servers:
            return httpx.Response(503)
        self._turn += 1
        server = servers[self._turn % len(servers)]
        try:
            return self._upstream.request(method, f"{server}{path}", headers=headers, content=body)
        except httpx.TransportError as error:
            return httpx.Response(502, text=f"{server}: {type(error).__name__}")


def _handler(balancer: Balancer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_A_CONNECTION}
            # Bodies are passed on as they are, not unpacked on the way.
            answer = balancer.ask(self.command, self.path, headers | {"Accept-Encoding": "identity"}, body)
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name.lower() not in _OF_A_CONNECTION:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_DELETE = _pass_on

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler
