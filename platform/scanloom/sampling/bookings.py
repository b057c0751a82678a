"""The orders that a desk has accepted: what of them waits, what runs, and whether another can be accepted. Pure.

An order is accepted if the forecast says that it will be made by its deadline, and that no order accepted before will
miss its own because of it. An interactive order is not refused for the sake of bulk ones: what is promised to those
holds as long as the interactive demand allows.

Of a batch in which nothing runs or waits the best pace counts that was ever seen, not the last one: what is refused is
not measured, and what was slow for a while would be held for slow for ever.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from scanloom.errors import BusyError, DeadlineError, DeadlineTooShort, RecipeError
from scanloom.sampling.admission import Draw, Going, Lane, Line, Pace, forecast
from scanloom.sampling.image_order import ImageOrder

Shape = tuple[int, ...]
"""Of one latent."""
Place = tuple[str, Shape]
"""A batch: the generator's name and the shape of its latents."""
MARGIN = 1.1
"""What a forecast is multiplied with before a promise is made of it."""
KEPT_SIZES = 32
"""Of a generator, whose paces are remembered while nobody asks for them."""
_UNKNOWN_RETRY_S = 1.0
_LEAST_OF_GUESS = 0.25
KNOWN_FROM = 20
"""Steps after which a guess has become a measurement."""
_LEAST_RETRY_S = 0.1


@dataclass(frozen=True)
class Capacity:
    """Of a generator's engine, for images of each size."""

    slots: int
    rows: int
    own: Shape
    """The shape of the generator's own latents."""
    pace: Pace
    """Of images of that size, from a warm-up."""


@dataclass
class _Order:
    asked: ImageOrder
    left: int
    """Images that are not made."""
    refused: int = 0
    """Draws that were."""
    place: Place | None = None
    """None: its generator was never loaded."""

    @property
    def draws(self) -> float:
        """To an image that passes, as far as this order shows."""
        made = self.asked.count - self.left
        return (made + self.refused + 1) / (made + 1)


@dataclass
class _Batch:
    line: Line
    pace: Pace
    best: Pace | None
    """The fastest that it ever was; None: its pace is still a guess."""
    measurements: int = 0
    going: dict[Draw, int] = field(default_factory=dict)
    """Steps that each has still to take."""

    @property
    def hoped(self) -> Pace:
        """What it may be: nobody is told for good that he asks for too much because of a guess or of bad times."""
        return self.best or self.pace.scaled(_LEAST_OF_GUESS)

    @property
    def used(self) -> int:
        return sum(draw.slots for draw in self.going)

    @property
    def used_by_bulk(self) -> int:
        return sum(draw.slots for draw in self.going if draw.bulk)

    @property
    def idle(self) -> bool:
        return not self.going and not len(self.line)


