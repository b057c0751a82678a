"""What an overlay renders to, as its pods, groups of workers and files: what tests/k8s_rules.py looks at."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = ROOT / "k8s" / "overlays"
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
GPU = "nvidia.com/gpu"
QUEUE = "kueue.x-k8s.io/queue-name"
"""Label of jobs that wait in a queue of Kueue."""


def kubectl() -> str | None:
    """The kubectl beside this Python, else one on the PATH."""
    beside = Path(sys.executable).parent / "kubectl"
    return str(beside) if beside.is_file() else shutil.which("kubectl")


@cache
def rendered(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder; RuntimeError with its message where it refuses."""
    command = [kubectl() or "kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stderr.strip()}")
    return done.stdout


def objects(folder: Path) -> list[Object]:
    """The objects of a rendered folder, new ones at each call."""
    return [thing for thing in yaml.load_all(rendered(folder), Loader=yaml.CSafeLoader) if thing]


def amount(quantity: object) -> float:
    """A Kubernetes quantity such as 500m or 2Gi, as a number."""
    text = str(quantity)
    digits = text.rstrip("".join(_UNITS))
    return float(digits) * _UNITS[text[len(digits) :]]


@dataclass(frozen=True)
class Pod:
    """A pod that an object makes, with the labels that it will have."""

    owner: Object
    template: Object
    labels: Mapping[str, str]
    group: Object | None = None
    """The group of workers that it belongs to."""

    @property
    def where(self) -> str:
        part = self.labels.get("ray.io/group", self.labels.get("app.kubernetes.io/component", "pod"))
        return f"{self.owner['kind']} {self.owner['metadata']['name']}, {part}"

    @property
    def spec(self) -> Object:
        spec: Object = self.template["spec"]
        return spec

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    def asks(self, resource: str, of: str = "requests") -> float:
        """Sum over its containers."""
        return sum(amount(c.get("resources", {}).get(of, {}).get(resource, 0)) for c in self.spec["containers"])

    @property
    def resources(self) -> set[str]:
        """Names of what its containers ask for."""
        return {name for c in self.spec["containers"] for name in c.get("resources", {}).get("requests", {})}

    def as_object(self) -> Object:
        """It alone, for schemas of core kinds."""
        metadata = {"name": "pod", **self.template.get("metadata", {})}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": self.spec}


@dataclass(frozen=True)
class RayCluster:
    """The cluster in a RayService or RayJob."""

    owner: Object
    spec: Object

    @property
    def head(self) -> Pod:
        return self._pod(self.spec["headGroupSpec"], {"ray.io/node-type": "head", "ray.io/group": "headgroup"})

    @property
    def workers(self) -> list[Pod]:
        return [
            self._pod(group, {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]})
            for group in self.spec.get("workerGroupSpecs", ())
        ]

    @property
    def autoscales(self) -> bool:
        return bool(self.spec.get("enableInTreeAutoscaling"))

    def _pod(self, group: Object, labels: dict[str, str]) -> Pod:
        own = group["template"].get("metadata", {}).get("labels", {})
        all_of_ray = {"ray.io/is-ray-node": "yes", "ray.io/cluster": self.owner["metadata"]["name"]}
        template = group["template"]
        if self.autoscales and labels["ray.io/node-type"] == "head":
            template = template | {"spec": self._with_autoscaler(template["spec"])}
        return Pod(self.owner, template, {**own, **all_of_ray, **labels}, group)

    def _with_autoscaler(self, spec: Object) -> Object:
        options = self.spec.get("autoscalerOptions", {})
        container = {
            "name": "autoscaler",
            "image": options.get("image", spec["containers"][0]["image"]),
            "resources": options.get("resources", {"requests": {"cpu": "500m", "memory": "512Mi"}}),
            **{key: options[key] for key in ("securityContext", "volumeMounts", "env", "envFrom") if key in options},
        }
        return spec | {"containers": [*spec["containers"], container]}


@dataclass(frozen=True)
class Site:
    """All that an overlay and its jobs put into a cluster."""

    name: str
    objects: Sequence[Object]
    versions: Sequence[str]
    """Of KubeRay, that it is for."""
    own_secrets: frozenset[str] = field(default=frozenset())
    """Secrets that a person makes, by the documentation."""

    def of_kind(self, *kinds: str) -> list[Object]:
        return [thing for thing in self.objects if thing["kind"] in kinds]

    def named(self, kind: str, name: str) -> Object | None:
        return next((thing for thing in self.of_kind(kind) if thing["metadata"]["name"] == name), None)

    @property
    def service(self) -> Object:
        [service] = self.of_kind("RayService")
        return service

    @property
    def clusters(self) -> list[RayCluster]:
        return [RayCluster(thing, cluster_spec(thing)) for thing in self.of_kind("RayService", "RayJob")]

    def pods(self) -> Iterator[Pod]:
        """Every kind of pod."""
        for cluster in self.clusters:
            yield cluster.head
            yield from cluster.workers
        for job in self.of_kind("RayJob"):
            if template := job["spec"].get("submitterPodTemplate"):
                yield Pod(job, template, template.get("metadata", {}).get("labels", {}))
        for thing in self.of_kind("Deployment", "StatefulSet", "Job"):
            template = thing["spec"]["template"]
            yield Pod(thing, template, template.get("metadata", {}).get("labels", {}))


def cluster_spec(thing: Object) -> Object:
    """Of the Ray cluster that a RayService or RayJob makes."""
    spec: Object = thing["spec"]["rayClusterConfig" if thing["kind"] == "RayService" else "rayClusterSpec"]
    return spec


@cache
def site(name: str, versions: tuple[str, ...]) -> Site:
    """An overlay with its jobs, and the queues where they wait in some; not to be changed."""
    folder = OVERLAYS / name
    made = {"scanloom-tls", "scanloom-redis"} | (
        {"scanloom-api-keys", "scanloom-release"} if name == "dev-cpu" else set()
    )
    things = [*objects(folder), *objects(folder / "jobs")]
    if any(QUEUE in thing["metadata"].get("labels", {}) for thing in things):
        things += objects(ROOT / "k8s" / "components" / "kueue" / "queues")
    return Site(name, things, versions, frozenset(made))
