"""Memory kept and memory held, looked at from processes made for it: neither can be taken back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from scanloom.heap import keep_freed_memory

COUNT = """
import resource, sys, threading
import numpy as np
from scanloom.heap import keep_freed_memory
def step():
    blocks = []
    for size in range(20_000, 600_000, 2_000):
        blocks = [*blocks[-60:], np.ones(size)]
def faults():
    if sys.argv[1] == "keep":
        assert keep_freed_memory()
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[2] == "first":
    faults()
else:
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
"""
"""Page faults of three times 290 blocks of up to 5 MB, of which 61 are held at once, after as many were given back."""


def faults(how: str, thread: str) -> int:
    ran = subprocess.run([sys.executable, "-c", COUNT, how, thread], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
@pytest.mark.parametrize("thread", ["first", "another"])
def test_memory_that_was_freed_is_used_again_without_page_faults(thread: str) -> None:
    assert faults("keep", thread) < 500 < faults("leave", thread)


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()


CHILD_OF_A_LARGE_PROCESS = """
import subprocess, sys
import numpy as np
from scanloom.heap import peak_resident_bytes
held = np.ones(64 << 20)
del held
print(peak_resident_bytes(), flush=True)
held = np.ones(64 << 20)
subprocess.run([sys.executable, "-c", "from scanloom.heap import peak_resident_bytes; print(peak_resident_bytes())"])
"""


def test_the_most_a_process_held_includes_what_it_gave_back_but_nothing_of_its_parent() -> None:
    ran = subprocess.run([sys.executable, "-c", CHILD_OF_A_LARGE_PROCESS], capture_output=True, text=True, check=True)
    parent, child = map(int, ran.stdout.split())
    assert 1 << 20 < child < 256 << 20 < 512 << 20 < parent
