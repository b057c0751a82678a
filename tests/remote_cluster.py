"""A Ray cluster with its dashboard in a process of its own, which lets in whoever has its token."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Ends with its standard input, however the tests end.
HOST = """
import sys
from ray.cluster_utils import Cluster
dashboard, agent = map(int, sys.argv[1:])
head = {"num_cpus": 4, "include_dashboard": True, "dashboard_port": dashboard, "dashboard_agent_listen_port": agent}
cluster = Cluster(initialize_head=True, head_node_args=head)
print(cluster.head_node.webui_url, cluster.head_node.get_session_dir_path(), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass
class RemoteCluster:
    """`with RemoteCluster() as cluster`: what runs in it finds jobs, the library and the store of this process."""

    token: str = field(default_factory=lambda: secrets.token_hex(16))

    def __enter__(self) -> RemoteCluster:
        path = os.pathsep.join((str(ROOT), str(ROOT / "platform")))
        beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "PYTHONPATH": path, "PATH": beside}
        command = [sys.executable, "-c", HOST, str(free_port()), str(free_port())]
        self._host = subprocess.Popen(
            command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._host.stdout is not None
        where, session = self._host.stdout.readline().split()
        self.address, self.session = f"http://{where}", Path(session)
        return self

    def __exit__(self, *_: object) -> None:
        self._host.communicate(timeout=120)

    def environment(self) -> dict[str, str]:
        """Of a command that is to be let in."""
        return {"RAY_API_SERVER_ADDRESS": self.address, "RAY_AUTH_TOKEN": self.token}


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
