"""Cohorts: what was ordered comes out in exact numbers, and what cannot be made is refused by name."""

from __future__ import annotations

import math
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scanloom.attributes import AttributeSchema, Envelope, Range
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import AsCorpusCohort, BalancedCohort, CellsCohort, Cohort, MarginalsCohort, NumberAttribute
from scanloom.sampling.cell import CohortTables, Span, split
from scanloom.sampling.cohort import resolve
from scanloom.sampling.draw import draw as drawn
from scanloom.sampling.draw import quotas
from tests.tiny_generator import CELLS, ENVELOPE, SCHEMA


def resolved(cohort: Cohort, images: int = 1000) -> CohortTables:
    return resolve(cohort, SCHEMA, ENVELOPE, CELLS, images).tables


def draw(cohort: CohortTables, schema: AttributeSchema, images: int, seed: int) -> pa.Table:
    return drawn(cohort, schema, images, seed).rows(0, images)


def cells(*cells: dict[str, Any]) -> CohortTables:
    return resolved(CellsCohort(cells=cells))


def marginals(**shares: dict[str, Any]) -> CohortTables:
    return resolved(MarginalsCohort(marginals=shares))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(any), st.integers(0, 10_000))
def test_quotas_sum_to_the_total_and_are_the_rounded_ideal(shares: list[float], total: int) -> None:
    counts = quotas(shares, total)
    assert sum(counts) == total
    for share, count in zip(shares, counts, strict=True):
        ideal = share * total / math.fsum(shares)
        assert ideal - 1.000001 < count < ideal + 1.000001


def test_ties_go_to_the_earlier_cell_as_the_decimals_are_written() -> None:
    assert quotas([1, 1, 1], 2) == [1, 1, 0]
    # In binary 0.1 is over a tenth and 0.7 under seven tenths, which would give the last cell the odd image.
    assert quotas([0.7, 0.2, 0.1], 5) == [4, 1, 0]
    assert quotas([0.5, 0.5], 7) == [4, 3]


def test_cells_get_their_exact_shares_of_images() -> None:
    cohort = cells(
        {"sex": "F", "findings": ["Cardiomegaly"], "share": 0.25},
        {"sex": "M", "findings": [], "share": 0.7},
        {"sex": "M", "findings": "Effusion+Cardiomegaly", "share": 0.05},
    )
    made = Counter((r["sex"], tuple(r["findings"])) for r in draw(cohort, SCHEMA, 1000, 1).to_pylist())
    assert made == {("F", ("Cardiomegaly",)): 250, ("M", ()): 700, ("M", ("Cardiomegaly", "Effusion")): 50}


def test_attributes_that_no_cell_names_are_unknown() -> None:
    table = draw(cells({"sex": "F", "share": 1}, {"age": 40, "share": 1}), SCHEMA, 10, 0)
    assert table["view"].null_count == 10
    assert table["sex"].null_count == 5
    assert table["age"].null_count == 5
    assert {(r["sex"], r["age"]) for r in table.to_pylist()} == {("F", None), (None, 40.0)}


def test_marginals_are_exact_and_independent() -> None:
    table = draw(
        marginals(
            sex={"F": 0.3, "M": 0.7},
            findings={"none": 0.5, "Cardiomegaly": 0.3, "Cardiomegaly+Effusion": 0.2},
            age={"uniform": [30, 70]},
        ),
        SCHEMA,
        10_000,
        2,
    )
    rows = table.to_pylist()
    assert Counter(r["sex"] for r in rows) == {"F": 3000, "M": 7000}
    assert Counter(tuple(r["findings"]) for r in rows) == {
        (): 5000,
        ("Cardiomegaly",): 3000,
        ("Cardiomegaly", "Effusion"): 2000,
    }
    women_with = sum(r["sex"] == "F" and "Cardiomegaly" in r["findings"] for r in rows)
    assert women_with == pytest.approx(1500, abs=5 * math.sqrt(10_000 * 0.15 * 0.85))
    assert np.corrcoef(table["age"].to_numpy(), [r["sex"] == "F" for r in rows])[0, 1] == pytest.approx(0, abs=0.05)


