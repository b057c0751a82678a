"""What a corpus says of itself: counts, patients, the joint table of attributes, the trained envelope.

Each shard carries its own tally in its commit; the manifest's is their sum, so nothing is read twice.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from scanloom.attributes import Attributes, AttributeSchema, Envelope, Range, Value
from scanloom.recipe import NumberAttribute

SPLITS = ("train", "validation", "holdout")
QUARANTINE = "quarantine"
COUNTED = ("bits_stored", "window", "value_unit", "orientation")
"""Columns of the corpus whose values the manifest counts."""
_BINS = 10


def shard_tally(tables: Mapping[str, pa.Table], schema: AttributeSchema) -> dict[str, Any]:
    """The tally of one shard's tables (without their images), by split and for the quarantine, as JSON holds it."""
    train = list(attribute_rows(tables["train"], schema)) if "train" in tables else []
    splits = {split: tables[split] for split in SPLITS if split in tables}
    spacings = [spacing for spacing in _column(splits.values(), "spacing_mm") if spacing is not None]
    quarantine = tables.get(QUARANTINE)
    return {
        "scans": {split: table.num_rows for split, table in splits.items()},
        "patients": {split: sorted(set(table["patient"].to_pylist())) for split, table in splits.items()},
        **{name: _counted(_shown_value(v) for v in _column(splits.values(), name)) for name in COUNTED},
        "repairs": _counted(repair for repairs in _column(splits.values(), "repairs") for repair in repairs or ()),
        "with_text": sum(1 for lines in _column(splits.values(), "text_lines") if lines),
        "spacing_mm": _counted(f"{spacing:.4g}" for spacing in spacings),
        "quarantined": _counted(quarantine["code"].to_pylist() if quarantine is not None else ()),
        "cells": _counted(json.dumps(_cell(row, schema)) for row in train),
        "envelope": Envelope.of(schema, train).model_dump(mode="json"),
    }


def corpus_statistics(tallies: Sequence[Mapping[str, Any]], schema: AttributeSchema) -> dict[str, Any]:
    """The statistics of a corpus's manifest from the tallies of all its shards.

    `cells` counts the scans of the train split per combination of attributes, numbers as [low, high]; an attribute
    that a cell does not name is unknown there. `spacing_mm` is the median over all splits, None where none is known.
    """
    envelope = _merged_envelopes([Envelope.model_validate(tally["envelope"]) for tally in tallies])
    scans = _summed(tallies, "scans")
    return {
        "schema": schema.model_dump(mode="json"),
        "rows": sum(scans.values()),
        "scans": {split: scans.get(split, 0) for split in SPLITS},
        "patients": {split: len(patients(tallies, split)) for split in SPLITS},
        "quarantined": _by_count(_summed(tallies, "quarantined")),
        **{name: dict(_summed(tallies, name)) for name in (*COUNTED, "repairs")},
        "with_text": sum(tally["with_text"] for tally in tallies),
        "spacing_mm": _median(_summed(tallies, "spacing_mm")),
        "envelope": envelope.model_dump(mode="json"),
        "cells": [_shown(json.loads(c), n, envelope) for c, n in sorted(_summed(tallies, "cells").items())],
        "deidentification": _summed_actions(tallies),
    }


def _column(tables: Iterable[pa.Table], name: str) -> Iterator[Any]:
    return (value for table in tables for value in table[name].to_pylist())


def _shown_value(value: object) -> str:
    return "unknown" if value in (None, "") else str(value)


def patients(tallies: Iterable[Mapping[str, Any]], split: str) -> set[str]:
    """The pseudonyms of a split's patients."""
    return {patient for tally in tallies for patient in tally["patients"].get(split, ())}


def attribute_rows(table: pa.Table, schema: AttributeSchema) -> Iterator[dict[str, Value]]:
    """The attributes of each row as the shard holds them (numbers have passed through float32)."""
    for row in table.select(list(schema.names)).to_pylist():
        yield {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def _cell(row: Attributes, schema: AttributeSchema) -> dict[str, object]:
    """The row with its numbers as [low, high] of their bin and without what is unknown."""
    cell: dict[str, object] = {}
    for declaration in schema.declarations:
        value = row[declaration.name]
        if isinstance(declaration, NumberAttribute) and isinstance(value, float):
            cell[declaration.name] = _bin(declaration, value)
        elif value is not None:
            cell[declaration.name] = value
    return cell


def _bin(declaration: NumberAttribute, value: float) -> tuple[float, float]:
    """Decades for years, else a tenth of the declared range."""
    years = declaration.unit == "years"
    start, width = (0.0, 10.0) if years else (declaration.minimum, (declaration.maximum - declaration.minimum) / _BINS)
    low = start + width * math.floor((value - start) / width)
    return low, low + width


def _shown(cell: Mapping[str, Any], count: int, envelope: Envelope) -> dict[str, object]:
    """A cell for the manifest: its bins cut to what was seen, so that every value drawn from it can be asked for."""
    shown: dict[str, object] = dict(cell)
    for name in cell.keys() & envelope.ranges.keys():
        seen, (low, high) = envelope.ranges[name], cell[name]
        shown[name] = [max(low, seen.low), min(high, seen.high)]
    return shown | {"count": count}


def _merged_envelopes(envelopes: Sequence[Envelope]) -> Envelope:
    values: dict[str, Counter[str]] = {}
    ranges: dict[str, Range] = {}
    for envelope in envelopes:
        for name, counts in envelope.values.items():
            values.setdefault(name, Counter()).update(counts)
        for name, seen in envelope.ranges.items():
            ranges[name] = ranges[name].merged(seen) if name in ranges else seen
    return Envelope(
        scans=sum(envelope.scans for envelope in envelopes),
        values={name: dict(sorted(counts.items())) for name, counts in values.items()},
        ranges=dict(sorted(ranges.items())),
    )


def _summed(tallies: Iterable[Mapping[str, Any]], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for tally in tallies:
        total.update(tally[name])
    return total


def _summed_actions(tallies: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    total: dict[str, Counter[str]] = {}
    for tally in tallies:
        for keyword, actions in tally["deidentification"].items():
            total.setdefault(keyword, Counter()).update(actions)
    return {keyword: dict(sorted(actions.items())) for keyword, actions in sorted(total.items())}


def _median(counts: Mapping[str, int]) -> float | None:
    ordered = sorted((float(value), count) for value, count in counts.items())
    middle, passed = sum(counts.values()) / 2, 0
    for value, count in ordered:
        passed += count
        if passed >= middle:
            return value
    return None


def _counted(items: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(items).items()))


def _by_count(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
