"""RayJobs for GitOps: a job of a recipe as the objects that Kubernetes is to hold, by `scanloom render`.

The manifest beside this file is the one that `k8s/jobs` builds on; it is part of the wheel, so that no checkout is
needed. Sizes of worker groups follow from the recipe.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml

from scanloom.errors import RecipeError
from scanloom.needs import Need, need
from scanloom.stored_recipe import content_at
from scanloom.submission import Submission

Object = dict[str, Any]
RECIPE = "/etc/scanloom/recipe.yaml"
SIGNING = "/etc/scanloom-release"
"""Where `release` finds what the Secret of that name holds: the key to sign with."""
LONGEST_NAME = 47
"""Of a RayJob; the operator makes longer names of it."""
_GPU = "nvidia.com/gpu"
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True)
class Place:
    """Where the job is to run."""

    image: str
    namespace: str = "scanloom"
    name: str | None = None
    """None: of the job, the recipe's name, and what they say, so that a changed recipe is another job."""
    queue: str | None = None
    """Of Kueue: the job waits there until all its workers fit."""
    labels: dict[str, str] = field(default_factory=dict)


def render(job: str, place: str, overrides: list[str], options: list[str], where: Place) -> str:
    """YAML of a ConfigMap with the recipe at `place`, and of the RayJob that runs the job on it.

    Raises RecipeError where the recipe is wrong, or is one that no cluster could run.
    """
    sent = Submission.of(job, place, overrides, options)
    if not sent.recipe.store.startswith("s3://"):
        raise RecipeError(f"recipe {place}: store {sent.recipe.store} is a folder that each pod has its own of")
    name = where.name or sent.name
    for option, told in (("--name", name), ("--namespace", where.namespace), ("--queue", where.queue or "x")):
        if not _LABEL.fullmatch(told) or len(told) > LONGEST_NAME:
            raise RecipeError(
                f"{option} {told!r}: expected small letters, digits and hyphens, a letter first, at most {LONGEST_NAME}"
            )
    labels = {"app.kubernetes.io/name": "scanloom", "scanloom.io/job": job, **where.labels}
    metadata = {"namespace": where.namespace, "labels": labels}
    held = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-recipe", **metadata},
        "data": {"recipe.yaml": content_at(place).decode("utf-8")},
    }  # fmt: skip
    made: Object = yaml.safe_load((files(__name__) / "rayjob.yaml").read_text(encoding="utf-8"))
    made["metadata"] = {"name": name, **metadata}
    _command(made, sent)
    _images(made, where.image)
    _volumes(made, f"{name}-recipe", signs=job == "release")
    _sizes(made, need(job, sent.recipe))
    if where.queue is not None:
        _wait_in(made, where.queue)
    documents = yaml.dump_all([held, made], Dumper=_Dumper, sort_keys=False, width=120)
    return f"# Made by `scanloom render {job}`; make it again where recipe or sizes change.\n{documents}"


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are, so that a change of a recipe can be read off a diff."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _command(made: Object, sent: Submission) -> None:
    changes = [word for override in sent.overrides for word in ("--set", override)]
    words = ["python", "-m", f"jobs.{sent.job}", RECIPE, *changes, *sent.options]
    made["spec"]["entrypoint"] = shlex.join(words)


def _images(made: Object, image: str) -> None:
    spec = made["spec"]
    cluster = spec["rayClusterSpec"]
    pods = [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    pods += [group["template"] for group in cluster["workerGroupSpecs"]]
    for pod in pods:
        for container in pod["spec"]["containers"]:
            container["image"] = image


def _volumes(made: Object, recipe: str, *, signs: bool) -> None:
    head = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    [held] = [volume for volume in head["volumes"] if volume["name"] == "recipe"]
    held["configMap"]["name"] = recipe
    if signs:
        head["volumes"].append({"name": "signing", "secret": {"secretName": "scanloom-release"}})
        mount = {"name": "signing", "mountPath": SIGNING, "readOnly": True}
        head["containers"][0]["volumeMounts"].append(mount)


def _sizes(made: Object, needed: Need) -> None:
    """Groups that may grow to what the job can use at once, and one pod of which holds any single part."""
    groups = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    cpu, gpu = groups
    left = needed.cpus
    if needed.gpus:
        each = max(1, math.ceil(needed.gpus_of_one))
        workers = max(1, math.floor(each / needed.gpus_of_one)) if needed.gpus_of_one else 1
        cores = _resources(gpu, math.ceil(workers * needed.cpus_of_one), each)
        gpu["maxReplicas"] = math.ceil(needed.gpus / each)
        left -= gpu["maxReplicas"] * cores
    else:
        del groups[1]
    cores = _resources(cpu, 0 if needed.gpus else math.ceil(needed.cpus_of_one), 0)
    cpu["maxReplicas"] = max(1, math.ceil(left / cores))


def _resources(group: Object, cpus: int, gpus: int) -> int:
    """Give each pod of a group at least so many CPUs, and so many GPUs; how many CPUs it then has."""
    resources = group["template"]["spec"]["containers"][0]["resources"]
    cpus = max(cpus, int(resources["requests"]["cpu"]))
    resources["requests"]["cpu"] = str(cpus)
    if gpus:
        resources["requests"][_GPU] = resources["limits"][_GPU] = gpus
    return cpus


def _wait_in(made: Object, queue: str) -> None:
    # Kueue wants jobs suspended and of fixed size.
    made["metadata"]["labels"] |= {"kueue.x-k8s.io/queue-name": queue}
    made["spec"]["suspend"] = True
    cluster = made["spec"]["rayClusterSpec"]
    del cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]
    for group in cluster["workerGroupSpecs"]:
        group["replicas"] = group["minReplicas"] = group["maxReplicas"]
