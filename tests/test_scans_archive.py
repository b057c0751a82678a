"""Archives: every member comes out once, as its bytes or as the reason why not, whoever made the archive."""

from __future__ import annotations

import gzip
import io
import random
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scanloom.errors import ScanError, StoreError
from scanloom.scans import archive
from scanloom.scans.archive import archive_names, is_archive_name, is_packed, read_archive
from scanloom.scans.quarantine import CODES
from scanloom.store import Store
from tests.made_dicom import file, tar

FILES = [(f"{i}.dcm", bytes([65 + i]) * (700 + i)) for i in range(4)]
NOISE = [(f"{i}", np.random.default_rng(i).bytes(900)) for i in range(4)]
CONTENTS = [data for _, data in FILES]


def members(store: Store, key: str) -> list[bytes | str]:
    size = next(o.bytes for o in store.list() if o.key == key)
    results = list(read_archive(store, key, size))
    assert [ordinal for ordinal, _ in results] == list(range(len(results)))
    return [content.code if isinstance(content, ScanError) else content for _, content in results]


def kept(data: bytes, tmp_path: Path, name: str = "a.tar") -> list[bytes | str]:
    (tmp_path / name).write_bytes(data)
    return members(Store(str(tmp_path)), name)


def names(data: bytes, tmp_path: Path) -> list[str]:
    (tmp_path / "a.tar").write_bytes(data)
    return archive_names(Store(str(tmp_path)), "a.tar", len(data))


