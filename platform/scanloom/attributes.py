"""What a scan is of: the attribute schema that travels from corpus to generator to dataset.

An attribute's value is a str (category), a float in the declared unit (number), a tuple of labels in declared order
(labels; the empty tuple says "none of them"), or None: unknown. Numbers are rounded to single precision at once, which
is what Parquet and conditioners hold. torch-free, so that curation needs no GPU stack.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from scanloom.errors import ArtefactError, RecipeError, ScanError
from scanloom.recipe import (
    AttributeDeclaration,
    CategoryAttribute,
    LabelsAttribute,
    NumberAttribute,
    nearest,
)

NO_LABEL = "none"
"""How an envelope names the empty set of labels."""
OLDEST_YEARS = 130
"""An age above it is a slip of the pen (NIH ChestX-ray14 has one of 411), not a person whose age a cap hides."""

Value = str | float | tuple[str, ...] | None
Attributes = Mapping[str, Value]


class AttributeSchema(BaseModel):
    """The ordered attribute declarations of a corpus, a generator or a dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    declarations: Annotated[tuple[AttributeDeclaration, ...], Field(min_length=1)]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.declarations)

    def __getitem__(self, name: str) -> AttributeDeclaration:
        for declaration in self.declarations:
            if declaration.name == name:
                return declaration
        raise RecipeError(f"no attribute {name!r} in the schema{nearest(name, self.names)}")

    def parse(self, raw: Mapping[str, str | None]) -> dict[str, Value]:
        """Schema values from a source's text (key: the declaration's `source` or name).

        Absent or empty text is unknown. Text outside the declared values is unknown too, so that no free text of a
        source can pass; labels that the schema does not name are left out, and "none of them" must be spelled.

        Raises ScanError("attribute-out-of-range") for a number outside the declared range and
        ScanError("attribute-not-a-number") for text where a number is declared.
        """
        return {d.name: _parse(d, raw.get(d.source or d.name)) for d in self.declarations}

    def check(self, values: Mapping[str, object]) -> dict[str, Value]:
        """The values in schema order and canonical form; attributes left out become unknown.

        Raises RecipeError that names the attribute, what was found and what is allowed.
        """
        for name in values:
            self[name]
        return {d.name: _check(d, values.get(d.name)) for d in self.declarations}

    def arrow_fields(self) -> list[pa.Field]:
        """One nullable Parquet column per attribute: string, float32 or list<string>."""
        types = {"category": pa.string(), "number": pa.float32(), "labels": pa.list_(pa.string())}
        return [pa.field(d.name, types[d.kind]) for d in self.declarations]

    def from_row(self, row: Mapping[str, object]) -> dict[str, Value]:
        """The attributes of one Parquet row (lists back to tuples; NaN back to unknown)."""
        return self.check({n: _plain(row.get(n)) for n in self.names})


RESOLUTIONS = (1.0, 0.1, 0.01, 0.001)
"""Of numbers: whole ones, tenths, and so on; finer ones count as any number."""
_MOST = 0.99
# Single precision tells no thousandths of thousands apart.
_TOLD_APART = 1e6


class Range(BaseModel):
    """Closed range of a number that was seen in training, and how finely it was written down there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float
    high: float
    scans: tuple[int, ...] | None = None
    """With a whole number, with one of tenths, and so on as RESOLUTIONS has them, and last with a finer one; None:
    not counted."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A range that nobody counted is told as it was before any was.
        told: dict[str, Any] = serialize(self)
        return {name: value for name, value in told.items() if value is not None}

    @property
    def resolution(self) -> float | None:
        """The coarsest that all but a hundredth of the scans keep to, 0 where there is none; None: not known."""
        if not self.scans:
            return None
        kept = 0
        for resolution, scans in zip(RESOLUTIONS, self.scans, strict=False):
            kept += scans
            if kept >= _MOST * sum(self.scans):
                return resolution
        return 0.0

    @property
    def is_exact(self) -> bool:
        """Whether every scan keeps to the resolution."""
        finer = 1 + (RESOLUTIONS.index(self.resolution) if self.resolution else len(RESOLUTIONS))
        return self.scans is not None and not any(self.scans[finer:])

    def merged(self, other: Range) -> Range:
        """The range of both's scans."""
        counted = self.scans is not None and other.scans is not None
        scans = tuple(map(sum, zip(self.scans or (), other.scans or (), strict=True))) if counted else None
        return Range(low=min(self.low, other.low), high=max(self.high, other.high), scans=scans)


def resolution_of(number: float) -> int:
    """The place in RESOLUTIONS of the coarsest of which a single-precision number is a multiple, else their count."""
    if float(number).is_integer():
        return 0
    for place, resolution in enumerate(RESOLUTIONS):
        multiple = number / resolution
        if abs(multiple - round(multiple)) <= 1e-7 * abs(multiple) + 1e-9 and abs(multiple) < _TOLD_APART:
            return place
    return len(RESOLUTIONS)


