"""Counting in bounded memory: exact while there are few, close when there are many, the same in any order."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from scanloom.scans import distinct
from scanloom.scans.distinct import FEW, Distinct, Seen


def _names(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest()[:16] for number in range(count)]


def test_few_are_counted_exactly_however_often_they_come() -> None:
    names = _names(1000)
    both = Distinct.of(names) | Distinct.of(names[::2])
    assert (both.count, both.exact, str(both)) == (1000, True, "1,000")
    assert Distinct().count == 0


def test_many_are_estimated_closely_in_memory_that_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distinct, "BOUND", 4096)
    names = _names(200_000)
    parts = [Distinct.of(names[at : at + 10_000]) for at in range(0, len(names), 10_000)]
    random.Random(0).shuffle(parts)
    whole = Distinct()
    for part in parts:
        whole |= part
    assert len(whole.smallest) == 4096
    assert not whole.exact
    # Five standard errors.
    assert abs(whole.count / len(names) - 1) < 5 / np.sqrt(4096)
    assert np.array_equal(whole.smallest, Distinct.of(names).smallest)
    assert str(whole).startswith("about ")
    assert str(whole).endswith("000")


def test_many_scans_of_one_patient_are_not_common() -> None:
    seen = Seen()
    for _ in range(100):
        seen = seen.of("a")
    assert (seen.scans, seen.is_common) == (100, False)
    for patient in "bcd":
        seen = seen.of(patient)
    assert not seen.is_common
    assert seen.of("e").is_common


def test_parts_join_to_the_same_in_any_order() -> None:
    patients = _names(40)
    parts = [Seen().of(patient, scans=2) for patient in patients]
    forwards, backwards = Seen(), Seen()
    for part in parts:
        forwards = forwards.joined(part)
    for part in reversed(parts):
        backwards = part.joined(backwards)
    assert forwards == backwards == Seen(80, tuple(sorted(patients)[:FEW]))
