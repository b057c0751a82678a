"""The HTTP face of the service: API v1 on FastAPI, of parts that know nothing of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from scanloom.api import (
    Answer,
    DatasetJob,
    DatasetJobs,
    DatasetRequest,
    DatasetResult,
    GeneratorInfo,
    Generators,
    ImagesAnswer,
    ImagesRequest,
    ProblemKind,
)
from scanloom.section import nearest
from serve.access import Forbidden
from serve.datasets import FILE_TYPES, Datasets
from serve.images import Images
from serve.intake import Admission, Bodies, Intake
from serve.metrics import CONTENT_TYPE
from serve.openapi import (
    ANY,
    IMAGE_FORMATS,
    KEYED,
    KEYLESS,
    body_of,
    dataset_examples,
    document,
    images_examples,
    problems,
    success,
)
from serve.parts import Parts as Parts
from serve.pictures import JSON
from serve.problem import Refusal, of_parameters, refusal_of

ENCODERS = 4
"""Threads that encode images, beside the event loop; codecs leave the interpreter to others."""
_NOT_READY_RETRY_S = 2.0


class State(Answer):
    """`GET /healthz` and `GET /readyz`, where all is well."""

    status: Literal["ok", "ready"]


def gateway(parts: Parts) -> FastAPI:
    """The application of these parts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        # Lines of the last seconds are still to be written.
        await asyncio.to_thread(parts.audit.close)

    app = FastAPI(docs_url=None, redoc_url=None, redirect_slashes=False, openapi_url=None, lifespan=lifespan)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    # The last one added is the outermost.
    app.add_middleware(Bodies, limits=parts.service.limits)
    app.add_middleware(Admission, gatekeeper=parts.gatekeeper)
    app.add_middleware(Intake, measure=parts.measure)
    _add_images(app, parts)
    _add_datasets(app, parts)
    _add_generators(app, parts)
    _add_operations(app, parts)
    return app


def _add_images(app: FastAPI, parts: Parts) -> None:
    images = Images(parts, ThreadPoolExecutor(ENCODERS, thread_name_prefix="encoder"))
    app.add_api_route(
        "/v1/images",
        images.post,
        methods=["POST"],
        response_model=ImagesAnswer,
        responses=success(200, "The images.", content=IMAGE_FORMATS)
        | problems(*KEYED, "unacceptable", "invalid", "outside-envelope", "busy", "quota", "deadline"),
        openapi_extra=body_of(ImagesRequest, images_examples(next(iter(parts.catalogue.values())))),
        summary="Make a few images now",
        tags=["images"],
    )


def _add_datasets(app: FastAPI, parts: Parts) -> None:
    datasets = Datasets(parts)
    add = partial(app.add_api_route, tags=["datasets"])
    faults: tuple[ProblemKind, ...] = (*KEYED, "not-found", "invalid", "busy", "store-unavailable")
    known, settled = problems(*faults), problems(*faults, "conflict")
    add(
        "/v1/datasets",
        datasets.post,
        methods=["POST"],
        status_code=202,
        response_model=DatasetJob,
        responses=success(200, "The same key ordered it before.", model=DatasetJob)
        | problems(*faults, "outside-envelope", "quota", "conflict"),
        openapi_extra=body_of(DatasetRequest, dataset_examples(next(iter(parts.catalogue.values())))),
        summary="Order a dataset",
    )
    one = "/v1/datasets/{id}"
    add("/v1/datasets", datasets.list, response_model=DatasetJobs, responses=known, summary="List datasets")
    add(one, datasets.get, response_model=DatasetJob, responses=known, summary="Where a dataset stands")
    add(f"{one}/cancel", datasets.cancel, methods=["POST"], response_model=DatasetJob, responses=settled,
        summary="Cancel a dataset")  # fmt: skip
    add(f"{one}/result", datasets.result, response_model=DatasetResult, responses=settled,
        summary="The files of a finished dataset")  # fmt: skip
    content: dict[str, Any] = {name: {} for name in FILE_TYPES}
    file = success(200, "The file.", content=content) | success(
        206, "The part of it that Range names.", content=content
    )
    unchanged = success(304, "It is what If-None-Match names: the ETag of a file is its SHA-256.")
    add(f"{one}/files/{{path:path}}", datasets.file, response_class=Response,
        responses=file | unchanged | problems(*faults, "conflict", "changed", "not-satisfiable"),
        summary="A file of a finished dataset in a local store")  # fmt: skip


