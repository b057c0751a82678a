"""Units of a source that grows: nothing is read twice, nothing that is gone is kept, nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.scan import SourceFile, TableRow
from scanloom.scans.units import UNIT_BYTES, Listing, ShardFacts, Unit, by_digest, cut, grown, listing_of, remembered
from tests.made_dicom import KEY

PSEUDONYMS = Pseudonyms(KEY.encode())


def files(numbers: Sequence[int], version: str = "1") -> list[SourceFile]:
    return [SourceFile(f"MRN-{n:04d}", 10, version, alone=n % 7 == 0) for n in numbers]


def keys(units: Sequence[Unit]) -> list[str]:
    return [file.key for unit in units for file in unit.files]


def facts(listing: Listing, lost: Collection[int] = (), empty: Collection[int] = ()) -> dict[int, ShardFacts]:
    return {unit.index: ShardFacts(0 if unit.index in empty else 2, unit.index in lost) for unit in listing.units}


def test_loose_files_share_a_unit_up_to_its_count_and_bytes_and_others_are_alone() -> None:
    loose = [SourceFile(f"{i}", 1) for i in range(5)]
    assert [len(unit.files) for unit in cut(loose, 2, 10)] == [2, 2, 1]
    assert [unit.index for unit in cut(loose, 2, 10)] == [10, 11, 12]
    archive = SourceFile("a.tar", 1, alone=True)
    assert [len(unit.files) for unit in cut([loose[0], archive, *loose[1:]], 99, 0)] == [1, 1, 4]
    heavy = [SourceFile(f"{i}", UNIT_BYTES // 2) for i in range(5)]
    assert [len(unit.files) for unit in cut(heavy, 99, 0)] == [2, 2, 1]
    giant = [SourceFile("0", 3 * UNIT_BYTES), SourceFile("1", 1)]
    assert [len(unit.files) for unit in cut(giant, 99, 0)] == [1, 1]


@given(st.sets(st.integers(0, 300), min_size=1), st.integers(1, 9))
def test_every_file_is_in_one_unit(numbers: set[int], per_unit: int) -> None:
    listed = files(sorted(numbers))
    assert keys(cut(listed, per_unit, 0)) == [file.key for file in listed]


@given(st.sets(st.integers(0, 60), min_size=1), st.sets(st.integers(0, 90)), st.sets(st.integers(0, 60)))
def test_a_changed_source_keeps_what_is_intact_and_cuts_the_rest_anew(
    first: set[int], added: set[int], removed: set[int]
) -> None:
    old = by_digest(files(sorted(first)), PSEUDONYMS)
    listing = listing_of("rules", cut(list(old.values()), 4, 0), old)
    new = by_digest(files(sorted((first | added) - removed)), PSEUDONYMS)
    units = grown(listing, new, facts(listing), 4)
    assert sorted(keys(units)) == sorted(file.key for file in new.values())
    before = {unit.index: unit for unit in remembered(listing, old)}
    for unit in units:
        if unit.index in before:
            assert unit == before[unit.index]
    intact = {index for index, unit in before.items() if not {f.key for f in unit.files} - set(keys(units))}
    assert intact <= {unit.index for unit in units}
    if not first & removed:
        assert set(before) <= {unit.index for unit in units}


def test_units_that_lost_duplicates_are_read_again_when_any_unit_is_gone() -> None:
    old = by_digest(files(range(1, 7)), PSEUDONYMS)
    listing = listing_of("rules", cut(list(old.values()), 2, 0), old)
    more = by_digest(files(range(1, 9)), PSEUDONYMS)
    assert [unit.index for unit in grown(listing, more, facts(listing, {2}), 2)] == [0, 1, 2, 3, 4]
    fewer = by_digest(files(range(3, 7)), PSEUDONYMS)
    assert [unit.index for unit in grown(listing, fewer, facts(listing, {2}), 2)] == [1, 3]
    assert [unit.index for unit in grown(listing, fewer, facts(listing), 2)] == [1, 2]
    assert [unit.index for unit in grown(listing, fewer, facts(listing, {2}, empty={0}), 2)] == [1, 2]


def test_a_file_that_changed_in_place_or_in_the_table_is_another_file() -> None:
    def one(version: str, age: str) -> str:
        row = TableRow("MRN-1", "p", "", {"PatientAge": age})
        return next(iter(by_digest([SourceFile("MRN-1", 5, version, rows=(row,))], PSEUDONYMS)))

    assert one("1", "50") == one("1", "50")
    assert len({one("1", "50"), one("2", "50"), one("1", "51")}) == 3


@pytest.mark.parametrize(
    "name", [b"scan.dcm", "Gr\u00f6\u00dfe/\u6771\u4eac.dcm".encode(), b"caf\xe9.dcm", b"caf\xc3\xa9\xff"]
)
def test_a_name_of_any_bytes_reaches_the_worker_and_has_a_digest_of_its_own(name: bytes) -> None:
    (unit,) = cut([SourceFile(os.fsdecode(name), 5, "1"), SourceFile("other", 5, "1")], 4, 0)
    assert os.fsencode(Unit.model_validate_json(unit.model_dump_json()).files[0].key) == name
    assert len(by_digest(unit.files, PSEUDONYMS)) == 2


def test_what_a_corpus_remembers_names_no_file() -> None:
    source = by_digest(files(range(20)), PSEUDONYMS)
    listing = listing_of("rules", cut(list(source.values()), 4, 0), source)
    assert "MRN" not in listing.model_dump_json()
    other = by_digest(files(range(20)), Pseudonyms(KEY[::-1].encode()))
    assert not set(source) & set(other)
