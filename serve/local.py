"""The generation service on this machine, with a Ray of its own: `scanloom serve`.

python -m serve.local GENERATOR [--datasets STORE] [--gate URI]     one generator, s3://bucket/folder or a local folder
python -m serve.local CONFIG.yaml                      a Serve config file, such as serve/scanloom.yaml
python -m serve.local --demo demo                      the generator that `make demo` made, from the store in its folder

It ends on Ctrl-C or SIGTERM: requests that are being answered are finished first.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import secrets
import shlex
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scanloom import console
from scanloom.api_key import PATTERN, fingerprint, new_key
from scanloom.artefact import open_artefact
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import Quality, load_recipe
from serve.config import Access, ApiKey, Datasets, ServedGenerator, Service, as_arguments

if TYPE_CHECKING:
    from serve.catalogue import Offer

# Ray reads RAY_* variables while it is imported: nothing here may import it, or what imports it, before `_settle`.

ROOT = Path(__file__).resolve().parents[1]
DEMO_RECIPE = ROOT / "jobs" / "recipes" / "demo.yaml"
PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Names what Serve's proxy puts before the gateways."""
OBJECT_STORE_BYTES = 1 << 30
READY_S = 600.0
"""For Ray, weights and the first image."""
HTTP: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, "request_timeout_s": 330, "keep_alive_timeout_s": 90}


@dataclass(frozen=True)
class Plan:
    """What is to run."""

    service: Service
    config: dict[str, Any]
    """As a Serve config file has it."""
    env_file: Path
    key: str | None
    """Of the client; None where the config file says who may ask."""

    @property
    def application(self) -> str:
        return str(self.config["applications"][0]["name"])

    @property
    def address(self) -> tuple[str, int]:
        return self.config["http_options"]["host"], self.config["http_options"]["port"]

    @property
    def url(self) -> str:
        host, port = self.address
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"


def serve_here(options: argparse.Namespace) -> None:
    """Serve until told to end."""
    _settle()
    with ExitStack() as stack:
        if options.demo:
            options = _of_demo(options, stack)
        plan = _plan(options)
        offers = _require_generators(plan.service)
        _require_free(*plan.address)
        print(f"starting Ray and {_names(plan.service)}: half a minute or more", flush=True)  # noqa: T201
        logs = stack.enter_context(_running(plan))
        _tell(plan, offers[0], logs)
        with suppress(KeyboardInterrupt):
            signal.pause()
        print("finishing what is being answered; Ctrl-C again to leave it", flush=True)  # noqa: T201


def _settle() -> None:
    """The variables of Ray and of what it starts."""
    if os.environ.get("RAY_ADDRESS"):
        raise RecipeError(
            "RAY_ADDRESS is set, and `scanloom serve` starts a Ray of its own: unset it, or run `serve deploy` with a "
            "config file on that cluster"
        )
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token":
        # Its own, which its processes alone inherit.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(PROXY_CALLBACK, "serve.proxy:middlewares")
    # Replicas and the jobs of datasets import what lies beside this package.
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)


# --- what to serve --------------------------------------------------------------------------------------------


def _of_demo(options: argparse.Namespace, stack: ExitStack) -> argparse.Namespace:
    """The options for the demo's generator, with the demo's store running."""
    folder: Path = options.demo
    if not (folder / "s3" / "settings.json").is_file():
        raise RecipeError(f"{folder}: no demo was run there; run `make demo` first, some minutes")
    recipe = load_recipe(DEMO_RECIPE)
    s3 = stack.enter_context(EmbeddedS3(folder / "s3"))
    os.environ.update(s3.environment)
    bucket = recipe.store.split("/")[2]
    given = {
        "place": recipe.uri("generator"),
        "datasets": options.datasets or f"s3://{bucket}/served",
        "env": options.env or folder / "serve-env",
    }
    return argparse.Namespace(**(vars(options) | given))


