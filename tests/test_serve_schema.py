"""The service against its own OpenAPI document: whatever is sent, no fault of the service, and answers as it says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.generation.case import Case
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from scanloom.sampling.image_order import ImageOrder, MadeImages
from serve.gateway import gateway
from serve.openapi import document
from serve.replica import Replica
from tests.served_datasets import finish
from tests.served_images import ORDER, bearer, listening, parts_of, settings
from tests.tiny_generator import publish_generator

FEW, MANY = 12, 240
"""Cases of each operation and mode."""
STEPS, LEAST_S = 3, 20.0
FILE = "images/shard-000000-0a1b2c3d4e5f.parquet"
CHECKS: list[Any] = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance, allow_header_conformance,
]  # fmt: skip
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
KNOWN = st.fixed_dictionaries(
    {},
    optional={
        "sex": st.sampled_from(["F", "M", None]),
        "age": st.floats(21.0, 88.0) | st.integers(21, 88) | st.none(),
        "view": st.sampled_from(["PA", None]),
        "findings": st.lists(st.sampled_from(["Cardiomegaly", "Effusion"]), max_size=3) | st.none(),
    },
)


@dataclass
class Service:
    """A service under uvicorn, and what came of the cases that were sent to it."""

    root: str
    document: dict[str, Any]
    ids: list[str]
    session: requests.Session = field(default_factory=requests.Session)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)

    def send(self, case: Case[Any], known: dict[str, Any], dataset: str | None) -> None:
        """Send a case, often with what this generator knows and of what is there, or few would go far."""
        body: Any = case.body
        if known and isinstance(body, dict) and "attributes" in body:
            body = body | {"attributes": known}
        if dataset:
            there = {"id": dataset, "name": "tiny", "path": FILE}
            case.path_parameters.update({name: there[name] for name in case.path_parameters or ()})
        # A deadline of nothing cannot be met, and 503 says so rightly.
        if isinstance(body, dict) and isinstance(body.get("deadline_s"), float) and body["deadline_s"] < LEAST_S:
            body = body | {"deadline_s": LEAST_S}
        case.body = body
        answer = case.call(base_url=self.root, session=self.session, headers=bearer("admin"))
        case.validate_response(answer, checks=CHECKS)
        self.statuses[case.operation.label, answer.status_code] += 1

    def fuzz(self, count: int) -> None:
        """`count` cases of every operation, of what fits the document and as many of what does not."""
        schema = schemathesis.openapi.from_dict(self.document, config=SchemathesisConfig())
        for found in schema.get_all_operations():
            assert isinstance(found, Ok)
            for mode in MODES:
                attempt = given(
                    found.ok().as_strategy(generation_mode=mode), KNOWN, st.sampled_from([None, *self.ids])
                )(self.send)
                settled = examples(
                    max_examples=count, deadline=None, database=None, derandomize=True,
                    phases=[Phase.generate], suppress_health_check=list(HealthCheck),
                )(attempt)  # fmt: skip
                try:
                    settled()
                except Unsatisfiable:
                    # An operation that takes nothing cannot be asked wrongly.
                    assert mode is GenerationMode.NEGATIVE


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    uri = publish_generator(str(folder / "generator")).uri
    made = settings(uri, str(folder / "datasets"), everyone={"datasets_at_once": 20}, limits={"deadline_s": 30})
    replica = Replica(made)

    async def quick(order: ImageOrder) -> MadeImages:
        # By the real engine, but not in a thousand steps.
        return await replica.make(replace(order, steps=min(order.steps, STEPS)))

    app = gateway(parts_of(made, quick))
    with listening(app) as (host, port):
        root = f"http://{host}:{port}"
        body, headers = json.dumps(ORDER), bearer("admin")
        placed = [requests.post(f"{root}/v1/datasets", data=body, headers=headers).json() for _ in range(2)]
        finish(made, "operators", placed[0]["id"], {FILE: b"PAR1"})
        yield Service(root, document(app), [job["id"] for job in placed])
    replica.drain(0.0)


def require_reached(statuses: Counter[tuple[str, int]]) -> None:
    """The cases went all the way: each operation succeeded, and each that takes anything refused something."""
    succeeded = {label for label, status in statuses if status < 300}
    refused = {label for label, status in statuses if 400 <= status < 500}
    labels = {label for label, _ in statuses}
    assert labels == succeeded
    assert {"POST /v1/images", "POST /v1/datasets", "GET /v1/datasets", "GET /v1/datasets/{id}"} <= refused


def test_a_few_hundred_cases_of_its_document(service: Service) -> None:
    before = sum(service.statuses.values())
    service.fuzz(FEW)
    assert sum(service.statuses.values()) - before >= 200
    require_reached(service.statuses)


@pytest.mark.slow
def test_five_thousand_cases_of_its_document_in_bounded_memory(service: Service) -> None:
    before, memory = sum(service.statuses.values()), psutil.Process().memory_info().rss
    service.fuzz(MANY)
    assert sum(service.statuses.values()) - before >= 5000
    require_reached(service.statuses)
    assert psutil.Process().memory_info().rss - memory < 512 << 20


WORDS = st.text(max_size=12) | st.sampled_from(
    ["attributes", "steps", "count", "seed", "cohort", "kind", "cells", "images"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.integers(-(10**400), 10**400),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=20,
)


@pytest.mark.parametrize("path", ["/v1/images", "/v1/datasets"])
def test_no_body_is_a_fault_of_the_service(service: Service, path: str) -> None:
    @examples(max_examples=150, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(st.binary(max_size=200) | JSON.map(lambda tree: json.dumps(tree).encode()))
    def send(body: bytes) -> None:
        answer = service.session.post(service.root + path, data=body, headers=bearer("admin"))
        assert answer.status_code < 500, (body, answer.text)

    send()
