"""A page of measurements: a section a part, of which a run writes those that it measured."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path


def write_section(page: Path, head: str, titles: Sequence[str], title: str, section: str) -> None:
    """Put a part's section in its place on the page, in the order of `titles`; the others stay as they were."""
    there = re.split(r"^(?=## )", page.read_text(), flags=re.MULTILINE)[1:] if page.exists() else []
    sections = {text.partition("\n")[0].removeprefix("## "): text.strip() for text in there} | {title: section.strip()}
    known = [sections[name] for name in titles if name in sections]
    page.write_text("\n\n".join([head.strip(), *known]) + "\n")


def machine() -> str:
    """The cores and the processor of this machine."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": a CPU")
    return f"{os.cpu_count()} cores of {model.partition(':')[2].strip()}"
