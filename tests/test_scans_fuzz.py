"""Files as chance or malice makes them: each is read, or refused with a code, in seconds and in little memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from scanloom.scans.quarantine import CODES
from tests.made_bombs import BOMBS, bomb
from tests.made_mutants import Mutant, mutant
from tests.watched_reading import MOST_BYTES, MOST_SECONDS, Finding, Outcome, read_watched

SHORT, WHOLE = 3_000, 40_000
# Made in a moment, and of every kind that once was a finding.
QUICK = {
    "zeros",
    "negative frames",
    "2^31 frames",
    "nested 200000 SQ True",
    "nested 200000 UN False",
    "a million windows",
    "tables that lie",
    "jpeg 2000 of tiles 7000 gray",
    "jpeg-ls 65000 colour",
    "htj2k of small tiles 4000 colour",
    "rle 65000",
    "tiff of 100,000 pages",
    "tiff of pages in a circle",
    "png with many chunks",
    "zip of members that share their bytes",
    "archives in archives",
}


def outcomes(numbers: Sequence[int], make: Callable[[int], Mutant]) -> list[Outcome]:
    """Every file's outcome; none of them may be a finding, slow or large."""
    results = list(read_watched(numbers, make))
    assert [result.number for result in results] == list(numbers)
    assert [result for result in results if isinstance(result, Finding)] == []
    read = [result for result in results if isinstance(result, Outcome)]
    assert [result for result in read if result.seconds > MOST_SECONDS] == []
    assert [result for result in read if result.peak_bytes > MOST_BYTES] == []
    assert all(result.codes for result in read)
    return read


def codes(results: Sequence[Outcome]) -> Counter[str]:
    return Counter(code for result in results for code in set(result.codes))


def test_mutants_are_read_or_refused_with_a_code() -> None:
    found = codes(outcomes(range(SHORT), mutant))
    assert found.keys() <= {"scan", *CODES}
    # The mutants must get as far as to the pixels, and fail at every step of the way there.
    assert found["scan"] > SHORT / 10
    expected = {"not-dicom", "unreadable-dicom", "truncated", "unsupported-pixels", "unsupported-syntax"}
    assert found.keys() >= expected | {"undecodable-pixels", "not-an-image-file", "broken-archive", "broken-member"}


def test_the_same_number_gives_the_same_mutant() -> None:
    assert [mutant(number) for number in range(200)] == [mutant(number) for number in range(200)]
    assert len({mutant(number).data for number in range(200)}) > 190


@pytest.mark.slow
def test_forty_thousand_mutants_are_read_or_refused_with_a_code() -> None:
    assert sum(mutant(number).kind == "dicom" for number in range(WHOLE)) > 20_000
    assert len(codes(outcomes(range(SHORT, WHOLE), mutant))) > 20


def test_bombs_are_refused_or_read_in_bounds() -> None:
    numbers = [number for number, (_, name, _) in enumerate(BOMBS) if name in QUICK]
    assert len(numbers) == len(QUICK)
    outcomes(numbers, bomb)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BOMBS)), ids=[name for _, name, _ in BOMBS])
def test_each_bomb_is_refused_or_read_in_bounds(number: int) -> None:
    outcomes([number], bomb)


# --- the watch itself -----------------------------------------------------------------------------------------


def harmful(number: int) -> Mutant:
    """Makes its reader die, raise, run on and swell."""
    import os
    import time

    if number == 1:
        os._exit(3)
    if number == 3:
        return Mutant("dicom", "raises", 7)  # type: ignore[arg-type]
    if number == 5:
        time.sleep(3600)
    return Mutant("dicom", "harmless", b"harmless")


def test_the_watch_sees_what_dies_raises_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: the others go on as if nothing had been."""
    monkeypatch.setattr("tests.watched_reading.MOST_WALL_SECONDS", 5.0)
    results = list(read_watched(range(7), harmful))
    assert [result.number for result in results] == list(range(7))
    faults = {result.number: result.fault for result in results if isinstance(result, Finding)}
    assert faults.keys() == {1, 3, 5}
    assert faults[1] == "died with exit code 3"
    assert "TypeError" in faults[3]
    assert faults[5] == "hung"
