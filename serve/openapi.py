"""The service's OpenAPI document: what FastAPI knows of the routes, and bodies, problems, keys, examples that work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from scanloom import __version__
from scanloom.api import PROBLEM_JSON, DatasetRequest, ImagesRequest, Problem, ProblemKind
from scanloom.section import Section
from serve.catalogue import Offer
from serve.pictures import DICOM, JSON, MULTIPART, PARQUET, PNG
from serve.problem import STATUS

REFS = "#/components/schemas/{model}"
ANY: tuple[ProblemKind, ...] = ("bad-request", "too-large", "too-slow", "internal")
"""What can become of any request."""
KEYED: tuple[ProblemKind, ...] = ("unauthenticated", "forbidden", "unavailable", *ANY)
"""What can become of one that needs a key."""
KEYLESS: dict[str, Any] = {"security": []}
"""`openapi_extra` of a route that anybody may ask."""
_BINARY = {"schema": {"type": "string", "format": "binary"}}
IMAGE_FORMATS: Mapping[str, Any] = {PNG: _BINARY, DICOM: _BINARY, MULTIPART: _BINARY, PARQUET: _BINARY}
"""Content of an answer with images, beside JSON."""
_REQUEST_ID = {
    "name": "X-Request-ID", "in": "header", "required": False, "schema": {"type": "string"},
    "description": "Taken for the request's id where it is 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'.",
}  # fmt: skip
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key", "in": "header", "required": False,
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    "description": "The same key and body again give the same seed or the same dataset.",
}  # fmt: skip
_ID_SENT = {"X-Request-ID": {"description": "The request's id.", "schema": {"type": "string"}, "required": True}}


def problems(*kinds: ProblemKind) -> dict[int | str, dict[str, Any]]:
    """Responses of a route that may answer with these kinds of problem."""
    by_status: dict[int, list[str]] = {}
    for kind in dict.fromkeys(kinds):
        by_status.setdefault(STATUS[kind][0], []).append(f"`{kind}`: {STATUS[kind][1]}")
    content = {PROBLEM_JSON: {"schema": {"$ref": REFS.format(model="Problem")}}}
    return {
        status: {"description": "; ".join(told), "content": content, "headers": _ID_SENT | _retry(status)}
        for status, told in sorted(by_status.items())
    }


def success(status: int, description: str, **told: Any) -> dict[int | str, dict[str, Any]]:
    """One more response of a route; `told`: `content` by media type, or `model`."""
    return {status: {"description": description, **told}}


def body_of(model: type[Section], examples: Mapping[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes a body, which may be sent again under an Idempotency-Key."""
    schema = {"$ref": REFS.format(model=model.__name__)}
    told = {name: {"summary": name, "value": value} for name, value in examples.items()}
    return {
        "requestBody": {"required": True, "content": {JSON: {"schema": schema, "examples": told}}},
        "parameters": [_IDEMPOTENCY_KEY],
    }


def images_examples(offer: Offer) -> dict[str, Any]:
    """Bodies of `POST /v1/images` that a generator can meet."""
    known = offer.example()
    return {
        "one image": {"attributes": known, "seed": 7, "steps": 20},
        "whatever it likes": {},
        "two of a named generator, quickly": {
            "generator": offer.name, "attributes": known, "count": 2, "steps": 4, "guidance_scale": 1.0,
        },
        "as DICOM with 12 bits": {
            "attributes": known, "bits_stored": 12, "dicom": {"sop_class": "DX", "transfer_syntax": "jpeg-ls"},
        },
    }  # fmt: skip


def dataset_examples(offer: Offer) -> dict[str, Any]:
    """Bodies of `POST /v1/datasets` that a generator can meet."""
    cells = [{**offer.example(), "share": 3}, {"share": 1}]
    return {
        "as the corpus is": {"images": 100, "cohort": {"kind": "as-corpus"}},
        "chosen cells": {"images": 8, "cohort": {"kind": "cells", "cells": cells}, "steps": 8},
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The document of an application whose routes were declared with the above."""
    told = get_openapi(
        title="scanloom", version=__version__, routes=app.routes,
        description="Synthetic medical images and datasets of them, made to order. Problems are RFC 9457 documents.",
    )  # fmt: skip
    _, schemas = models_json_schema(
        [(ImagesRequest, "validation"), (DatasetRequest, "validation"), (Problem, "serialization")], ref_template=REFS
    )
    components = told.setdefault("components", {})
    components["schemas"] = components.get("schemas", {}) | schemas["$defs"]
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    told["security"] = [{"key": []}]
    for path in told["paths"].values():
        for operation in path.values():
            operation.setdefault("parameters", []).append(_REQUEST_ID)
            for status, answer in operation["responses"].items():
                if status.startswith("2"):
                    answer.setdefault("headers", {}).update(_ID_SENT)
    return told


def _retry(status: int) -> dict[str, Any]:
    if status not in (429, 503):
        return {}
    return {"Retry-After": {"description": "Seconds until asking again may help.", "schema": {"type": "integer"}}}
