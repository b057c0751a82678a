"""What the columns of a table look like, told without telling anything of anybody.

A value is shown only where its column is made of few values that each at least FEW patients have, and where neither the
column's name nor the value's shape speaks of names, numbers of people, dates, places or free text. Of numbers the range
is shown that at least FEW patients reach at either end. Everything else is `n distinct`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from scanloom.scans.distinct import FEW, Seen

MOST_ROWS = 200_000
"""Rows that a profile is made of; later ones are not looked at."""
MOST_VALUES = 1000
"""Different values of a column that are told apart; with more of them it is no category."""
MOST_CATEGORIES = 50
LABEL_SEPARATORS = ("|", ";")
ENOUGH = 0.9
"""Share of the filled cells that the shown values must make up."""

Kind = Literal["empty", "number", "category", "labels", "other"]

# Words of column names whose values can point at somebody, or say anything at all.
_TELLING = frozenset(
    {
        "accession", "address", "birth", "city", "clinic", "clinician", "comment", "contact", "date", "day",
        "description", "dob", "doctor", "file", "first", "history", "hospital", "id", "identifier", "ids",
        "impression", "index", "indication", "initials", "institution", "key", "last", "month", "mrn", "name",
        "nhs", "note", "notes", "nr", "number", "nurse", "occupation", "operator", "path", "person", "phone",
        "physician", "place", "postcode", "radiologist", "reader", "reason", "referrer", "referring", "remark",
        "remarks", "report", "serial", "series", "site", "ssn", "staff", "station", "street", "technologist",
        "text", "time", "title", "town", "uid", "url", "user", "ward", "year", "zip",
    }
)  # fmt: skip
# Inside of words, too: patientname, birthdate.
_TELLING_PARTS = ("name", "birth", "date", "time", "mail", "phone", "comment", "mrn", "uid", "patientid", "studyid")
_TELLING_ALONE = frozenset({"patient", "subject", "study", "case"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_AGE = re.compile(r"(\d{3})([DWMY])")
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}|(19|20)\d{6}")
_MANY_DIGITS = re.compile(r"\d{4}")
_LONGEST_VALUE, _MOST_WORDS = 40, 4
_FLAGS = 6
"""A column of so few different numbers is one of marks such as 0 and 1."""


@dataclass(frozen=True)
class Column:
    """What may be said of a column.

    `values` are those of a category or the labels, with the number of rows; `hidden` counts the different values that
    are not shown, `low` and `high` bound a number. `distinct` is exact up to MOST_VALUES.
    """

    name: str
    kind: Kind
    filled: int
    empty: int
    distinct: int
    values: Mapping[str, int] = field(default_factory=dict)
    hidden: int = 0
    low: float | None = None
    high: float | None = None
    separator: str = ""


class ColumnTally:
    """A column while its cells are read."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._filled = self._empty = self._numbers = self._fractions = 0
        self._values: dict[str, Seen] = {}
        self._parts: dict[str, dict[str, Seen]] = {separator: {} for separator in LABEL_SEPARATORS}
        self._split: dict[str, int] = dict.fromkeys(LABEL_SEPARATORS, 0)
        self._histogram: dict[float, Seen] = {}

    def add(self, cell: str, patient: str) -> None:
        if not cell:
            self._empty += 1
            return
        self._filled += 1
        _see(self._values, cell, patient)
        number = number_of(cell)
        if number is not None:
            self._numbers += 1
            self._fractions += not number.is_integer()
            self._histogram[number] = self._histogram.get(number, Seen()).of(patient)
        for separator, parts in self._parts.items():
            self._split[separator] += separator in cell
            for part in cell.split(separator):
                _see(parts, part.strip(), patient)

    def column(self) -> Column:
        """The verdict."""
        plain = Column(self._name, "other", self._filled, self._empty, len(self._values), hidden=len(self._values))
        if not self._filled:
            return Column(self._name, "empty", 0, self._empty, 0)
        if is_telling(self._name):
            return plain
        separator = max(LABEL_SEPARATORS, key=lambda each: self._split[each])
        if self._split[separator]:
            return self._with_values(plain, "labels", self._parts[separator], separator)
        if self._numbers >= 0.99 * self._filled and len(self._values) > _FLAGS:
            return self._with_range(plain)
        return self._with_values(plain, "category", self._values, "")

    def _with_values(self, plain: Column, kind: Kind, seen: Mapping[str, Seen], separator: str) -> Column:
        shown = shareable(seen)
        enough = sum(shown.values()) >= ENOUGH * sum(each.scans for each in seen.values())
        if not shown or not enough or len(seen) > MOST_CATEGORIES:
            return plain
        hidden = len(seen) - len(shown)
        return Column(
            self._name, kind, self._filled, self._empty, len(self._values), shown, hidden, separator=separator
        )

    def _with_range(self, plain: Column) -> Column:
        many = 0.5 * min(self._filled, 2 * MOST_VALUES - 1)
        # Nearly as many different whole numbers as rows: somebody's numbers.
        if not self._fractions and len(self._values) > max(MOST_CATEGORIES, many) and "age" not in _words(self._name):
            return plain
        found = span(self._histogram)
        if found is None or _DATE.fullmatch(f"{found[1]:.0f}"):
            return plain
        return Column(self._name, "number", self._filled, self._empty, len(self._values), low=found[0], high=found[1])


def is_telling(column: str) -> bool:
    """Whether a column of this name may hold what points at somebody, or free text."""
    lower = column.lower()
    return bool(_words(column) & _TELLING) or lower in _TELLING_ALONE or any(part in lower for part in _TELLING_PARTS)


def _words(column: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(column)}


def is_plain(text: str) -> bool:
    """Whether a value has the shape of a term, not of a name, a number of somebody's, a date or free text."""
    if len(text) > _LONGEST_VALUE or len(text.split()) > _MOST_WORDS or any(sign in text for sign in "@^,:/\\"):
        return False
    return not (_DATE.search(text) or _MANY_DIGITS.search(text))


def shareable(seen: Mapping[str, Seen]) -> dict[str, int]:
    """The values that at least FEW patients have and that look like terms, by falling count."""
    shown = {text: each.scans for text, each in seen.items() if text and each.is_common and is_plain(text)}
    return dict(sorted(shown.items(), key=lambda item: (-item[1], item[0])))


def span(histogram: Mapping[float, Seen]) -> tuple[float, float] | None:
    """The numbers down to which and up to which there are FEW patients; None where there are too few for both."""
    low, high = _reached(sorted(histogram.items())), _reached(sorted(histogram.items(), reverse=True))
    return (low, high) if low is not None and high is not None and low <= high else None


def _reached(ordered: Iterable[tuple[float, Seen]]) -> float | None:
    patients: set[str] = set()
    for number, seen in ordered:
        patients.update(seen.patients)
        if len(patients) >= FEW:
            return number
    return None


def number_of(text: str) -> float | None:
    """A number to three digits; ages as DICOM spells them are numbers too."""
    age = _AGE.fullmatch(text)
    try:
        number = float(age[1]) if age and age[2] == "Y" else float(text)
    except ValueError:
        return None
    return float(f"{number:.3g}") if math.isfinite(number) else None


def _see(seen: dict[str, Seen], text: str, patient: str) -> None:
    if text in seen:
        seen[text] = seen[text].of(patient)
    elif len(seen) < MOST_VALUES:
        seen[text] = Seen(1, (patient,))
