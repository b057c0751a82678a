"""A table's profile tells what its columns are, and nothing of anybody in it."""

from __future__ import annotations

import pytest

from scanloom.scans.distinct import Seen
from scanloom.scans.table_profile import MOST_VALUES, Column, ColumnTally, is_plain, is_telling, span

ROWS = 60


def _column(name: str, cells: list[str], patients: list[str] | None = None) -> Column:
    tally = ColumnTally(name)
    for number, cell in enumerate(cells):
        tally.add(cell, patients[number] if patients else str(number))
    return tally.column()


def test_a_category_is_shown_with_its_common_values_alone() -> None:
    column = _column("View", ["PA"] * 30 + ["AP"] * 26 + ["odd"] * 4)
    assert (column.kind, column.values, column.hidden) == ("category", {"PA": 30, "AP": 26}, 1)


def test_what_one_patient_has_often_is_not_common() -> None:
    cells = ["PA"] * 100 + ["her own"] * 10
    patients = [str(number) for number in range(100)] + ["one"] * 10
    assert _column("View", cells, patients).values == {"PA": 100}
    assert _column("View", ["her own"] * 10, ["one"] * 10).kind == "other"


def test_labels_are_told_apart_at_their_separator() -> None:
    column = _column("Findings", ["Effusion|Mass"] * 20 + ["No Finding"] * 40)
    assert (column.kind, column.separator) == ("labels", "|")
    assert column.values == {"No Finding": 40, "Effusion": 20, "Mass": 20}


def test_a_number_is_bounded_by_what_five_patients_reach() -> None:
    ages = [str(20 + number) for number in range(50)] + ["104", "3"]
    column = _column("Age", ages)
    assert (column.kind, column.low, column.high) == ("number", 23, 66)
    assert _column("PatientAge", [f"{20 + n % 30:03d}Y" for n in range(ROWS)]).kind == "number"


def test_a_number_that_fewer_than_five_patients_reach_from_either_end_has_no_range() -> None:
    assert span({float(n): Seen().of(str(n)) for n in range(8)}) is None
    assert span({float(n): Seen().of(str(n)) for n in range(9)}) == (4, 4)
    assert span({1.0: Seen(9, ("a",)), 2.0: Seen(9, ("b",))}) is None


@pytest.mark.parametrize(
    "name",
    ["Patient Name", "patientname", "ReferringPhysician", "MRN", "patient_id", "StudyDate", "dob", "Comments", "Index",
     "AccessionNumber", "Patient", "report", "Operator", "e-mail", "File"],
)  # fmt: skip
def test_no_value_is_shown_of_a_column_with_a_telling_name(name: str) -> None:
    assert is_telling(name)
    assert _column(name, ["Miller"] * ROWS) == Column(name, "other", ROWS, 0, 1, hidden=1)
    assert _column(name, [str(n % 20) for n in range(ROWS)]).low is None


@pytest.mark.parametrize(
    "name", ["Patient Age", "Patient Gender", "View Position", "Finding Labels", "sex", "side", "dose"]
)
def test_harmless_names_are_not_taken_for_telling(name: str) -> None:
    assert not is_telling(name)


@pytest.mark.parametrize(
    "text",
    ["Miller^Anna", "20120301", "2012-03-01", "1.3.2019", "a@b.org", "MRN 12345", "x" * 41, "one two three four five"],
)
def test_no_value_is_shown_that_looks_like_a_name_a_date_a_number_or_a_sentence(text: str) -> None:
    assert not is_plain(text)
    assert _column("group", [text] * ROWS).values == {}


@pytest.mark.parametrize("text", ["PA", "No Finding", "Pleural_Thickening", "left lateral", "T2", "0.5"])
def test_terms_are_plain(text: str) -> None:
    assert is_plain(text)


def test_free_text_and_numbers_of_people_are_only_counted() -> None:
    free = _column("seen", [f"the patient number {n} was well" for n in range(ROWS)])
    assert (free.kind, free.distinct, free.values) == ("other", ROWS, {})
    numbers = _column("code", [str(40_000 + 3 * n) for n in range(2000)])
    assert (numbers.kind, numbers.low) == ("other", None)
    assert numbers.distinct == MOST_VALUES


def test_an_empty_column_is_empty() -> None:
    assert _column("View", [""] * 3) == Column("View", "empty", 0, 3, 0)
