"""Kubernetes objects checked as an API server checks them, without one: core kinds by the published schemas, Ray's
kinds by the schemas and rules (CEL) of KubeRay's resource definitions, other operators' by models of their kinds
(k8s_operators.py), unknown keys refused everywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import cel
import jsonschema
import yaml
from jsonschema.exceptions import best_match
from kubernetes_validate.utils import all_versions, major_minor, schema_contents
from referencing import Registry, Resource

from tests.k8s_operators import KINDS, operator_faults

Object = dict[str, Any]

DEFINITIONS = Path(__file__).resolve().parents[2] / "shared" / "k8s-crds"
KUBERNETES = ("1.30", "1.37")
"""The oldest version that is meant, and the newest."""
_KEPT = ("enum", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "pattern", "required")


def kuberay_versions() -> list[str]:
    """Versions of KubeRay whose definitions are here, oldest first; none where they are not."""
    return sorted(folder.name.removeprefix("kuberay-") for folder in DEFINITIONS.glob("kuberay-*"))


def core_faults(thing: Object) -> Iterator[str]:
    """What speaks against an object of a core kind by Kubernetes' schemas, of another operator's by its model."""
    text = json.dumps(thing, sort_keys=True)
    yield from (fault for version in KUBERNETES for fault in _core_faults(text, version))


def ray_faults(thing: Object, version: str) -> Iterator[str]:
    """What KubeRay's definition of an object's kind says against it."""
    yield from _ray_faults(json.dumps(thing, sort_keys=True), version)


@cache
def _core_faults(text: str, version: str) -> tuple[str, ...]:
    thing = json.loads(text)
    if (thing["apiVersion"], thing["kind"]) in KINDS:
        return tuple(operator_faults(thing)) if version == KUBERNETES[-1] else ()
    validator = _core_validator(version, thing["apiVersion"], thing["kind"])
    if validator is None:
        return (f"Kubernetes {version}: no kind {thing['kind']} of {thing['apiVersion']}",)
    error = best_match(validator.iter_errors(thing))
    return (f"Kubernetes {version}: {_place(error.absolute_path)}: {error.message}",) if error else ()


@cache
def _core_validator(version: str, api: str, kind: str) -> jsonschema.Draft202012Validator | None:
    """What kubernetes_validate's `validate(..., strict=True)` makes anew at every call; None for an unknown kind."""
    group = re.sub(r"^([^./]*)(\.[^/]*)?/", r"\1-", api)
    try:
        schema = schema_contents(f"{_folder(version)}/{kind.lower()}-{group}.json", version)
    except FileNotFoundError:
        return None
    return jsonschema.Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _core_definitions(version))


@cache
def _core_definitions(version: str) -> Registry[Any]:
    definitions = schema_contents(f"{_folder(version)}/_definitions.json", version)
    return Resource.from_contents(definitions) @ Registry()


def _folder(version: str) -> str:
    whole = [known for known in all_versions() if major_minor(known) == version][-1]
    return f"kubernetes-json-schema/v{whole}-local-strict"


@cache
def _ray_faults(text: str, version: str) -> tuple[str, ...]:
    thing = json.loads(text)
    schema = _definition(version, thing["kind"])
    if schema is None:
        return (f"KubeRay {version}: no kind {thing['kind']}",)
    errors = sorted(_validator(version, thing["kind"]).iter_errors(thing), key=lambda error: list(error.absolute_path))
    found = [f"KubeRay {version}: {_place(error.absolute_path)}: {error.message}"[:300] for error in errors]
    return (*found, *(f"KubeRay {version}: {fault}" for fault in _broken_rules(schema, thing, thing["kind"])))


def _place(path: Any) -> str:
    return ".".join(map(str, path)) or "top level"


@cache
def _definition(version: str, kind: str) -> Object | None:
    file = DEFINITIONS / f"kuberay-{version}" / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        return None
    definition = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    [v1] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema: Object = v1["schema"]["openAPIV3Schema"]
    return schema


@cache
def _validator(version: str, kind: str) -> jsonschema.Draft202012Validator:
    schema = _definition(version, kind)
    assert schema is not None
    return jsonschema.Draft202012Validator(_strict(schema))


def _strict(schema: Object) -> Object:
    """JSON Schema that says what a structural schema says, and refuses what an API server would drop in silence."""
    kept = {key: schema[key] for key in _KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | ({"pattern": kept["pattern"]} if "pattern" in kept else {})
    if "type" in schema:
        kept["type"] = [schema["type"], "null"] if schema.get("nullable") else schema["type"]
    if "properties" in schema:
        kept["properties"] = {name: _strict(below) for name, below in schema["properties"].items()}
        kept["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if isinstance(schema.get("additionalProperties"), Mapping):
        kept["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        kept["items"] = _strict(schema["items"])
    return kept


def _broken_rules(schema: Object, value: Any, at: str) -> Iterator[str]:
    """Rules in CEL that a value breaks; those of transitions (`oldSelf`) hold for a new object."""
    if value is None:
        return
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{at}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        below = schema.get("additionalProperties")
        for name, child in value.items():
            known = schema.get("properties", {}).get(name, below if isinstance(below, Mapping) else {})
            yield from _broken_rules(known, child, f"{at}.{name}")
    elif isinstance(value, list) and "items" in schema:
        for number, child in enumerate(value):
            yield from _broken_rules(schema["items"], child, f"{at}.{number}")
