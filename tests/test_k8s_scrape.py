"""What alerts and dashboards ask for is on the pages of metrics of a service that runs, as Prometheus reads them."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import named
from tests.running_service import RunningService, config, wait_until, written
from tests.test_k8s_monitoring import LABELS, expressions
from tests.tiny_generator import publish_generator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gpus_available"}
"""Where there is none, Ray says nothing of them."""
LENIENT = {"least_contrast": 0.0, "most_white": 1.0, "most_black": 1.0}
STRICT = {"least_contrast": 0.9, "attempts": 2}


def wanted() -> set[str]:
    """Names in all expressions."""
    return {name for _, text in expressions() for name in re.findall(r"\bray_[a-z0-9_]+", text)} - LABELS


def pages(service: RunningService) -> set[str]:
    """Names of all samples that the metrics agents of the service's nodes show."""
    found: set[str] = set()
    for process in named(service.process.pid, "dashboard/agent.py", "DashboardAgent"):
        with suppress(psutil.Error):
            for connection in psutil.Process(process).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    with suppress(httpx.HTTPError, ValueError):
                        page = httpx.get(
                            f"http://127.0.0.1:{connection.laddr.port}/metrics", timeout=5, trust_env=False
                        )
                        families = text_string_to_metric_families(page.text) if page.status_code == 200 else ()
                        found |= {sample.name for family in families for sample in family.samples}
    return found


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
    seen: set[str] = set()
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
            return wanted() - OF_GPUS <= seen

        try:
            took_s = wait_until(all_there, 240, "every metric is there")
        except AssertionError as error:
            raise AssertionError(f"missing: {sorted(wanted() - seen)} of {len(wanted())}") from error
    print(f"{len(wanted() & seen)} of {len(wanted())} names in a scrape after {took_s:.0f} s")  # noqa: T201
