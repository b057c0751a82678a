"""What alerts and dashboards ask for is on the pages of metrics of what runs, as Prometheus reads them.

The fast test puts the parts of a service together in this process, its Serve deployment and a Ray Data job on the
session's Ray; the slow one asks a whole service, started as `scanloom serve` starts it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import ray.data
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from serve.app import _of_engines
from serve.config import Replicas
from serve.gateway import gateway
from serve.replica import Replica
from tests.processes import named
from tests.running_service import RunningService, config, wait_until, written
from tests.served_images import Asked, parts_of, settings
from tests.test_k8s_monitoring import LABELS, expressions
from tests.tiny_generator import publish_generator

Samples = Mapping[str, list[Mapping[str, str]]]
"""Labels of all samples, by the name of their metric."""

OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gpus_available"}
"""Where there is none, Ray says nothing of them."""
OF_PODS = {*LABELS, "app_kubernetes_io_component", "instance", "le"}
"""Labels that Prometheus adds, or that only go with their own metric."""
SHOWN = {"deployment", "operator", "route"}
"""Labels whose values that are asked for are among those of a run without faults and refusals by a gate."""
LENIENT = {"least_contrast": 0.0, "most_white": 1.0, "most_black": 1.0}
STRICT = {"least_contrast": 1.0, "most_white": 0.0, "attempts": 2}
"""No image is of full contrast without a white pixel."""


def asked() -> list[tuple[str, str]]:
    """Where each expression stands, and itself."""
    return list(expressions())


def wanted() -> set[str]:
    """Names in all expressions."""
    return {name for _, text in asked() for name in re.findall(r"\bray_[a-z0-9_]+", text)} - LABELS


def faults(asked: Iterable[tuple[str, str]], seen: Samples) -> Iterator[str]:
    """Metrics, labels and values that expressions ask for and no sample has."""
    for where, text in asked:
        metrics = re.findall(r"\b(ray_[a-z0-9_]+)(?:\{([^}]*)\})?", text)
        for name, selector in metrics:
            if name in LABELS | OF_GPUS:
                continue
            if name not in seen:
                yield f"{where}: no metric {name}"
                continue
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', selector):
                values = {labels[label] for labels in seen[name] if label in labels}
                if label not in OF_PODS and not values:
                    yield f"{where}: {name} has no label {label}"
                elif label in SHOWN and not any(re.fullmatch(value, shown) for shown in values):
                    yield f"{where}: {name} has no {label} {value}, only {', '.join(sorted(values))}"
        known = {label for name, _ in metrics for labels in seen.get(name, ()) for label in labels}
        for label in re.findall(r"\w+", " ".join(re.findall(r"\bby ?\(([^)]*)\)", text))):
            if label not in known | OF_PODS:
                yield f"{where}: sums by {label}, which none of its metrics has"


def page(address: str) -> Samples:
    """What a metrics agent shows of what is asked for; nothing where it does not answer."""
    found: dict[str, list[Mapping[str, str]]] = {}
    with suppress(httpx.HTTPError, ValueError):
        text = httpx.get(f"http://{address}/metrics", timeout=5, trust_env=False).text
        names = tuple(wanted())
        lines = [line for line in text.splitlines() if line.startswith(names)]
        for family in text_string_to_metric_families("\n".join([*lines, ""])):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.labels)
    return found


# --- on the session's Ray -------------------------------------------------------------------------------------


def use_the_parts(folder: Path) -> None:
    """Ask a gateway and an engine of this process for images: some are made, some refused by quality, some at once."""
    generator = publish_generator(str(folder / "generator")).uri
    offered = [{"name": name, "uri": generator, "quality": quality} for name, quality in
               (("tiny", LENIENT), ("strict", STRICT))]  # fmt: skip
    service = settings(generator, generators=offered, limits={"images": 2})
    engine = Replica(service)
    with closing(Asked(gateway(parts_of(service, engine.make)))) as ask:
        told = [
            ask("POST", "/v1/images", json={"generator": name, "count": count, "steps": 2}).status_code
            for name, count in (("tiny", 1), ("strict", 1), ("tiny", 99))
        ]
        assert told[0] == 200
        assert told[1] >= 400
        assert told[2] in (400, 413, 422)


@pytest.fixture(scope="module")
def scrape(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Samples]:
    """The page of the session's node after a short use of all that is counted."""

    # Defined here, so that Ray's workers need not import this module for them.
    class Still:
        def make(self) -> int:
            return 1

    def write_shard(row: dict[str, Any], store: str) -> dict[str, Any]:
        return row

    node = ray.nodes()[0]
    options = _of_engines(Replicas()) | {"graceful_shutdown_wait_loop_s": 0.1}
    found: dict[str, list[Mapping[str, str]]] = {}
    serve.start(proxy_location="Disabled")
    try:
        deployed = serve.deployment(name="engines", **options)(Still).bind()
        serve._run(deployed, _blocking=False, name="scanloom", route_prefix=None)
        use_the_parts(tmp_path_factory.mktemp("scrape"))

        def all_there() -> bool:
            # Each process tells its numbers every ten seconds, and a gauge that is set once is told once. Other jobs
            # of the session may have left the same metrics of their own operators.
            if any("ray_data" in fault for fault in faults(asked(), found)):
                ray.data.range(2).map(partial(write_shard, store="")).materialize()
            for name, labels in page(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}").items():
                found.setdefault(name, []).extend(labels)
            return not list(faults(asked(), found)) or threading.Event().wait(0.3)

        with suppress(AssertionError):
            wait_until(all_there, 60, "what is asked for is on the page")
        yield found
    finally:
        serve.shutdown()