def zipped(files: Iterable[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as made:
        for name, data in files:
            made.writestr(name, data, None if isinstance(name, zipfile.ZipInfo) else method)
    return sink.getvalue()


def tarred(entry: tarfile.TarInfo, data: bytes = b"", form: Any = tarfile.GNU_FORMAT) -> bytes:
    """One member of a tar, without the archive's end."""
    entry.size = entry.size or len(data)
    return entry.tobuf(form) + data + bytes(-len(data) % 512)


END = bytes(1024)


# --- every kind -----------------------------------------------------------------------------------------------

WHOLE: dict[str, Callable[[], bytes]] = {
    "tar": lambda: tar(FILES),
    "tar.gz": lambda: tar(FILES, "w:gz"),
    "tar.gz in two parts": lambda: gzip.compress(tar(FILES)[:1000]) + gzip.compress(tar(FILES)[1000:]),
    "tar.gz with padding": lambda: tar(FILES, "w:gz") + bytes(5000),
    "zip": lambda: zipped(FILES),
    "zip, stored": lambda: zipped(FILES, zipfile.ZIP_STORED),
    "zip behind other bytes": lambda: zipped(FILES[:1])[:30] + zipped(FILES),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_archive_gives_its_files_in_order_whatever_its_name(kind: str, tmp_path: Path) -> None:
    for name in ("a.tar", "a.zip", "a.tgz"):
        assert kept(WHOLE[kind](), tmp_path, name) == CONTENTS
    assert names(WHOLE[kind](), tmp_path) == [name for name, _ in FILES]


def test_archives_are_opened_by_four_names() -> None:
    assert all(map(is_archive_name, ("a.tar", "b/c.tar.gz", "D.TGZ", "e.Zip")))
    assert not any(map(is_archive_name, ("a.dcm", "tar", "a.gz", "a.tar.bz2", "zip/a")))


def test_dicom_is_never_taken_for_an_archive() -> None:
    scan = file()
    assert not is_packed(scan)
    for magic in (b"PK\x03\x04", b"\x1f\x8b"):
        assert not is_packed(magic + scan[len(magic) :])
    assert not any(map(is_packed, (b"", b"P", b"a letter" * 100, bytes(1000), scan[132:])))


@pytest.mark.parametrize("data", [b"not a tar" * 200, b"PK", b"\x1f"])
def test_what_is_no_archive_at_all_gives_one_refusal(tmp_path: Path, data: bytes) -> None:
    assert kept(data, tmp_path) == ["not-an-archive"]


@pytest.mark.parametrize("data", [b"\x1f\x8b not gzip", b"PK\x03\x04 not a zip" * 40])
def test_what_only_begins_like_an_archive_gives_one_refusal(tmp_path: Path, data: bytes) -> None:
    assert kept(data, tmp_path) == ["broken-archive"]
    assert names(data, tmp_path) == []


@pytest.mark.parametrize("empty", [tar([]), tar([], "w:gz"), zipped([]), zipped([("folder/", b"")])])
def test_an_archive_without_files_is_not_passed_over(empty: bytes, tmp_path: Path) -> None:
    assert kept(empty, tmp_path) == ["empty-archive"]


def test_an_object_without_bytes_is_an_empty_file(tmp_path: Path) -> None:
    assert kept(b"", tmp_path) == ["empty-file"]


# --- damage ---------------------------------------------------------------------------------------------------


def test_a_tar_cut_anywhere_ends_with_one_refusal_and_keeps_what_came_before(tmp_path: Path) -> None:
    whole = tar(FILES)
    # Each file takes a header block and two blocks of content.
    for blocks in range(1, 12):
        for extra in (0, 100):
            results = kept(whole[: blocks * 512 + extra], tmp_path)
            complete = [c for i, c in enumerate(CONTENTS) if blocks * 512 + extra >= i * 1536 + 512 + len(c)]
            assert results == [*complete, "broken-archive"], (blocks, extra)


def test_a_damaged_header_in_the_middle_is_no_silent_end(tmp_path: Path) -> None:
    damaged = bytearray(tar(FILES))
    damaged[1536 + 20] ^= 0xFF
    assert kept(bytes(damaged), tmp_path) == [CONTENTS[0], "broken-archive"]


def test_a_second_archive_behind_the_first_is_not_lost_in_silence(tmp_path: Path) -> None:
    assert kept(tar(FILES) * 2, tmp_path) == [*CONTENTS, "broken-archive"]
    assert kept(tar(FILES, "w:gz") * 2, tmp_path) == [*CONTENTS, "broken-archive"]


def test_a_compressed_archive_that_is_cut_or_flipped_ends_with_one_refusal(tmp_path: Path) -> None:
    whole = tar(NOISE, "w:gz")
    for size in range(20, len(whole), 97):
        cut = kept(whole[:size], tmp_path)
        assert cut[-1] == "broken-archive"
        assert cut[:-1] == [data for _, data in NOISE][: len(cut) - 1]
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    assert kept(bytes(flipped), tmp_path) == [*(data for _, data in NOISE), "broken-archive"]


def test_a_zip_that_is_cut_has_lost_its_directory(tmp_path: Path) -> None:
    whole = zipped(NOISE)
    for size in range(20, len(whole), 97):
        assert kept(whole[:size], tmp_path) == ["broken-archive"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_of_a_zip_costs_that_member_alone(method: int, tmp_path: Path) -> None:
    damaged = bytearray(zipped(NOISE, method))
    with zipfile.ZipFile(io.BytesIO(damaged)) as made:
        second, third = (made.infolist()[i].header_offset for i in (1, 2))
    damaged[second + 400] ^= 1
    damaged[third + 30] ^= 1
    expected = [NOISE[0][1], "broken-member", "broken-member", NOISE[3][1]]
    assert kept(bytes(damaged), tmp_path) == expected


def test_a_zip_may_not_lie_about_a_size(tmp_path: Path) -> None:
    for lie in (0, 1, 899, 901, 5000):
        lying = bytearray(zipped(NOISE))
        entry = lying.find(b"PK\x01\x02")
        lying[entry + 24 : entry + 28] = struct.pack("<I", lie)
        assert kept(bytes(lying), tmp_path) == ["broken-member", *(data for _, data in NOISE[1:])], lie


def test_the_store_failing_is_no_fault_of_the_archive(tmp_path: Path) -> None:
    for data in (tar(FILES), tar(NOISE, "w:gz"), zipped(FILES)):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(StoreError):
            list(read_archive(Store(str(tmp_path)), "a.tar", len(data) + 1))


# --- members that are not read --------------------------------------------------------------------------------


def test_links_are_refused_and_folders_are_no_files(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as made:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            made.addfile(entry)
    assert kept(sink.getvalue(), tmp_path) == ["archive-link", "archive-link"]


def test_a_link_in_a_zip_is_refused_and_its_folders_are_no_files(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    data = zipped([("folder/", b""), (link, b"/etc/passwd"), ("folder/file", b"content")])
    assert kept(data, tmp_path) == ["archive-link", b"content"]
    assert names(data, tmp_path) == ["link", "folder/file"]


def test_a_member_without_a_name_is_a_file_like_others(tmp_path: Path) -> None:
    data = bytearray(zipped(FILES[:2], zipfile.ZIP_STORED))
    # A name ends at its first zero.
    for magic, name in ((b"PK\x03\x04", 30), (b"PK\x01\x02", 46)):
        data[data.find(magic) + name] = 0
    assert names(bytes(data), tmp_path) == ["", "1.dcm"]
    assert kept(bytes(data), tmp_path)[1:] == CONTENTS[1:2]
    assert kept(tar([("", b"content")]), tmp_path) == [b"content"]


def test_an_encrypted_member_and_one_of_another_method_have_their_codes(tmp_path: Path) -> None:
    data = bytearray(zipped(FILES))
    entries = [at for at in range(len(data)) if data[at : at + 4] == b"PK\x01\x02"]
    data[entries[1] + 8] |= 1
    data[entries[2] + 10] = zipfile.ZIP_LZMA
    assert kept(bytes(data), tmp_path) == [CONTENTS[0], "archive-encrypted", "archive-compression", CONTENTS[3]]


def test_an_archive_in_an_archive_is_refused_and_so_is_a_packed_file(tmp_path: Path) -> None:
    inner = [tar(FILES), tar(FILES, "w:gz"), zipped(FILES), gzip.compress(file())]
    for outer in (tar, zipped):
        data = outer([("scan", file()), *((f"{i}.dcm", packed) for i, packed in enumerate(inner))])
        assert kept(data, tmp_path)[1:] == ["packed-file"] * 4


def test_a_member_over_the_limit_is_refused_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 701)
    for data in (tar(FILES), tar(FILES, "w:gz"), zipped(FILES)):
        assert kept(data, tmp_path) == [*CONTENTS[:2], "too-large", "too-large"]
        assert names(data, tmp_path) == [name for name, _ in FILES]


def test_sparse_members_of_every_format_are_refused_and_the_next_one_is_read(tmp_path: Path) -> None:
    old = tarfile.TarInfo("old")
    old.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(tarred(old, b"x" * 600))
    header[482] = 1
    map_continues, map_ends = bytearray(512), bytes(512)
    map_continues[504] = 1
    data = bytes(with_checksum(header[:512])) + map_continues + map_ends + header[512:]
    new = tarfile.TarInfo("GNUSparseFile.0/new")
    new.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "new"}
    data += tarred(new, b"1\n0\n1\n".ljust(512, b"\0") + b"x", tarfile.PAX_FORMAT)
    data += tarred(tarfile.TarInfo("next"), b"content") + END
    assert kept(data, tmp_path) == ["archive-sparse", "archive-sparse", b"content"]


def with_checksum(header: bytearray) -> bytearray:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


# --- headers of tars ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_format_of_tar(form: int, tmp_path: Path) -> None:
    long = "/".join(["Ä" * 20] * 6) if form != tarfile.USTAR_FORMAT else "/".join(["a" * 40] * 5)
    entries = [tarfile.TarInfo(name) for name in (long, "short", long + "x")]
    entries[0].pax_headers = {"comment": "line\nsecond = line"} if form == tarfile.PAX_FORMAT else {}
    data = b"".join(tarred(entry, b"content", form) for entry in entries) + END
    assert kept(data, tmp_path) == [b"content"] * 3
    assert names(data, tmp_path) == [long, "short", long + "x"]


def test_the_size_of_an_extended_header_counts(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("big")
    entry.pax_headers = {"size": "600"}
    entry.size = 1
    data = tarred(entry, b"x" * 600, tarfile.PAX_FORMAT) + tarred(tarfile.TarInfo("next"), b"content") + END
    assert kept(data, tmp_path) == [b"x" * 600, b"content"]


def extended(records: bytes) -> bytes:
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    return tarred(header, records) + tarred(tarfile.TarInfo("next"), b"content") + END


def test_the_helper_makes_extended_headers_that_are_read(tmp_path: Path) -> None:
    assert names(extended(b"13 path=abcd\n"), tmp_path) == ["abcd"]


@pytest.mark.parametrize(
    "records",
    [
        b"99999999999999999999 path=x\n",
        b"9999 path=x\n",
        b"3 path=x\n",
        b"path=x\n",
        b"11 size=-1\n\0\0",
        b"13 size=1e99\n",
        b"5012 size=" + b"9" * 5001 + b"\n",
        b"10 size=\xff\n",
        b"x" * 10_000,
    ],
)
def test_an_extended_header_of_nonsense_breaks_the_archive_and_nothing_else(records: bytes, tmp_path: Path) -> None:
    assert kept(extended(records), tmp_path) == ["broken-archive"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_absurdly_large_extension_is_not_read(kind: bytes, tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 1 << 40
    assert kept(header.tobuf(tarfile.GNU_FORMAT) + b"1" * 5000, tmp_path) == ["broken-archive"]


@pytest.mark.parametrize("size", [-1, -(1 << 62), (1 << 62) + 1, (1 << 80)])
def test_a_size_that_cannot_be_breaks_the_archive_or_is_too_large(size: int, tmp_path: Path) -> None:
    header = bytearray(tarred(tarfile.TarInfo("x"), b"content"))
    header[124:136] = (size & ((1 << 96) - 1)).to_bytes(12, "big")
    header[124] = 0xFF if size < 0 else 0x80
    expected = ["broken-archive"] if size < 0 else ["too-large", "broken-archive"]
    assert kept(bytes(with_checksum(header[:512]) + header[512:]) + END, tmp_path) == expected


def test_ten_thousand_headers_of_headers_are_no_recursion(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type = tarfile.GNUTYPE_LONGNAME
    data = tarred(header, b"name\0") * 10_000 + tarred(tarfile.TarInfo("next"), b"content") + END
    assert kept(data, tmp_path) == [b"content"]


# --- bombs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_FREE_BYTES", 1 << 20)
    monkeypatch.setattr(archive, "MOST_MEMBERS", 50)
    monkeypatch.setattr(archive, "LEAST_MEMBER_BYTES", 1 << 40)


@pytest.mark.usefixtures("small_bounds")
def test_an_archive_that_inflates_out_of_proportion_is_left_alone(tmp_path: Path) -> None:
    fine, bomb = bytes(1 << 19), bytes(64 << 20)
    for data in (tar([("0", fine), ("1", bomb)], "w:gz"), zipped([("0", fine), ("1", bomb), ("2", b"lost")])):
        assert kept(data, tmp_path) == [fine, "archive-bomb"]
    many = [(f"{i}", fine) for i in range(40)]
    for data in (tar(many, "w:gz"), zipped(many)):
        assert kept(data, tmp_path)[-1] == "archive-bomb"
    assert kept(gzip.compress(bytes(64 << 20)), tmp_path) == ["archive-bomb"]


@pytest.mark.usefixtures("small_bounds")
def test_scans_that_compress_well_are_no_bomb(tmp_path: Path) -> None:
    black = [(f"{i}", bytes(1 << 18)) for i in range(4)]
    noise = [(f"n{i}", np.random.default_rng(i).bytes(1 << 20)) for i in range(4)]
    for data in (tar(noise + black, "w:gz"), zipped(noise + black)):
        assert kept(data, tmp_path) == [content for _, content in noise + black]


@pytest.mark.usefixtures("small_bounds")
def test_more_members_than_anybody_needs_end_the_archive(tmp_path: Path) -> None:
    many = [(f"{i}", b"") for i in range(60)]
    folders = b"".join(tarred(folder(f"{i}")) for i in range(60)) + END
    for data in (tar(many), tar(many, "w:gz"), zipped(many)):
        assert kept(data, tmp_path) == [b""] * 50 + ["archive-bomb"]
    assert kept(folders, tmp_path) == ["archive-bomb"]
    assert kept(gzip.compress(b"") * 60, tmp_path) == ["archive-bomb"]


def test_an_archive_of_files_with_content_may_hold_any_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_MEMBERS", 50)
    many = [(f"{i}", bytes([i]) * 4096) for i in range(120)]
    assert kept(tar(many), tmp_path) == [data for _, data in many]


def folder(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.DIRTYPE
    return entry


def test_a_zip_whose_members_share_their_bytes_is_left_alone(tmp_path: Path) -> None:
    data = bytearray(zipped(NOISE))
    entries = [at for at in range(len(data)) if data[at : at + 4] == b"PK\x01\x02"]
    data[entries[2] + 42 : entries[2] + 46] = data[entries[1] + 42 : entries[1] + 46]
    assert kept(bytes(data), tmp_path) == [NOISE[0][1], NOISE[1][1], "archive-bomb"]


def test_a_directory_larger_than_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_LONGEST_DIRECTORY", 1000)
    assert kept(zipped([(f"{i}", b"x") for i in range(40)]), tmp_path) == ["archive-bomb"]


def test_a_member_that_says_it_is_huge_takes_no_memory(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("huge")
    entry.size = 500 << 20
    cut = entry.tobuf(tarfile.GNU_FORMAT) + b"content"
    tracemalloc.start()
    try:
        assert kept(cut, tmp_path) == ["broken-archive"]
        assert kept(gzip.compress(cut), tmp_path) == ["broken-archive"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


# --- streaming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tar, lambda files: zipped(files, zipfile.ZIP_STORED)])
def test_an_archive_is_streamed_not_loaded(make: Callable[[Any], bytes], tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(make([(f"{i}", bytes(8 << 20)) for i in range(12)]))
    size = (tmp_path / "a.tar").stat().st_size
    tracemalloc.start()
    try:
        count = sum(len(c) for _, c in read_archive(Store(str(tmp_path)), "a.tar", size) if isinstance(c, bytes))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 12 * (8 << 20)
    assert peak < size / 2


@pytest.mark.parametrize("kind", WHOLE)
def test_few_requests_read_an_archive(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read_range = Store.read_range

    def counted(self: Store, key: str, offset: int, length: int) -> bytes:
        asked.append(length)
        return read_range(self, key, offset, length)

    monkeypatch.setattr(Store, "read_range", counted)
    data = WHOLE[kind]()
    assert kept(data, tmp_path) == CONTENTS
    assert len([length for length in asked if length]) <= 6
    assert sum(asked) <= 3 * len(data)


# --- everything else that can be wrong ------------------------------------------------------------------------


def test_no_damage_to_an_archive_is_an_unexpected_error(tmp_path: Path) -> None:
    """2,000 archives with bytes changed, cut out, doubled or cut off; each gives files and documented codes."""
    chance = random.Random(5)
    seeds = [make() for make in WHOLE.values()]
    found = set()
    for _ in range(2000):
        damaged = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(damaged) + 1)
            length = chance.choice([1, 2, 4, 512])
            change = chance.choice([b"", b"\0" * length, b"\xff" * length, chance.randbytes(length)])
            damaged[at : at + length] = change
        found |= {content for content in kept(bytes(damaged), tmp_path) if isinstance(content, str)}
    assert found <= set(CODES)
    assert found >= {"broken-archive", "broken-member", "not-an-archive"}
