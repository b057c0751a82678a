"""Asked beside achieved: what a generator ignores shows, what the probe gets wrong of real scans too is told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scanloom.attributes import Attributes
from scanloom.audit.fairness import ALL, readings
from scanloom.audit.report import Reading
from scanloom.models.probe_card import ProbeCard
from scanloom.models.probe_card import Reading as Held
from tests.tiny_generator import SCHEMA

RANDOM = np.random.default_rng(6)


def card(*readable: str) -> ProbeCard:
    held = [
        Held(
            name=name, figure="auc", estimate=0.9, low=0.8, high=1.0, chance=0.5, scans=9, with_it=4,
            better_than_chance=True,
        )
        for name in readable
    ]  # fmt: skip
    return ProbeCard(
        name="made", attributes=SCHEMA, size_px=32, channels=(8,), scales={"age": (50.0, 10.0)},
        false_reject_share=0.02, trained_scans=1, held_out_scans=1, readings=tuple(held),
    )  # fmt: skip


def drawn(count: int) -> list[Attributes]:
    return [
        {
            "sex": "F" if RANDOM.random() < 0.5 else "M", "age": float(RANDOM.integers(30, 80)), "view": "PA",
            "findings": ("Effusion",) if RANDOM.random() < 0.4 else (),
        }
        for _ in range(count)
    ]  # fmt: skip


def seen(of: ProbeCard, rows: list[Attributes], *, wrong: float = 0.0) -> np.ndarray[Any, Any]:
    """What a probe reads that is wrong about a share of categories and labels."""
    out = np.zeros((len(rows), len(of.outputs)))
    for n, row in enumerate(rows):
        for column, output in enumerate(of.outputs):
            value = row[output.attribute]
            if isinstance(value, float):
                out[n, column] = value
            else:
                said = output.value in value if isinstance(value, tuple) else output.value == value
                out[n, column] = 0.9 if said != (RANDOM.random() < wrong) else 0.1
    return out


def by(found: tuple[Reading, ...], name: str, cell: str = ALL) -> Reading:
    return next(one for one in found if (one.name, one.cell) == (name, cell))


def gap(reading: Reading) -> float:
    assert reading.asked.value is not None
    assert reading.achieved.value is not None
    return abs(reading.asked.value - reading.achieved.value)


def test_a_finding_that_one_group_does_not_get_shows_in_that_cell() -> None:
    of, asked, real = card("findings=Effusion", "age"), drawn(600), drawn(400)
    made = seen(of, asked)
    ignored = [n for n, row in enumerate(asked) if row["sex"] == "F"]
    made[np.ix_(ignored, [of.columns["findings=Effusion"]])] = 0.1
    found = readings(of, made, asked, [str(n) for n in range(600)], seen(of, real), real)
    assert gap(by(found, "findings=Effusion", "sex=F")) > 0.3
    assert gap(by(found, "findings=Effusion", "sex=M")) == 0.0
    assert gap(by(found, "age")) == 0.0
    assert by(found, "age").asked.value == pytest.approx(54.5, abs=3)
    # It is not read, or the cell is made of it.
    assert not [one for one in found if one.name.startswith(("sex", "view"))]


def test_the_probes_own_error_is_stated() -> None:
    of, asked, real = card("findings=Effusion"), drawn(2000), drawn(2000)
    found = readings(
        of, seen(of, asked, wrong=0.2), asked, [str(n) for n in range(2000)], seen(of, real, wrong=0.2), real
    )
    effusion = by(found, "findings=Effusion")
    assert gap(effusion) > 0.0
    assert effusion.held_out_truth is not None
    assert effusion.held_out_read is not None
    assert effusion.held_out_read - effusion.held_out_truth == pytest.approx(gap(effusion), abs=0.05)


def test_small_cells_are_marked_and_unknown_ones_left_out() -> None:
    of, asked = card("findings=Effusion"), drawn(40)
    asked[0] = {**asked[0], "findings": None}
    found = readings(of, seen(of, [{**row, "findings": row["findings"] or ()} for row in asked]), asked,
                     [str(n) for n in range(40)], np.zeros((0, len(of.outputs))), [])  # fmt: skip
    assert by(found, "findings=Effusion").images == 39
    assert not by(found, "findings=Effusion").small
    assert by(found, "findings=Effusion", "sex=F").small
    assert by(found, "findings=Effusion").held_out_truth is None
    assert not [one for one in found if one.cell == "view=AP"]
