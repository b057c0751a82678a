"""Asked beside achieved: what a generator ignores shows, what the probe gets wrong of real scans too is told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scanloom.attributes import Attributes
from scanloom.audit.fairness import COMPOSITION, Group, gaps, readings, subgroups
from scanloom.audit.fidelity import Embedded
from scanloom.audit.groups import ALL, EVERYONE, Axis, Grouping, difference, widest_gap, within
from scanloom.audit.report import Interval, Reading
from scanloom.errors import RecipeError
from scanloom.models.probe_card import ProbeCard
from scanloom.models.probe_card import Reading as Held
from tests.tiny_generator import SCHEMA

RANDOM = np.random.default_rng(6)
BY_SEX = Grouping.of(SCHEMA, [], ["sex"])
CROSSED = Grouping.of(SCHEMA, [])


def group(rows: list[Attributes], read: np.ndarray[Any, Any]) -> Group:
    return Group(rows, [str(n) for n in range(len(rows))], read)


def card(*readable: str) -> ProbeCard:
    held = [
        Held(
            name=name, figure="auc", estimate=0.9, low=0.8, high=1.0, chance=0.5, scans=9, with_it=4,
            better_than_chance=True,
        )
        for name in readable
    ]  # fmt: skip
    return ProbeCard(
        name="made", attributes=SCHEMA, size_px=32, channels=(8,), scales={"age": (50.0, 10.0)},
        false_reject_share=0.02, trained_scans=1, held_out_scans=1, readings=tuple(held),
    )  # fmt: skip


def drawn(count: int) -> list[Attributes]:
    return [
        {
            "sex": "F" if RANDOM.random() < 0.5 else "M", "age": float(RANDOM.integers(30, 80)), "view": "PA",
            "findings": ("Effusion",) if RANDOM.random() < 0.4 else (),
        }
        for _ in range(count)
    ]  # fmt: skip


def seen(of: ProbeCard, rows: list[Attributes], *, wrong: float = 0.0) -> np.ndarray[Any, Any]:
    """What a probe reads that is wrong about a share of categories and labels."""
    out = np.zeros((len(rows), len(of.outputs)))
    for n, row in enumerate(rows):
        for column, output in enumerate(of.outputs):
            value = row[output.attribute]
            if isinstance(value, float):
                out[n, column] = value
            else:
                said = output.value in value if isinstance(value, tuple) else output.value == value
                out[n, column] = 0.9 if said != (RANDOM.random() < wrong) else 0.1
    return out


def by(found: tuple[Reading, ...], name: str, cell: str = ALL) -> Reading:
    return next(one for one in found if (one.name, one.cell) == (name, cell))


def gap(reading: Reading) -> float:
    assert reading.asked.value is not None
    assert reading.achieved.value is not None
    return abs(reading.asked.value - reading.achieved.value)


def test_a_finding_that_one_group_does_not_get_shows_in_that_cell() -> None:
    of, asked, real = card("findings=Effusion", "age"), drawn(600), drawn(400)
    made = seen(of, asked)
    ignored = [n for n, row in enumerate(asked) if row["sex"] == "F"]
    made[np.ix_(ignored, [of.columns["findings=Effusion"]])] = 0.1
    found = readings(of, BY_SEX, group(asked, made), group(real, seen(of, real)))
    assert gap(by(found, "findings=Effusion", "sex=F")) > 0.3
    assert gap(by(found, "findings=Effusion", "sex=M")) == 0.0
    sure = by(found, "findings=Effusion", "sex=F").sure_gap
    assert sure is not None
    assert 0.25 < sure < gap(by(found, "findings=Effusion", "sex=F"))
    assert by(found, "findings=Effusion", "sex=M").sure_gap == 0.0
    assert gap(by(found, "age")) == 0.0
    assert by(found, "age").asked.value == pytest.approx(54.5, abs=3)
    # It is not read, or the cell is made of it.
    assert not [one for one in found if one.name.startswith(("sex", "view"))]


def test_the_probes_own_error_is_stated() -> None:
    of, asked, real = card("findings=Effusion"), drawn(2000), drawn(2000)
    found = readings(of, BY_SEX, group(asked, seen(of, asked, wrong=0.2)), group(real, seen(of, real, wrong=0.2)))
    effusion = by(found, "findings=Effusion")
    assert gap(effusion) > 0.0
    assert effusion.held_out_truth is not None
    assert effusion.held_out_read is not None
    assert effusion.held_out_read - effusion.held_out_truth == pytest.approx(gap(effusion), abs=0.05)
    assert effusion.gap is not None
    assert effusion.gap < 0.05
    assert effusion.sure_gap == 0.0


def test_a_probe_that_errs_the_other_way_hides_no_gap() -> None:
    interval = Interval(value=0.0, low=0.0, high=0.0)
    one = Reading(
        name="sex=F", cell=ALL, asked=interval.model_copy(update={"value": 0.5}),
        achieved=interval.model_copy(update={"value": 0.3}), held_out_truth=0.5, held_out_read=0.7, share=True,
        images=1000, small=False, excess=Interval(value=-0.2, low=-0.23, high=-0.17),
        held_out_excess=Interval(value=0.2, low=0.16, high=0.24),
    )  # fmt: skip
    assert one.gap == pytest.approx(0.4)
    assert one.sure_gap == pytest.approx(0.35)


def test_small_cells_are_marked_and_unknown_ones_left_out() -> None:
    of, asked = card("findings=Effusion"), drawn(40)
    asked[0] = {**asked[0], "findings": None}
    read = seen(of, [{**row, "findings": row["findings"] or ()} for row in asked])
    found = readings(of, CROSSED, group(asked, read), group([], np.zeros((0, len(of.outputs)))))
    assert by(found, "findings=Effusion").images == 39
    assert not by(found, "findings=Effusion").small
    assert by(found, "findings=Effusion", "sex=F").small
    assert by(found, "findings=Effusion").held_out_truth is None
    assert not [one for one in found if one.cell == "view=AP"]


def test_a_crossed_cell_shows_what_neither_of_its_parts_shows() -> None:
    of, real = card("findings=Effusion", "sex=F", "sex=M", "view=PA", "view=AP", "age"), drawn(800)
    asked: list[Attributes] = [{**row, "view": "PA" if RANDOM.random() < 0.5 else "AP"} for row in drawn(2000)]
    # Women from the front come out as men, as many men from behind as women.
    shown: list[Attributes] = [
        {**row, "sex": "M" if row["view"] == "PA" else "F"} if RANDOM.random() < 0.5 else row for row in asked
    ]  # fmt: skip
    found = readings(of, CROSSED, group(asked, seen(of, shown)), group(real, seen(of, real)))
    assert gap(by(found, "sex=F")) < 0.04
    assert gap(by(found, "view=PA")) == 0.0
    cell = by(found, COMPOSITION, "sex=F, age 40 to under 65, view=PA")
    assert cell.excess is not None
    assert cell.excess.high is not None
    assert cell.excess.high < -0.03
    # Both were asked for as often.
    other = by(found, COMPOSITION, "sex=F, age 40 to under 65, view=AP")
    assert other.excess is not None
    assert other.excess.low is not None
    assert other.excess.low > 0.03
    assert sum(one.asked.value or 0.0 for one in found if one.name == COMPOSITION) == pytest.approx(1.0)


def test_the_gap_between_groups_is_that_of_the_images_beside_that_of_the_probe() -> None:
    of, asked, real = card("findings=Effusion"), drawn(1500), drawn(1500)
    column = of.columns["findings=Effusion"]
    made, held = seen(of, asked), seen(of, real)
    women = [n for n, row in enumerate(asked) if row["sex"] == "F"]
    made[np.ix_(women, [column])] = 0.1
    (found,) = [one for one in told_gaps(of, asked, made, real, held) if one.of == "sex"]
    assert (found.worst, found.best, found.beyond_chance) == ("sex=F", "sex=M", True)
    assert found.gap.value == pytest.approx(0.4, abs=0.06)
    assert found.baseline is not None
    assert found.baseline.value == 0.0
    # A probe that misses it in women alone: the images are innocent, and the baseline says so.
    truly = [n for n, row in enumerate(real) if row["sex"] == "F"]
    held[np.ix_(truly, [column])] = 0.1
    (blamed,) = [one for one in told_gaps(of, asked, made, real, held) if one.of == "sex"]
    assert blamed.baseline is not None
    assert blamed.baseline.value == pytest.approx(blamed.gap.value, abs=0.06)


def told_gaps(of: ProbeCard, asked: list[Attributes], made: Any, real: list[Attributes], held: Any) -> Any:
    return gaps(CROSSED, readings(of, CROSSED, group(asked, made), group(real, held)), ())


def test_a_group_whose_images_are_unlike_its_scans_is_the_worst() -> None:
    rows = [drawn(400) for _ in range(3)]
    vectors = [RANDOM.standard_normal((400, 6)) for _ in range(3)]
    women = [n for n, row in enumerate(rows[0]) if row["sex"] == "F"]
    vectors[0][women] = 0.3 * vectors[0][women] + 1.0
    parts = [Embedded.of(one) for one in vectors]
    found = subgroups(CROSSED, parts[0], rows[0], parts[1], rows[1], parts[2], rows[2])
    by_cell = {one.cell: one for one in found}
    assert by_cell["sex=M"].images + by_cell["sex=F"].images == 400
    worse, fine = (by_cell[f"sex={sex}"].figures["kid"] for sex in "FM")
    assert (difference(worse.synthetic, worse.baseline).low or 0.0) > 0.0
    away = difference(fine.synthetic, fine.baseline)
    assert away.low is not None
    assert away.high is not None
    assert away.low < 0.0 < away.high
    told = {one.figure: one for one in gaps(CROSSED, (), found) if one.of == "sex"}
    assert {one.worst for one in told.values()} == {"sex=F"}
    assert all(one.beyond_chance for one in told.values())
    # Cells that neither images nor scans have are left out.
    assert "view=AP" not in by_cell
    assert "age under 18" not in by_cell
    crossed = [one for one in found if one.cell.count(",") == 2]
    assert crossed
    assert all(one.small for one in crossed if min(one.images, one.held_out_scans) < 30)


def test_cells_with_too_few_images_are_there_without_figures() -> None:
    women: list[Attributes] = [{"sex": "F"}] * 40
    men: list[Attributes] = [{"sex": "M"}] * 3
    rows = [women + men, women, women]
    parts = [Embedded.of(RANDOM.standard_normal((len(one), 4))) for one in rows]
    found = subgroups(BY_SEX, parts[0], rows[0], parts[1], rows[1], parts[2], rows[2])
    assert [(one.cell, one.images, one.small, bool(one.figures)) for one in found] == [
        ("sex=F", 40, False, True), ("sex=M", 3, True, False),
    ]  # fmt: skip
    assert gaps(BY_SEX, (), found) == ()


def test_gaps_of_groups_that_are_alike_are_not_beyond_chance() -> None:
    beyond = 0
    for _ in range(200):
        cells = {}
        for name in "abcdef":
            values = RANDOM.standard_normal(100)
            half = 1.96 * float(values.std(ddof=1)) / 10
            cells[name] = Interval(value=float(values.mean()), low=values.mean() - half, high=values.mean() + half)
        found = widest_gap("f", "of", cells)
        assert found is not None
        beyond += found.beyond_chance
    # Without regard to the choice of two among six it would be about two in five.
    assert beyond / 200 < 0.08
    assert widest_gap("f", "of", {"a": Interval(value=1.0, low=0.0, high=2.0)}) is None


def test_a_difference_has_the_interval_of_independent_parts() -> None:
    first, second = Interval(value=5.0, low=2.0, high=9.0), Interval(value=1.0, low=-3.0, high=2.0)
    found = difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((4.0, 4.0 - 10**0.5, 4.0 + 32**0.5))
    assert difference(first, second, 3).low == pytest.approx(4.0 - 10**0.5 * 2.393980 / 1.959964, abs=1e-5)
    assert difference(first, Interval(value=1.0, low=None, high=None)).low is None


def test_groups_are_values_bands_and_what_was_named() -> None:
    assert [axis.attribute for axis in CROSSED.axes] == ["sex", "age", "view"]
    bands = CROSSED.axes[1]
    assert bands.names == ("age under 18", "age 18 to under 40", "age 40 to under 65", "age 65 and over")
    assert [bands.place({"age": age}) for age in (17.9, 18.0, 64.9, 65.0)] == [0, 1, 2, 3]
    assert bands.place({"age": None}) == -1
    codes = CROSSED.codes([{"sex": "F", "age": 70.0, "view": "AP"}, {"sex": None, "age": 70.0}])
    assert [cell.name for cell in CROSSED.crossed(codes)] == ["sex=F, age 65 and over, view=AP"]
    assert within(EVERYONE, codes).tolist() == [True, True]
    assert BY_SEX.crossed(codes[:, :1]) == []
    with pytest.raises(RecipeError, match=r"audit.fairness.groups: 'findings' is no category or number"):
        Grouping.of(SCHEMA, [], ["findings"])
    assert Axis("dose", ("known",)).place({"dose": 3.0}) == 0
