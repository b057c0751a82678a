"""Every error as the service tells it: problem details (RFC 9457), named by what the client does about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from scanloom.api import PROBLEM_JSON, FieldProblem, Problem, ProblemKind
from scanloom.errors import (
    BusyError,
    DeadlineError,
    DeadlineTooShort,
    QualityError,
    RecipeError,
    ScanloomError,
    StoreError,
)
from scanloom.section import UnknownKey
from serve.access import Forbidden, IssuerUnreachable, Unauthenticated
from serve.engines import UnavailableError
from serve.ledger import Conflict, NotFound
from serve.quotas import QuotaError

STATUS: Mapping[ProblemKind, tuple[int, str]] = {
    "bad-request": (400, "The request cannot be read"),
    "unauthenticated": (401, "Who asks is not known"),
    "forbidden": (403, "This caller may not do that"),
    "not-found": (404, "There is no such thing"),
    "not-allowed": (405, "This address does not take that method"),
    "unacceptable": (406, "The answer cannot be given in that format"),
    "too-slow": (408, "The request's body did not come in time"),
    "conflict": (409, "It contradicts what is there"),
    "changed": (412, "It is not what the request is for any more"),
    "too-large": (413, "The request's body is too large"),
    "invalid": (422, "The request is not valid"),
    "not-satisfiable": (416, "The file has no such part"),
    "outside-envelope": (422, "The generator was not trained on that"),
    "busy": (429, "There is no room for it now"),
    "quota": (429, "The tenant's quota is used up"),
    "internal": (500, "The service failed"),
    "deadline": (503, "It cannot be made in time"),
    "unavailable": (503, "The service cannot do it now"),
    "store-unavailable": (503, "The store does not answer"),
}
"""Status and title of each kind of problem."""
TYPE_PREFIX = "urn:scanloom:problem:"
_MOST_FIELDS = 32
_LONGEST_DETAIL = 1000
_STORE_RETRY_S = 5.0


class Refusal(ScanloomError):
    """A request is not done, for a reason that the client is told."""

    def __init__(
        self,
        kind: ProblemKind,
        detail: str,
        *,
        errors: Sequence[FieldProblem] = (),
        envelope: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind: ProblemKind = kind
        self.errors = tuple(errors)[:_MOST_FIELDS]
        self.envelope = envelope
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})

    @property
    def status(self) -> int:
        return STATUS[self.kind][0]


def invalid(field: str, message: str) -> Refusal:
    """The refusal of one field (dotted path), header or parameter."""
    told = FieldProblem(field=_short(field), message=_short(message))
    return Refusal("invalid", f"{told.field}: {told.message}" if field else message, errors=[told])


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of an error; of one that nobody foresaw, nothing but that the log has it."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return _of_routing(error)
    if isinstance(error, DeadlineTooShort):
        return invalid("deadline_s", str(error))
    if isinstance(error, StoreError):
        # Its text names places that are nobody's business; the log has it.
        return Refusal("store-unavailable", "the service's store does not answer", retry_after_s=_STORE_RETRY_S)
    kind: ProblemKind | None = next((kind for known, kind in _KINDS.items() if isinstance(error, known)), None)
    if kind is None:
        return Refusal("internal", "an error of the service; its log has more, under this request's id")
    headers = {"WWW-Authenticate": "Bearer"} if kind == "unauthenticated" else None
    return Refusal(kind, str(error), retry_after_s=getattr(error, "retry_after_s", None), headers=headers)


# Children before their parents.
_KINDS: Mapping[type[ScanloomError], ProblemKind] = {
    Unauthenticated: "unauthenticated",
    Forbidden: "forbidden",
    NotFound: "not-found",
    Conflict: "conflict",
    IssuerUnreachable: "unavailable",
    UnavailableError: "unavailable",
    QuotaError: "quota",
    DeadlineError: "deadline",
    BusyError: "busy",
    QualityError: "invalid",
    RecipeError: "invalid",
}


def of_validation(error: ValidationError, body: object) -> Refusal:
    """The refusal of a body, each fault by the dotted path of its field."""
    faults = error.errors(include_url=False, include_input=False)
    fields = [_field_problem(fault, body) for fault in faults[:_MOST_FIELDS]]
    first = f"{fields[0].field}: {fields[0].message}" if fields[0].field else fields[0].message
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Refusal("invalid", first + more, errors=fields)


def of_parameters(error: RequestValidationError) -> Refusal:
    """The refusal of what stands in a path or behind its question mark."""
    faults = error.errors()[:_MOST_FIELDS]
    fields = [FieldProblem(field=str(f["loc"][-1])[:_LONGEST_DETAIL], message=_short(str(f["msg"]))) for f in faults]
    return Refusal("invalid", f"{fields[0].field}: {fields[0].message}", errors=fields)


def response(refusal: Refusal, request: str) -> Response:
    """The answer for a refusal; `request` is the request's id."""
    status, title = STATUS[refusal.kind]
    told = Problem(
        type=TYPE_PREFIX + refusal.kind,
        title=title,
        status=status,
        detail=_short(str(refusal)),
        instance=request,
        errors=refusal.errors,
        envelope=refusal.envelope,
        retry_after_s=refusal.retry_after_s,
    )
    headers = dict(refusal.headers)
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after_s)))
    return Response(told.model_dump_json(exclude_none=True), status, headers, PROBLEM_JSON)


def _of_routing(error: HTTPException) -> Refusal:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Refusal("not-found", "there is nothing at this address; GET /openapi.json says what there is")
    if error.status_code == 405:
        return Refusal("not-allowed", "this address takes other methods", headers=headers)
    return Refusal("bad-request" if error.status_code < 500 else "internal", str(error.detail), headers=headers)


def _field_problem(fault: Mapping[str, Any], body: object) -> FieldProblem:
    path = _fields(fault["loc"], body)
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, UnknownKey):
        path.append(cause.key)
    message = str(fault["msg"]).removeprefix("Value error, ")
    return FieldProblem(field=_short(".".join(path)), message=_short(message))


def _fields(loc: Sequence[int | str], body: object) -> list[str]:
    """A fault's place as a client spells it: without the names that pydantic gives to the members of a union."""
    path: list[str] = []
    node, tagged = body, False
    for part in loc:
        if isinstance(node, Mapping) and not tagged and node.get("kind") == part:
            tagged = True
            continue
        path.append(str(part))
        node, tagged = _child(node, part), False
    return path


def _child(node: object, part: int | str) -> object:
    if isinstance(node, Mapping):
        return node.get(part)
    return node[part] if isinstance(node, list) and isinstance(part, int) and part < len(node) else None


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_DETAIL else f"{text[: _LONGEST_DETAIL - 3]}..."
