"""Which batch takes the next step, and what a forecast makes of that."""

from __future__ import annotations

import pytest

from scanloom.sampling.admission import BULK_TURN, Draw, Lane, Line, Pace, Rota, forecast


def turns(rota: Rota[int], count: int, batches: dict[tuple[str, int], bool]) -> list[tuple[str, int] | None]:
    return [rota.next(batches) for _ in range(count)]


def test_batches_take_turns_by_generator_and_size() -> None:
    batches = {("a", 1): True, ("a", 2): True, ("b", 1): True}
    assert turns(Rota(), 8, batches) == [("a", 1), ("b", 1), ("a", 2), ("b", 1)] * 2
    rota = Rota[int]()
    turns(rota, 3, batches)
    # Who comes anew has waited longest.
    assert turns(rota, 3, batches | {("c", 1): True})[:1] == [("c", 1)]
    assert rota.next({}) is None


def test_batches_that_somebody_waits_for_go_before_bulk_which_never_starves() -> None:
    batches = {("a", 1): False, ("b", 1): True, ("a", 2): False}
    taken = turns(Rota(), 2 * BULK_TURN, batches)
    assert taken == [*[("b", 1)] * (BULK_TURN - 1), ("a", 1), *[("b", 1)] * (BULK_TURN - 1), ("a", 2)]
    rota = Rota[int]()
    turns(rota, 5, batches)
    # Turns while there was no bulk are not counted against those who come.
    turns(rota, 20, {("b", 1): True})
    assert turns(rota, BULK_TURN, batches) == [*[("b", 1)] * (BULK_TURN - 1), ("a", 1)]
    assert turns(rota, 3, {("a", 1): False, ("c", 1): False}) == [("c", 1), ("a", 1), ("c", 1)]


def test_a_forecast_gives_bulk_of_another_generator_its_turns() -> None:
    def lane(name: str, number: int, *, bulk: bool, call_s: float) -> Lane:
        line = Line(4)
        line.put(Draw(number, 0, 14, 1, 1e9, bulk))
        return Lane(name, 4, 4, Pace(call_s, 0.0), (), line)

    told = forecast([lane("a", 0, bulk=False, call_s=0.01), lane("b", 1, bulk=True, call_s=0.1)], 0.0)
    # One turn of bulk may be at once, and one follows every seven of the other's; then bulk goes on alone.
    assert told[0] == pytest.approx(0.1 + 14 * 0.01 + 2 * 0.1)
    assert told[1] == pytest.approx(told[0] + 12 * 0.1)
