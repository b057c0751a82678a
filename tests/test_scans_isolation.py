"""The fence: a file that kills, hangs or starves its reader is refused, and the next one is read."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scanloom.errors import ScanError
from scanloom.scans.isolation import Fence


def echo(content: bytes, times: int) -> Iterator[bytes]:
    for _ in range(times):
        yield content


def chatter(content: bytes) -> Iterator[bytes]:
    sys.stdout.write("a codec's remark\n")
    os.write(1, b"and one from C")
    yield content


def crash(content: bytes) -> Iterator[bytes]:
    yield content
    ctypes.string_at(0)


def hang(content: bytes) -> Iterator[bytes]:
    yield content
    signal.pause()


def devour(content: bytes) -> Iterator[bytes]:
    yield bytes(1 << 34)


def refuse(content: bytes) -> Iterator[bytes]:
    yield content
    raise ScanError("truncated", "PixelData", "the file ends before its content does")


def fail(content: bytes) -> Iterator[bytes]:
    yield content
    raise LookupError("a value of the header: DOE^JANE")


def code_of(fence: Fence, read: Callable[..., Iterator[bytes]]) -> tuple[list[bytes], str]:
    """What came before the refusal, and its code."""
    got: list[bytes] = []
    with pytest.raises(ScanError) as refusal:
        got.extend(fence.run(read, b"content"))
    return got, refusal.value.code


def test_what_is_read_behind_the_fence_is_what_is_read_before_it() -> None:
    large = os.urandom(3 << 20)
    with Fence() as fence:
        assert list(fence.run(echo, large, 3)) == [large] * 3
        assert list(fence.run(echo, b"", 0)) == []
        assert list(fence.run(chatter, b"x")) == [b"x"]


def test_a_file_that_crashes_its_reader_is_refused_and_the_next_is_read() -> None:
    with Fence() as fence:
        assert code_of(fence, crash) == ([b"content"], "reader-died")
        assert list(fence.run(echo, b"next", 1)) == [b"next"]


def test_a_file_that_never_ends_is_refused_and_its_process_is_gone() -> None:
    with Fence(patience_s=2.0) as fence:
        list(fence.run(echo, b"warm", 1))
        process = fence._process
        assert process is not None
        assert code_of(fence, hang) == ([b"content"], "reader-hung")
        assert process.returncode == -signal.SIGKILL
        assert list(fence.run(echo, b"next", 1)) == [b"next"]


def test_a_file_that_wants_all_the_memory_is_refused() -> None:
    with Fence() as fence:
        assert code_of(fence, devour) == ([], "reader-died")
        assert list(fence.run(echo, b"next", 1)) == [b"next"]


def test_the_readers_own_refusal_comes_through() -> None:
    with Fence() as fence:
        assert code_of(fence, refuse) == ([b"content"], "truncated")
        assert list(fence.run(echo, b"next", 1)) == [b"next"]


def test_an_error_that_nobody_foresaw_refuses_the_file_without_its_words() -> None:
    with Fence() as fence:
        assert code_of(fence, fail) == ([b"content"], "reader-failed")
        assert list(fence.run(echo, b"next", 1)) == [b"next"]


def test_a_hanging_reader_does_not_outlive_the_process_that_waits_for_it() -> None:
    with Fence(patience_s=1.0) as fence:
        list(fence.run(echo, b"warm", 1))
        process = fence._process
        assert process is not None
        reading = fence.run(hang, b"x")
        assert next(reading) == b"x"
        assert process.wait(timeout=20) == -signal.SIGALRM  # nobody listens, as when the worker was killed


def test_a_caller_that_stops_half_way_does_not_get_the_rest_with_the_next_file() -> None:
    with Fence() as fence:
        reading = fence.run(echo, b"old", 5)
        assert next(reading) == b"old"
        reading.close()  # type: ignore[attr-defined]
        assert list(fence.run(echo, b"new", 1)) == [b"new"]


def test_the_fence_leaves_no_process_behind() -> None:
    with Fence() as fence:
        list(fence.run(echo, b"x", 1))
        process = fence._process
        assert process is not None
        assert Path(f"/proc/{process.pid}").exists()
    assert not Path(f"/proc/{process.pid}").exists()