def _plan(options: argparse.Namespace) -> Plan:
    env_file = options.env or Path("serve-env")
    given = {"host": options.host, "port": options.port}
    stated = {name: value for name, value in given.items() if value is not None}
    if options.place.endswith((".yaml", ".yml")):
        return _of_file(options, stated, env_file)
    key, access = _own_key(env_file)
    service = Service(
        generators=(_served(options),),
        access=access,
        datasets=Datasets(store=options.datasets, jobs_at_once=1) if options.datasets else None,
    )
    application = {"name": "scanloom", "route_prefix": "/", "import_path": "serve.app:app"}
    return Plan(service, _config(application, service, HTTP | stated), env_file, key)


def _served(options: argparse.Namespace) -> ServedGenerator:
    return ServedGenerator(
        name=options.name or _name(options.place), uri=options.place, quality=Quality(gate=options.gate)
    )


def _of_file(options: argparse.Namespace, stated: dict[str, Any], env_file: Path) -> Plan:
    from serve.access import is_loopback
    from serve.config_file import read_config

    if options.datasets or options.name or options.gate:
        raise RecipeError(
            f"{options.place}: --datasets, --name and --gate are for one generator; set args in the file instead"
        )
    found = read_config(Path(options.place))
    service, key = found.service, None
    access = service.access
    if not (access.open or access.keys or access.keys_file or access.oidc):
        key, access = _own_key(env_file)
        service = service.model_copy(update={"access": access})
    http = HTTP | found.deploy.http_options.model_dump(exclude_unset=True) | stated
    if access.open and not is_loopback(http["host"]):
        raise RecipeError(f"access.open lets everybody in who reaches {http['host']}; listen on 127.0.0.1, or set keys")
    application = found.application.model_dump(mode="json", exclude_unset=True)
    return Plan(service, _config(application, service, http), env_file, key)


def _config(application: dict[str, Any], service: Service, http: dict[str, Any]) -> dict[str, Any]:
    own = application | {"args": as_arguments(service)}
    return {"proxy_location": "HeadOnly", "http_options": http, "applications": [own]}


def _own_key(env_file: Path) -> tuple[str, Access]:
    """A key for whoever started the service, with all scopes."""
    key = _former_key(env_file) or new_key("local")
    local = ApiKey(id="local", sha256=fingerprint(key), tenant="local", scopes=("generate", "datasets", "admin"))
    return key, Access(keys=(local,))


def _name(uri: str) -> str:
    """What a generator calls itself, as far as it is a name."""
    with _saying_what_to_run():
        own = open_artefact(uri, "generator").manifest.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", own).strip("-._")[:64] or "generator"


def _former_key(file: Path) -> str | None:
    """The key of an earlier run, so that its clients go on."""
    with suppress(OSError):
        found = re.search(rf"SCANLOOM_API_KEY=({PATTERN})$", file.read_text(encoding="utf-8"), re.MULTILINE)
        return found[1] if found else None
    return None


def _require_generators(service: Service) -> list[Offer]:
    """What is served. Raises ArtefactError or StoreError, before Ray starts, where a generator cannot be read."""
    from serve.catalogue import read_catalogue

    with _saying_what_to_run():
        return list(read_catalogue(service).values())


@contextmanager
def _saying_what_to_run() -> Iterator[None]:
    try:
        yield
    except ArtefactError as error:
        raise ArtefactError(f"{error}; make it with `scanloom finetune`, or `make demo`") from error


def _require_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RecipeError(f"--host {host} --port {port}: {error.strerror}; choose another") from error


def _names(service: Service) -> str:
    return ", ".join(generator.name for generator in service.generators)


# --- run ------------------------------------------------------------------------------------------------------


