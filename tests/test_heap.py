"""Memory kept and memory held, looked at from processes made for it: neither can be taken back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from scanloom.heap import keep_freed_memory

COUNT = """
import resource, sys
import numpy as np
from scanloom.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    for _ in range(50):
        blocks = [np.ones(40_000) for _ in range(20)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        blocks.clear()
        blocks = [np.ones(40_000) for _ in range(20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
"""
"""Page faults of a thousand blocks of 320 kB, each of which has 79 pages, once as many were used and given back."""


def faults(how: str) -> int:
    ran = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    assert faults("keep") < 500


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
