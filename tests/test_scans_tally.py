"""The statistics of a corpus: sums over shards equal what one look at all rows says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanloom.attributes import AttributeSchema, Envelope
from scanloom.recipe import CategoryAttribute, LabelsAttribute, NumberAttribute
from scanloom.scans.tally import SPLITS, corpus_statistics, shard_tally
from scanloom.shards.schemas import corpus_schema

SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", values=("F", "M")),
        NumberAttribute(name="age", unit="years", minimum=0, maximum=90),
        NumberAttribute(name="slice", unit="mm", minimum=-500, maximum=500),
        LabelsAttribute(name="findings", values=("Effusion", "Mass")),
    )
)
ROWS = st.fixed_dictionaries(
    {
        "split": st.sampled_from(SPLITS),
        "patient": st.sampled_from("abcdefgh"),
        "spacing_mm": st.sampled_from([None, 0.25, 0.5, 1.0]),
        "bits_stored": st.sampled_from([8, 16]),
        "sex": st.sampled_from([None, "F", "M"]),
        "age": st.one_of(st.none(), st.integers(0, 90).map(float)),
        "slice": st.one_of(st.none(), st.integers(-500, 500).map(float)),
        "findings": st.one_of(st.none(), st.sampled_from([[], ["Mass"], ["Effusion", "Mass"]])),
    }
)


def tally(rows: list[dict[str, Any]]) -> dict[str, Any]:
    schema = corpus_schema(SCHEMA)
    tables = {
        split: pa.Table.from_pylist([r for r in rows if r["split"] == split], schema=schema)
        for split in SPLITS
        if any(row["split"] == split for row in rows)
    }
    return shard_tally(tables, SCHEMA) | {"deidentification": {"PatientName": {"removed": len(rows)}}}


@settings(deadline=None, max_examples=60)
@given(st.lists(ROWS, max_size=30), st.integers(1, 5))
def test_however_rows_are_cut_into_shards_the_corpus_says_the_same(rows: list[dict[str, Any]], shards: int) -> None:
    cut = corpus_statistics([tally(rows[i::shards]) for i in range(shards)], SCHEMA)
    assert cut == corpus_statistics([tally(rows)], SCHEMA)
    assert cut["scans"] == {split: sum(row["split"] == split for row in rows) for split in SPLITS}
    assert cut["patients"] == {split: len({r["patient"] for r in rows if r["split"] == split}) for split in SPLITS}
    assert sum(cell["count"] for cell in cut["cells"]) == cut["scans"]["train"] == cut["envelope"]["scans"]
    assert cut["deidentification"] == {"PatientName": {"removed": len(rows)}}


@settings(deadline=None, max_examples=60)
@given(st.lists(ROWS, min_size=1, max_size=30))
def test_every_value_that_a_cell_offers_may_be_asked_for(rows: list[dict[str, Any]]) -> None:
    statistics = corpus_statistics([tally(rows)], SCHEMA)
    envelope = Envelope.model_validate(statistics["envelope"])
    for cell in statistics["cells"]:
        named = {name: value for name, value in cell.items() if name != "count"}
        for end in (0, 1):
            drawn = {n: v[end] if n in ("age", "slice") else v for n, v in named.items()}
            envelope.require(SCHEMA.check(drawn))


def test_numbers_fall_into_decades_or_tenths_cut_to_what_was_seen() -> None:
    row = {"split": "train", "patient": "a", "spacing_mm": None, "bits_stored": 8, "sex": "F", "findings": None}
    ages = [61.0, 69.0, 70.0, 88.0]
    statistics = corpus_statistics([tally([row | {"age": age, "slice": -450.0} for age in ages])], SCHEMA)
    cells = Counter({tuple(cell["age"]): cell["count"] for cell in statistics["cells"]})
    assert cells == {(61.0, 70.0): 2, (70.0, 80.0): 1, (80.0, 88.0): 1}
    assert {tuple(cell["slice"]) for cell in statistics["cells"]} == {(-450.0, -450.0)}
    assert all("findings" not in cell for cell in statistics["cells"])


@pytest.mark.parametrize(
    "spacings, median", [([], None), ([0.5], 0.5), ([0.1, 0.2, 0.9], 0.2), ([1.0] * 5 + [3.0], 1.0)]
)
def test_the_median_spacing_is_over_all_scans_that_have_one(spacings: list[float], median: float | None) -> None:
    row: dict[str, Any] = {"split": "holdout", "patient": "a", "bits_stored": 16}
    rows = [row | {"spacing_mm": spacing} for spacing in [None, *spacings]]
    assert corpus_statistics([tally(rows)], SCHEMA)["spacing_mm"] == median