def test_spans_are_uniform_over_whole_units_with_both_ends() -> None:
    ages = draw(marginals(age={"uniform": [30, 39]}), SCHEMA, 20_000, 3)["age"].to_numpy()
    counts = Counter(ages.tolist())
    assert sorted(counts) == [float(age) for age in range(30, 40)]
    assert max(abs(count - 2000) for count in counts.values()) < 5 * math.sqrt(2000)


def test_a_span_within_a_unit_is_drawn_from_all_of_it() -> None:
    ages = draw(cells({"age": [30.2, 30.8]}), SCHEMA, 1000, 3)["age"].to_numpy()
    assert ages.min() >= np.float32(30.2)
    assert ages.max() <= np.float32(30.8)
    assert len(set(ages.tolist())) > 900


SPACING = NumberAttribute(name="spacing", unit="mm", minimum=0, maximum=10)


def spacings(cohort: Cohort, *bins: list[float]) -> list[float]:
    schema = AttributeSchema(declarations=(SPACING,))
    envelope = Envelope(scans=9, values={}, ranges={"spacing": Range(low=0, high=10)})
    cells = [{"spacing": b, "count": 9 // len(bins)} for b in bins]
    found: list[float] = (
        drawn(resolve(cohort, schema, envelope, cells, 900).tables, schema, 900, 3).rows(0, 900)["spacing"].to_pylist()
    )
    return found


@pytest.mark.parametrize(
    "cohort",
    [
        MarginalsCohort(marginals={"spacing": {"uniform": [0.2, 1.9]}}),
        MarginalsCohort(
            marginals={"spacing": {"uniform": [0.2, 1.9]}}, dependence="corpus"
        ),
        CellsCohort(cells=({"spacing": [0.2, 1.9]},)),
        AsCorpusCohort(),
    ],
    ids=lambda cohort: str(cohort.kind),
)  # fmt: skip
def test_a_span_whose_ends_are_not_whole_is_drawn_from_all_of_it(cohort: Cohort) -> None:
    found = spacings(cohort, [0.2, 0.9], [0.9, 1.9])
    assert len(set(found)) > 800
    assert 0.2 - 1e-6 <= min(found) < 0.25 < 1.85 < max(found) <= 1.9 + 1e-6


def test_bands_whose_edges_are_not_whole_all_get_their_images() -> None:
    for edges in ((0.1, 0.5, 1.0), (0.0, 0.2, 0.5, 1.0), (2.0, 4.0, 6.5)):
        found = spacings(BalancedCohort(over=("spacing",), bands={"spacing": edges}), [0.0, 10.0])
        made = Counter(sum(value >= np.float32(edge) for edge in edges[:-1]) for value in found)
        assert made == {band: 900 // (len(edges) - 1) for band in range(1, len(edges))}
        assert len(set(found)) > 400


def test_a_uniform_number_cut_at_whole_bins_stays_uniform() -> None:
    found = split(Span(low=1.5, high=4.0), (0.0, 2.0, 3.0))
    assert [part.low for part in found] == [1.5, 2.0, 3.0]
    assert [part.high for part in found] == [pytest.approx(high, abs=1e-6) for high in (2, 3, 4)]
    assert not any(part.grid for part in found)
    assert split(Span(low=1.0, high=4.0), (0.0, 2.0, 4.0)) == [
        Span(low=1.0, high=1.0), Span(low=2.0, high=3.0), Span(low=4.0, high=4.0)
    ]  # fmt: skip


def test_a_band_that_single_precision_cannot_hold_is_refused() -> None:
    with pytest.raises(RecipeError, match="between two edges"):
        spacings(BalancedCohort(over=("spacing",), bands={"spacing": (0.1, 0.5, 0.500000001, 1.0)}), [0.0, 10.0])


def test_numbers_by_share_keep_their_values() -> None:
    ages = draw(marginals(age={"40": 1, "62.5": 3}), SCHEMA, 8, 0)["age"].to_pylist()
    assert Counter(ages) == {40.0: 2, 62.5: 6}


def test_as_corpus_keeps_the_corpus_shares_within_the_ages_seen() -> None:
    cohort = resolved(AsCorpusCohort())
    assert cohort.tables[0][0].values["age"] == Span(low=21.0, high=29.0)
    rows = draw(cohort, SCHEMA, 400, 5).to_pylist()
    assert Counter(r["sex"] if r["view"] else "unknown" for r in rows) == {"F": 100, "M": 200, "unknown": 100}
    assert all(80 <= r["age"] <= 88 for r in rows if r["sex"] == "M")


def test_the_same_seed_draws_the_same_rows_and_another_seed_another_order() -> None:
    cohort = marginals(sex={"F": 1, "M": 1}, age={"uniform": [30, 70]})
    first = draw(cohort, SCHEMA, 500, 7)
    assert first.equals(draw(cohort, SCHEMA, 500, 7))
    assert not first.equals(draw(cohort, SCHEMA, 500, 8))


def test_rows_are_shuffled() -> None:
    sexes = draw(cells({"sex": "F", "share": 1}, {"sex": "M", "share": 1}), SCHEMA, 1000, 0)["sex"].to_pylist()
    changes = sum(a != b for a, b in pairwise(sexes))
    assert changes == pytest.approx(500, abs=80)


def test_a_cohort_survives_the_manifest() -> None:
    cohort = cells({"sex": "F", "age": [30, 40], "findings": [], "share": 2}, {"age": 50, "view": None})
    assert CohortTables.model_validate_json(cohort.model_dump_json()) == cohort


def test_a_million_rows_are_not_drawn_one_by_one() -> None:
    cohort = marginals(sex={"F": 0.5, "M": 0.5}, findings={"none": 0.6, "Cardiomegaly": 0.4}, age={"uniform": [30, 70]})
    started = time.process_time()
    assert len(draw(cohort, SCHEMA, 1_000_000, 1)) == 1_000_000
    drawn = time.process_time()
    assert len([{"index": row} for row in range(1_000_000)]) == 1_000_000
    assert drawn - started < 10 * (time.process_time() - drawn)


@pytest.mark.parametrize(
    "cohort, request_, envelope",
    [
        (CellsCohort(cells=({"age": 95},)), "age=95", "21 to 88"),
        (CellsCohort(cells=({"age": [15, 40]},)), "age=15", "21 to 88"),
        (CellsCohort(cells=({"view": "AP"},)), "view='AP'", "PA"),
        (MarginalsCohort(marginals={"findings": {"none": 1, "Nodule": 1}}), "findings='Nodule'", "none, Cardiomegaly"),
    ],
)
def test_a_request_outside_the_envelope_is_refused_naming_both(cohort: Cohort, request_: str, envelope: str) -> None:
    with pytest.raises(ArtefactError) as caught:
        resolved(cohort)
    assert request_ in str(caught.value)
    assert f"trained on {envelope}" in str(caught.value)


@pytest.mark.parametrize(
    "cohort, told",
    [
        (CellsCohort(cells=({"sexx": "F"},)), "did you mean 'sex'"),
        (CellsCohort(cells=({"sex": "Q"},)), "sex='Q'"),
        (CellsCohort(cells=({"age": [50, 40]},)), "low is over high"),
        (CellsCohort(cells=({"age": [1, 2, 3]},)), "[low, high]"),
        (CellsCohort(cells=({"age": 10**400},)), "age: an integer of so many digits"),
        (CellsCohort(cells=({"sex": "F", "share": -1},)), "share -1"),
        (CellsCohort(cells=({"sex": "F", "share": 0},)), "sum to 0"),
        (CellsCohort(cells=({"findings": "Cardiomegally"},)), "did you mean 'Cardiomegaly'"),
        (MarginalsCohort(marginals={"age": {"unifrom": [1, 2]}}), "'unifrom'"),
        (MarginalsCohort(marginals={"age": {"uniform": [30, 40], "50": 1}}), "stands alone"),
        (MarginalsCohort(marginals={}), "at least one attribute"),
    ],
)
def test_a_malformed_cohort_is_refused_naming_the_fault(cohort: Cohort, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolved(cohort)
    assert told in str(caught.value)
