"""What a recipe says of the privacy gate: how it is made of a corpus."""

from __future__ import annotations

from scanloom.recipe_audit import CopyDetection
from scanloom.section import Count


class Gate(CopyDetection):
    """The gate that refuses copies of training scans while images are made; trained apart from the audit's encoder."""

    max_scans: Count = 50000
    """Its encoder learns from so many; every scan of the train split is in its index, however many."""
