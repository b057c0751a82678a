"""What a recipe says of a cohort: who is to be generated. docs/cohorts.md has an example of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from scanloom.section import Count, Fraction, Section, Words

Unseen = Literal["allow", "refuse"]
"""What to do where no scan of the corpus has the asked-for combination of attributes: say so, or refuse."""


class CellsCohort(Section):
    """A joint table: each cell fixes attributes and has a `share` (relative) of the images."""

    kind: Literal["cells"] = "cells"
    cells: Annotated[tuple[Mapping[str, Any], ...], Field(min_length=1)]
    """Per cell: attribute -> value, a list of labels, or [low, high] for a number drawn uniformly; plus `share`."""
    unseen: Unseen = "allow"


class TableCohort(Section):
    """A joint table in a file: a row a cell, its columns attributes and either `share` or `count`."""

    kind: Literal["table"] = "table"
    uri: Annotated[str, Field(pattern=r"\.(csv|parquet)$")]
    """A .csv (UTF-8) or .parquet file, local or s3://. Empty is unknown; labels are joined by "+", or "none"; numbers
    may be spans such as 60-79. Counts must add up to `images`."""
    unseen: Unseen = "allow"


class Pair(Section):
    """How two attributes of the marginals hang together."""

    of: tuple[str, str]
    joint: Mapping[str, Mapping[str, Annotated[float, Field(ge=0)]]] | None = None
    """Value of the first -> value of the second -> share. Its odds ratios are kept, the marginals are met."""
    correlation: Annotated[float, Field(gt=-1.0, lt=1.0)] | None = None
    """Pearson's, of numbers or of attributes with two values (the first listed counts 0, the second 1)."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.joint is None) == (self.correlation is None):
            raise ValueError(f"pair {'-'.join(self.of)}: give either joint or correlation")
        if self.of[0] == self.of[1]:
            raise ValueError(f"pair {'-'.join(self.of)}: names one attribute twice")
        return self


class MarginalsCohort(Section):
    """Marginals: attribute -> {value: share}, or {"uniform": [low, high]} for a number.

    For labels, a key is one label, several joined by "+", or "none"; for numbers a number or a span such as "60-79".
    """

    kind: Literal["marginals"] = "marginals"
    marginals: Mapping[str, Mapping[str, Any]]
    dependence: Literal["independent", "corpus"] = "independent"
    """corpus: the attributes hang together as in the corpus's train split (its odds ratios), whatever the marginals."""
    pairs: tuple[Pair, ...] = ()
    unseen: Unseen = "allow"


class BalancedCohort(Section):
    """As many images in every combination of the attributes in `over`."""

    kind: Literal["balanced"] = "balanced"
    over: Words
    bands: Mapping[str, Annotated[tuple[float, ...], Field(min_length=2)]] = {}
    """Per number in `over`, the edges of its bands: [20, 40, 60, 80] are 20-39, 40-59 and 60-80."""
    values: Mapping[str, Words] = {}
    """Per category or labels attribute in `over`, which values; default: all that were seen, and of labels each alone
    and none."""
    others: Literal["unknown", "as-corpus"] = "unknown"
    """The attributes that are not in `over`: left to the generator, or as in the corpus within each combination."""
    unseen: Literal["refuse", "leave-out"] = "refuse"
    """What to do with combinations that fewer than `least_scans` scans of the corpus have."""
    least_scans: Count = 1


class AsCorpusCohort(Section):
    """The joint distribution of the corpus's train split, with rare combinations raised where one asks for it."""

    kind: Literal["as-corpus"] = "as-corpus"
    least_share: Fraction = 0.0
    """Of the images, what each combination of `over` that the corpus has gets at least; the others keep their
    proportions in what is left."""
    over: Words | None = None
    """None: all attributes. A combination that leaves one of them unknown is not raised."""

    @model_validator(mode="after")
    def _over_what_is_raised(self) -> Self:
        if self.over is not None and not self.least_share:
            raise ValueError("over: says which combinations to raise; give least_share too, or leave it out")
        return self


Cohort = Annotated[
    CellsCohort | TableCohort | MarginalsCohort | BalancedCohort | AsCorpusCohort, Field(discriminator="kind")
]
