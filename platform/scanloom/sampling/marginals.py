"""Marginals, and how they hang together: a joint table with exactly these marginals that is as near as can be to the
corpus's dependence, or to what is said of pairs of attributes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from scanloom.attributes import AttributeSchema
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import MarginalsCohort, NumberAttribute, nearest
from scanloom.recipe_cohort import Pair
from scanloom.sampling.cell import MOST_CELLS, Cell, Span, Wanted, parse_share, parse_value, shown, shown_value, split
from scanloom.sampling.corpus_table import CorpusTable
from scanloom.sampling.draw import quotas
from scanloom.sampling.joint import Floats, Ints, Margin, Misfit, fit, fit_pair, pair_of_correlation, whole_images

_UNIFORM = "uniform"
# Of an image: below it a margin is met, since images are whole.
_NEAR = 0.05


def marginal_tables(
    cohort: MarginalsCohort, schema: AttributeSchema, corpus: CorpusTable, images: int
) -> list[list[Cell]]:
    """Independent tables: one an attribute, but one joint table for attributes that hang together.

    A joint table's shares are whole images, so that its marginals are exact.

    Raises RecipeError for what is malformed or contradicts itself, ArtefactError for what no table with the corpus's
    zeros can meet.
    """
    return [
        _Joint(cohort, names, schema, corpus, images).cells()
        if len(names) > 1
        else _axis(cohort, names[0], schema, corpus)
        for names in _connected(cohort)
    ]


def _connected(cohort: MarginalsCohort) -> list[list[str]]:
    """The attributes in groups that hang together, groups and attributes in the order of the recipe."""
    names = list(cohort.marginals)
    links = [pair.of for pair in cohort.pairs]
    for name in (name for link in links for name in link):
        if name not in names:
            raise RecipeError(f"generate.cohort: a pair names {name!r}, which has no marginal{nearest(name, names)}")
    if cohort.dependence == "corpus":
        links += [(names[0], name) for name in names[1:]]
    groups = [{name} for name in names]
    for link in links:
        touched = [group for group in groups if group & set(link)]
        groups = [group for group in groups if group not in touched] + [set().union(*touched)]
    in_order = [[name for name in names if name in group] for group in groups]
    return sorted(in_order, key=lambda group: names.index(group[0]))


def _axis(
    cohort: MarginalsCohort, name: str, schema: AttributeSchema, corpus: CorpusTable, edges: Sequence[float] = ()
) -> list[Cell]:
    """The cells of one marginal; a uniform one cut at `edges`."""
    shares, declaration, where = cohort.marginals[name], schema[name], f"cohort marginal of {name}"
    scale = corpus.scales.get(name)
    if _UNIFORM not in shares or not isinstance(declaration, NumberAttribute):
        values = ((parse_value(declaration, key, where, scale), share) for key, share in shares.items())
        cells = [Cell(values={name: value}, share=parse_share(share, where)) for value, share in values]
    elif len(shares) > 1:
        raise RecipeError(f"{where}: 'uniform' stands alone; found {', '.join(shares)}")
    else:
        whole = parse_value(declaration, shares[_UNIFORM], where, scale)
        parts = split(whole, edges) if isinstance(whole, Span) and edges else [whole]
        sizes = [part.numbers if isinstance(part, Span) and len(parts) > 1 else 1.0 for part in parts]
        cells = [Cell(values={name: part}, share=size) for part, size in zip(parts, sizes, strict=True)]
    if not any(cell.share for cell in cells):
        raise RecipeError(f"{where}: its shares sum to 0; give at least one value a share")
    return cells


class _Joint:
    """The joint table of attributes that hang together."""

    def __init__(
        self, cohort: MarginalsCohort, names: list[str], schema: AttributeSchema, corpus: CorpusTable, images: int
    ) -> None:
        self._cohort, self._names, self._schema, self._corpus, self._images = cohort, names, schema, corpus, images
        self._axes = [_axis(cohort, name, schema, corpus, corpus.edges(name)) for name in names]
        self._shape = [len(axis) for axis in self._axes]
        if math.prod(self._shape) > MOST_CELLS:
            raise RecipeError(
                f"generate.cohort: the joint table of {', '.join(names)} has {math.prod(self._shape)} cells, "
                f"{MOST_CELLS} at most; name fewer values, or let fewer attributes hang together"
            )
        self._quotas = [np.array(quotas([cell.share for cell in axis], images)) for axis in self._axes]
        self._codes: Ints = np.stack([code.ravel() for code in np.indices(self._shape)], axis=1)

    def cells(self) -> list[Cell]:
        """The cells that get images, with how many as their share."""
        corpus = self._cohort.dependence == "corpus"
        seed = self._corpus.crosstab(self._axes).ravel() if corpus else np.ones(len(self._codes))
        margins = self._margins()
        table, misfit = fit(seed, [margin for _, margin in margins])
        if misfit and misfit.difference * self._images > _NEAR:
            raise self._refusal(*margins[misfit.margin], misfit)
        images = whole_images(table, self._codes, self._quotas)
        if images is None:
            raise ArtefactError(
                f"generate.cohort: no {self._images} whole images have these marginals of {', '.join(self._names)} and "
                "no combination that the table leaves out; order more images, or set dependence: independent"
            )
        return [
            Cell(values=self._values(place), share=float(images[place])) for place in np.flatnonzero(images).tolist()
        ]

    def _values(self, place: int) -> dict[str, Wanted]:
        chosen = (axis[code] for axis, code in zip(self._axes, self._codes[place], strict=True))
        return {name: value for cell in chosen for name, value in cell.values.items()}

    def _margins(self) -> list[tuple[tuple[int, ...], Margin]]:
        """What is to be met: the joint table of each pair, and the marginals of attributes in no pair."""
        pairs = [pair for pair in self._cohort.pairs if pair.of[0] in self._names]
        found: list[tuple[tuple[int, ...], Margin]] = []
        for pair in pairs:
            first, second = (self._names.index(name) for name in pair.of)
            group = self._codes[:, first] * self._shape[second] + self._codes[:, second]
            found.append(((first, second), Margin(group, self._pair(pair, first, second).ravel())))
        paired = {place for axes, _ in found for place in axes}
        return found + [
            ((place,), Margin(self._codes[:, place], self._shares(place)))
            for place in range(len(self._names))
            if place not in paired
        ]

    def _shares(self, place: int) -> Floats:
        shares: Floats = self._quotas[place] / self._images
        return shares

    def _pair(self, pair: Pair, first: int, second: int) -> Floats:
        """The joint table [len(first axis), len(second axis)] that a pair is to have."""
        p, q = self._shares(first), self._shares(second)
        where = f"generate.cohort: pair {'-'.join(pair.of)}"
        if pair.joint is not None:
            table, misfit = fit_pair(self._said(pair, first, second, where), p, q)
            if misfit and misfit.difference * self._images > _NEAR:
                raise RecipeError(f"{where}: no table with the zeros of `joint` has these marginals; change either")
            return table
        u, v = (self._scores(place, where) for place in (first, second))
        assert pair.correlation is not None
        correlated = pair_of_correlation(p, q, u, v, pair.correlation)
        if correlated is None:
            raise RecipeError(
                f"{where}: with these marginals they cannot correlate by {pair.correlation:g}; ask for less, or for "
                "marginals that are more alike"
            )
        return correlated

    def _said(self, pair: Pair, first: int, second: int, where: str) -> Floats:
        table = np.zeros([self._shape[first], self._shape[second]])
        assert pair.joint is not None
        for key, shares in pair.joint.items():
            for inner, share in shares.items():
                table[self._place(first, key, where), self._place(second, inner, where)] = share
        return table

    def _place(self, attribute: int, key: str, where: str) -> int:
        name, axis = self._names[attribute], self._axes[attribute]
        value = parse_value(self._schema[name], key, where, self._corpus.scales.get(name))
        for place, cell in enumerate(axis):
            if cell.values[name] == value:
                return place
        known = [shown_value(cell.values[name]) for cell in axis]
        raise RecipeError(f"{where}: {name}={key!r} is no value of its marginal{nearest(key, known)}")

    def _scores(self, attribute: int, where: str) -> Floats:
        name, axis = self._names[attribute], self._axes[attribute]
        values = [cell.values[name] for cell in axis]
        if sum(1 for images in self._quotas[attribute] if images) < 2:
            raise RecipeError(f"{where}: {name} has a single value, which correlates with nothing")
        if len(values) == 2 and not isinstance(self._schema[name], NumberAttribute):
            return np.array([0.0, 1.0])
        middles = [(v.low + v.high) / 2 if isinstance(v, Span) else v for v in values]
        if not all(isinstance(middle, float) for middle in middles):
            raise RecipeError(f"{where}: {name} is no number and has not two values; say `joint` instead")
        if len({m for m, images in zip(middles, self._quotas[attribute], strict=True) if images}) < 2:
            raise RecipeError(f"{where}: the values of {name} have one middle, which correlates with nothing")
        return np.array(middles, dtype=np.float64)

    def _refusal(self, axes: tuple[int, ...], margin: Margin, misfit: Misfit) -> Exception:
        codes = np.unravel_index(misfit.group, [self._shape[axis] for axis in axes])
        values = {n: v for a, c in zip(axes, codes, strict=True) for n, v in self._axes[a][int(c)].values.items()}
        asked = f"generate.cohort: {shown(values)} cannot be {margin.target[misfit.group]:.3g} of the images"
        if self._cohort.dependence == "corpus":
            return ArtefactError(
                f"{asked}: with the rest that is asked for, the corpus's {self._corpus.scans} scans have too few "
                "combinations with it; ask for other marginals, or set dependence: independent"
            )
        return RecipeError(f"{asked}: what is said of the pairs contradicts itself; say less of them")
