"""What the corpus has: counts, parts of bins, and how much of an order no scan has, against brute force."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanloom.sampling.cell import Cell, Span
from scanloom.sampling.corpus_table import CorpusTable

SEXES, FINDINGS, DECADES = ("F", "M"), ((), ("Effusion",), ("Nodule",)), (20, 30, 40)


def cell(share: float = 1.0, **values: Any) -> Cell:
    return Cell(
        values={n: Span(low=v[0], high=v[1]) if isinstance(v, list) else v for n, v in values.items()}, share=share
    )


def corpus(*cells: Cell) -> CorpusTable:
    return CorpusTable(cells)


def test_a_bin_holds_its_low_end_and_its_high_end_only_where_no_bin_begins() -> None:
    table = corpus(cell(10, age=[20, 30]), cell(30, age=[30, 38]))
    assert table.edges("age") == (20, 30)
    assert table.scans_in({"age": 30.0}) == 30
    assert table.scans_in({"age": 38.0}) == 30
    assert table.scans_in({"age": 39.0}) == 0
    assert table.scans_in({"age": Span(low=25, high=29)}) == pytest.approx(10 * 5 / 10)
    assert table.scans_in({"age": Span(low=20, high=38)}) == pytest.approx(40)
    assert table.scans_in({}) == 40


def test_combinations_are_counted_as_they_are_and_unknown_is_nobody() -> None:
    table = corpus(
        cell(5, sex="F", findings=("Effusion",)), cell(7, sex="M", findings=("Effusion", "Nodule")), cell(9, sex="F")
    )
    assert table.scans_in({"sex": "F", "findings": ("Effusion",)}) == 5
    assert table.scans_in({"sex": "M", "findings": ("Effusion",)}) == 0
    assert table.scans_in({"sex": "F", "findings": None}) == 14
    assert table.scans_in({"findings": ()}) == 0


def test_the_crosstab_counts_scans_and_shares_out_bins() -> None:
    table = corpus(cell(8, sex="F", age=[20, 30]), cell(2, sex="M", age=[30, 40]), cell(100, sex="M"))
    axes = [[cell(sex="F"), cell(sex="M")], [cell(age=[20, 24]), cell(age=[25, 40])]]
    assert table.crosstab(axes).tolist() == [[4, 4], [0, 2]]


def test_an_unseen_combination_of_seen_values_is_found_and_named() -> None:
    table = corpus(cell(sex="F", age=[60, 80], findings=()), cell(sex="M", age=[80, 89], findings=("Effusion",)))
    found = table.coverage([[cell(3, sex="F", age=[80, 89], findings=("Effusion",)), cell(1, sex="F", age=[60, 69])]])
    assert found.unseen == pytest.approx(0.75)
    assert found.unseen_by_cell == ((1.0, 0.0),)
    assert found.scans[0] == pytest.approx((0.0, 0.5))
    assert found.example == {"sex": "F", "age": Span(low=80, high=89), "findings": ("Effusion",)}


def test_independent_marginals_are_unseen_as_the_product_of_their_shares_says() -> None:
    table = corpus(cell(sex="F", findings=()), cell(sex="M", findings=()), cell(sex="M", findings=("Effusion",)))
    sexes, findings = (
        [cell(0.3, sex="F"), cell(0.7, sex="M")],
        [cell(0.8, findings=()), cell(0.2, findings=("Effusion",))],
    )
    found = table.coverage([sexes, findings])
    assert found.unseen == pytest.approx(0.3 * 0.2)
    assert found.unseen_by_cell[0] == pytest.approx((0.2, 0.0))
    assert found.unseen_by_cell[1] == pytest.approx((0.0, 0.3))
    assert found.example == {"sex": "F", "findings": ("Effusion",)}


AGES = st.tuples(st.integers(20, 50), st.integers(20, 50)).map(sorted)
BOXES = st.sets(st.sampled_from(list(product(SEXES, FINDINGS, DECADES))), min_size=1)
ASKED = st.tuples(
    st.sampled_from([*SEXES, None]), st.sampled_from(FINDINGS), st.one_of(st.none(), AGES), st.integers(1, 5)
)


def in_bin(age: int | None, low: int, lows: set[int]) -> bool:
    return age is None or low <= age < low + 10 or (age == low + 10 and age not in lows)


@settings(deadline=None)
@given(BOXES, st.lists(ASKED, min_size=1, max_size=5))
def test_a_joint_table_is_unseen_as_counting_every_age_says(boxes: set[Any], asked: list[Any]) -> None:
    table = corpus(*(cell(sex=s, findings=f, age=[low, low + 10]) for s, f, low in sorted(boxes)))
    lows, unseen = {low for _, _, low in boxes}, 0.0
    for sex, findings, ages, weight in asked:
        span = range(ages[0], ages[1] + 1) if ages else [None]
        for age in span:
            seen = (sex in (None, s) and findings == f and in_bin(age, low, lows) for s, f, low in boxes)
            unseen += 0 if any(seen) else weight / len(span)
    found = table.coverage([[cell(w, sex=s, findings=f, age=a) for s, f, a, w in asked]])
    assert found.unseen == pytest.approx(unseen / sum(weight for *_, weight in asked), abs=1e-9)
    if unseen > 1e-6:
        assert table.coverage([[Cell(values=found.example, share=1)]]).unseen > 0