class Envelope(BaseModel):
    """What a generator was trained on: per attribute the seen values with counts, or the seen range.

    Requests outside it are refused: there the generator would only guess.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scans: int
    values: Mapping[str, Mapping[str, int]]
    """category and labels attributes: value -> number of training scans that have it; NO_LABEL: that have none."""
    ranges: Mapping[str, Range]
    """number attributes."""

    @classmethod
    def of(cls, schema: AttributeSchema, rows: Iterable[Attributes]) -> Envelope:
        """The envelope of these training rows."""
        counts: dict[str, dict[str, int]] = {d.name: {} for d in schema.declarations if d.kind != "number"}
        lows: dict[str, float] = {}
        highs: dict[str, float] = {}
        finely: dict[str, Counter[int]] = {}
        total = 0
        for row in rows:
            total += 1
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    lows[name] = min(value, lows.get(name, value))
                    highs[name] = max(value, highs.get(name, value))
                    finely.setdefault(name, Counter())[resolution_of(value)] += 1
                elif value is not None:
                    for item in _items(value):
                        counts[name][item] = counts[name].get(item, 0) + 1
        places = range(len(RESOLUTIONS) + 1)
        ranges = {
            name: Range(low=lows[name], high=highs[name], scans=tuple(finely[name][place] for place in places))
            for name in sorted(lows)
        }
        return cls(scans=total, values={n: dict(sorted(c.items())) for n, c in counts.items()}, ranges=ranges)

    def require(self, attributes: Attributes) -> None:
        """Raise ArtefactError naming attribute, request and envelope where a request lies outside it."""
        for name, value in attributes.items():
            if isinstance(value, (int, float)):
                seen = self.ranges.get(name)
                if seen is None or not seen.low <= value <= seen.high:
                    span = f"{seen.low:g} to {seen.high:g}" if seen else "nothing"
                    raise ArtefactError(f"{name}={value:g} is outside the trained envelope; trained on {span}")
            elif value is not None:
                known = self.values.get(name, {})
                for item in _items(value):
                    if item not in known:
                        seen_items = ", ".join(known) or "nothing"
                        raise ArtefactError(f"{name}={item!r} is outside the trained envelope; trained on {seen_items}")


def describe(attributes: Attributes) -> str:
    """A short caption, e.g. `F 63 PA cardiomegaly`; unknown attributes are left out, no findings reads `none`."""
    words = []
    for value in attributes.values():
        if isinstance(value, float):
            words.append(f"{value:.0f}")
        elif isinstance(value, tuple):
            words.append("+".join(value) or "none")
        elif value is not None:
            words.append(value)
    return " ".join(words)


def _items(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value or (NO_LABEL,)


def _single(number: float) -> float:
    return float(np.float32(number))


def _parse(declaration: AttributeDeclaration, text: str | None) -> Value:
    text = (text or "").strip()
    if not text:
        return None
    if isinstance(declaration, NumberAttribute):
        return _parse_number(declaration, text)
    if isinstance(declaration, LabelsAttribute):
        found = {part.strip() for part in text.split(declaration.separator)}
        labels = tuple(value for value in declaration.values if value in found)
        # Text that says nothing known does not say that there is nothing.
        return labels if labels or declaration.none in found else None
    spelled = declaration.aliases.get(text, text)
    return spelled if spelled in declaration.values else None


def _parse_number(declaration: NumberAttribute, text: str) -> float:
    # DICOM ages are AS: 054Y, 018M, 003W, 010D (PS3.5 6.2).
    per_year = {"Y": 1.0, "M": 12.0, "W": 52.1775, "D": 365.25}
    divisor = 1.0
    if declaration.unit == "years" and len(text) == 4 and text[3] in per_year and text[:3].isdigit():
        divisor, text = per_year[text[3]], text[:3]
    try:
        value = float(text) / divisor
    except ValueError:
        raise ScanError("attribute-not-a-number", declaration.name, "holds text where a number is declared") from None
    possible = math.isfinite(value) and not (declaration.unit == "years" and value > OLDEST_YEARS)
    if declaration.cap is not None and possible:
        value = min(value, declaration.cap)
    if not (possible and declaration.minimum <= value <= declaration.maximum):
        span = f"[{declaration.minimum:g}, {declaration.maximum:g}] {declaration.unit}"
        raise ScanError("attribute-out-of-range", declaration.name, f"lies outside the declared range {span}")
    return _single(value)


def _check(declaration: AttributeDeclaration, value: object) -> Value:
    if value is None:
        return None
    if isinstance(declaration, NumberAttribute):
        if isinstance(value, Real) and not isinstance(value, bool):
            number = _single(float(value))
            # Limits are rounded too, or a value at one of them would fall outside.
            if _single(declaration.minimum) <= number <= _single(declaration.maximum):
                return number
        raise RecipeError(
            f"{declaration.name}={value!r}: expected a number in [{declaration.minimum:g}, {declaration.maximum:g}] "
            f"{declaration.unit}"
        )
    if isinstance(declaration, CategoryAttribute):
        if value in declaration.values:
            return str(value)
        raise RecipeError(f"{declaration.name}={value!r}{nearest(str(value), declaration.values)}")
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise RecipeError(f"{declaration.name}={value!r}: expected a list of labels, possibly empty")
    found = {str(item) for item in value}
    for item in sorted(found - set(declaration.values)):
        raise RecipeError(f"{declaration.name}={item!r}{nearest(item, declaration.values)}")
    return tuple(item for item in declaration.values if item in found)


def _plain(value: object) -> object:
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
