"""A survey as it may be shown, to a person or as data: no identifier, no date, no file name, no free text.

What a schema names is counted, but where fewer than FEW patients have it the count is withheld too: it is too little to
train on, and could point at one of them. Texts that the schema does not name are shown where a column of a table could
show them (scans.table_profile), of DICOM headers those of code strings alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword

from scanloom.recipe import AttributeDeclaration, DicomSource, DicomWebSource, NumberAttribute, PhantomSource
from scanloom.scans.distinct import Distinct, Seen
from scanloom.scans.glimpse import is_header_enough
from scanloom.scans.quarantine import CODES
from scanloom.scans.survey import UNKNOWN, Look, Survey, axes
from scanloom.scans.table_profile import MOST_VALUES, Column, is_telling, shareable, span

FEW_WORD = "few"
_MOST_TERMS = 16
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR", "colour")

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table for the terminal."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def report(survey: Survey, look: Look, columns: Sequence[Column], listed: int) -> dict[str, Any]:
    """The survey as data for JSON; `listed` objects are in the source. A count of null is one of few patients."""
    return {
        "kind": look.source.kind,
        "objects": {"listed": listed, "looked_at": survey.objects, "bytes": survey.bytes},
        "pixels_decoded": look.pixels or not is_header_enough(look.source),
        "scans": survey.scans,
        "patients": _number(survey.patients),
        "studies": _number(survey.studies),
        "headers": {topic: _by_count(terms) for topic, terms in survey.terms.items()},
        "pixel_size": survey.extent._asdict() if survey.extent else None,
        "attributes": [_attribute(declaration, survey, look) for declaration in look.schema.declarations],
        "joint": _joint(survey, look),
        "quarantine": _quarantine(survey),
        "duplicates_counted": survey.instances.exact,
        "columns": [_column(column) for column in columns],
    }


def _number(distinct: Distinct) -> dict[str, object]:
    return {"count": distinct.count, "exact": distinct.exact}


def _by_count(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _count(seen: Seen) -> int | None:
    return seen.scans if seen.is_common else None


def _attribute(declaration: AttributeDeclaration, survey: Survey, look: Look) -> dict[str, Any]:
    name = declaration.name
    withheld = survey.withheld.get(name, {})
    texts = shareable(withheld) if _may_show(declaration, look) else {}
    found: dict[str, Any] = {
        "name": name,
        "kind": declaration.kind,
        "missing": survey.missing.get(name, 0),
        "withheld": {"scans": sum(seen.scans for seen in withheld.values()), "texts": len(withheld), "shown": texts},
    }
    values = survey.values.get(name, {})
    if isinstance(declaration, NumberAttribute):
        numbers = {float(text): seen for text, seen in values.items()}
        scans = sum(seen.scans for seen in numbers.values())
        low, high = span(numbers) or (None, None)
        return found | {"scans": scans, "low": low, "high": high}
    ordered = sorted(values.items(), key=lambda item: (-item[1].scans, item[0]))
    return found | {"values": {text: _count(seen) for text, seen in ordered}}


def _may_show(declaration: AttributeDeclaration, look: Look) -> bool:
    source = declaration.source or declaration.name
    if isinstance(look.source, DicomSource | DicomWebSource):
        tag = tag_for_keyword(source)
        return tag is not None and dictionary_VR(tag) == "CS"
    return isinstance(look.source, PhantomSource) or not is_telling(source)


def _joint(survey: Survey, look: Look) -> dict[str, Any]:
    finding, sex, age = axes(look.schema)
    named = [name for name in (finding, sex, age) if name]
    ordered = sorted(survey.cells.items(), key=lambda item: (item[0][0], item[0][1], _first(item[0][2])))
    cells = [
        {name: value for name, value in zip((finding, sex, age), cell, strict=True) if name} | {"scans": _count(seen)}
        for cell, seen in ordered
    ]
    return {"of": named, "cells": cells}


def _first(years: str) -> float:
    """Where a band begins; unknown ages come last."""
    low = years.rstrip("+").split("-")[0]
    return float(low) if low.replace(".", "").isdigit() else 1e9


def _quarantine(survey: Survey) -> dict[str, int]:
    again = survey.subjects - survey.instances.count if survey.instances.exact else 0
    return _by_count({**survey.refused, **({"duplicate": again} if again > 0 else {})})


def _column(column: Column) -> dict[str, Any]:
    return {
        "name": column.name,
        "kind": column.kind,
        "filled": column.filled,
        "empty": column.empty,
        "distinct": {"count": column.distinct, "exact": column.distinct < MOST_VALUES},
        "values": dict(column.values),
        "low": column.low,
        "high": column.high,
    }


# --- for a person ---------------------------------------------------------------------------------------------


def tables(found: Report) -> Iterator[Table]:
    """The report as tables."""
    yield Table(f"what is in this source ({found['kind']})", ("", ""), list(_whole(found)))
    if found["columns"]:
        rows = [_column_row(column) for column in found["columns"]]
        yield Table("columns of the table", ("column", "looks like", "filled", "values"), rows)
    headers = [(topic, _listed(counts)) for topic, counts in found["headers"].items()]
    if found["pixel_size"]:
        smallest, largest = (" x ".join(map(str, found["pixel_size"][end])) for end in ("smallest", "largest"))
        headers.append(("rows x columns, from and to", smallest if smallest == largest else f"{smallest} to {largest}"))
    yield Table("what the headers say", ("of", "files"), headers)
    rows = [_attribute_row(attribute) for attribute in found["attributes"]]
    yield Table("attributes of the scans", ("attribute", "values", "missing", "withheld"), rows)
    if found["joint"]["cells"]:
        yield _joint_table(found["joint"])
    refused = [(code, f"{count:,}", CODES.get(code, "")) for code, count in found["quarantine"].items()]
    if refused:
        yield Table("what prepare would refuse", ("code", "files", "reason"), refused)


def remarks(found: Report, look: Look) -> Iterator[str]:
    """What a reader of the tables should know, a sentence each."""
    listed, seen = found["objects"]["listed"], found["objects"]["looked_at"]
    if look.most_files is not None and look.most_files < listed:
        yield f"only the first {look.most_files:,} of {listed:,} files were looked at"
    if seen and not found["pixels_decoded"]:
        yield "no pixels were decoded: damaged and blank images show only with --decode, or in prepare"
    if not found["duplicates_counted"]:
        yield "with so many scans duplicates are not looked for; prepare finds them"
    counts = found["headers"].get("photometric interpretation", {})
    colour = sum(counts.get(name, 0) for name in _COLOURS)
    if colour and look.decode.colour == "refuse":
        yield (
            f"{colour:,} objects are in colour: they are refused unless they show gray; "
            "prepare.decode.colour=luminance reads them"
        )
    if any(cell["scans"] is None for cell in found["joint"]["cells"]):
        yield f"'{FEW_WORD}' stands for scans of fewer than 5 patients: too little to train on"
    if any(attribute["withheld"]["scans"] for attribute in found["attributes"]):
        yield "withheld texts are no declared values, so that a corpus leaves them out: declare them, or an alias"


def _whole(found: Report) -> Iterator[tuple[str, str]]:
    objects = found["objects"]
    yield "objects listed", f"{objects['listed']:,}"
    yield "files in them, looked at", f"{objects['looked_at']:,}"
    if objects["bytes"]:
        yield "bytes", _size(objects["bytes"])
    yield "scans", f"{found['scans']:,}" + ("" if found["pixels_decoded"] else " as far as headers tell")
    for what in ("patients", "studies"):
        yield what, ("" if found[what]["exact"] else "about ") + f"{found[what]['count']:,}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def _listed(counts: Mapping[str, int | None]) -> str:
    items = list(counts.items())
    shown = [f"{name}: {FEW_WORD if count is None else format(count, ',')}" for name, count in items[:_MOST_TERMS]]
    rest = f"{len(items) - _MOST_TERMS} more" if len(items) > _MOST_TERMS else ""
    return ", ".join([*shown, rest] if rest else shown) or "-"


def _column_row(column: Mapping[str, Any]) -> tuple[str, str, str, str]:
    filled = f"{column['filled']:,}" + (f" of {column['filled'] + column['empty']:,}" if column["empty"] else "")
    if column["kind"] == "number":
        return column["name"], "number", filled, _range(column)
    if column["values"]:
        return column["name"], column["kind"], filled, _listed(column["values"])
    more = "" if column["distinct"]["exact"] else " or more"
    return column["name"], "-", filled, f"{column['distinct']['count']:,}{more} distinct"


def _range(numbers: Mapping[str, Any]) -> str:
    return "-" if numbers["low"] is None or numbers["high"] is None else f"{numbers['low']:g} to {numbers['high']:g}"


def _attribute_row(attribute: Mapping[str, Any]) -> tuple[str, str, str, str]:
    values = _range(attribute) if attribute["kind"] == "number" else _listed(attribute["values"])
    withheld = attribute["withheld"]
    shown = f": {_listed(withheld['shown'])}" if withheld["shown"] else ""
    told = f"{withheld['scans']:,}{shown}" if withheld["scans"] else "-"
    return attribute["name"], values, f"{attribute['missing']:,}" if attribute["missing"] else "-", told


def _joint_table(joint: Mapping[str, Any]) -> Table:
    """Rows by finding and sex, columns by age; also of those that nobody is of."""
    names = list(joint["of"])
    cells = joint["cells"]
    last = names[-1]
    across = sorted({cell[last] for cell in cells}, key=lambda text: (_first(text), text))
    counts = {tuple(cell[name] for name in names): cell["scans"] for cell in cells}
    seen = [sorted({cell[name] for cell in cells}, key=lambda text: (text == UNKNOWN, text)) for name in names[:-1]]
    keys = itertools.product(*seen)
    rows = [
        [*key, *(_shown(counts[(*key, column)]) if (*key, column) in counts else "-" for column in across)]
        for key in keys
    ]
    return Table(f"scans by {' x '.join(names)}", (*names[:-1], *across), rows)


def _shown(count: int | None) -> str:
    return FEW_WORD if count is None else f"{count:,}"
