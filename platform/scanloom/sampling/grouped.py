"""Cohorts that follow the corpus group by group: balanced over attributes, or with rare combinations raised.

Groups get their images first, exactly; each group's images are then shared out among the cells in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import product

from scanloom.attributes import NO_LABEL, AttributeSchema, Envelope
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import AsCorpusCohort, BalancedCohort, LabelsAttribute, NumberAttribute, nearest
from scanloom.sampling.cell import MOST_CELLS, Cell, Span, Wanted, parse_value, shown, split
from scanloom.sampling.corpus_table import CorpusTable, merged
from scanloom.sampling.draw import quotas


def raised(cohort: AsCorpusCohort, schema: AttributeSchema, corpus: CorpusTable, images: int) -> list[Cell]:
    """The corpus's cells with every combination of `cohort.over` at `least_share` of the images at least.

    Combinations below it get that share, in whole images, the others keep their proportions in what is left. Raises
    RecipeError where the least shares alone are more than all.
    """
    over = cohort.over or schema.names
    for name in over:
        schema[name]
    groups: dict[tuple[Wanted, ...], list[Cell]] = {}
    for cell in corpus.cells:
        groups.setdefault(tuple(cell.values.get(name) for name in over), []).append(corpus.trimmed(cell))
    scans = [Fraction(sum(round(cell.share) for cell in cells)) for cells in groups.values()]
    least = Fraction(str(cohort.least_share))
    may_rise = [None not in group for group in groups]
    _require_enough(least, sum(may_rise), images)
    shares = _with_floor(scans, may_rise, Fraction(math.ceil(least * images), images))
    counts = quotas(shares, images)
    return [cell for cells, count in zip(groups.values(), counts, strict=True) for cell in _shared_out(cells, count)]


def _require_enough(least: Fraction, combinations: int, images: int) -> None:
    asked = f"generate.cohort: least_share {float(least):g} for {combinations} combinations is"
    if combinations * least > 1:
        raise RecipeError(f"{asked} more than all images; 1/{combinations} at most, or name fewer attributes in `over`")
    if combinations * (each := math.ceil(least * images)) > images:
        raise RecipeError(f"{asked} {each} images each, more than {images} in all; order more images, or raise by less")


def _with_floor(weights: Sequence[Fraction], may_rise: Sequence[bool], least: Fraction) -> list[Fraction]:
    """Shares in proportion to the weights, but `least` where one that may rise would have less; they sum to 1."""
    held: set[int] = set()
    while True:
        free = sum(weight for place, weight in enumerate(weights) if place not in held)
        scale = (1 - least * len(held)) / free if free else Fraction(0)
        under = {place for place, weight in enumerate(weights) if may_rise[place] and weight * scale < least} - held
        if not under:
            return [least if place in held else weight * scale for place, weight in enumerate(weights)]
        held |= under


def balanced(
    cohort: BalancedCohort, schema: AttributeSchema, envelope: Envelope, corpus: CorpusTable, images: int
) -> tuple[list[Cell], str | None]:
    """As many images in each combination, to one; and a line on those that are left out, where some are.

    Raises ArtefactError where the corpus has too few scans of a combination, RecipeError for what is malformed and
    for fewer images than combinations.
    """
    wanted = list(_combinations(cohort, schema, envelope, corpus))
    # Where a band cuts through a bin of the corpus, part of a scan lies in it: that counts as one.
    under = [math.ceil(corpus.scans_in(values)) < cohort.least_scans for values in wanted]
    lacking = [values for values, lacks in zip(wanted, under, strict=True) if lacks]
    told = f"{len(lacking)} of {len(wanted)} combinations have under {cohort.least_scans} scans in the corpus, such as "
    if lacking and (cohort.unseen == "refuse" or len(lacking) == len(wanted)):
        raise ArtefactError(
            f"generate.cohort: {told}{shown(lacking[0])} (trained on {envelope.scans} scans); set unseen: leave-out, "
            "or balance over less"
        )
    kept = [values for values, lacks in zip(wanted, under, strict=True) if not lacks]
    if images < len(kept):
        raise RecipeError(f"generate.images={images}: balanced over {len(kept)} combinations; order as many at least")
    counts = quotas([1.0] * len(kept), images)
    cells = [
        cell for values, count in zip(kept, counts, strict=True) for cell in _within(cohort, values, corpus, count)
    ]
    return cells, f"{told}{shown(lacking[0])}: left out" if lacking else None


def _combinations(
    cohort: BalancedCohort, schema: AttributeSchema, envelope: Envelope, corpus: CorpusTable
) -> Iterable[dict[str, Wanted]]:
    for what, mapping in (("bands", cohort.bands), ("values", cohort.values)):
        for name in mapping:
            if name not in cohort.over:
                raise RecipeError(
                    f"generate.cohort: {what} of {name!r}, which is not in over{nearest(name, cohort.over)}"
                )
    if len(set(cohort.over)) != len(cohort.over):
        raise RecipeError(f"generate.cohort: over names an attribute twice: {', '.join(cohort.over)}")
    axes = [_values(cohort, name, schema, envelope, corpus) for name in cohort.over]
    if (count := math.prod(len(axis) for axis in axes)) > MOST_CELLS:
        raise RecipeError(
            f"generate.cohort: {count} combinations; {MOST_CELLS} at most: name fewer values or attributes"
        )
    return (dict(zip(cohort.over, values, strict=True)) for values in product(*axes))


def _values(
    cohort: BalancedCohort, name: str, schema: AttributeSchema, envelope: Envelope, corpus: CorpusTable
) -> list[Wanted]:
    declaration, where = schema[name], f"generate.cohort: balanced over {name}"
    if isinstance(declaration, NumberAttribute):
        if name not in cohort.bands:
            raise RecipeError(f"{where}: a number needs bands, such as bands: {{{name}: [20, 40, 60, 80]}}")
        edges = cohort.bands[name]
        if list(edges) != sorted(set(edges)):
            raise RecipeError(f"{where}: the edges of its bands do not ascend: {list(edges)}")
        whole = parse_value(declaration, [edges[0], edges[-1]], where, corpus.scales.get(name))
        assert isinstance(whole, Span)
        parts = split(whole, edges[:-1])
        if len(parts) != len(edges) - 1:
            told = f"no number that is a multiple of {whole.step:g}" if whole.step else "nothing of single precision"
            raise RecipeError(f"{where}: {told} lies between two edges of its bands: {list(edges)}")
        return list(parts)
    if name in cohort.bands:
        raise RecipeError(f"{where}: is no number; list its values under `values`")
    if name in cohort.values:
        found = [parse_value(declaration, value, where) for value in cohort.values[name]]
    else:
        found = [
            ()
            if isinstance(declaration, LabelsAttribute) and value == NO_LABEL
            else parse_value(declaration, value, where)
            for value in _seen(envelope.values.get(name, {}), declaration.values)
        ]
    if len(set(found)) != len(found):
        raise RecipeError(f"{where}: a value is listed twice")
    return found


def _seen(counts: Mapping[str, int], declared: Sequence[str]) -> list[str]:
    return [value for value in (NO_LABEL, *declared) if value in counts]


def _within(cohort: BalancedCohort, values: Mapping[str, Wanted], corpus: CorpusTable, images: int) -> list[Cell]:
    """The cells of one combination."""
    if cohort.others == "unknown":
        return [Cell(values=values, share=images)]
    others = (
        Cell(values={**corpus.trimmed(cell).values, **values}, share=scans) for cell, scans in corpus.having(values)
    )
    return _shared_out(merged(others), images)


def _shared_out(cells: Sequence[Cell], images: int) -> list[Cell]:
    """The cells that get any of so many images, with how many as their share."""
    counts = quotas([cell.share for cell in cells], images)
    return [Cell(values=c.values, share=n) for c, n in zip(cells, counts, strict=True) if n]
