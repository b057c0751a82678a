"""Figures of a probe against their definitions, and its limits against what they promise of scans yet to come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from scanloom.attributes import AttributeSchema, Value
from scanloom.models.probe_card import Check, ProbeCard
from scanloom.recipe import CategoryAttribute, LabelsAttribute, NumberAttribute
from scanloom.training.calibration import auc, checks, readings

SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", values=("F", "M")),
        NumberAttribute(name="age", unit="years", minimum=0, maximum=100),
        LabelsAttribute(name="findings", values=("Effusion", "Nodule", "Mass")),
    )
)
RANDOM = np.random.default_rng(7)
Rows = list[dict[str, Value]]


@pytest.fixture(autouse=True)
def _the_same_draws_in_any_order() -> None:
    RANDOM.bit_generator.state = np.random.PCG64(7).state


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    for _ in range(20):
        scores, positive = RANDOM.integers(0, 6, 40).astype(np.float64), RANDOM.random(40) < 0.4
        ours, others = scores[positive], scores[~positive]
        pairs = [(a > b) + 0.5 * (a == b) for a in ours for b in others]
        assert auc(scores, positive)[0] == pytest.approx(np.mean(pairs))


def test_delongs_interval_holds_the_true_area_as_often_as_it_says() -> None:
    # Two normal populations one deviation apart: the area is Phi(1 / sqrt(2)).
    truth, held = 0.7602499, 0
    for _ in range(400):
        scores = np.concatenate([RANDOM.normal(1.0, 1.0, 40), RANDOM.normal(0.0, 1.0, 120)])
        _, low, high = auc(scores, np.arange(160) < 40)
        held += low <= truth <= high
    # 95 % of 400, less four deviations of a binomial and the interval's known slight narrowness.
    assert held >= 360


def test_a_perfect_separation_of_a_few_scans_promises_little() -> None:
    area, low, high = auc(np.arange(12.0), np.arange(12) >= 9)
    assert (area, high) == (1.0, 1.0)
    assert low == pytest.approx(0.025 ** (1 / 3))


def made(scans: int, *, skill: float, unknown: float = 0.0) -> tuple[NDArray[np.float32], Rows]:
    """Outputs [N, 6] of a probe of this skill (0: it reads nothing), and the truth."""
    rows: Rows = []
    outputs = np.zeros((scans, 6), dtype=np.float32)
    for number in range(scans):
        sex, age = ("F", "M")[RANDOM.integers(2)], float(RANDOM.uniform(20, 80))
        found = tuple(
            label
            for label, share in zip(SCHEMA["findings"].values, (0.4, 0.3, 0.05), strict=True)  # type: ignore[union-attr]
            if RANDOM.random() < share
        )
        female = 1 / (1 + np.exp(-skill * (2 * (sex == "F") - 1) - RANDOM.normal()))
        read = [
            1 / (1 + np.exp(-skill * (2 * (label in found) - 1) - RANDOM.normal()))
            for label in ("Effusion", "Nodule", "Mass")
        ]
        noise = RANDOM.normal(0, 5)
        outputs[number] = [female, 1 - female, age + noise if skill else 50 + 10 * noise, *read]
        known = RANDOM.random(3) >= unknown
        rows.append(
            {
                "sex": sex if known[0] else None,
                "age": age if known[1] else None,
                "findings": found if known[2] else None,
            }
        )
    return outputs, rows


def calibrated(outputs: NDArray[np.float32], rows: Rows, share: float = 0.02) -> ProbeCard:
    card = ProbeCard(
        name="made", attributes=SCHEMA, size_px=32, channels=(8,), scales={"age": (50.0, 17.0)},
        false_reject_share=share, trained_scans=1, held_out_scans=len(rows),
    )  # fmt: skip
    card = card.model_copy(update={"readings": readings(card, outputs, rows, {"age": 50.0})})
    return card.model_copy(update={"checks": checks(card, outputs, rows)})


def refused(card: ProbeCard, chosen: Sequence[Check], outputs: NDArray[np.float32], rows: Rows) -> NDArray[np.bool_]:
    """Which rows any of these checks refuses, when asked for what they really are."""
    return np.array(
        [
            any(
                one.limit is not None and one.concerns(row) and card.agreement(one, read, row) < one.limit
                for one in chosen
            )
            for read, row in zip(outputs, rows, strict=True)
        ]
    )


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_no_more_real_scans_are_refused_for_an_attribute_than_stated(share: float) -> None:
    fresh, fresh_rows = made(4000, skill=2.0)
    rates: dict[str, list[float]] = {name: [] for name in SCHEMA.names}
    for _ in range(6):
        outputs, rows = made(1200, skill=2.0, unknown=0.1)
        card = calibrated(outputs, rows, share)
        for name in SCHEMA.names:
            chosen = [one for one in card.checks if one.attribute == name]
            known = [number for number, row in enumerate(rows) if row[name] is not None]
            assert refused(card, chosen, outputs, rows)[known].mean() <= share
            rates[name].append(float(refused(card, chosen, fresh, fresh_rows).mean()))
    for name, found in rates.items():
        # Of one calibration it scatters around what is promised on average.
        assert np.mean(found) <= share * 1.15, name
        assert np.mean(found) >= share * 0.3, f"{name}: refuses far less than it may"


def test_each_check_states_what_share_of_its_own_scans_it_refuses() -> None:
    outputs, rows = made(2400, skill=2.0)
    card = calibrated(outputs, rows)
    for one in card.checks:
        mine = [number for number, row in enumerate(rows) if one.concerns(row)]
        assert one.scans == len(mine)
        assert one.limit is not None
        assert one.rejected_share is not None
        assert one.rejected_share == pytest.approx(refused(card, [one], outputs, rows)[mine].mean())
        assert one.rejected_share <= 0.02


def test_what_is_read_no_better_than_by_chance_is_not_checked() -> None:
    outputs, rows = made(600, skill=0.0)
    card = calibrated(outputs, rows)
    assert [reading.name for reading in card.readings if reading.better_than_chance] == []
    assert {(one.limit, one.reason) for one in card.checks} == {(None, "no better than chance")}
    [age] = [reading for reading in card.readings if reading.name == "age"]
    assert age.chance is not None
    assert age.estimate is not None
    assert age.chance < age.estimate


def test_chance_is_rarely_taken_for_skill() -> None:
    lucky = 0
    for _ in range(100):
        outputs, rows = made(60, skill=0.0)
        lucky += sum(reading.better_than_chance for reading in calibrated(outputs, rows).readings)
    # Six readings, two of them the same: 2.5 % each, so 15 are expected.
    assert lucky < 40


def test_too_few_held_out_scans_of_a_kind_are_said_and_never_guessed_from() -> None:
    outputs, rows = made(300, skill=6.0)
    card = calibrated(outputs, rows)
    by_name = {one.name: one for one in card.checks}
    rare = by_name["findings=Mass"]
    assert 2 < rare.scans < 49
    assert (rare.limit, rare.reason) == (None, "too few held-out scans")
    assert by_name["findings=Effusion"].limit is not None
    assert by_name["findings without Mass"].limit is not None


def test_an_attribute_that_is_never_known_is_not_checked() -> None:
    outputs, rows = made(100, skill=2.0)
    card = calibrated(outputs, [row | {"findings": None, "age": None} for row in rows])
    assert {one.limit for one in card.checks if one.attribute != "sex"} == {None}
    unknown = [reading for reading in card.readings if not reading.name.startswith("sex")]
    assert {(reading.estimate, reading.scans) for reading in unknown} == {(None, 0)}
