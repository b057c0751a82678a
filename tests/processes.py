"""Processes below another one, found through /proc and killed without warning."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def descendants(root: int) -> list[int]:
    """Process ids below `root`, parents first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        # A process may end while we look.
        with suppress(OSError, ValueError, IndexError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = list(children.get(root, ()))
    for child in found:
        found += children.get(child, ())
    return found


def named(root: int, *names: str) -> list[int]:
    """Descendants of `root` whose command line (Ray sets it to what a worker does) holds one of `names`."""
    found = []
    for process in descendants(root):
        with suppress(OSError):
            line = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
            if any(name in line for name in names):
                found.append(process)
    return found


def kill(process: int) -> bool:
    """SIGKILL; False where it had ended by itself."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
