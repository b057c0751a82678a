"""What a process holds of memory: what its allocator keeps of a network's or a codec's, and the most it ever held."""

from __future__ import annotations

import ctypes
import re
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3), as numbered in malloc.h."""
_KEPT_BYTES = 2**31 - 1
_MOST_FROM_HEAP_BYTES = 32 << 20
"""Larger blocks always come from the kernel: glibc allows no higher limit on 64 bits (DEFAULT_MMAP_THRESHOLD_MAX)."""
_PAD_BYTES = 128 << 20
"""Of a thread's heaps (64 MiB each, HEAP_MAX_SIZE) a free one is given back unless that leaves less than this."""


def keep_freed_memory() -> bool:
    """Have this process's malloc keep what is freed for the next call; whether it could be told (glibc alone can).

    By default glibc takes blocks of 128 KiB and more from the kernel and gives them back, as it does the free end of
    its heap, and the kernel fills every page with zeros before it is used again. A network's activations are
    hundreds of such blocks a call: a process pays for them again and again, or not, by what sizes it happened to free
    before, for each of which glibc raises its limits. Threads other than the first have heaps of their own, many small
    ones, which are given back whole. The price is that the process stays as large as it once was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = {_MMAP_THRESHOLD: _MOST_FROM_HEAP_BYTES, _TRIM_THRESHOLD: _KEPT_BYTES, _TOP_PAD: _PAD_BYTES}
    return mallopt is not None and all(mallopt(parameter, value) for parameter, value in settings.items())


def peak_resident_bytes() -> int:
    """The most that this process ever held of the host's memory."""
    if _STATUS.exists():
        # The high-water mark of getrusage also knows that of the process that this one was forked from.
        held = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if held:
            return int(held[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
