"""Cells: the kinds of images that a cohort is made of, and how a recipe or a table spells them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from scanloom.attributes import NO_LABEL, AttributeSchema, Envelope, Value
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import AttributeDeclaration, LabelsAttribute, NumberAttribute

MOST_CELLS = 20_000
"""Of a joint table that is computed; one that is written out may have any number."""
_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_SPAN = re.compile(rf"\s*(?:\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]|({_NUMBER})\s*-\s*({_NUMBER}))\s*")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Span(_Record):
    """Numbers from low to high, both included: whole ones where both ends are, else all that lie between."""

    low: float
    high: float

    @property
    def by_unit(self) -> bool:
        """Whether only whole numbers are meant."""
        return self.low < self.high and self.low.is_integer() and self.high.is_integer()


Wanted = Value | Span
"""What a cell says of an attribute; None: unknown."""


class Cell(_Record):
    """One kind of image: attribute -> value, span of numbers or None (unknown); `share` is relative."""

    values: Mapping[str, str | float | tuple[str, ...] | Span | None]
    share: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    @property
    def known(self) -> dict[str, Wanted]:
        """The attributes that the cell gives a value."""
        return {name: value for name, value in self.values.items() if value is not None}


class CohortTables(_Record):
    """A cohort with nothing left to look up: independent joint tables over disjoint attributes."""

    tables: tuple[tuple[Cell, ...], ...]


def parse_cell(schema: AttributeSchema, raw: Mapping[str, Any], share_key: str, where: str) -> Cell:
    """The cell of a mapping of attributes to what a recipe says of them, and `share_key` to its share (default 1).

    Raises RecipeError that begins with `where`.
    """
    values = {name: parse_value(schema[name], value, where) for name, value in raw.items() if name != share_key}
    return Cell(values=values, share=parse_share(raw.get(share_key, 1), where))


def parse_value(declaration: AttributeDeclaration, value: object, where: str) -> Wanted:
    """What a recipe says of one attribute: `unknown` and null are None, labels may be joined by `+`, or `none`;
    numbers as text, and spans as `60-79` or `[60, 79]`.
    """
    if value is None or (value == "unknown" and "unknown" not in getattr(declaration, "values", ())):
        return None
    try:
        if isinstance(declaration, NumberAttribute):
            value = _number(declaration, value) if isinstance(value, str) else value
            if isinstance(value, (list, tuple)):
                return _span(declaration, value)
        if isinstance(declaration, LabelsAttribute) and isinstance(value, str):
            return _checked(declaration, _labels(declaration, value))
        return _checked(declaration, value)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def parse_share(share: object, where: str) -> float:
    """A share: a number of 0 or more."""
    # An integer of a recipe can be larger than any floating-point number.
    if isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share <= sys.float_info.max:
        return float(share)
    raise RecipeError(f"{where}: share {share!r}; expected a number of 0 or more")


def shown(values: Mapping[str, Wanted]) -> str:
    """A cell as a person reads it, e.g. `sex=F, age=60-79, findings=none`; unknown attributes are left out."""
    told = [f"{name}={shown_value(value)}" for name, value in values.items() if value is not None]
    return ", ".join(told) or "anything"


def shown_value(value: Wanted) -> str:
    """One value, spelled as `parse_value` reads it."""
    if isinstance(value, Span):
        return f"{value.low:g}-{value.high:g}" if value.low < value.high else f"{value.low:g}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "+".join(value) or NO_LABEL
    return "unknown" if value is None else str(value)


def require_within(cell: Cell, envelope: Envelope) -> None:
    """Raise ArtefactError naming the cell and the envelope where the cell asks for a value outside it."""
    for name, value in cell.values.items():
        for end in ends(value):
            try:
                envelope.require({name: end})
            except ArtefactError as error:
                raise ArtefactError(
                    f"generate.cohort: {error}; asked for by the cell {shown(cell.values)}; ask for what lies within, "
                    "or train on more"
                ) from error


def clipped(cell: Cell, envelope: Envelope) -> Cell:
    """The cell with its spans cut to what was seen: a decade's bin reaches beyond the youngest and oldest scan."""
    values = dict(cell.values)
    for name, value in values.items():
        seen = envelope.ranges.get(name)
        if isinstance(value, Span) and seen and value.low <= seen.high and value.high >= seen.low:
            values[name] = Span(low=max(value.low, seen.low), high=min(value.high, seen.high))
    return Cell(values=values, share=cell.share)


def split(span: Span, edges: Sequence[float]) -> list[Span]:
    """The span cut at these edges, each of which begins a part.

    A span of whole numbers is cut into such where the edges are whole too; any other into parts that each hold all
    numbers below the next one's beginning, and of edges that single precision cannot tell apart only one counts.
    """
    inside = sorted({float(np.float32(edge)) for edge in edges if span.low < edge <= span.high})
    if span.by_unit and all(edge.is_integer() for edge in inside):
        lasts = [*(edge - 1 for edge in inside), span.high]
        return [Span(low=low, high=high) for low, high in zip([span.low, *inside], lasts, strict=True)]
    inside = [edge for edge in inside if span.low < edge < span.high]
    if not inside:
        return [span]
    lasts = [*(_below(edge) for edge in inside), span.high]
    parts = [Span(low=low, high=high) for low, high in zip([span.low, *inside], lasts, strict=True)]
    # A last part with whole ends would be of whole numbers, unlike the others.
    return [Span(low=part.low, high=_below(part.high)) if part.by_unit else part for part in parts]


def _below(number: float) -> float:
    """The single-precision number before this one."""
    return float(np.nextafter(np.float32(number), np.float32(-np.inf)))


def ends(value: Wanted) -> tuple[Value, ...]:
    """Both ends of a span; of anything else the value."""
    return (value.low, value.high) if isinstance(value, Span) else (value,)


def _number(declaration: NumberAttribute, text: str) -> float | list[float]:
    if found := _SPAN.fullmatch(text):
        return [float(end) for end in found.groups() if end is not None]
    try:
        return float(text)
    except ValueError:
        raise RecipeError(
            f"{declaration.name}={text!r}: expected a number, a span such as '60-79', or in marginals "
            '{"uniform": [low, high]}'
        ) from None


def _labels(declaration: LabelsAttribute, text: str) -> list[str]:
    if text in declaration.values:
        return [text]
    return [] if text == NO_LABEL else text.split("+")


def _span(declaration: AttributeDeclaration, said: Sequence[object]) -> Span:
    if len(said) != 2:
        raise RecipeError(f"{declaration.name}={list(said)!r}: expected a number or [low, high]")
    low, high = (_checked(declaration, end) for end in said)
    if not (isinstance(low, float) and isinstance(high, float) and low <= high):
        raise RecipeError(f"{declaration.name}={list(said)!r}: low is over high")
    return Span(low=low, high=high)


def _checked(declaration: AttributeDeclaration, value: object) -> Value:
    try:
        return AttributeSchema(declarations=(declaration,)).check({declaration.name: value})[declaration.name]
    except OverflowError:
        raise RecipeError(f"{declaration.name}: an integer of so many digits is beyond all numbers") from None
