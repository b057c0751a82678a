"""Who gets slots, what is promised, and that promises are kept: all with a clock that the tests turn themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanloom.errors import BusyError, DeadlineError, DeadlineTooShort, RecipeError
from scanloom.sampling.admission import BULK_TURN, Draw, Going, Lane, Line, Pace, Rota, forecast
from scanloom.sampling.bookings import KEPT_SIZES, KNOWN_FROM, MARGIN, Bookings, Capacity
from scanloom.sampling.image_order import ImageOrder, Priority

OWN = (4, 8, 8)
PACE = Pace(0.01, 0.002)


def draw(order: int, *, slots: int = 1, steps: int = 10, due: float = 100.0, bulk: bool = False) -> Draw:
    return Draw(order, 0, steps, slots, due, bulk)


def line_of(slots: int, draws: Iterable[Draw]) -> Line:
    line = Line(slots)
    line.put_all(draws)
    return line


def taken(line: Line, free: int, held_by_bulk: int = 0) -> list[int]:
    """The orders whose turn it is, one after the other, until nothing fits."""
    orders = []
    while (found := line.next(free, held_by_bulk)) is not None:
        free -= found.slots
        held_by_bulk += found.slots if found.bulk else 0
        orders.append(found.order)
    return orders


# --- whose turn it is -------------------------------------------------------------------------------------------


def test_interactive_images_go_by_deadline_and_bulk_ones_by_arrival_after_them() -> None:
    line = line_of(
        6, [draw(0, bulk=True, due=1.0), draw(1, due=9.0), draw(2, bulk=True, due=0.5), draw(3, due=5.0), draw(4)]
    )  # fmt: skip
    assert taken(line, 6) == [3, 1, 4, 0, 2]
    assert len(line) == 0


def test_of_every_eight_slots_one_is_for_bulk_images_that_wait() -> None:
    line = line_of(4, [*(draw(n) for n in range(40)), *(draw(100 + n, bulk=True) for n in range(3))])
    order = [number for _ in range(43) for number in taken(line, 1)]
    assert [place for place, number in enumerate(order) if number >= 100] == [7, 15, 23]
    assert BULK_TURN == 8


def test_bulk_images_leave_slots_free_for_interactive_ones_to_come() -> None:
    line = line_of(16, [draw(n, bulk=True) for n in range(20)])
    assert len(taken(line, 16)) == 14
    line.put(draw(50))
    assert taken(line, 2, held_by_bulk=14) == [50]


def test_an_image_that_needs_two_slots_is_not_overtaken() -> None:
    line = line_of(4, [draw(0, slots=2, due=1.0), draw(1, due=2.0)])
    assert taken(line, 1) == []
    assert taken(line, 2) == [0]
    waiting = line_of(4, [draw(0, slots=2, bulk=True), *(draw(n) for n in range(1, 40))])
    granted = taken(waiting, 14)
    assert len(granted) == 14
    # Now it is the bulk image's turn, and slots that come free one by one are kept for it.
    assert taken(waiting, 1) == []
    assert taken(waiting, 2) == [0]


def test_an_order_that_ends_leaves_the_line() -> None:
    line = line_of(4, [draw(0), draw(1), draw(0, bulk=True), draw(2, bulk=True)])
    line.drop(0)
    assert taken(line, 4) == [1, 2]


# --- forecasts --------------------------------------------------------------------------------------------------


def test_a_forecast_plays_steps_slots_calls_and_decoding() -> None:
    going = [Going(draw(0, steps=10), 4), Going(draw(1, slots=2), 10)]
    lane = Lane("a", 4, 2, PACE, going, line_of(4, [draw(2, slots=2, steps=3)]))
    told = forecast([lane], 50.0)
    # Three slots are two calls a step; order 2 starts when order 0 has left its slot, and then four are two calls.
    assert told[0] == pytest.approx(50.0 + 4 * 2 * 0.01 + 0.002)
    assert told[2] == pytest.approx(told[0] + 3 * 2 * 0.01 + 0.002)
    assert told[1] == pytest.approx(told[2] + 3 * 0.01 + 0.002)


def test_generators_take_turns_by_step_and_so_do_sizes() -> None:
    def lane(name: str, number: int) -> Lane:
        return Lane(name, 4, 4, Pace(0.01, 0.0), (), line_of(4, [draw(number, steps=10)]))

    assert forecast([lane("a", 0), lane("b", 1)], 0.0) == pytest.approx({0: 0.2, 1: 0.2})
    # A generator with two sizes has as many turns as one with one size.
    told = forecast([lane("a", 0), lane("a", 1), lane("b", 2)], 0.0)
    assert told == pytest.approx({2: 0.2, 0: 0.3, 1: 0.3})


def test_what_a_generator_is_loaded_for_waits_until_it_is() -> None:
    late = Lane("b", 4, 4, Pace(0.01, 0.0), (), line_of(4, [draw(1, steps=5)]), ready=100.5)
    soon = Lane("a", 4, 4, Pace(0.01, 0.0), (), line_of(4, [draw(0, steps=100)]))
    told = forecast([soon, late], 100.0)
    assert told == pytest.approx({1: 100.6, 0: 101.05})
    assert forecast([late], 100.0) == pytest.approx({1: 100.55})


def test_draws_that_will_be_refused_are_counted_in() -> None:
    pace, draws = Pace(0.01, 0.0), {0: 3.0}
    waiting = Lane("a", 1, 1, pace, (), line_of(1, [draw(0, steps=10), draw(1, steps=10)]), draws=draws)
    assert forecast([waiting], 0.0) == pytest.approx({0: 0.3, 1: 0.4})
    going = Lane("a", 1, 1, pace, [Going(draw(0, steps=10), 4)], line_of(1, []), draws=draws)
    assert forecast([going], 0.0) == pytest.approx({0: 0.04 + 2 * 0.1})


def test_measurements_find_the_pace() -> None:
    pace = Pace(1.0, 1.0)
    for turn in range(2000):
        calls, images = 1 + turn % 3, turn % 5 if turn % 5 < 3 else 0
        pace = pace.measured(calls * 0.02 + images * 0.03, calls, images)
    assert (pace.call_s, pace.image_s) == pytest.approx((0.02, 0.03), rel=0.01)


# --- promises ---------------------------------------------------------------------------------------------------


def book_of(*, orders: int = 64, slots: int = 4, rows: int = 4, pace: Pace = PACE) -> Bookings:
    book = Bookings(orders)
    book.opened("a", Capacity(slots, rows, OWN, pace))
    return book


def order(
    due: float, *, steps: int = 10, count: int = 1, scale: float = 1.0, priority: Priority = "interactive",
    generator: str = "a", shape: tuple[int, ...] | None = None, asked: float | None = None,
) -> ImageOrder:  # fmt: skip
    return ImageOrder(
        "r", generator, {}, 1, due, count=count, steps=steps, guidance_scale=scale, priority=priority,
        latent_shape=shape, asked=asked,
    )  # fmt: skip


def test_what_is_too_late_behind_the_others_is_refused_and_told_for_how_long() -> None:
    book = book_of()
    for _ in range(4):
        book.take(order(due=10.0, steps=100), 0.0)
    book.admit("a", OWN)
    with pytest.raises(DeadlineError) as refused:
        book.take(order(due=0.5), 0.0)
    # It would start after a second, when the others have left their slots, and need a tenth of another.
    assert refused.value.retry_after_s == pytest.approx((1.0 + 0.1 + 5 * 0.002) * MARGIN - 0.5, rel=0.05)
    # Nothing of it is left, and one that can wait is taken.
    assert len(book) == 4
    book.take(order(due=1.5), 0.0)


def test_what_an_idle_engine_cannot_do_is_the_callers_mistake() -> None:
    book = book_of()
    with pytest.raises(DeadlineTooShort, match="deadline_s: 1 images of 100 steps take"):
        book.take(order(due=1.0, steps=100), 0.0)
    with pytest.raises(DeadlineTooShort):
        book.take(order(due=1.05, steps=10, count=40), 0.0)
    # Time that was lost on the way here is no mistake of the caller's.
    with pytest.raises(DeadlineError) as refused:
        book.take(order(due=1.0, steps=50, asked=0.0), 0.6)
    assert not isinstance(refused.value, RecipeError)


def test_nobody_is_let_in_who_makes_others_late() -> None:
    book = book_of()
    first = [book.take(order(due=1.2, steps=100), 0.0) for _ in range(4)]
    book.admit("a", OWN)
    queued = book.take(order(due=2.3, steps=100), 0.0)
    # By its deadline it would go before the one that waits, which had to wait for a second more.
    for _ in range(3):
        book.take(order(due=2.28, steps=100), 0.0)
    with pytest.raises(DeadlineError):
        book.take(order(due=2.28, steps=100), 0.0)
    told = book.ends(0.0)
    assert all(told[number] <= 1.2 for number in first)
    assert told[queued] <= 2.3


def test_bulk_orders_make_nobody_late_and_do_not_stand_in_the_way() -> None:
    book = book_of(slots=4)
    bulk = book.take(order(due=1.3, steps=100, count=4, priority="bulk"), 0.0)
    # Without priority this one could not be taken: it makes the bulk order late.
    interactive = [book.take(order(due=1.2, steps=100), 0.0) for _ in range(4)]
    told = book.ends(0.0)
    assert all(told[number] < told[bulk] for number in interactive)
    assert told[bulk] > 1.3
    with pytest.raises(DeadlineError):
        book.take(order(due=1.3, steps=100, priority="bulk"), 0.0)


def test_a_full_book_says_when_the_next_order_ends() -> None:
    book = book_of(orders=3)
    for steps in (200, 50, 300):
        book.take(order(due=50.0, steps=steps), 0.0)
    with pytest.raises(BusyError, match="3 orders") as refused:
        book.take(order(due=50.0), 0.0)
    assert not isinstance(refused.value, DeadlineError)
    assert refused.value.retry_after_s == pytest.approx(0.502)


def test_an_order_is_late_as_soon_as_no_engine_could_help_it() -> None:
    book = book_of(slots=1, rows=1)
    number = book.take(order(due=1.2, steps=100), 0.0)
    assert book.late(0.19) == []
    assert book.late(0.2) == [number]
    book.admit("a", OWN)
    for _ in range(50):
        book.stepped("a", OWN)
    assert book.late(0.69) == []
    assert book.late(0.71) == [number]


def test_a_guided_image_is_refused_by_an_engine_of_one_slot() -> None:
    book = Bookings(8)
    early = book.take(order(due=10.0, scale=2.0), 0.0)
    assert book.opened("a", Capacity(1, 1, OWN, PACE)) == [early]
    with pytest.raises(RecipeError, match="guidance_scale"):
        book.take(order(due=10.0, scale=2.0), 0.0)


def test_orders_for_a_generator_that_was_never_loaded_wait_and_are_then_lined_up() -> None:
    book = Bookings(8)
    numbers = [book.take(order(due=10.0), 0.0), book.take(order(due=9.0, shape=OWN), 0.0)]
    assert (book.waiting("a"), book.shapes("a"), book.ends(0.0)) == (2, [], {})
    assert book.late(9.5) == [numbers[1]]
    book.loading("a", 0.0)
    assert book.opened("a", Capacity(4, 4, OWN, PACE)) == []
    # The size that the generator has of itself is the one that was named.
    assert book.shapes("a") == [OWN]
    assert [each.order for each in book.admit("a", OWN)] == [1, 0]


def test_a_generator_that_made_room_needs_the_time_to_load_it() -> None:
    book = book_of()
    book.closed("a", 3.0)
    with pytest.raises(DeadlineError):
        book.take(order(due=2.0), 0.0)
    number = book.take(order(due=5.0), 0.0)
    book.loading("a", 1.0)
    assert book.ends(1.5)[number] == pytest.approx(4.102)
    book.opened("a", Capacity(4, 4, OWN, PACE))
    assert book.ends(1.5)[number] == pytest.approx(1.602)


def test_larger_images_are_taken_for_slower_until_they_are_measured_and_forgotten_in_time() -> None:
    book = book_of()
    # Four times the pixels: 0.4 s if it were the guess, of which nobody is told for good.
    with pytest.raises(DeadlineTooShort):
        book.take(order(due=0.09, shape=(4, 16, 16)), 0.0)
    number = book.take(order(due=0.3, shape=(4, 16, 16)), 0.0)
    book.admit("a", (4, 16, 16))
    # It is slower than the guess, which is soon learnt.
    for _ in range(KNOWN_FROM):
        book.measured("a", (4, 16, 16), 0.4, 1, 0)
    book.forget(number)
    with pytest.raises(DeadlineTooShort):
        book.take(order(due=3.5, shape=(4, 16, 16)), 0.0)
    book.forget(book.take(order(due=4.6, shape=(4, 16, 16)), 0.0))
    for side in range(8, 8 + 3 * KEPT_SIZES):
        book.forget(book.take(order(due=1e6, shape=(4, side, 8)), 0.0))
    assert len(book._batches) <= KEPT_SIZES + 2


def test_an_engine_that_stood_still_for_a_while_is_not_held_for_slow_for_ever() -> None:
    book = book_of(slots=4)
    slow = book.take(order(due=100.0, steps=20), 0.0)
    book.admit("a", OWN)
    for _ in range(19):
        book.measured("a", OWN, 35.0, 1, 0)
        book.stepped("a", OWN)
    # As long as it is at work it is as slow as it was seen to be.
    assert book.ends(0.0)[slow] > 0.5
    with pytest.raises(DeadlineError):
        book.take(order(due=702.0, steps=20), 700.0)
    book.forget(slow)
    again = book.take(order(due=702.0, steps=20), 700.0)
    assert book.late(700.0) == []
    book.admit("a", OWN)
    slowest = book.ends(700.0)[again] - 700.0
    for _ in range(19):
        book.measured("a", OWN, 0.01, 1, 0)
        book.stepped("a", OWN)
    # One step is left, at a pace that comes back to what it was.
    assert book.ends(700.0)[again] - 700.0 < slowest / 20 / 2


def test_one_step_counts_for_no_more_than_four() -> None:
    paused = PACE.measured(3600.0, 1, 0)
    assert paused.call_s <= 1.3 * PACE.call_s


def test_whoever_asks_for_what_cannot_be_made_makes_nobody_else_slow() -> None:
    book = book_of(slots=4)
    hopeless = book.take(order(due=100.0, steps=20), 0.0)
    [drawn] = book.admit("a", OWN)
    for _ in range(400):
        for _ in range(20):
            book.stepped("a", OWN)
        book.judged(drawn, passed=False)
        [drawn] = book.admit("a", OWN)
    # Its own end is far, that of others is not.
    assert book.ends(0.0)[hopeless] > 50.0
    other = book.take(order(due=0.3, steps=20), 0.0)
    assert book.ends(0.0)[other] < 0.3


# --- properties -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    at: float
    steps: int
    count: int
    scale: float
    patience: float
    priority: Priority
    generator: str
    size: int
    withdrawn_after: float
    refused_draws: int


ASKED = st.builds(
    _Asked,
    at=st.floats(0.0, 3.0),
    steps=st.integers(1, 50),
    count=st.integers(1, 5),
    scale=st.sampled_from([1.0, 2.0]),
    patience=st.floats(0.01, 4.0),
    priority=st.sampled_from(["interactive", "interactive", "bulk"]),
    generator=st.sampled_from(["a", "a", "b"]),
    size=st.sampled_from([8, 8, 16]),
    withdrawn_after=st.one_of(st.just(math.inf), st.floats(0.0, 2.0)),
    refused_draws=st.sampled_from([0, 0, 0, 1, 2]),
)


class _Played:
    """A desk without threads and engines, whose steps take exactly as long as they are said to."""

    def __init__(self, asked: Sequence[_Asked], slots: int, rows: int, *, perfect: bool) -> None:
        self.book = Bookings(12)
        self.paces = {"a": Pace(0.01, 0.003), "b": Pace(0.02, 0.0)}
        for name, pace in self.paces.items():
            self.book.opened(name, Capacity(slots, rows, OWN, pace))
            # A first order of the other size, so that its pace is no guess.
            self.book.take(order(due=1e9, generator=name, shape=(4, 16, 16)), 0.0)
            for _ in range(KNOWN_FROM):
                self.book.measured(name, (4, 16, 16), 4 * pace.call_s, 1, 0)
            self.book.forget(next(iter(self.book.of(name))))
        self.slots, self.rows, self.perfect = slots, rows, perfect
        self.asked = sorted(asked, key=lambda each: each.at)
        self.now = 0.0
        self.orders: dict[int, tuple[_Asked, ImageOrder]] = {}
        self.ends: dict[int, tuple[str, float]] = {}
        self.retries: list[float] = []
        self.hopeless = 0
        self.going: dict[tuple[str, tuple[int, ...]], list[list[int | Draw]]] = {}
        self.draws: dict[tuple[int, int], int] = {}
        self.rota = Rota[tuple[int, ...]]()
        self.granted: dict[tuple[str, tuple[int, ...]], int] = {}
        """Slots that interactive images got in a batch while bulk ones waited."""

    def run(self) -> None:
        while self.asked or len(self.book):
            self._arrivals()
            for number in self.book.late(self.now):
                self._end(number, "late")
            for number, (each, told) in list(self.orders.items()):
                if number not in self.ends and self.now >= each.at + each.withdrawn_after and told:
                    self._end(number, "withdrawn")
            places = [(name, shape) for name in "ab" for shape in self.book.shapes(name)]
            turn = self.rota.next({place: self.book.is_urgent(*place) for place in places})
            if turn is None:
                self.now = max(self.now, min((each.at for each in self.asked), default=self.now))
                continue
            self._step(*turn)

    def _arrivals(self) -> None:
        while self.asked and self.asked[0].at <= self.now:
            each = self.asked.pop(0)
            told = order(
                each.at + each.patience, steps=each.steps, count=each.count, scale=each.scale, priority=each.priority,
                generator=each.generator, shape=(4, each.size, each.size), asked=each.at,
            )  # fmt: skip
            try:
                number = self.book.take(told, each.at)
            except BusyError as error:
                self.retries.append(error.retry_after_s)
            except DeadlineTooShort:
                self.hopeless += 1
            else:
                self.orders[number] = each, told

    def _step(self, name: str, shape: tuple[int, ...]) -> None:
        going = self.going.setdefault((name, shape), [])
        waiting = list(self.book._batches[name, shape].line)
        for each in self.book.admit(name, shape):
            self._check_turn((name, shape), each, waiting)
            going.append([each.steps, each])
        used = sum(each.slots for _, each in going if isinstance(each, Draw))
        assert 0 < used <= self.slots
        calls = self.book.calls(name, shape)
        assert calls == -(-used // self.rows)
        factor = math.prod(shape) / math.prod(OWN)
        pace = self.paces[name].scaled(factor)
        seconds = calls * pace.call_s
        for entry in going:
            assert isinstance(entry[0], int)
            entry[0] -= 1
        done = [each for left, each in going if left == 0 and isinstance(each, Draw)]
        self.going[name, shape] = [entry for entry in going if entry[0] != 0]
        seconds += len(done) * pace.image_s
        self.now += seconds
        self.book.stepped(name, shape)
        self.book.measured(name, shape, seconds, calls, len(done))
        for each in done:
            self._judge(each)

    def _check_turn(self, place: tuple[str, tuple[int, ...]], each: Draw, waiting: list[Draw]) -> None:
        waiting.remove(each)
        others = {other.bulk for other in waiting}
        granted = self.granted.get(place, 0)
        if each.bulk:
            # Before one that is interactive only where seven eighths went to those.
            assert False not in others or granted >= (BULK_TURN - 1) * each.slots
            self.granted[place] = 0
        else:
            assert not any(other.due < each.due for other in waiting if not other.bulk)
            self.granted[place] = granted + each.slots if True in others else 0

    def _judge(self, each: Draw) -> None:
        if each.order in self.ends:
            return
        key = (each.order, each.index)
        self.draws[key] = self.draws.get(key, 0) + 1
        passed = self.perfect or self.draws[key] > self.orders[each.order][0].refused_draws
        if self.book.judged(each, passed=passed):
            self._end(each.order, "made")

    def _end(self, number: int, how: str) -> None:
        assert number not in self.ends, "ended twice"
        self.ends[number] = how, self.now
        self.book.forget(number)
        for entries in self.going.values():
            entries[:] = [entry for entry in entries if not (isinstance(entry[1], Draw) and entry[1].order == number)]


@settings(max_examples=300, deadline=None)
@given(st.lists(ASKED, max_size=25), st.integers(2, 12), st.integers(1, 4))
def test_every_order_ends_once_and_slots_are_never_over_committed(asked: list[_Asked], slots: int, rows: int) -> None:
    played = _Played(asked, slots, rows, perfect=False)
    played.run()
    assert len(played.orders) + len(played.retries) + played.hopeless == len(asked)
    assert all(retry_s > 0.0 for retry_s in played.retries)
    assert played.ends.keys() == played.orders.keys()
    assert len(played.book) == 0
    for name in "ab":
        assert (played.book.waiting(name), played.book.running(name), played.book.slots(name)[0]) == (0, 0, 0)


@settings(max_examples=300, deadline=None)
@given(st.lists(ASKED, max_size=25), st.integers(2, 12), st.integers(1, 4))
def test_what_is_accepted_is_made_in_time(asked: list[_Asked], slots: int, rows: int) -> None:
    """Where steps take as long as they are said to and nothing is refused: interactive orders, whatever comes."""
    played = _Played(asked, slots, rows, perfect=True)
    played.run()
    for number, (how, at) in played.ends.items():
        each, told = played.orders[number]
        if each.priority == "interactive":
            assert how in ("made", "withdrawn"), (how, at, told)
            assert at <= told.due + 1e-6 or how == "withdrawn"
