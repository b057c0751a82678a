"""How finely numbers are drawn: as the corpus's are written, whole where those are whole."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scanloom.attributes import AttributeSchema, Envelope, Range
from scanloom.errors import RecipeError
from scanloom.recipe import AsCorpusCohort, BalancedCohort, CellsCohort, Cohort, MarginalsCohort, NumberAttribute
from scanloom.sampling.cell import CohortTables, Scale, Span, count, split
from scanloom.sampling.cohort import resolve
from scanloom.sampling.draw import draw

POSITION = NumberAttribute(name="position", unit="mm", minimum=-500, maximum=1000)
SCHEMA = AttributeSchema(declarations=(POSITION,))
WHOLE, TENTHS, FINE = [3.0, 20.0, 97.0], [3.0, 20.2, 96.7], [3.0, 20.123456, 96.7]


def envelope(positions: list[float]) -> Envelope:
    return Envelope.of(SCHEMA, [{"position": float(np.float32(position))} for position in positions])


def positions(cohort: Cohort, seen: list[float], *bins: list[float], images: int = 2000) -> list[float]:
    """What is drawn of a corpus of these, counted in these bins."""
    cells = [{"position": bin, "count": 10} for bin in bins or ([0.0, 50.0], [50.0, 100.0])]
    found = envelope([0.0, *seen, 100.0])
    tables = resolve(cohort, SCHEMA, found, cells, images).tables
    drawn: list[float] = draw(tables, SCHEMA, images, 3).rows(0, images)["position"].to_pylist()
    return drawn


def uniform(low: float, high: float) -> list[Cohort]:
    marginal = {"position": {"uniform": [low, high]}}
    return [
        CellsCohort(cells=({"position": [low, high]},)),
        MarginalsCohort(marginals=marginal),
        MarginalsCohort(marginals=marginal, dependence="corpus"),
        BalancedCohort(over=("position",), bands={"position": (low, high)}),
    ]


@pytest.mark.parametrize("cohort", [AsCorpusCohort(), *uniform(0, 100)], ids=lambda cohort: str(cohort.kind))
@pytest.mark.parametrize(("seen", "step", "most"), [(WHOLE, 1.0, 101), (TENTHS, 0.1, 1001)], ids=["whole", "tenths"])
def test_all_numbers_that_the_corpus_could_have_are_drawn_and_no_others(
    cohort: Cohort, seen: list[float], step: float, most: int
) -> None:
    found = positions(cohort, seen, images=20_000)
    meant = {float(np.float32(place * step)) for place in range(most)}
    assert set(found) == meant
    assert max(found.count(number) for number in (0.0, 50.0, 100.0)) < 20_000 / most * 2.5


@pytest.mark.parametrize("cohort", [AsCorpusCohort(), *uniform(0, 100)], ids=lambda cohort: str(cohort.kind))
def test_where_the_corpus_is_finer_all_numbers_between_are_drawn_though_the_ends_are_whole(cohort: Cohort) -> None:
    found = positions(cohort, FINE)
    assert len(set(found)) > 1900
    assert 0.0 <= min(found) < 1.0
    assert 99.0 < max(found) <= 100.0
    # No gap where one bin of the corpus ends and the next begins.
    assert any(49.0 < number < 50.0 for number in found)


def test_ends_that_a_whole_corpus_could_not_have_are_moved_inwards() -> None:
    cohort = CellsCohort(cells=({"position": [10.5, 14.2]},))
    assert set(positions(cohort, WHOLE)) == {11.0, 12.0, 13.0, 14.0}
    assert set(positions(cohort, TENTHS)) == {float(np.float32(place / 10)) for place in range(105, 143)}
    # Bins of the corpus whose edges are not whole.
    found = positions(AsCorpusCohort(), WHOLE, [0.0, 2.5], [2.5, 5.0], [5.0, 100.0])
    assert all(number.is_integer() for number in found)
    assert {0.0, 1.0, 2.0, 3.0, 4.0, 5.0} <= set(found)


def test_who_asks_for_less_than_a_step_gets_all_that_lies_there() -> None:
    found = positions(CellsCohort(cells=({"position": [10.2, 10.8]},)), WHOLE)
    assert len(set(found)) > 1900
    assert min(found) >= np.float32(10.2)
    assert max(found) <= np.float32(10.8)


def test_a_few_fractions_among_whole_ages_make_none_of_the_others_fractions() -> None:
    """Ages of infants are written in months."""
    ages = [*[float(age) for age in range(1, 100)] * 10, 0.25, 1.5]
    assert set(positions(CellsCohort(cells=({"position": [20, 29]},)), ages)) == {float(age) for age in range(20, 30)}
    # Who asks for a span that begins with an infant's age gets all that lies in it; a bin of the corpus that does is
    # one of years all the same.
    assert len(set(positions(CellsCohort(cells=({"position": [0.25, 9]},)), ages))) > 1900
    bins = [0.25, 10.0], [10.0, 100.0]
    assert set(positions(AsCorpusCohort(), ages, *bins, images=9000)) == {float(age) for age in range(1, 101)}
    many = [*[float(age) for age in range(100)], *[0.5, 0.25, 1.5] * 10]
    found = positions(CellsCohort(cells=({"position": [20, 29]},)), many, images=20_000)
    assert set(found) == {float(np.float32(place / 100)) for place in range(2000, 2901)}


def test_a_corpus_whose_numbers_nobody_counted_is_drawn_as_before_and_its_plan_keeps_its_digest() -> None:
    told = {"low": 0.0, "high": 100.0}
    assert Range.model_validate(told).resolution is None
    found = Envelope(scans=3, values={}, ranges={"position": Range(low=0.0, high=100.0)})
    tables = resolve(CellsCohort(cells=({"position": [0, 100]},)), SCHEMA, found, [{"position": [0, 100]}], 9).tables
    assert json.loads(tables.model_dump_json())["tables"][0][0]["values"] == {"position": told}
    assert CohortTables.model_validate_json(tables.model_dump_json()) == tables
    finer = resolve(CellsCohort(cells=({"position": [0, 100]},)), SCHEMA, envelope([*TENTHS, 0, 100]), [], 9).tables
    assert CohortTables.model_validate_json(finer.model_dump_json()) == finer
    assert finer != tables


def test_bands_within_one_step_are_refused_by_the_step() -> None:
    cohort = BalancedCohort(over=("position",), bands={"position": (10.0, 10.2, 10.7, 12.0)})
    with pytest.raises(RecipeError, match="no number that is a multiple of 1 lies between two edges"):
        positions(cohort, WHOLE)


# --- scales, ranges and spans -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "resolution", "is_exact"),
    [
        ([1, 2, 300], 1.0, True), ([0.1, 7], 0.1, True), ([0.3, 0.7, 1234.5], 0.1, True), ([-17.25, 3], 0.01, True),
        ([0.143, 0.171], 0.001, True), ([1 / 3], 0.0, True), ([1 / 3, 5], 0.0, True), ([8000.1234], 0.0, True),
        ([1e6, 3e6, 2.0**30], 1.0, True),
        ([*range(1000), 0.5], 1.0, False), ([*range(50), 0.5], 0.1, True),
    ],
)  # fmt: skip
def test_the_resolution_is_the_coarsest_that_nearly_all_keep_to(
    numbers: list[float], resolution: float, is_exact: bool
) -> None:
    found = envelope([float(number) for number in numbers]).ranges["position"]
    assert (found.resolution, found.is_exact) == (resolution, is_exact)


@given(st.lists(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=9), min_size=2, max_size=4))
def test_ranges_of_shards_add_up_to_that_of_all(shards: list[list[float]]) -> None:
    merged = envelope(shards[0]).ranges["position"]
    for shard in shards[1:]:
        merged = merged.merged(envelope(shard).ranges["position"])
    assert merged == envelope([number for shard in shards for number in shard]).ranges["position"]
    assert merged.merged(Range(low=-1, high=1)).resolution is None


STEPS = st.sampled_from([1.0, 0.1, 0.01, 0.001])


@given(STEPS, st.integers(-3000, 3000), st.integers(0, 400), st.lists(st.integers(-3100, 3500), max_size=6))
def test_the_parts_of_a_span_hold_each_of_its_numbers_once(
    step: float, first: int, more: int, edges: list[int]
) -> None:
    span = Scale(step, is_exact=True).span(float(np.float32(first * step)), float(np.float32((first + more) * step)))
    assert (span.step, span.numbers) == (step, more + 1)
    parts = split(span, [(edge + 0.5 * (edge % 2)) * step for edge in edges])
    assert sum(part.numbers for part in parts) == span.numbers
    assert (parts[0].low, parts[-1].high) == (span.low, span.high)
    assert sum(count(part.low, part.high, step) for part in parts) == more + 1
    for before, after in pairwise(parts):
        assert after.low == float(np.float32(round(before.high / step + 1) * step))


def test_an_open_end_is_not_counted() -> None:
    assert [count(0.0, 0.3, 0.1), count(0.0, 0.3, 0.1, closed=False), count(0.05, 0.07, 0.1)] == [4, 3, 0]
    assert Span(low=2.0, high=2.0).numbers == Span(low=2.0, high=2.0, step=1.0).numbers == 1


def test_numbers_that_are_drawn_lie_within_the_envelope() -> None:
    known: Any = envelope([0.1, 0.7])
    tables = resolve(CellsCohort(cells=({"position": [0.1, 0.7]},)), SCHEMA, known, [], 500).tables
    for row in draw(tables, SCHEMA, 500, 1).rows(0, 500).to_pylist():
        known.require({"position": row["position"]})
