"""Cohorts: who is to be generated, from what a recipe says to tables of cells with shares.

A cohort is one or more joint tables that are drawn independently of each other, each over attributes of its own. A
table's cells get exact integer quotas (draw.py), so that a dataset holds what was ordered and not only on average.
What the generator cannot know is refused here, before anything is started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scanloom.attributes import AttributeSchema, Envelope
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import AsCorpusCohort, BalancedCohort, CellsCohort, Cohort, MarginalsCohort, TableCohort
from scanloom.sampling.cell import Cell, CohortTables, clipped, parse_cell, require_within, scales, shown
from scanloom.sampling.cohort_file import read_cells
from scanloom.sampling.corpus_table import CorpusTable, Coverage
from scanloom.sampling.grouped import balanced, raised
from scanloom.sampling.marginals import marginal_tables


@dataclass(frozen=True)
class Resolved:
    """A recipe's cohort as tables, how much of it the corpus never had, and what a person should be told of it."""

    tables: CohortTables
    coverage: Coverage
    told: tuple[str, ...]


def resolve(
    cohort: Cohort,
    schema: AttributeSchema,
    envelope: Envelope,
    corpus_cells: Sequence[Mapping[str, Any]],
    images: int,
) -> Resolved:
    """The tables of a recipe's cohort. `corpus_cells`: attribute -> value or [low, high], plus `count`.

    Raises RecipeError for a cohort that says nothing or something malformed, ArtefactError naming cell and envelope
    where it asks for what the generator has not seen.
    """
    known = scales(envelope)
    # Where its bins are what is drawn, one that begins with one of the few finer numbers stands for the others, too.
    drawn = isinstance(cohort, AsCorpusCohort)
    spelled = {name: replace(scale, is_exact=scale.is_exact or drawn) for name, scale in known.items()}
    parsed = (parse_cell(schema, cell, "count", "the corpus's table", spelled) for cell in corpus_cells)
    corpus = CorpusTable([clipped(cell, envelope) for cell in parsed], known)
    tables, told = _tables(cohort, schema, envelope, corpus, images)
    for table in tables:
        if not any(cell.share for cell in table):
            raise RecipeError("generate.cohort: the shares of a table sum to 0; give at least one cell a share")
        for cell in table:
            require_within(cell, envelope)
    if not tables:
        raise RecipeError("generate.cohort: no marginals; name at least one attribute")
    coverage = corpus.has_all(tables) if isinstance(cohort, AsCorpusCohort) else corpus.coverage(tables)
    if coverage.unseen:
        told = (*told, _sentence(coverage, corpus, images))
        # A balanced cohort has refused or left out what is unseen as a whole.
        if not isinstance(cohort, AsCorpusCohort | BalancedCohort) and cohort.unseen == "refuse":
            raise ArtefactError(f"generate.cohort: {told[-1]}; ask for what it has, or set unseen: allow")
    return Resolved(CohortTables(tables=tuple(tuple(table) for table in tables)), coverage, told)


def _tables(
    cohort: Cohort, schema: AttributeSchema, envelope: Envelope, corpus: CorpusTable, images: int
) -> tuple[list[list[Cell]], tuple[str, ...]]:
    if isinstance(cohort, CellsCohort):
        told = enumerate(cohort.cells, 1)
        return [[parse_cell(schema, c, "share", f"cohort cell {n}", corpus.scales) for n, c in told]], ()
    if isinstance(cohort, TableCohort):
        return [read_cells(cohort.uri, schema, images, corpus.scales)], ()
    if isinstance(cohort, MarginalsCohort):
        return marginal_tables(cohort, schema, corpus, images), ()
    if isinstance(cohort, BalancedCohort):
        cells, left_out = balanced(cohort, schema, envelope, corpus, images)
        return [cells], (left_out,) if left_out else ()
    if cohort.least_share and corpus.cells:
        return [raised(cohort, schema, corpus, images)], ()
    # Bins share their ends; drawn as they are, an end would come up for both.
    return [[corpus.trimmed(cell) for cell in corpus.cells]], ()


def _sentence(coverage: Coverage, corpus: CorpusTable, images: int) -> str:
    about = f"about {coverage.unseen * images:.0f}" if coverage.unseen * images >= 0.5 else "less than one"
    return (
        f"{about} of {images} images are of combinations that none of the corpus's {corpus.scans} scans has, such as "
        f"{shown(coverage.example)}"
    )