class Bookings:
    """Who is to be served, in which order. Times are seconds since 1970."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._orders: dict[int, _Order] = {}
        self._batches: dict[Place, _Batch] = {}
        self._capacities: dict[str, Capacity] = {}
        self._ready: dict[str, float] = {}
        """When generators that are being loaded will be there."""
        self._absent: dict[str, float] = {}
        """What it takes to load a generator that was loaded before, in seconds."""
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Orders that are not ended."""
        return len(self._orders)

    def of(self, generator: str) -> list[int]:
        """The numbers of a generator's orders."""
        return [number for number, order in self._orders.items() if order.asked.generator == generator]

    def waiting(self, generator: str) -> int:
        """Images that have no slots."""
        early = sum(self._orders[n].left for n in self.of(generator) if self._orders[n].place is None)
        return early + sum(len(batch.line) for (name, _), batch in self._batches.items() if name == generator)

    def running(self, generator: str) -> int:
        """Images between their first and last step."""
        return sum(len(batch.going) for (name, _), batch in self._batches.items() if name == generator)

    def slots(self, generator: str) -> tuple[int, int]:
        """Slots in use, and all there are for the sizes that are being made."""
        used = [batch.used for (name, _), batch in self._batches.items() if name == generator and not batch.idle]
        known = self._capacities.get(generator)
        return sum(used), (known.slots if known is not None else 0) * max(1, len(used))

    def shapes(self, generator: str) -> list[Shape]:
        """Those of which something waits or runs."""
        return [shape for (name, shape), batch in self._batches.items() if name == generator and not batch.idle]

    def is_urgent(self, generator: str, shape: Shape) -> bool:
        """Whether an interactive image is in a batch."""
        batch = self._batches[generator, shape]
        return batch.line.interactive or any(not draw.bulk for draw in batch.going)

    def is_going(self, draw: Draw) -> bool:
        """Whether an image is between its first and last step."""
        return any(draw in batch.going for batch in self._batches.values())

    @property
    def next_due(self) -> float:
        """The earliest deadline; infinite without orders."""
        return min((order.asked.due for order in self._orders.values()), default=math.inf)

    # --- generators ---------------------------------------------------------------------------------------------

    def loading(self, generator: str, now: float) -> None:
        """A generator is being loaded from now on."""
        self._ready[generator] = now + self._absent.pop(generator, 0.0)

    def opened(self, generator: str, capacity: Capacity) -> list[int]:
        """A generator was loaded; the numbers of the orders, taken before that was known, that can never have slots."""
        self._ready.pop(generator, None)
        self._capacities.setdefault(generator, capacity)
        early = [number for number in self.of(generator) if self._orders[number].place is None]
        for number in early:
            self._line_up(number)
        return [number for number in early if _slots(self._orders[number].asked) > capacity.slots]

    def closed(self, generator: str, load_s: float) -> None:
        """A generator made room for another; it would take this long to load it again."""
        self._ready.pop(generator, None)
        self._absent[generator] = load_s

    # --- orders -------------------------------------------------------------------------------------------------

    def take(self, order: ImageOrder, now: float) -> int:
        """The number of an order, from now on accepted.

        Raises BusyError where there are as many as may be; DeadlineError where it cannot be made in time as things
        stand; DeadlineTooShort where an idle engine could not either; RecipeError where it can never have its slots.
        """
        if len(self._orders) >= self._most:
            raise BusyError(
                f"{len(self._orders)} orders are being made or wait, which is the limit; ask again", self._next_end(now)
            )
        number = next(self._numbers)
        capacity = self._capacities.get(order.generator)
        if capacity is not None:
            if _slots(order) > capacity.slots:
                raise RecipeError("guidance_scale: a guided image takes two slots and the engine has one; set it to 1")
            self._require_in_time(order, number, capacity, now)
        self._orders[number] = _Order(order, order.count)
        if capacity is not None:
            self._line_up(number)
            self._forget_sizes(order.generator)
        return number

    def forget(self, number: int) -> None:
        """An order is ended, however; what waits of it waits no more, and what runs is out of its slots."""
        order = self._orders.pop(number)
        if order.place is not None:
            batch = self._batches[order.place]
            batch.line.drop(number)
            batch.going = {draw: left for draw, left in batch.going.items() if draw.order != number}

    def late(self, now: float) -> list[int]:
        """The numbers of orders that cannot be made in time any more, had they the engine to themselves from now on, at
        the best pace that was ever seen."""
        return [number for number, order in self._orders.items() if self._is_late(number, order, now)]

    # --- images -------------------------------------------------------------------------------------------------

    def admit(self, generator: str, shape: Shape) -> list[Draw]:
        """The images that get the free slots of a batch; from now on they are under way."""
        batch, capacity = self._batches[generator, shape], self._capacities[generator]
        admitted = []
        while (draw := batch.line.next(capacity.slots - batch.used, batch.used_by_bulk)) is not None:
            batch.going[draw] = draw.steps
            admitted.append(draw)
        return admitted

    def calls(self, generator: str, shape: Shape) -> int:
        """Of the denoiser, for the next step."""
        return -(-self._batches[generator, shape].used // self._capacities[generator].rows)

    def foreseen_s(self, generator: str, shape: Shape) -> float:
        """What the next step takes, without what it may finish."""
        return self.calls(generator, shape) * self._batches[generator, shape].pace.call_s

    def stepped(self, generator: str, shape: Shape) -> None:
        """A batch has taken a step; images that took their last leave their slots."""
        batch = self._batches[generator, shape]
        batch.going = {draw: left - 1 for draw, left in batch.going.items() if left > 1}

    def measured(self, generator: str, shape: Shape, seconds: float, calls: int, finished: int) -> None:
        """A step with so many calls took so long, images that it finished and what was done with them included."""
        batch = self._batches[generator, shape]
        batch.pace = batch.pace.measured(seconds, calls, finished)
        batch.measurements += 1
        if batch.best is not None:
            batch.best = batch.best.best(batch.pace)
        elif batch.measurements >= KNOWN_FROM:
            batch.best = batch.pace

    def judged(self, draw: Draw, *, passed: bool) -> bool:
        """A draw was looked at: made, or to be drawn again. Whether the order is complete by it."""
        order = self._orders[draw.order]
        assert order.place is not None
        if passed:
            order.left -= 1
        else:
            order.refused += 1
            self._batches[order.place].line.put(draw)
        return order.left == 0

    # --- forecasts ----------------------------------------------------------------------------------------------

    def ends(self, now: float) -> dict[int, float]:
        """When each order will be done, if nothing else comes; without those whose generator was never loaded."""
        return forecast(list(self._lanes(now).values()), now)

    def _require_in_time(self, order: ImageOrder, number: int, capacity: Capacity, now: float) -> None:
        place, draws = _place(order, capacity), _draws(order, number)
        batch = self._batches.get(place) or _batch(place[1], capacity)
        empty = Line(capacity.slots)
        empty.put_all(draws)
        idle = Lane(place[0], capacity.slots, capacity.rows, batch.hoped, (), empty)
        alone = forecast([idle], 0.0)[number] * MARGIN
        if (now if order.asked is None else order.asked) + alone > order.due:
            raise DeadlineTooShort(
                f"deadline_s: {order.count} images of {order.steps} steps take {alone:.2g} s on an idle engine; ask "
                "for fewer images or steps, or set a later deadline"
            )
        lane = self._lane(place, batch, now)
        lane.line.put_all(draws)
        with_it = forecast(list((self._lanes(now) | {place: lane}).values()), now)
        beyond = _beyond(with_it[number], now, order.due)
        if beyond <= 0.0:
            beyond = self._harm(order, with_it, now)
        if beyond > 0.0:
            # An engine that has done all that it has now would take it.
            idle_s = max((end for other, end in with_it.items() if other != number), default=now) - now
            raise DeadlineError(
                f"{order.count} images of {order.steps} steps would be made in {with_it[number] - now:.2g} s, after "
                f"what was accepted before, and are due in {order.due - now:.2g} s; ask again, or set a later deadline",
                max(min(beyond, idle_s), _LEAST_RETRY_S),
            )

    def _harm(self, order: ImageOrder, with_it: Mapping[int, float], now: float) -> float:
        """Seconds beyond its deadline at which an order accepted before would end because of this one; 0: none."""
        hurt: dict[int, float] = {}
        for other, end in with_it.items():
            known = self._orders.get(other)
            if known is not None and (order.priority == "bulk" or known.asked.priority == "interactive"):
                beyond = _beyond(end, now, known.asked.due)
                hurt |= {other: beyond} if beyond > 0.0 else {}
        if not hurt:
            return 0.0
        # Who is late in any case is helped by no refusal.
        without = self.ends(now)
        saved = (n for n in hurt if without[n] <= self._orders[n].asked.due and without[n] < with_it[n])
        return max((hurt[number] for number in saved), default=0.0)

    def _lanes(self, now: float) -> dict[Place, Lane]:
        return {place: self._lane(place, batch, now) for place, batch in self._batches.items() if not batch.idle}

    def _lane(self, place: Place, batch: _Batch, now: float) -> Lane:
        """A batch for a forecast, with a line of its own."""
        capacity, absent = self._capacities[place[0]], self._absent.get(place[0])
        ready = self._ready.get(place[0], 0.0) if absent is None else now + absent
        going = [Going(draw, left) for draw, left in batch.going.items()]
        pace = batch.hoped if batch.idle else batch.pace
        draws = {n: order.draws for n, order in self._orders.items() if order.place == place and order.refused}
        return Lane(place[0], capacity.slots, capacity.rows, pace, going, batch.line.copy(), ready, draws)

    def _next_end(self, now: float) -> float:
        ends = self.ends(now).values()
        return max(min(ends) - now, _LEAST_RETRY_S) if ends else _UNKNOWN_RETRY_S

    def _is_late(self, number: int, order: _Order, now: float) -> bool:
        if order.place is None:
            return now > order.asked.due
        batch = self._batches[order.place]
        if now + batch.hoped.alone_s(order.asked.steps) <= order.asked.due:
            return False
        if any(draw.order == number for draw in batch.line):
            return True
        left = max((left for draw, left in batch.going.items() if draw.order == number), default=0)
        return now + left * batch.hoped.call_s > order.asked.due

    # --- batches ------------------------------------------------------------------------------------------------

    def _line_up(self, number: int) -> None:
        order = self._orders[number]
        capacity = self._capacities[order.asked.generator]
        order.place = _place(order.asked, capacity)
        if order.place not in self._batches:
            self._batches[order.place] = _batch(order.place[1], capacity)
        self._batches[order.place].line.put_all(_draws(order.asked, number))

    def _forget_sizes(self, generator: str) -> None:
        """Sizes are of the clients' choice: their number must not grow for ever."""
        own = self._capacities[generator].own
        idle = [p for p, batch in self._batches.items() if p[0] == generator and p[1] != own and batch.idle]
        used = {order.place for order in self._orders.values()}
        for place in idle[:-KEPT_SIZES]:
            if place not in used:
                del self._batches[place]


def _place(order: ImageOrder, capacity: Capacity) -> Place:
    return order.generator, order.latent_shape or capacity.own


def _slots(order: ImageOrder) -> int:
    return 1 if order.guidance_scale == 1.0 else 2


def _draws(order: ImageOrder, number: int) -> list[Draw]:
    indices = range(order.first_index, order.first_index + order.count)
    return [Draw(number, n, order.steps, _slots(order), order.due, order.priority == "bulk") for n in indices]


def _batch(shape: Shape, capacity: Capacity) -> _Batch:
    pace = capacity.pace.scaled(math.prod(shape) / math.prod(capacity.own))
    return _Batch(Line(capacity.slots), pace, pace if shape == capacity.own else None)


def _beyond(end: float, now: float, due: float) -> float:
    """Seconds by which an end with its margin is after the deadline; below 0 where it is before."""
    return now + (end - now) * MARGIN - due
