"""Tables, marginals that hang together, balanced cohorts and raised rare cells, of the base generator's corpus."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanloom.artefact import open_artefact
from scanloom.attributes import AttributeSchema, Envelope
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe import AsCorpusCohort, BalancedCohort, CellsCohort, Cohort, MarginalsCohort
from scanloom.recipe_cohort import Pair
from scanloom.sampling.cell import Cell, Span
from scanloom.sampling.cohort import Resolved, resolve
from scanloom.sampling.draw import draw, quotas

BASE = open_artefact("embedded://base").manifest.statistics
SCHEMA = AttributeSchema.model_validate(BASE["schema"])
ENVELOPE = Envelope.model_validate(BASE["envelope"])
CELLS: list[dict[str, Any]] = BASE["cells"]
# The same corpus, but that no woman of 80 and more had an effusion.
GAP = [c for c in CELLS if not (c["sex"] == "F" and c["age"][0] >= 80 and "Effusion" in c["findings"])]
Rows = list[dict[str, Any]]


def order(cohort: Cohort, images: int = 1000, cells: list[dict[str, Any]] = CELLS) -> Resolved:
    return resolve(cohort, SCHEMA, ENVELOPE, cells, images)


def rows(cohort: Cohort, images: int = 1000, cells: list[dict[str, Any]] = CELLS, seed: int = 3) -> Rows:
    found: Rows = draw(order(cohort, images, cells).tables, SCHEMA, images, seed).rows(0, images).to_pylist()
    return found


def counts(made: Rows, *names: str) -> Counter[Any]:
    def key(row: dict[str, Any]) -> Any:
        return tuple(tuple(row[n]) if isinstance(row[n], list) else row[n] for n in names)

    return Counter(key(row) if len(names) > 1 else key(row)[0] for row in made)


# --- marginals ------------------------------------------------------------------------------------------------

SEX, FINDINGS = {"F": 0.7, "M": 0.3}, {"none": 0.5, "Effusion": 0.3, "Nodule": 0.2}
AGE = {"20-39": 0.2, "40-59": 0.3, "60-79": 0.5}


def odds(table: Counter[Any], a: Any, b: Any) -> float:
    return table[a[0], b[0]] * table[a[1], b[1]] / (table[a[0], b[1]] * table[a[1], b[0]])


def test_the_corpus_dependence_keeps_its_odds_ratios_under_new_marginals() -> None:
    skewed = [
        c | {"count": c["count"] * (9 if c["sex"] == "F" and c["findings"] == ["Effusion"] else 1)} for c in CELLS
    ]
    cohort = MarginalsCohort(marginals={"sex": SEX, "findings": FINDINGS}, dependence="corpus")
    made = rows(cohort, 100_000, skewed)
    assert counts(made, "sex") == {"F": 70_000, "M": 30_000}
    assert counts(made, "findings") == {(): 50_000, ("Effusion",): 30_000, ("Nodule",): 20_000}
    corpus: Counter[Any] = Counter()
    for cell in skewed:
        corpus[cell["sex"], tuple(cell["findings"])] += cell["count"]
    table = counts(made, "sex", "findings")
    for findings in [((), ("Effusion",)), ((), ("Nodule",))]:
        assert odds(table, "FM", findings) == pytest.approx(odds(corpus, "FM", findings), rel=0.01)
    assert odds(corpus, "FM", ((), ("Effusion",))) < 0.2


def test_a_uniform_number_stays_uniform_when_it_hangs_together_with_others() -> None:
    cohort = MarginalsCohort(
        marginals={"age": {"uniform": [30, 89]}, "sex": SEX, "findings": FINDINGS}, dependence="corpus"
    )
    (table,) = order(cohort, 60_000, GAP).tables.tables
    decades: Counter[float] = Counter()
    for cell in table:
        span = cell.values["age"]
        assert isinstance(span, Span)
        decades[span.low] += int(cell.share)
    assert decades == dict.fromkeys((30.0, 40.0, 50.0, 60.0, 70.0, 80.0), 10_000)
    made = rows(cohort, 60_000, GAP)
    assert counts(made, "sex") == {"F": 42_000, "M": 18_000}
    assert [r for r in made if r["sex"] == "F" and r["age"] >= 80 and r["findings"] == ["Effusion"]] == []
    assert order(cohort, 60_000, GAP).told == ()


def test_one_pair_alone_keeps_the_rest_independent() -> None:
    pair = Pair(
        of=("findings", "sex"),
        joint={"none": {"F": 8, "M": 1}, "Effusion": {"F": 1, "M": 1}, "Nodule": {"F": 1, "M": 1}},
    )
    cohort = MarginalsCohort(marginals={"sex": SEX, "view": {"PA": 1, "AP": 1}, "findings": FINDINGS}, pairs=(pair,))
    first, second = order(cohort, 10_000).tables.tables
    assert {name for cell in first for name in cell.values} == {"sex", "findings"}
    assert {name for cell in second for name in cell.values} == {"view"}
    table = counts(rows(cohort, 10_000), "findings", "sex")
    assert odds(table, ((), ("Effusion",)), "FM") == pytest.approx(8, rel=0.02)
    assert odds(table, (("Effusion",), ("Nodule",)), "FM") == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("correlation", [-0.3, 0.0, 0.6])
def test_a_correlation_of_two_values_is_had_to_the_image(correlation: float) -> None:
    pair = Pair(of=("sex", "findings"), correlation=correlation)
    made = rows(MarginalsCohort(marginals={"sex": SEX, "findings": {"none": 3, "Nodule": 2}}, pairs=(pair,)), 5000)
    drawn = np.corrcoef([r["sex"] == "M" for r in made], [r["findings"] == ["Nodule"] for r in made])[0, 1]
    assert drawn == pytest.approx(correlation, abs=1e-3)


def test_several_correlations_hold_at_once_with_exact_marginals() -> None:
    pairs = (Pair(of=("age", "findings"), correlation=0.4), Pair(of=("sex", "findings"), correlation=-0.2))
    cohort = MarginalsCohort(marginals={"sex": SEX, "age": AGE, "findings": {"none": 3, "Nodule": 2}}, pairs=pairs)
    made = rows(cohort, 5000)
    middle = [30 if r["age"] < 40 else 50 if r["age"] < 60 else 70 for r in made]
    nodule = [r["findings"] == ["Nodule"] for r in made]
    assert np.corrcoef(middle, nodule)[0, 1] == pytest.approx(0.4, abs=2e-3)
    assert np.corrcoef([r["sex"] == "M" for r in made], nodule)[0, 1] == pytest.approx(-0.2, abs=2e-3)
    assert Counter(middle) == {30: 1000, 50: 1500, 70: 2500}
    assert counts(made, "sex") == {"F": 3500, "M": 1500}
    assert sum(nodule) == 2000


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=2),
    st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    st.integers(1, 700),
)
def test_marginals_are_exact_whatever_the_dependence(sex: list[int], findings: list[int], images: int) -> None:
    marginals = {"sex": dict(zip("FM", sex, strict=True)), "findings": dict(zip(FINDINGS, findings, strict=True))}
    for dependence in ("independent", "corpus"):
        cohort = MarginalsCohort.model_validate({"marginals": marginals, "dependence": dependence})
        made = rows(cohort, images)
        assert [counts(made, "sex")[s] for s in "FM"] == quotas([float(n) for n in sex], images)
        wanted = quotas([float(n) for n in findings], images)
        assert [counts(made, "findings")[f] for f in ((), ("Effusion",), ("Nodule",))] == wanted


@pytest.mark.parametrize(
    "change, told",
    [
        ({"pairs": [{"of": ["sex", "vieww"], "correlation": 0.1}]}, "names 'vieww', which has no marginal"),
        ({"pairs": [{"of": ["sex", "findings"], "correlation": 0.1}]}, "findings is no number and has not two values"),
        ({"pairs": [{"of": ["sex", "age"], "correlation": 0.99}]}, "cannot correlate by 0.99"),
        ({"pairs": [{"of": ["sex", "age"], "joint": {"F": {"20-40": 1}}}]}, "age='20-40' is no value of its marginal"),
        ({"pairs": [{"of": ["sex", "age"], "joint": {"F": {"20-39": 1}, "M": {"40-59": 1}}}]}, "zeros of `joint`"),
        (
            {"marginals": {"sex": {"F": 1}, "age": AGE}, "pairs": [{"of": ["sex", "age"], "correlation": 0.1}]},
            "single value",
        ),
        (
            {
                "marginals": {"sex": SEX, "age": {"50": 1, "41-59": 1}},
                "pairs": [{"of": ["sex", "age"], "correlation": 0.3}],
            },
            "have one middle",
        ),
        (
            {
                "marginals": {"sex": {"F": 0.999, "M": 0.001}, "age": AGE},
                "pairs": [{"of": ["sex", "age"], "correlation": 0.5}],
            },
            "cannot correlate by 0.5",
        ),
        ({"marginals": {"sex": {"F": 0}, "age": AGE}, "dependence": "corpus"}, "its shares sum to 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_marginals_that_contradict_themselves_are_refused(change: dict[str, Any], told: str) -> None:
    settings: dict[str, Any] = {"marginals": {"sex": SEX, "age": AGE, "findings": FINDINGS}}
    with pytest.raises(RecipeError) as caught:
        order(MarginalsCohort.model_validate(settings | change))
    assert told in str(caught.value)


def test_pairs_at_odds_with_each_other_are_refused() -> None:
    pairs = [
        {"of": ["sex", "view"], "correlation": 0.95}, {"of": ["view", "findings"], "correlation": 0.95},
        {"of": ["sex", "findings"], "correlation": -0.95},
    ]  # fmt: skip
    half = {"sex": {"F": 1, "M": 1}, "view": {"PA": 1, "AP": 1}, "findings": {"none": 1, "Nodule": 1}}
    with pytest.raises(RecipeError, match="contradicts itself"):
        order(MarginalsCohort.model_validate({"marginals": half, "pairs": pairs}))


def test_marginals_that_the_corpus_zeros_forbid_are_refused_by_name() -> None:
    marginals: dict[str, Any] = {
        "sex": {"F": 1},
        "age": {"80-89": 0.9, "20-29": 0.1},
        "findings": {"Effusion": 0.8, "none": 0.2},
    }
    with pytest.raises(ArtefactError) as caught:
        order(MarginalsCohort(marginals=marginals, dependence="corpus"), cells=GAP)
    assert "of the images" in str(caught.value)
    assert "dependence: independent" in str(caught.value)
    assert order(MarginalsCohort(marginals=marginals), cells=GAP).coverage.unseen == pytest.approx(0.72)


@pytest.mark.parametrize("images", [1000, 1_000_000])
def test_marginals_that_leave_a_seen_combination_no_image_are_made(images: int) -> None:
    had = [("F", "AP", 30), ("F", "PA", 40), ("M", "PA", 50)]
    cells = [{"sex": sex, "view": view, "count": count} for sex, view, count in had]
    half = {"sex": {"F": 1, "M": 1}, "view": {"PA": 1, "AP": 1}}
    (table,) = order(MarginalsCohort(marginals=half, dependence="corpus"), images, cells).tables.tables
    made = {(cell.values["sex"], cell.values["view"]): cell.share for cell in table}
    assert made == {("F", "AP"): images / 2, ("M", "PA"): images / 2}


def test_marginals_that_only_fractions_of_images_could_have_are_refused() -> None:
    had = [("F", "PA", ["Nodule"]), ("F", "AP", []), ("M", "PA", []), ("M", "AP", ["Nodule"])]
    cells = [{"sex": sex, "view": view, "findings": findings, "count": 5} for sex, view, findings in had]
    marginals = {"sex": {"F": 1, "M": 1}, "view": {"PA": 1, "AP": 1}, "findings": {"none": 1, "Nodule": 1}}
    cohort = MarginalsCohort(marginals=marginals, dependence="corpus")
    assert set(counts(rows(cohort, 4, cells), "sex", "view", "findings").values()) == {1}
    # Two images would have to differ in all three, and no two of these do.
    with pytest.raises(ArtefactError, match="no 2 whole images have these marginals of sex, view, findings"):
        order(cohort, 2, cells)


def test_a_pair_says_one_thing() -> None:
    for bad in ({"of": ["sex", "age"]}, {"of": ["sex", "sex"], "correlation": 0.1}):
        with pytest.raises(ValueError, match="pair"):
            Pair.model_validate(bad)


# --- unseen ---------------------------------------------------------------------------------------------------


def test_combinations_that_the_corpus_never_had_are_told_or_refused() -> None:
    cells: Any = ({"sex": "F", "age": [80, 89], "findings": ["Effusion"], "share": 1}, {"sex": "M", "share": 3})
    told = "about 250 of 1000 images are of combinations that none of the corpus's "
    found = order(CellsCohort(cells=cells), cells=GAP)
    assert found.told[0].startswith(told)
    assert found.told[0].endswith("such as sex=F, age=80-89, findings=Effusion")
    with pytest.raises(ArtefactError, match=told):
        order(CellsCohort(cells=cells, unseen="refuse"), cells=GAP)
    assert order(CellsCohort(cells=cells, unseen="refuse")).told == ()


# --- balanced -------------------------------------------------------------------------------------------------

OVER: dict[str, Any] = {
    "over": ("age", "sex", "findings"),
    "bands": {"age": (20, 50, 80, 89)},
    "values": {"findings": ("none", "Effusion")},
}


def band(row: dict[str, Any]) -> int:
    return 20 if row["age"] < 50 else 50 if row["age"] < 80 else 80


def test_a_balanced_cohort_has_as_many_of_each_to_one_image() -> None:
    made = rows(BalancedCohort(**OVER), 1207)
    found = Counter((band(r), r["sex"], tuple(r["findings"])) for r in made)
    assert len(found) == 12
    assert set(found.values()) == {100, 101}
    assert {r["age"] for r in made if band(r) == 20} <= {float(age) for age in range(20, 50)}
    assert {r["view"] for r in made} == {None}


def test_other_attributes_follow_the_corpus_within_each_combination() -> None:
    made = rows(BalancedCohort(**OVER, others="as-corpus"), 12_000)
    assert set(Counter((band(r), r["sex"], tuple(r["findings"])) for r in made).values()) == {1000}
    corpus: Counter[str] = Counter()
    for cell in CELLS:
        if cell["sex"] == "F" and cell["findings"] == ["Effusion"] and cell["age"][0] < 50:
            corpus[cell["view"]] += cell["count"]
    views = counts([r for r in made if r["sex"] == "F" and band(r) == 20 and r["findings"] == ["Effusion"]], "view")
    assert views["PA"] == pytest.approx(1000 * corpus["PA"] / corpus.total(), abs=1)


def test_values_are_those_that_were_seen_labels_each_alone_and_none() -> None:
    made = rows(BalancedCohort(over=("findings", "view")), 1200)
    singles = ["Cardiomegaly", "Effusion", "Nodule", "Pneumothorax", "Consolidation"]
    wanted = {(v, view): 100 for v in [(), *((s,) for s in singles)] for view in ("PA", "AP")}
    assert counts(made, "findings", "view") == wanted


def test_unseen_combinations_are_refused_or_left_out_and_told() -> None:
    with pytest.raises(ArtefactError) as caught:
        order(BalancedCohort(**OVER), cells=GAP)
    assert "1 of 12 combinations have under 1 scans" in str(caught.value)
    assert "age=80-89, sex=F, findings=Effusion (trained on 5458 scans)" in str(caught.value)
    left = BalancedCohort(**OVER, unseen="leave-out")
    found = Counter((band(r), r["sex"], tuple(r["findings"])) for r in rows(left, 1100, GAP))
    assert set(found.values()) == {100}
    assert len(found) == 11
    assert order(left, 1100, GAP).told == (
        "1 of 12 combinations have under 1 scans in the corpus, such as age=80-89, sex=F, findings=Effusion: left out",
    )


@pytest.mark.parametrize(
    "change, images, told",
    [
        ({}, 11, "balanced over 12 combinations; order as many at least"),
        ({"over": ("age", "sexx"), "values": {}}, 100, "did you mean 'sex'"),
        ({"bands": {}}, 100, "a number needs bands"),
        ({"bands": {"age": (20, 80, 50)}}, 100, "do not ascend"),
        ({"bands": {"age": (20, 50), "sex": (1, 2)}}, 100, "is no number"),
        ({"bands": {"age": (20, 50), "view": (1, 2)}}, 100, "bands of 'view', which is not in over"),
        ({"values": {"findings": ("none", "none")}}, 100, "listed twice"),
        ({"over": ("sex", "sex"), "bands": {}, "values": {}}, 100, "names an attribute twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_balanced_cohort_is_refused(change: dict[str, Any], images: int, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        order(BalancedCohort(**OVER | change), images)
    assert told in str(caught.value)


def test_a_band_outside_the_envelope_is_refused() -> None:
    with pytest.raises(ArtefactError, match="trained on 20 to 89"):
        order(BalancedCohort(over=("age",), bands={"age": (20, 50, 90)}))


# --- as-corpus ------------------------------------------------------------------------------------------------


def test_every_age_and_decade_has_its_share_of_the_corpus() -> None:
    made = rows(AsCorpusCohort(), 54_580)
    corpus: Counter[int] = Counter()
    for cell in CELLS:
        corpus[int(cell["age"][0]) // 10 * 10] += cell["count"]
    assert Counter(int(r["age"]) // 10 * 10 for r in made) == {decade: 10 * n for decade, n in corpus.items()}
    ages = counts(made, "age")
    assert ages[30.0] == pytest.approx(corpus[30], abs=5 * math.sqrt(corpus[30]))


def test_rare_combinations_get_the_least_share_and_the_others_keep_their_proportions() -> None:
    images = 20_000
    made = counts(rows(AsCorpusCohort(over=("findings",), least_share=0.01), images), "findings")
    corpus: Counter[Any] = Counter()
    for cell in CELLS:
        corpus[tuple(cell["findings"])] += cell["count"]
    assert made.keys() == corpus.keys()
    rare = {f for f, n in made.items() if n == 200}
    assert min(made.values()) == 200
    assert rare
    assert all(corpus[f] / corpus.total() < 0.01 for f in rare)
    scale = (1 - 0.01 * len(rare)) / sum(n for f, n in corpus.items() if f not in rare)
    assert all(made[f] == pytest.approx(corpus[f] * scale * images, abs=1) for f in corpus if f not in rare)


def test_within_a_raised_combination_all_is_as_in_the_corpus() -> None:
    made = rows(AsCorpusCohort(over=("sex", "findings"), least_share=0.02), 50_000)
    wanted: Counter[Any] = Counter()
    for cell in CELLS:
        if (cell["sex"], cell["findings"]) == ("F", ["Nodule"]):
            wanted[cell["view"]] += cell["count"]
    found = counts([r for r in made if (r["sex"], r["findings"]) == ("F", ["Nodule"])], "view")
    assert found["PA"] / found.total() == pytest.approx(wanted["PA"] / wanted.total(), abs=0.01)


def test_unknown_is_never_raised() -> None:
    cells = [{"sex": "F", "count": 90}, {"sex": "M", "count": 9}, {"view": "PA", "count": 1}]
    made = counts(rows(AsCorpusCohort(over=("sex",), least_share=0.3), 1000, cells), "sex")
    assert made == {"M": 300, "F": 692, None: 8}


@pytest.mark.parametrize("images", [30, 997, 1033])
def test_the_least_share_is_had_at_least(images: int) -> None:
    cells = [{"sex": "F", "view": "PA", "count": 90}, {"sex": "F", "view": "AP", "count": 2}]
    cells += [{"sex": "M", "view": "PA", "count": 2}, {"sex": "M", "view": "AP", "count": 1}]
    made = counts(rows(AsCorpusCohort(least_share=0.05, over=("sex", "view")), images, cells), "sex", "view")
    assert made.total() == images
    assert sorted(made.values())[:3] == [math.ceil(0.05 * images)] * 3


def test_over_without_a_least_share_is_refused() -> None:
    with pytest.raises(ValueError, match="give least_share too"):
        AsCorpusCohort(over=("sex",))


def test_more_than_all_is_refused() -> None:
    with pytest.raises(RecipeError, match="5 images each, more than 100 in all"):
        order(AsCorpusCohort(over=("findings",), least_share=0.045), 100)
    with pytest.raises(RecipeError, match="22 combinations is more than all images; 1/22 at most"):
        order(AsCorpusCohort(over=("findings",), least_share=0.05))
    with pytest.raises(RecipeError, match="did you mean 'sex'"):
        order(AsCorpusCohort(over=("sexx",), least_share=0.05))


# --- the same for ever ----------------------------------------------------------------------------------------

PINNED: dict[str, Cohort] = {
    "independent": MarginalsCohort(marginals={"sex": SEX, "age": {"uniform": [30, 70]}, "findings": FINDINGS}),
    "corpus": MarginalsCohort(
        marginals={"sex": SEX, "age": {"uniform": [30, 70]}, "findings": FINDINGS}, dependence="corpus"
    ),
    "pairs": MarginalsCohort(marginals={"sex": SEX, "age": AGE}, pairs=(Pair(of=("sex", "age"), correlation=0.3),)),
    "balanced": BalancedCohort(**OVER, others="as-corpus"),
    "raised": AsCorpusCohort(over=("findings",), least_share=0.02),
    "as-corpus": AsCorpusCohort(),
}
# Of the base generator that is committed: its joint table is part of what was ordered.
DIGESTS = {
    "independent": "b39448bcb9441b06",
    "corpus": "52f87bde2b0ec906",
    "pairs": "a2c33dfe9bbb5817",
    "balanced": "afe0e5366e696dc7",
    "raised": "3e26a8b905d824db",
    "as-corpus": "74a3859f190caf2b",
}


@pytest.mark.parametrize("name", PINNED)
def test_an_order_gives_the_same_rows_for_ever(name: str) -> None:
    text = repr(draw(order(PINNED[name]).tables, SCHEMA, 1000, 7).rows(0, 1000).to_pydict())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[name]


def test_cells_of_computed_tables_hold_whole_images_that_add_up() -> None:
    for name in ("corpus", "pairs", "balanced", "raised"):
        for table in order(PINNED[name], 997).tables.tables:
            assert all(isinstance(cell, Cell) and cell.share == int(cell.share) > 0 for cell in table)
            assert sum(cell.share for cell in table) == 997
