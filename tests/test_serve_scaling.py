"""Engines come when they are asked and go when they are not, hosts are drained and lost: no request fails by that."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from scanloom.api_key import fingerprint, new_key
from scanloom.client import Client
from tests.running_service import RunningService, config, free_port, plain_environment, wait_until, written
from tests.tiny_generator import publish_generator
from tests.traffic import Traffic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LENIENT = {"least_contrast": 0.0, "most_white": 1.0, "most_black": 1.0}
# What engines and gateways report, every second instead of every ten.
OFTEN = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_generator(str(tmp_path_factory.mktemp("store") / "generator")).uri


def settings(generator: str, **replicas: Any) -> dict[str, Any]:
    common = {"slots": 4, "requests": 16, "queued": 32, "upscale_delay_s": 2, "downscale_delay_s": 6, "drain_s": 20}
    return {
        "generators": [{"name": "tiny", "uri": generator, "quality": LENIENT}],
        "replicas": common | replicas,
        "limits": {"longest_deadline_s": 300},
    }


def test_engines_go_from_none_to_two_and_back_without_a_failed_request(generator: str, tmp_path: Path) -> None:
    tree = config(settings(generator, least=0, most=2))
    with RunningService(tmp_path, written(tmp_path, tree), environment=OFTEN) as service:
        assert service.workers("engine") == []
        with Client(service.url, service.key) as client:
            began = time.monotonic()
            client.images.generate(steps=4, deadline_s=120)
            cold_s = time.monotonic() - began
        with Traffic(service, clients=12, steps=200) as heavy:
            up_s = wait_until(lambda: len(service.workers("engine")) == 2, 120, "two engines")
            heavy.await_more(24)
        with Traffic(service, clients=1, steps=50, pause_s=0.2) as light:
            down_s = wait_until(lambda: len(service.workers("engine")) == 1, 120, "one engine is left")
            light.await_more(4)
        none_s = wait_until(lambda: service.workers("engine") == [], 120, "no engine is left")
        with Client(service.url, service.key) as client:
            client.images.generate(steps=4, deadline_s=120)
        print(heavy.told("load"), light.told("on the way down"), sep="\n")  # noqa: T201
        print(  # noqa: T201
            f"first image with no engine there: {cold_s:.1f} s; two engines {up_s:.1f} s after the load came, one "
            f"{down_s:.1f} s after it went, none {none_s:.1f} s after the last request"
        )
    assert heavy.failures == light.failures == []
    assert set(heavy.answers) <= {"200", "429"}
    assert set(light.answers) == {"200"}


class OnTwoHosts(RunningService):
    """A service on a cluster: gateway and proxy on its head, an engine on each of two hosts."""

    def __init__(self, folder: Path, tree: dict[str, Any], key: str) -> None:
        self._key, self._port = key, tree["http_options"]["port"]
        head = {
            "num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port(),
            "dashboard_agent_listen_port": free_port(),
        }  # fmt: skip
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._serve = ServeSubmissionClient(f"http://{self.cluster.webui_url}")
        self._serve.deploy_applications(tree)
        # Engines have no room on the head; where there are no hosts yet, the gateway has it for itself.
        wait_until(lambda: len(self.hosts_of("gateway")) == 1, 120, "the gateway runs")
        self.hosts = [self.add_host(), self.add_host()]
        wait_until(lambda: len(self.hosts_of("engines")) == 2, 180, "an engine runs on each host")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def key(self) -> str:
        return self._key

    def add_host(self) -> Any:
        return self.cluster.add_node(num_cpus=1, resources={"engine": 1})

    def hosts_of(self, part: str) -> set[str]:
        """Node ids where replicas of a deployment run."""
        application = self._serve.get_serve_details()["applications"].get("scanloom", {})
        replicas = application.get("deployments", {}).get(part, {}).get("replicas", ())
        return {replica["node_id"] for replica in replicas if replica["state"] == "RUNNING"}

    def drain(self, host: Any, within_s: int) -> None:
        """Say that a host will be gone, as a cloud does of a spot node."""
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")), "drain-node", "--address", str(self.cluster.address),
                "--node-id", host.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test",
                "--deadline-remaining-seconds", str(within_s),
            ],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip


@pytest.fixture
def cluster(generator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnTwoHosts]:
    monkeypatch.setenv("PYTHONPATH", plain_environment()["PYTHONPATH"])
    key = new_key("tests")
    known = {"id": "tests", "sha256": fingerprint(key), "tenant": "tests", "scopes": ["generate", "admin"]}
    args = settings(generator, least=2, most=2, resources={"engine": 1}) | {"access": {"keys": [known]}}
    service = OnTwoHosts(tmp_path, config(args) | {"proxy_location": "HeadOnly"}, key)
    yield service
    service.cluster.shutdown()


def test_a_host_that_is_drained_and_one_that_is_lost_fail_no_request(cluster: OnTwoHosts) -> None:
    with Traffic(cluster) as drained:
        drained.await_more(8)
        gone = cluster.hosts.pop(0)
        cluster.drain(gone, within_s=60)
        cluster.hosts.append(cluster.add_host())
        elsewhere_s = wait_until(
            lambda: len(cluster.hosts_of("engines") - {gone.node_id}) == 2, 120, "its engine runs elsewhere"
        )
        cluster.cluster.remove_node(gone, allow_graceful=False)
        drained.await_more(12)
    print(drained.told(f"host drained, its engine elsewhere {elsewhere_s:.1f} s later, then killed"))  # noqa: T201
    with Traffic(cluster) as lost:
        lost.await_more(8)
        cluster.cluster.remove_node(cluster.hosts.pop(0), allow_graceful=False)
        lost.await_more(20)
    print(lost.told("host killed without warning"))  # noqa: T201
    assert drained.failures == lost.failures == []
    assert set(drained.answers) == {"200"}
