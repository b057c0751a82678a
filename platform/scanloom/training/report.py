"""The training report: one HTML file, without external resources, of what a run's journal holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def training_report(
    history: Sequence[Mapping[str, Any]], pictures: Mapping[int, bytes], facts: Mapping[str, str]
) -> str:
    """The report of a run: `history` as of `journal.read_history`, sample grids as PNG by step, what was trained.

    `facts` are shown as they are, name and value, in their order. Every figure comes from the history.
    """
    raise NotImplementedError
