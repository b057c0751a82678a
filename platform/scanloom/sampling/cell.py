"""Cells: the kinds of images that a cohort is made of, and how a recipe or a table spells them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

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
    """Numbers from low to high, both included."""

    low: float
    high: float
    step: Annotated[float, Field(ge=0)] | None = None
    """Which of them are meant: its multiples, and both ends are such; 0: all. None, where nobody counted how finely the
    corpus's numbers are written: whole ones where both ends are whole, else all."""

    @property
    def grid(self) -> float:
        """Of what all numbers that are meant are multiples; 0: all between the ends are."""
        if self.step is not None:
            return self.step
        return float(self.low < self.high and self.low.is_integer() and self.high.is_integer())

    @property
    def numbers(self) -> float:
        """How many are meant; where all are, the length."""
        if self.grid:
            return round((self.high - self.low) / self.grid) + 1
        return self.high - self.low if self.low < self.high else 1.0

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, float]:
        # Plans of before there were steps keep their digests.
        told: dict[str, float] = serialize(self)
        return told if self.step is not None else {"low": self.low, "high": self.high}


@dataclass(frozen=True)
class Scale:
    """How finely the corpus's numbers of one attribute are written."""

    step: float
    """All but a few are its multiples; 0: they are not those of any."""
    is_exact: bool
    """Whether all are."""

    def span(self, low: float, high: float) -> Span:
        """What the corpus could have between two numbers.

        Ends that it could not have are moved inwards. Where some scan is of finer numbers, or nothing is left, all
        that lies between was meant.
        """
        if not self.step:
            return Span(low=low, high=high, step=0.0)
        first, last = math.ceil(_places(low, self.step)), math.floor(_places(high, self.step))
        inside = Span(low=_single(first * self.step), high=_single(last * self.step), step=self.step)
        kept = first <= last and (self.is_exact or (inside.low, inside.high) == (low, high))
        return inside if kept else Span(low=low, high=high, step=0.0)


Scales = Mapping[str, Scale]
"""Of attributes, by name; one that is left out was not counted."""


def scales(envelope: Envelope) -> Scales:
    """How finely the numbers are written that a generator was trained on."""
    known = ((name, seen, seen.resolution) for name, seen in envelope.ranges.items())
    return {name: Scale(step, seen.is_exact) for name, seen, step in known if step is not None}


def count(low: float, high: float, grid: float, closed: bool = True) -> int:
    """How many multiples of `grid` lie in [low, high], or in [low, high) where it is not closed."""
    first, last = _places(low, grid), _places(high, grid)
    return max(0, (math.floor(last) + 1 if closed else math.ceil(last)) - math.ceil(first))


def _places(number: float, grid: float) -> float:
    """`number / grid`, whole where single precision cannot tell it from a whole one."""
    exact = number / grid
    nearest = float(round(exact))
    return nearest if abs(exact - nearest) <= 1e-7 * abs(exact) + 1e-9 else exact


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


def parse_cell(
    schema: AttributeSchema, raw: Mapping[str, Any], share_key: str, where: str, scales: Scales | None = None
) -> Cell:
    """The cell of a mapping of attributes to what a recipe says of them, and `share_key` to its share (default 1).

    Raises RecipeError that begins with `where`.
    """
    known = scales or {}
    values = {n: parse_value(schema[n], value, where, known.get(n)) for n, value in raw.items() if n != share_key}
    return Cell(values=values, share=parse_share(raw.get(share_key, 1), where))


def parse_value(declaration: AttributeDeclaration, value: object, where: str, scale: Scale | None = None) -> Wanted:
    """What a recipe says of one attribute: `unknown` and null are None, labels may be joined by `+`, or `none`;
    numbers as text, and spans as `60-79` or `[60, 79]`, of which those are meant that the corpus's scale has.
    """
    if value is None or (value == "unknown" and "unknown" not in getattr(declaration, "values", ())):
        return None
    try:
        if isinstance(declaration, NumberAttribute):
            value = _number(declaration, value) if isinstance(value, str) else value
            if isinstance(value, (list, tuple)):
                return _span(declaration, value, scale)
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
            low, high = max(value.low, seen.low), min(value.high, seen.high)
            kept = Scale(value.step, is_exact=True).span(low, high) if value.step else None
            values[name] = kept or value.model_copy(update={"low": low, "high": high})
    return Cell(values=values, share=cell.share)


def split(span: Span, edges: Sequence[float]) -> list[Span]:
    """The span cut at these edges, each of which begins a part.

    One of multiples is cut into such, without parts that hold none; where it is only of whole numbers because both
    ends are, if the edges are whole too. Any other is cut into parts that each hold all numbers below the next one's
    beginning, and of edges that single precision cannot tell apart only one counts.
    """
    inside = sorted({_single(edge) for edge in edges if span.low < edge <= span.high})
    if span.step or (span.grid and all(edge.is_integer() for edge in inside)):
        firsts = [math.ceil(_places(edge, span.grid)) for edge in inside]
        lows = [span.low, *(_single(first * span.grid) for first in firsts)]
        highs = [*(_single((first - 1) * span.grid) for first in firsts), span.high]
        ends = zip(lows, highs, strict=True)
        return [Span(low=low, high=high, step=span.step) for low, high in ends if low <= high]
    inside = [edge for edge in inside if span.low < edge < span.high]
    if not inside:
        return [span]
    highs = [*(_below(edge) for edge in inside), span.high]
    parts = [Span(low=low, high=high, step=span.step) for low, high in zip([span.low, *inside], highs, strict=True)]
    # A last part with whole ends would be of whole numbers, unlike the others.
    return [Span(low=part.low, high=_below(part.high)) if part.grid else part for part in parts]


def _single(number: float) -> float:
    return float(np.float32(number))


def _below(number: float) -> float:
    """The single-precision number before this one."""
    return _single(np.nextafter(np.float32(number), np.float32(-np.inf)))


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


def _span(declaration: AttributeDeclaration, said: Sequence[object], scale: Scale | None) -> Span:
    if len(said) != 2:
        raise RecipeError(f"{declaration.name}={list(said)!r}: expected a number or [low, high]")
    low, high = (_checked(declaration, end) for end in said)
    if not (isinstance(low, float) and isinstance(high, float) and low <= high):
        raise RecipeError(f"{declaration.name}={list(said)!r}: low is over high")
    return scale.span(low, high) if scale is not None else Span(low=low, high=high)


def _checked(declaration: AttributeDeclaration, value: object) -> Value:
    try:
        return AttributeSchema(declarations=(declaration,)).check({declaration.name: value})[declaration.name]
    except OverflowError:
        raise RecipeError(f"{declaration.name}: an integer of so many digits is beyond all numbers") from None
