from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanloom.attributes import AttributeSchema, Envelope, Value, describe
from scanloom.errors import ArtefactError, RecipeError, ScanError
from scanloom.recipe import CategoryAttribute, LabelsAttribute, NumberAttribute

SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", source="PatientSex", values=("F", "M"), aliases={"female": "F"}),
        NumberAttribute(name="age", unit="years", minimum=0, maximum=120, cap=90),
        NumberAttribute(name="dose", unit="mGy", minimum=0.1, maximum=0.7),
        LabelsAttribute(name="findings", values=("cardiomegaly", "effusion")),
    )
)


def _parsed(**raw: str | None) -> dict[str, Value]:
    return SCHEMA.parse(raw)


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("063Y", 63), ("018M", 1.5), ("026W", 26 / 52.1775), ("010D", 10 / 365.25), ("000D", 0),
        ("63", 63), (" 63.5 ", 63.5), ("95", 90), ("119Y", 90), ("1e1", 10),
    ],
)  # fmt: skip
def test_ages_are_read_in_dicom_s_units_and_capped(text: str, years: float) -> None:
    assert _parsed(age=text)["age"] == np.float32(years)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "-inf", "411", "131Y"])
def test_a_number_out_of_range_is_a_typed_reason_without_the_value(text: str) -> None:
    with pytest.raises(ScanError) as caught:
        _parsed(age=text)
    assert (caught.value.code, caught.value.tag) == ("attribute-out-of-range", "age")
    assert text not in caught.value.reason


@pytest.mark.parametrize("text", ["abc", "63 Y", "0²0Y", "John Doe"])
def test_text_where_a_number_belongs_is_a_typed_reason_without_the_text(text: str) -> None:
    with pytest.raises(ScanError) as caught:
        _parsed(age=text)
    assert caught.value.code == "attribute-not-a-number"
    assert text not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "  "])
def test_absent_text_is_unknown(text: str | None) -> None:
    assert set(_parsed(PatientSex=text, age=text, findings=text).values()) == {None}


@pytest.mark.parametrize(
    ("text", "value"),
    [("F", "F"), (" M ", "M"), ("female", "F"), ("Jane Doe", None), ("f", None)],
)
def test_a_category_lets_only_declared_values_through(text: str, value: str | None) -> None:
    assert _parsed(PatientSex=text, sex="M")["sex"] == value


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("effusion|cardiomegaly", ("cardiomegaly", "effusion")),
        ("effusion | effusion", ("effusion",)),
        ("No Finding", ()),
        ("Jane Doe", None),
        ("No Finding|effusion", ("effusion",)),
        ("Jane Doe|effusion", ("effusion",)),
    ],
)
def test_labels_come_in_declared_order_without_foreign_text(text: str, labels: tuple[str, ...] | None) -> None:
    assert _parsed(findings=text)["findings"] == labels


def test_checked_values_are_in_schema_order_with_gaps_unknown() -> None:
    checked = SCHEMA.check({"findings": ["effusion", "cardiomegaly"], "age": 63, "sex": "F"})
    assert list(checked.items()) == [
        ("sex", "F"),
        ("age", 63.0),
        ("dose", None),
        ("findings", ("cardiomegaly", "effusion")),
    ]
    assert SCHEMA.check({"findings": []})["findings"] == ()


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"agee": 3}, "no attribute 'agee' in the schema; did you mean 'age'?"),
        ({"sex": "X"}, "sex='X'; known: F, M"),
        ({"sex": 1}, "sex=1"),
        ({"age": 130}, r"age=130: expected a number in [0, 120] years"),
        ({"age": float("nan")}, "age=nan"),
        ({"age": True}, "age=True"),
        ({"age": "63"}, "age='63'"),
        ({"findings": "effusion"}, "expected a list of labels"),
        ({"findings": ["effusoin"]}, "findings='effusoin'; did you mean 'effusion'?"),
        ({"findings": 3}, "expected a list of labels"),
    ],
)
def test_a_wrong_request_names_attribute_value_and_what_is_allowed(values: dict[str, Any], hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        SCHEMA.check(values)
    assert hint in str(caught.value)


_VALUES = st.fixed_dictionaries(
    {
        "sex": st.sampled_from(["F", "M", None]),
        "age": st.none() | st.floats(0, 120),
        "dose": st.none() | st.floats(0.1, 0.7),
        "findings": st.none() | st.sets(st.sampled_from(["cardiomegaly", "effusion"])).map(sorted),
    }
)


@given(st.lists(_VALUES, min_size=1, max_size=5))
@settings(deadline=None)
def test_attributes_survive_parquet_s_columns_and_stay_in_their_envelope(rows: list[dict[str, Any]]) -> None:
    checked = [SCHEMA.check(row) for row in rows]
    table = pa.Table.from_pylist(checked, schema=pa.schema(SCHEMA.arrow_fields()))
    back = [SCHEMA.from_row(row) for row in table.to_pylist()]
    assert back == checked
    envelope = Envelope.model_validate_json(Envelope.of(SCHEMA, checked).model_dump_json())
    for row in back:
        envelope.require(row)


def test_a_pandas_row_is_read_as_well() -> None:
    table = pa.Table.from_pylist([{"sex": "F", "findings": ["effusion"]}], schema=pa.schema(SCHEMA.arrow_fields()))
    row = table.to_pandas().iloc[0].to_dict()
    assert SCHEMA.from_row(row) == {"sex": "F", "age": None, "dose": None, "findings": ("effusion",)}


ENVELOPE = Envelope.of(
    SCHEMA,
    [
        {"sex": "F", "age": 30.0, "dose": None, "findings": ("effusion",)},
        {"sex": "F", "age": 70.0, "dose": None, "findings": ("effusion", "cardiomegaly")},
    ],
)


def test_the_envelope_counts_what_was_seen() -> None:
    assert ENVELOPE.scans == 2
    assert ENVELOPE.values == {"sex": {"F": 2}, "findings": {"cardiomegaly": 1, "effusion": 2}}
    assert {name: (seen.low, seen.high) for name, seen in ENVELOPE.ranges.items()} == {"age": (30.0, 70.0)}


@pytest.mark.parametrize("attributes", [{"age": 30.0}, {"age": 70.0}, {"sex": None}, {"findings": ("effusion",)}, {}])
def test_a_request_inside_the_envelope_passes(attributes: dict[str, Value]) -> None:
    ENVELOPE.require(attributes)


@pytest.mark.parametrize(
    ("attributes", "hint"),
    [
        ({"age": 29.9}, "age=29.9 is outside the trained envelope; trained on 30 to 70"),
        ({"age": 71.0}, "trained on 30 to 70"),
        ({"dose": 0.5}, "dose=0.5 is outside the trained envelope; trained on nothing"),
        ({"sex": "M"}, "sex='M' is outside the trained envelope; trained on F"),
        ({"findings": ()}, "findings='none' is outside the trained envelope; trained on cardiomegaly, effusion"),
    ],
)
def test_a_request_outside_the_envelope_names_it(attributes: dict[str, Value], hint: str) -> None:
    with pytest.raises(ArtefactError) as caught:
        ENVELOPE.require(attributes)
    assert hint in str(caught.value)


def test_captions_leave_out_what_is_unknown() -> None:
    assert describe({"sex": "F", "age": 63.4, "view": None, "findings": ()}) == "F 63 none"
    assert describe({"sex": None, "findings": ("effusion", "nodule")}) == "effusion+nodule"