def _add_generators(app: FastAPI, parts: Parts) -> None:
    told = {name: offer.info() for name, offer in parts.catalogue.items()}

    async def every(request: Request) -> Response:
        _require_any_scope(request)
        return Response(Generators(generators=list(told.values())).model_dump_json(), media_type=JSON)

    async def one(request: Request, name: str) -> Response:
        _require_any_scope(request)
        if name not in told:
            raise Refusal("not-found", f"no generator of this name is served here{nearest(name[:64], told)}")
        return Response(told[name].model_dump_json(), media_type=JSON)

    add = partial(app.add_api_route, tags=["generators"])
    add("/v1/generators", every, response_model=Generators, responses=problems(*KEYED), summary="List generators")
    add("/v1/generators/{name}", one, response_model=GeneratorInfo, responses=problems(*KEYED, "not-found"),
        summary="What may be asked of a generator")  # fmt: skip


def _add_operations(app: FastAPI, parts: Parts) -> None:
    openapi: dict[str, Any] = {}

    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz() -> Response:
        if not await parts.ready():
            raise Refusal("unavailable", "no engine is ready", retry_after_s=_NOT_READY_RETRY_S)
        return JSONResponse({"status": "ready"})

    async def metrics(request: Request) -> Response:
        request.state.caller.require("admin")
        return Response(await parts.measure.exposition(), media_type=CONTENT_TYPE)

    async def described() -> Response:
        openapi.update(openapi or document(app))
        return JSONResponse(openapi)

    add = partial(app.add_api_route, tags=["operations"])
    add("/healthz", healthz, response_model=State, responses=problems(*ANY), openapi_extra=KEYLESS,
        summary="Whether the gateway answers")  # fmt: skip
    add("/readyz", readyz, response_model=State, responses=problems(*ANY, "unavailable"), openapi_extra=KEYLESS,
        summary="Whether images can be made")  # fmt: skip
    for path, state in (("/healthz", healthz), ("/readyz", readyz)):
        # Load balancers ask so.
        add(path, state, methods=["HEAD"], include_in_schema=False)
    page = success(200, "In Prometheus' text format.", content={"text/plain": {}})
    add(
        "/metrics",
        metrics,
        response_class=Response,
        responses=page | problems(*KEYED),
        summary="The service in numbers",
    )
    add("/openapi.json", described, include_in_schema=False)


def _require_any_scope(request: Request) -> None:
    if not request.state.caller.scopes:
        raise Forbidden("this needs a scope, and your key or token has none; ask for one that has it")


async def _refused(request: Request, error: Exception) -> Response:
    """Nothing: what FastAPI and the router find is raised as a refusal, which Intake tells and counts."""
    if isinstance(error, RequestValidationError):
        raise of_parameters(error) from None
    refusal = refusal_of(error)
    if refusal.kind == "not-allowed":
        allowed = ", ".join(sorted(_methods(request)))
        refusal = Refusal("not-allowed", f"this address takes {allowed}", headers={"Allow": allowed})
    raise refusal from None


def _methods(request: Request) -> set[str]:
    """Those that the address takes; the router only looks at the first of its routes."""
    routes = [route for route in request.app.routes if isinstance(route, APIRoute)]
    return {method for r in routes if r.path_regex.match(request.scope["path"]) for method in r.methods or ()}
