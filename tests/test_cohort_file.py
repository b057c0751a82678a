"""Tables of cohorts in CSV and Parquet: what they order, and what is refused by file, line and fault."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scanloom.errors import ArtefactError, RecipeError, StoreError
from scanloom.recipe import CellsCohort, TableCohort
from scanloom.store import Store
from tests.test_cohort_kinds import counts, order, rows

CSV = '\ufeffsex,age,findings,view,count\nF,60-79,Effusion,PA,3\nF,"[60, 79]",none,,1\nM,45,Effusion+Nodule,AP,6\n'


def written(folder: Path, text: str, name: str = "cohort.csv") -> TableCohort:
    (folder / name).write_text(text, encoding="utf-8")
    return TableCohort(uri=str(folder / name))


def test_a_csv_with_counts_is_made_to_the_image(tmp_path: Path) -> None:
    made = rows(written(tmp_path, CSV), 10)
    found = counts(made, "sex", "findings", "view")
    assert found == {("F", ("Effusion",), "PA"): 3, ("F", (), None): 1, ("M", ("Effusion", "Nodule"), "AP"): 6}
    assert all(60 <= row["age"] <= 79 if row["sex"] == "F" else row["age"] == 45 for row in made)


def test_csv_parquet_and_cells_that_say_the_same_are_the_same_order(tmp_path: Path) -> None:
    by_csv = order(written(tmp_path, CSV.replace("count", "share"))).tables
    told: list[dict[str, Any]] = [
        {"sex": "F", "age": "60-79", "findings": ["Effusion"], "view": "PA", "share": 3.0},
        {"sex": "F", "age": "60-79", "findings": [], "view": None, "share": 1.0},
        {"sex": "M", "age": "45", "findings": ["Effusion", "Nodule"], "view": "AP", "share": 6.0},
    ]
    pq.write_table(pa.Table.from_pylist(told), tmp_path / "cohort.parquet")
    assert order(TableCohort(uri=str(tmp_path / "cohort.parquet"))).tables == by_csv
    assert order(CellsCohort(cells=tuple(told))).tables == by_csv


def test_parquet_numbers_and_their_nan_are_numbers_and_unknown(tmp_path: Path) -> None:
    pq.write_table(pa.table({"age": [45.0, math.nan], "share": [1, 1]}), tmp_path / "c.parquet")
    made = rows(TableCohort(uri=str(tmp_path / "c.parquet")), 4)
    assert counts(made, "age") == {45.0: 2, None: 2}


def test_a_relative_uri_is_found_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, CSV)
    monkeypatch.chdir(tmp_path)
    assert len(rows(TableCohort(uri="cohort.csv"), 10)) == 10


@pytest.mark.s3
def test_a_table_in_s3_is_read_like_a_local_one(tmp_path: Path, store_uri: str) -> None:
    Store(store_uri).write("orders/cohort.csv", CSV.encode())
    assert order(TableCohort(uri=f"{store_uri}/orders/cohort.csv"), 10) == order(written(tmp_path, CSV), 10)


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "has no rows"),
        ("sex,count\n", "has no rows"),
        ("sex,count\nF,11\n", "add up to 11, generate.images is 10"),
        ("sex,count\nF,9.5\nM,0.5\n", "line 2: count 9.5 is no whole number"),
        ("sex,share\nF,many\n", "line 2: share 'many' is no number"),
        ("sex,share\nF,-1\n", "line 2: share -1"),
        ("sex,share\nF,\n", "line 2: share None"),
        ("sex,age\nF,3\n", "has 0 of the columns 'share' and 'count'"),
        ("sex,share,count\nF,3,3\n", "has 2 of the columns"),
        ("sexx,share\nF,3\n", "column 'sexx' is no attribute; did you mean 'sex'"),
        ("sex,sex,share\nF,F,3\n", "has column 'sex' twice"),
        ("sex,share\nF,3,4\n", "line 2: has 3 cells under 2 columns"),
        ("sex,share\nQ,3\n", "line 2: sex='Q'"),
        ("age,share\nold,3\n", "line 2: age='old'"),
        ("age,share\n70-60,3\n", "line 2: age=[70.0, 60.0]: low is over high"),
        ('sex,share\n"F,3\n', "is no proper CSV"),
    ],
)
def test_a_table_that_is_none_is_refused_naming_file_line_and_fault(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        order(written(tmp_path, text), 10)
    assert told in str(caught.value)
    assert "cohort.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    with pytest.raises(RecipeError, match="is no Parquet file"):
        order(TableCohort(uri=str(tmp_path / "c.parquet")))
    (tmp_path / "c.csv").write_bytes(b"sex,share\n\xff,1\n")
    with pytest.raises(RecipeError, match="not UTF-8"):
        order(TableCohort(uri=str(tmp_path / "c.csv")))
    with pytest.raises(StoreError, match=r"missing\.csv"):
        order(TableCohort(uri=str(tmp_path / "missing.csv")))
    with pytest.raises(ValueError, match="pattern"):
        TableCohort(uri="cohort.xlsx")


def test_parquet_that_is_no_table_of_a_cohort_is_refused_by_its_fault(tmp_path: Path) -> None:
    text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    one = pa.array([1.0])
    for table, told in (
        (pa.Table.from_arrays([one, one, one], ["age", "share", "share"]), "has column 'share' twice"),
        (pa.table({"sex": text, "share": one}), "not UTF-8"),
    ):
        pq.write_table(table, tmp_path / "c.parquet")
        with pytest.raises(RecipeError, match=told):
            order(TableCohort(uri=str(tmp_path / "c.parquet")))


def test_decimals_are_counts(tmp_path: Path) -> None:
    table = pa.table({"sex": ["F", "M"], "count": pa.array([Decimal(3), Decimal(7)], pa.decimal128(38, 0))})
    pq.write_table(table, tmp_path / "c.parquet")
    assert counts(rows(TableCohort(uri=str(tmp_path / "c.parquet")), 10), "sex") == {"F": 3, "M": 7}


def test_a_share_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(RecipeError, match="expected a number of 0 or more"):
        order(CellsCohort(cells=({"sex": "F", "share": 10**400},)))


def test_a_cell_outside_the_envelope_is_refused_naming_cell_and_envelope(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError) as caught:
        order(written(tmp_path, "sex,age,findings,share\nF,40-49,none,1\nM,60-90,Effusion,2\n"))
    for told in ("age=90", "sex=M, age=60-90, findings=Effusion", "trained on 20 to 89"):
        assert told in str(caught.value)
