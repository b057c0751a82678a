"""A Serve config file, read strictly: what `scanloom serve CONFIG` runs here and `serve deploy` runs on a cluster.

Ray Serve takes unknown keys without a word, so that a typo turns a limit off. Here each is an error that names the
nearest key, and what the service settles from its own settings cannot be said a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from scanloom.errors import RecipeError
from scanloom.section import first_faults, nearest
from serve.config import Service

IMPORT_PATH = "serve.app:app"
DEPLOYMENTS = ("gateway", "engines", "dispatcher")
SETTLED = {
    "num_replicas": "args.replicas or args.gateways", "autoscaling_config": "args.replicas",
    "max_ongoing_requests": "args.replicas.requests", "max_queued_requests": "args.replicas.queued",
    "graceful_shutdown_timeout_s": "args.replicas.drain_s", "graceful_shutdown_wait_loop_s": "args.replicas.drain_s",
    "backpressure_config": "args.replicas.queued",
    "ray_actor_options": "args.replicas.cpus, gpus and resources",
}  # fmt: skip
"""Options of deployments that follow from the service's settings, and the settings that say so. A file's option would
take the place of ours, as a whole."""


@dataclass(frozen=True)
class ServeFile:
    """What a config file holds."""

    deploy: ServeDeploySchema
    service: Service

    @property
    def application(self) -> ServeApplicationSchema:
        """Ours, the only one."""
        return self.deploy.applications[0]


def read_config(file: Path) -> ServeFile:
    """The content of a Serve config file with one application, ours.

    Raises RecipeError that names the file, the key and the nearest known one.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, Mapping):
        raise RecipeError(f"{file}: expected a Serve config file, a YAML mapping with the key applications")
    try:
        for fault in _faults(tree):
            raise RecipeError(f"{file}: {fault}")
        deploy = ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{file}: {first_faults(error)}") from error
    try:
        service = Service.model_validate(deploy.applications[0].args)
    except ValidationError as error:
        raise RecipeError(f"{file}: applications.0.args: {first_faults(error)}") from error
    cut_s, longest_s = deploy.http_options.request_timeout_s, service.limits.longest_deadline_s
    if cut_s is not None and 0 < cut_s <= longest_s:
        raise RecipeError(
            f"{file}: http_options.request_timeout_s: {cut_s:g} s cuts off requests that may take {longest_s:g} s "
            "(args.limits.longest_deadline_s); raise it, or lower that"
        )
    return ServeFile(deploy, service)


def _faults(tree: Mapping[str, Any]) -> Iterator[str]:
    yield from _unknown(tree, ServeDeploySchema, "")
    applications = tree.get("applications")
    if not isinstance(applications, list) or len(applications) != 1:
        yield "applications: expected a list of one, the service"
        return
    [application] = applications
    if not isinstance(application, Mapping) or application.get("import_path") != IMPORT_PATH:
        yield f"applications.0.import_path: expected {IMPORT_PATH}"
        return
    if isinstance(environment := application.get("runtime_env"), Mapping):
        known = sorted(name for name in RuntimeEnv.known_fields if not name.startswith("_"))
        yield from (f"applications.0.runtime_env: {_hint(key, known)}" for key in environment if key not in known)
    for number, deployment in enumerate(application.get("deployments") or ()):
        if isinstance(deployment, Mapping):
            yield from _deployment_faults(deployment, f"applications.0.deployments.{number}")


def _deployment_faults(deployment: Mapping[str, Any], at: str) -> Iterator[str]:
    if deployment.get("name") not in DEPLOYMENTS:
        name = str(deployment.get("name"))
        yield f"{at}.name: unknown deployment {name!r}{nearest(name, DEPLOYMENTS)}"
    yield from (f"{at}: {key} follows from {SETTLED[key]}; set that" for key in deployment if key in SETTLED)


def _unknown(tree: Mapping[Any, Any], model: type[BaseModel], at: str) -> Iterator[str]:
    """Keys that the model does not have, here and below."""
    for key, value in tree.items():
        if key not in model.model_fields:
            yield f"{at or 'top level: '}{_hint(key, list(model.model_fields))}"
            continue
        below = next(_models(model.model_fields[key].annotation), None)
        for place, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if below is not None and isinstance(child, Mapping):
                path = f"{at.removesuffix(': ')}{'.' if at else ''}{key}{'' if place is None else f'.{place}'}: "
                yield from _unknown(child, below, path)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _hint(key: object, known: list[str]) -> str:
    return f"unknown key {key!r}{nearest(str(key), known)}"
