"""What a recipe says of the privacy gate: how it is made of a corpus."""

from __future__ import annotations

from scanloom.recipe_audit import CopyDetection
from scanloom.section import Count, Fraction


class Gate(CopyDetection):
    """The gate that refuses copies of training scans while images are made; trained apart from the audit's encoder."""

    max_scans: Count = 50000
    """Its encoder learns from so many; every scan of the train split is in its index, however many."""
    least_recall: Fraction = 0.95
    """Of slight planted copies, of the kind that is found least often, it must refuse so many, or there is no gate."""
    most_false_positives: Fraction = 0.05
    """So many of further patients may have a scan that it refuses, as promised by those who were held out; with fewer
    than 19 of them there is no gate."""