@contextmanager
def _running(plan: Plan) -> Iterator[str]:
    """Ray and the service, ready, and the folder of their logs.

    At the end what is being answered is finished, up to `replicas.drain_s`.
    """
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    # Not by ray.init, which cannot choose the port of the agent that takes jobs: any other Ray on the machine has it.
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": _processors(plan.service),
            "num_gpus": _gpus(plan.service),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": _free_port(),
            "dashboard_agent_listen_port": _free_port(),
        },
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # After Ray, which has handlers of its own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _deploy(plan, f"http://{cluster.webui_url}")
        assert cluster.head_node is not None
        yield f"{cluster.head_node.get_session_dir_path()}/logs"
        serve.delete(plan.application)
    finally:
        with suppress(KeyboardInterrupt):
            serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def _deploy(plan: Plan, dashboard: str) -> None:
    """Have Serve run the config, as `serve deploy` does, and wait until it answers."""
    from ray import serve
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    ServeSubmissionClient(dashboard).deploy_applications(plan.config)
    deadline = time.monotonic() + READY_S
    while not _answers(f"{plan.url}/readyz"):
        told = serve.status().applications.get(plan.application)
        if told is not None and told.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reasons = [told.message, *(deployment.message for deployment in told.deployments.values())]
            raise ArtefactError(f"the service does not start: {_last_words(reasons)}")
        if time.monotonic() > deadline:
            raise ArtefactError(f"{plan.url}/readyz: not ready after {READY_S:.0f} s; Ray's logs say more")
        time.sleep(0.2)


def _gpus(service: Service) -> int:
    """Those of the machine, where somebody asks for some."""
    if not (service.replicas.gpus or (service.datasets and service.datasets.gpus_per_engine)):
        return 0
    import torch

    return torch.cuda.device_count()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


def _last_words(messages: Sequence[str]) -> str:
    """The last line of the longest message, which ends a traceback."""
    lines = max(messages, key=len).strip().splitlines()
    return lines[-1] if lines else "Ray's logs say more"


def _processors(service: Service) -> int:
    """That Ray is told of: those of the machine, or as many as all parts together ask for, who then share them.

    A dataset's job reads and writes in tasks of their own, two of which must find room.
    """
    engines = service.replicas.most * service.replicas.cpus
    made = service.datasets
    datasets = made.jobs_at_once * (made.engines * made.cpus_per_engine + made.writers + 3) if made else 0
    return max(os.cpu_count() or 1, engines + service.gateways + datasets)


def _tell(plan: Plan, offer: Offer, logs: str) -> None:
    """Leave the file for a shell, and say what to do next."""
    lines = [f"export SCANLOOM_URL={shlex.quote(plan.url)}"]
    lines += [f"export SCANLOOM_API_KEY={plan.key}"] if plan.key else []
    _write_private(plan.env_file, "".join(f"{line}\n" for line in lines))
    authorization = '-H "Authorization: Bearer $SCANLOOM_API_KEY" ' if not plan.service.access.open else ""
    body = shlex.quote(json.dumps({"attributes": offer.example()}))
    datasets = (
        f"datasets go to {plan.service.datasets.store}" if plan.service.datasets else "no datasets: see --datasets"
    )
    told = [
        f"serving {_names(plan.service)} at {plan.url} until Ctrl-C ({datasets}); in another shell:",
        f"source {shlex.quote(str(plan.env_file))}",
        f'curl -sSf "$SCANLOOM_URL/v1/images" {authorization}-H "Content-Type: application/json" '
        f'-H "Accept: image/png" -d {body} -o image.png',
        f"all routes: {plan.url}/openapi.json; logs: {logs}",
    ]
    print(*told, sep="\n  ", flush=True)  # noqa: T201


def _write_private(file: Path, content: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        os.fchmod(stream.fileno(), 0o600)
        stream.write(content)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scanloom serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", nargs="?", metavar="GENERATOR|CONFIG", help="a generator's URI, or a config file")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="serve what the demo in this folder made")
    parser.add_argument("--host", help="address to listen on; default: 127.0.0.1, or the file's")
    parser.add_argument("--port", type=int, help="default: 8000, or the file's")
    parser.add_argument("--name", help="by which requests ask for the generator; default: its own")
    parser.add_argument("--gate", metavar="URI", help="a privacy gate that every image must pass; default: none")
    parser.add_argument("--datasets", metavar="STORE", help="where ordered datasets go, s3://... or a folder")
    parser.add_argument("--env", type=Path, metavar="FILE", help="URL and key for a shell; default: serve-env")
    options = parser.parse_args(argv)
    if bool(options.place) == bool(options.demo):
        parser.error("give a generator or a config file, or --demo FOLDER")
    return console.run(lambda: serve_here(options))


if __name__ == "__main__":
    sys.exit(main())
