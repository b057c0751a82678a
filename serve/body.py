"""Bodies of requests: strict JSON, of values that some field could hold, as one of the API's models."""

from __future__ import annotations

import asyncio
import math
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from scanloom.section import Section
from serve.problem import Refusal, invalid, of_validation

Body = TypeVar("Body", bound=Section)

# Far above what any request needs. Below them nothing that follows can take long or much memory.
MOST_VALUES = 50_000
LONGEST_TEXT = 4096
LARGEST_INTEGER = 2**63
_READ_AT_ONCE_BYTES = 1 << 14

_Place = tuple[Any, str] | None
"""A value's name and the place of what holds it."""


async def read_body(request: Request, model: type[Body]) -> Body:
    """The request's body. Raises Refusal: `bad-request` for what is no JSON, `invalid` with each field at fault."""
    data = await request.body()
    if len(data) <= _READ_AT_ONCE_BYTES:
        return parse(data, model)
    return await asyncio.to_thread(parse, data, model)


def parse(data: bytes, model: type[Body]) -> Body:
    """A body of these bytes; raises as `read_body` does."""
    try:
        tree = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal("bad-request", f"the body is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise invalid("", "the body is no object; expected one of fields and their values, in braces")
    _require_sound(tree)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise of_validation(error, tree) from None


def _require_sound(tree: object) -> None:
    """Raise Refusal for a number or a text beyond all that any field holds, and for more values than any body needs.

    Some fields hold whatever a generator's attributes ask for, which is checked late and by others.
    """
    ahead: list[tuple[_Place, object]] = [(None, tree)]
    values = 1
    while ahead:
        place, value = ahead.pop()
        fault = _fault(value)
        if fault:
            raise invalid(_spelled(place), fault)
        if isinstance(value, (dict, list)):
            values += len(value)
            if values > MOST_VALUES:
                raise Refusal("invalid", f"the body holds more than {MOST_VALUES} values; ask for less at once")
            named = value.items() if isinstance(value, dict) else enumerate(value)
            ahead += [((place, str(name)), inner) for name, inner in named]


def _fault(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a number beyond all floating point"
    if isinstance(value, int):
        return "" if abs(value) <= LARGEST_INTEGER else "a number beyond all that a field holds"
    longest = (
        max(map(len, value), default=0) if isinstance(value, dict) else len(value) if isinstance(value, str) else 0
    )
    return "" if longest <= LONGEST_TEXT else f"a text of {longest} characters; none has more than {LONGEST_TEXT}"


def _spelled(place: _Place) -> str:
    parts = []
    while place is not None:
        place, name = place
        parts.append(name)
    return ".".join(reversed(parts))