def test_what_is_asked_for_is_on_the_page_of_a_node(scrape: Samples) -> None:
    assert list(faults(asked(), scrape)) == []
    assert len(wanted() & scrape.keys()) >= 17


@pytest.mark.parametrize(
    "before, after, told",
    [
        (
            "ray_serve_deployment_replica_healthy",
            "ray_serve_deployment_replica_ready",
            "no metric ray_serve_deployment",
        ),
        ("ray_data_num_tasks_running", "ray_data_tasks_running", "no metric ray_data_tasks_running"),
        ("ray_scanloom_requests_total", "ray_scanloom_requests", "no metric ray_scanloom_requests"),
        ("ray_node_mem_used", "ray_node_memory_used", "no metric ray_node_memory_used"),
        ('{reason="gate"}', '{cause="gate"}', "has no label cause"),
        ('deployment="engines"', 'deployment="engine"', "has no deployment engine, only engines"),
        (".*write_shard.*", ".*write_shards.*", "has no operator"),
        ('route="/v1/images"', 'route="/images"', "has no route /images"),
        ("sum by (reason)", "sum by (cause)", "sums by cause"),
    ],
)
def test_a_fault_in_an_expression_is_found(scrape: Samples, before: str, after: str, told: str) -> None:
    changed = [(where, text.replace(before, after)) for where, text in asked()]
    assert changed != asked()
    assert any(told in fault for fault in faults(changed, scrape))


# --- a whole service ------------------------------------------------------------------------------------------


def pages(service: RunningService) -> dict[str, list[Mapping[str, str]]]:
    """What all metrics agents of the service's nodes show."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for process in named(service.process.pid, "dashboard/agent.py", "DashboardAgent"):
        with suppress(psutil.Error):
            for connection in psutil.Process(process).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    for name, labels in page(f"127.0.0.1:{connection.laddr.port}").items():
                        found.setdefault(name, []).extend(labels)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_service_that_works_shows_every_metric_that_is_asked_for(tmp_path: Path) -> None:
    generator = publish_generator(str(tmp_path / "store" / "generator")).uri
    args: dict[str, Any] = {
        "generators": [
            {"name": "tiny", "uri": generator, "quality": LENIENT},
            {"name": "strict", "uri": generator, "quality": STRICT},
        ],
        "replicas": {"slots": 4, "least": 1, "most": 2},
        "limits": {"images": 2},
        "datasets": {"store": str(tmp_path / "served")},
    }
    seen: dict[str, list[Mapping[str, str]]] = {}
    with RunningService(tmp_path, written(tmp_path, config(args))) as service, service.client() as client:
        statuses = [
            client.post("/v1/images", json={"generator": "tiny", "steps": 4}).status_code,
            client.post("/v1/images", json={"generator": "strict", "steps": 4}).status_code,
            client.post("/v1/images", json={"generator": "tiny", "count": 99}).status_code,
            client.post("/v1/datasets", json={"generator": "tiny", "images": 400, "bits_stored": 12}).status_code,
        ]
        assert statuses[0] == 200
        assert statuses[1] >= 400
        assert statuses[2] in (400, 413, 422)
        assert statuses[3] == 202

        def all_there() -> bool:
            seen.update(pages(service))
            return not list(faults(asked(), seen))

        try:
            took_s = wait_until(all_there, 240, "every metric is there")
        except AssertionError as error:
            raise AssertionError(f"of {len(wanted())}: {list(faults(asked(), seen))}") from error
    print(f"{len(wanted() & seen.keys())} of {len(wanted())} names in a scrape after {took_s:.0f} s")  # noqa: T201
