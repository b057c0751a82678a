"""That a site's settings fit its pods: the service's file, the recipe, the jobs' commands, the GPUs that they need."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from unittest import mock

import jobs.cluster
from scanloom.audit.policy import read_policy
from scanloom.errors import RecipeError, ScanloomError
from scanloom.needs import Need, need
from scanloom.recipe import Recipe, read_recipe
from serve.config_file import ServeFile, read_config
from tests.k8s_rules import entrypoint
from tests.k8s_site import GPU, Object, Pod, RayCluster, Site

RECIPE = "/etc/scanloom/recipe.yaml"


def service(site: Site) -> Iterator[str]:
    """The service's file is read, its deadlines are kept by all around it, and its replicas find their places."""
    spec = site.service["spec"]
    try:
        read = _read(spec["serveConfigV2"])
    except RecipeError as error:
        yield f"serveConfigV2: {error}"
        return
    settings, replicas = read.service, read.service.replicas
    options = read.deploy.http_options
    if options.port != 8000 or options.host != "0.0.0.0":
        yield f"serveConfigV2: listens on {options.host}:{options.port}, where nothing reaches it"
    longest_s, request_s = settings.limits.longest_deadline_s + settings.limits.body_s, options.request_timeout_s or 0
    if request_s <= longest_s:
        yield f"serveConfigV2: request_timeout_s {request_s:g} cuts requests off that may take {longest_s:g} s"
    if spec.get("rayClusterDeletionDelaySeconds", 60) <= request_s:
        yield "rayClusterDeletionDelaySeconds: an upgrade cuts requests off"
    for route in site.of_kind("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            if float(rule.get("timeouts", {}).get("request", "0s").removesuffix("s")) <= request_s:
                yield f"HTTPRoute {route['metadata']['name']}: times out before the service does"
    [cluster] = [cluster for cluster in site.clusters if cluster.owner["kind"] == "RayService"]
    engines = next((pod for pod in cluster.workers if pod.labels["ray.io/group"] == "engines"), None)
    if engines is None:
        yield "RayService: no group `engines`"
        return
    grace = engines.spec.get("terminationGracePeriodSeconds", 30)
    if grace <= longest_s or grace <= replicas.drain_s:
        yield f"engines: {grace} s of grace cut requests off that may take {longest_s:g} s"
    needed = Need(
        settings.gateways + replicas.most * replicas.cpus, replicas.most * replicas.gpus, replicas.cpus, replicas.gpus
    )
    yield from (f"RayService, replicas: {fault}" for fault in lacking(needed, [engines]))
    kept = {mount["mountPath"] for mount in engines.spec["containers"][0]["volumeMounts"]}
    if settings.access.open:
        yield "serveConfigV2: access.open lets everybody in"
    if settings.access.keys_file and str(Path(settings.access.keys_file).parent) not in kept:
        yield f"serveConfigV2: access.keys_file {settings.access.keys_file} is mounted nowhere"
    yield from _datasets(read, cluster)


def _datasets(read: ServeFile, cluster: RayCluster) -> Iterator[str]:
    datasets, replicas = read.service.datasets, read.service.replicas
    if datasets is None:
        return
    if not datasets.store.startswith("s3://"):
        yield f"serveConfigV2: datasets.store {datasets.store} is a folder that each pod has its own of"
    offered = {name for pod in cluster.workers for name in _custom(pod)}
    for name in datasets.resources.keys() - offered:
        yield f"serveConfigV2: datasets.resources asks for {name!r}, which no group has"
    busy = Need(read.service.gateways + replicas.least * replicas.cpus, replicas.least * replicas.gpus)
    one = Need(
        busy.cpus + datasets.engines * datasets.cpus_per_engine + datasets.writers,
        busy.gpus + datasets.engines * datasets.gpus_per_engine,
        datasets.cpus_per_engine, datasets.gpus_per_engine,
    )  # fmt: skip
    yield from (f"RayService, datasets: {fault}" for fault in lacking(one, cluster.workers))


def _custom(pod: Pod) -> Mapping[str, float]:
    # KubeRay hands the value to a shell: JSON in double quotes that are part of it.
    text = (pod.group or {}).get("rayStartParams", {}).get("resources", "'{}'").strip("'\"").replace('\\"', '"')
    found: Mapping[str, float] = json.loads(text)
    return found


def lacking(need: Need, pods: list[Pod]) -> Iterator[str]:
    """What pods, all groups grown as far as they may, have not of a need."""
    places = [(_cpus(pod), pod.asks(GPU), (pod.group or {}).get("maxReplicas", 1)) for pod in pods]
    cpus, gpus = (sum(place[kind] * place[2] for place in places) for kind in (0, 1))
    if need.cpus > cpus:
        yield f"{need.cpus:g} CPUs are needed, {cpus:g} are there"
    if need.gpus > gpus:
        yield f"{need.gpus:g} GPUs are needed, {gpus:g} are there"
    if not any(need.cpus_of_one <= place[0] and need.gpus_of_one <= place[1] for place in places):
        yield f"no pod has {need.cpus_of_one:g} CPUs and {need.gpus_of_one:g} GPUs"


def _cpus(pod: Pod) -> float:
    """What Ray takes a pod to have."""
    said = (pod.group or {}).get("rayStartParams", {}).get("num-cpus")
    return float(said) if said is not None else float(pod.asks("cpu", "limits") or pod.asks("cpu"))


def recipes(site: Site) -> Iterator[str]:
    """Commands are what the jobs' parsers take, and jobs find what the recipe lets them ask for."""
    held = site.named("ConfigMap", "scanloom-recipe")
    if held is None:
        yield "no ConfigMap scanloom-recipe"
        return
    for cluster in site.clusters:
        job = cluster.owner
        if job["kind"] != "RayJob":
            continue
        at = f"RayJob {job['metadata']['name']}"
        try:
            name, arguments = entrypoint(job)
            place, overrides = parsed(name, tuple(arguments))
        except ValueError as error:
            yield f"{at}: {error}"
            continue
        if job["metadata"].get("labels", {}).get("scanloom.io/job") != name:
            yield f"{at}: its label scanloom.io/job is not {name}"
        if place != RECIPE or "/etc/scanloom" not in {
            m["mountPath"] for m in cluster.head.containers[0]["volumeMounts"]
        }:
            yield f"{at}: no recipe at {place}"
            continue
        try:
            recipe = _recipe(held["data"]["recipe.yaml"], overrides)
            needed = need(name, recipe)
        except (RecipeError, KeyError) as error:
            yield f"{at}: {error}"
            continue
        if not recipe.store.startswith("s3://"):
            yield f"{at}: store {recipe.store} is a folder that each pod has its own of"
        yield from (f"{at}: {fault}" for fault in lacking(needed, cluster.workers or [cluster.head]))
        if name == "release":
            yield from (f"{at}: {fault}" for fault in _signing(recipe, arguments, held, cluster.head))


def _signing(recipe: Recipe, arguments: list[str], held: Object, head: Pod) -> Iterator[str]:
    """The policy is one and says all licences, what is signed goes into a store, the key is where a Secret is."""
    told = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    place = Path(told["--policy"])
    if place.parent == Path(RECIPE).parent:
        try:
            policy = read_policy(held["data"][place.name].encode(), place.name)
            given = {name for name in (recipe.name, recipe.autoencoder.path, recipe.finetune.start_from) if name}
            for name in sorted(given - {licence.of for licence in policy.licences}):
                yield f"--policy {place}: says no licence of {name}"
        except (KeyError, RecipeError) as error:
            yield f"--policy {place}: {error}"
    elif not told["--policy"].startswith("s3://"):
        yield f"--policy {place} is mounted nowhere"
    secret = {volume["name"] for volume in head.spec["volumes"] if "secret" in volume}
    mounts = head.containers[0]["volumeMounts"]
    if str(Path(told["--key"]).parent) not in {m["mountPath"] for m in mounts if m["name"] in secret}:
        yield f"--key {told['--key']} is of no mounted Secret"
    if not told["--to"].startswith("s3://"):
        yield f"--to {told['--to']} is a folder that each pod has its own of"


class _Parsed(ScanloomError):
    def __init__(self, place: str, overrides: list[str]) -> None:
        super().__init__("parsed")
        self.found = place, tuple(overrides)


@cache
def parsed(job: str, arguments: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The recipe and the overrides that the job's own parser finds in its arguments; ValueError where it refuses."""
    caught: list[tuple[str, tuple[str, ...]]] = []

    def take(place: str, overrides: list[str]) -> Recipe:
        caught.append((place, tuple(overrides)))
        raise _Parsed(place, overrides)

    try:
        module = importlib.import_module(f"jobs.{job}")
    except ModuleNotFoundError as error:
        raise ValueError(f"no job {job}") from error
    reads = module if hasattr(module, "recipe_at") else jobs.cluster
    with mock.patch.object(reads, "recipe_at", take), mock.patch("sys.stderr"):
        try:
            if hasattr(module, "main"):
                module.main(list(arguments))
            else:
                jobs.cluster.run_recipe(getattr(module, job), job, module.__doc__ or "", list(arguments))
        except SystemExit as error:
            raise ValueError(f"jobs.{job} refuses {' '.join(arguments)}") from error
    return caught[0]


@cache
def _recipe(text: str, overrides: tuple[str, ...]) -> Recipe:
    return read_recipe(text.encode(), "scanloom-recipe", overrides)


@cache
def _read(text: str) -> ServeFile:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(text, encoding="utf-8")
        return read_config(file)


CHECKS: tuple[Callable[[Site], Iterator[str]], ...] = (service, recipes)
