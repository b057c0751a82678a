"""The numbers of the service: what a page of several nodes looks like, and that labels cannot grow without bound."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from serve.metrics import MOST_VALUES, Metrics

ROOT = Path(__file__).resolve().parents[1]
FIRST = """# HELP ray_scanloom_requests_total Requests answered.
# TYPE ray_scanloom_requests_total counter
ray_scanloom_requests_total{route="/v1/images",status="200",WorkerId="a"} 3.0
# HELP ray_node_cpu_count Cores
# TYPE ray_node_cpu_count gauge
ray_node_cpu_count 2.0
# HELP ray_scanloom_request_seconds Latency.
# TYPE ray_scanloom_request_seconds histogram
ray_scanloom_request_seconds_bucket{le="1.0"} 3.0
ray_scanloom_request_seconds_bucket{le="+Inf"} 3.0
ray_scanloom_request_seconds_count 3.0
ray_scanloom_request_seconds_sum 0.5
"""
SECOND = FIRST.replace('WorkerId="a"', 'WorkerId="b"').replace(" 3.0", " 4.0").split("# HELP ray_node")[0]


class Agents:
    """Servers that each answer with one page, as Ray's metrics agents do."""

    def __init__(self, *pages: str) -> None:
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _answering(page)) for page in pages]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{server.server_port}/metrics" for server in self._servers]

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def _answering(page: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    return Handler


@pytest.fixture
def agents() -> Iterator[Agents]:
    served = Agents(FIRST, SECOND)
    yield served
    served.close()


@pytest.fixture
def silent() -> Iterator[str]:
    """An agent that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/metrics"


def samples(page: bytes) -> dict[str, list[Sample]]:
    """By family, through the parser that Prometheus' own client has."""
    return {family.name: family.samples for family in text_string_to_metric_families(page.decode())}


def test_the_page_holds_our_families_of_all_nodes_each_once(agents: Agents) -> None:
    page = asyncio.run(Metrics(agents.urls).exposition())
    found = samples(page)
    assert set(found) == {"ray_scanloom_requests", "ray_scanloom_request_seconds", "ray_scanloom_nodes"}
    assert {s.labels["WorkerId"]: s.value for s in found["ray_scanloom_requests"]} == {"a": 3.0, "b": 4.0}
    assert page.count(b"# TYPE ray_scanloom_requests_total counter\n") == 1
    assert [s.name for s in found["ray_scanloom_request_seconds"]].count("ray_scanloom_request_seconds_sum") == 1


def test_a_node_that_is_silent_and_one_that_is_gone_are_counted_and_break_nothing(agents: Agents, silent: str) -> None:
    gone = Agents("")
    urls = [*agents.urls(), silent, *gone.urls()]
    gone.close()
    found = samples(asyncio.run(Metrics(lambda: urls).exposition()))
    assert len(found["ray_scanloom_requests"]) == 2
    assert {s.labels["state"]: s.value for s in found["ray_scanloom_nodes"]} == {"read": 2.0, "silent": 2.0}


WITHOUT_RAY = """
import asyncio
from serve.metrics import Metrics

measure = Metrics()
measure.answered("/v1/images", "team", 200, 0.1)
measure.refused("busy")
measure.asked(4)
measure.redrawn("blank", 2)
measure.engine(slots=8, used=2, waiting=1, loaded=1, steps=10, images=3)
print(asyncio.run(measure.exposition()).decode())
"""


def test_without_ray_nothing_is_counted_and_nothing_fails() -> None:
    """In a process of its own: the session's has a Ray, as soon as any other test has asked for it."""
    path = os.pathsep.join(["platform", "."])
    told = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert 'ray_scanloom_nodes{state="read"} 0' in told.stdout
    assert "ray_scanloom_requests" not in told.stdout


def test_a_label_takes_so_many_values_and_counts_the_rest_together() -> None:
    measure = Metrics()
    seen = {measure._bounded("tenant", f"team-{number}") for number in range(3 * MOST_VALUES)}
    assert len(seen) == MOST_VALUES + 1
    assert "other" in seen
    assert measure._bounded("tenant", "team-0") == "team-0"
    assert measure._bounded("route", "/v1/images") == "/v1/images"
