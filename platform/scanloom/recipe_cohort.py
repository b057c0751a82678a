"""What a recipe says of a cohort: who is to be generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from scanloom.section import Section


class CellsCohort(Section):
    """A joint table: each cell fixes attributes and has a `share` (relative) of the images."""

    kind: Literal["cells"] = "cells"
    cells: Annotated[tuple[Mapping[str, Any], ...], Field(min_length=1)]
    """Per cell: attribute -> value, a list of labels, or [low, high] for a number drawn uniformly; plus `share`."""


class MarginalsCohort(Section):
    """Independent marginals: attribute -> {value: share}, or {"uniform": [low, high]} for a number.

    For labels, a key is one label, several joined by "+", or "none".
    """

    kind: Literal["marginals"] = "marginals"
    marginals: Mapping[str, Mapping[str, Any]]


class AsCorpusCohort(Section):
    """The joint distribution of the corpus's train split."""

    kind: Literal["as-corpus"] = "as-corpus"


Cohort = Annotated[CellsCohort | MarginalsCohort | AsCorpusCohort, Field(discriminator="kind")]
