"""Which batch takes the next step, which image gets the next free slots of it, and when orders will be done by these
rules. No clock, no thread.

Slots: interactive images first, earliest deadline first among them; bulk ones in the order in which they came. Two
exceptions keep both sides alive. While bulk images wait, one of every BULK_TURN slots that are granted goes to them, so
that they never starve. And an eighth of the slots is closed to them, so that an interactive image finds room at the
next step however much bulk runs.

Steps: generators take turns, and so do the sizes of a generator. Batches with an interactive image go before those with
nothing but bulk ones, which get one of every BULK_TURN turns.

The forecast plays the same rules forward from what runs and waits, with the measured times of a call and an image.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

BULK_TURN = 8
"""Of so many slots that are granted while bulk images wait, or steps that are taken, one is theirs."""
_NEWEST = 0.1
"""Weight of the newest measurement: about the last twenty count."""
MOST_SLOWER = 4.0


@dataclass(frozen=True)
class Draw:
    """One image that is to be drawn for an order, as far as its turn depends on it."""

    order: int
    """Number of the order; an earlier one has a lower number."""
    index: int
    steps: int
    slots: int
    due: float
    """Seconds since 1970."""
    bulk: bool = False


@dataclass(frozen=True)
class Pace:
    """How fast a generator makes images of one size, as measured."""

    call_s: float
    """A step takes this for each call of the denoiser, of which it needs one for every `rows` slots in use."""
    image_s: float
    """What an image takes beside its steps: decoding, rounding, quality checks."""

    def measured(self, seconds: float, calls: int, images: int) -> Pace:
        """After a step with so many calls that finished so many images.

        Normalised least mean squares (Widrow and Hoff 1960): what the step took beyond what was foreseen is put down to
        calls and images as there are calls and images in it. One step that took very long, because the host stood
        still, must not count for more than one that took MOST_SLOWER times as long as foreseen.
        """
        foreseen = calls * self.call_s + images * self.image_s
        beyond = min(seconds, MOST_SLOWER * foreseen) - foreseen
        share = _NEWEST * beyond / (calls**2 + images**2)
        call_s = max(self.call_s + share * calls, self.call_s / 2)
        return Pace(call_s, max(self.image_s + share * images, 0.0))

    def best(self, other: Pace) -> Pace:
        """The faster of two in each respect."""
        return Pace(min(self.call_s, other.call_s), min(self.image_s, other.image_s))

    def scaled(self, factor: float) -> Pace:
        """For images with `factor` times as many pixels: a guess, until some are made."""
        return Pace(self.call_s * factor, self.image_s * factor)

    def alone_s(self, steps: int) -> float:
        """Of one image by itself, drawn once."""
        return steps * self.call_s + self.image_s


class Line:
    """What waits for the slots of one batch."""

    def __init__(self, slots: int) -> None:
        self._interactive: list[tuple[float, int, int, Draw]] = []
        self._bulk: list[tuple[int, int, Draw]] = []
        self._granted = 0
        """Slots that interactive images got since bulk ones had their turn."""
        self.open_to_bulk = slots - (max(2, slots // 8) if slots >= 8 else 0)
        """Slots that bulk images may hold."""

    def __len__(self) -> int:
        return len(self._interactive) + len(self._bulk)

    def __iter__(self) -> Iterator[Draw]:
        """All that waits, in no order."""
        yield from (entry[-1] for entry in self._interactive)
        yield from (entry[-1] for entry in self._bulk)

    @property
    def interactive(self) -> bool:
        """Whether an interactive image is among those that wait."""
        return bool(self._interactive)

    def copy(self) -> Line:
        line = Line(0)
        line._interactive, line._bulk = list(self._interactive), list(self._bulk)
        line._granted, line.open_to_bulk = self._granted, self.open_to_bulk
        return line

    def put(self, draw: Draw) -> None:
        """Let an image wait, also one that is to be drawn again, which goes before those that came later."""
        if draw.bulk:
            heapq.heappush(self._bulk, (draw.order, draw.index, draw))
        else:
            heapq.heappush(self._interactive, (draw.due, draw.order, draw.index, draw))

    def put_all(self, draws: Iterable[Draw]) -> None:
        for draw in draws:
            self.put(draw)

    def drop(self, order: int) -> None:
        """Forget all images of an order."""
        self._interactive = [entry for entry in self._interactive if entry[-1].order != order]
        self._bulk = [entry for entry in self._bulk if entry[-1].order != order]
        heapq.heapify(self._interactive)
        heapq.heapify(self._bulk)

    def next(self, free: int, held_by_bulk: int) -> Draw | None:
        """Take the image out whose turn it is; None where none waits or it needs more than the `free` slots.

        Nobody overtakes an image that waits for a second free slot, or guided images would starve.
        """
        bulk = self._bulk[0][-1] if self._bulk else None
        if bulk is not None and held_by_bulk + bulk.slots > self.open_to_bulk:
            bulk = None
        if bulk is not None and (not self._interactive or self._granted >= (BULK_TURN - 1) * bulk.slots):
            if bulk.slots > free:
                return None
            self._granted = 0
            return heapq.heappop(self._bulk)[-1]
        if not self._interactive or self._interactive[0][-1].slots > free:
            return None
        draw = heapq.heappop(self._interactive)[-1]
        self._granted = self._granted + draw.slots if self._bulk else 0
        return draw


Batch = TypeVar("Batch", bound=Hashable)


class Rota(Generic[Batch]):
    """Whose step is next. A batch is named by its generator and whatever tells the generator's batches apart."""

    def __init__(self) -> None:
        self._turns = 0
        self._last: dict[str, int] = {}
        self._last_of: dict[tuple[str, Batch], int] = {}
        self._urgent = 0
        """Turns of interactive batches since one with nothing but bulk had its own."""

    def next(self, batches: Mapping[tuple[str, Batch], bool]) -> tuple[str, Batch] | None:
        """The batch that takes a step now, of those that could; each with whether an interactive image is in it.

        None where there are none.
        """
        urgent = [batch for batch, is_urgent in batches.items() if is_urgent]
        bulk = [batch for batch, is_urgent in batches.items() if not is_urgent]
        if not urgent or (bulk and self._urgent >= BULK_TURN - 1):
            urgent, self._urgent = bulk, 0
        else:
            self._urgent = self._urgent + 1 if bulk else 0
        # Who is gone is forgotten: sizes are of the clients' choice.
        self._last = {name: self._last[name] for name, _ in batches if name in self._last}
        self._last_of = {batch: self._last_of[batch] for batch in batches if batch in self._last_of}
        if not urgent:
            return None
        chosen = min(urgent, key=lambda batch: (self._last.get(batch[0], 0), self._last_of.get(batch, 0)))
        self._turns += 1
        self._last[chosen[0]] = self._last_of[chosen] = self._turns
        return chosen


@dataclass
class Going:
    """A draw that is under way, and the steps it has still to take."""

    draw: Draw
    left: float


@dataclass(frozen=True)
class Lane:
    """One batch: a generator's images of one size."""

    generator: str
    slots: int
    rows: int
    """Of a call of the denoiser."""
    pace: Pace
    going: Sequence[Going]
    line: Line
    ready: float = 0.0
    """When the generator is loaded, in seconds since 1970."""
    draws: Mapping[int, float] = field(default_factory=dict)
    """Draws to an image that passes the checks, by order; 1 where there is nothing."""


def forecast(lanes: Sequence[Lane], now: float) -> dict[int, float]:
    """When each order's last image will be made, in seconds since 1970, if nothing else comes.

    Steps in between two images' ends are taken at a stroke, so that the work grows with images, not with steps. An
    order that no lane has room for is left out.
    """
    played = [_Played(lane, lane.ready - now) for lane in lanes]
    clock, done, mixed = 0.0, dict[int, float](), False
    while True:
        for lane in played:
            lane.admit(clock)
        active = [lane for lane in played if lane.going]
        opens = min((lane.ready for lane in played if lane.ready > clock and len(lane.line)), default=math.inf)
        if not active:
            if opens == math.inf:
                return {order: now + after for order, after in done.items()}
            clock = opens
            continue
        urgent = [lane for lane in active if lane.urgent]
        bulk = [lane for lane in active if not lane.urgent]
        if bulk and urgent and not mixed:
            # The turn of bulk may be the very next.
            clock += max(lane.step_s for lane in bulk)
        mixed = bool(bulk and urgent)
        part = 1.0 / BULK_TURN if mixed else 1.0
        turns = _turns(urgent, 1.0 - part if mixed else 1.0) + _turns(bulk, part)
        turn_s = sum(share * lane.step_s for lane, share in turns)
        taken = min(lane.least_left / share for lane, share in turns)
        if clock + taken * turn_s > opens:
            taken, clock = max(0.0, opens - clock) / turn_s, max(clock, opens)
        else:
            clock += taken * turn_s
        for lane, share in turns:
            for draw in lane.advance(taken * share):
                clock += lane.pace.image_s
                done[draw.order] = clock


def _turns(lanes: Sequence[_Played], share: float) -> list[tuple[_Played, float]]:
    """Each lane's part of all turns, `share` of which are theirs: as much for each generator, shared by its sizes."""
    sizes = Counter(lane.generator for lane in lanes)
    return [(lane, share / len(sizes) / sizes[lane.generator]) for lane in lanes]


class _Played:
    """A lane as a forecast plays it."""

    def __init__(self, lane: Lane, ready: float) -> None:
        self.generator, self.pace, self.ready = lane.generator, lane.pace, ready
        self.line = lane.line.copy()
        self._draws, self._rows = lane.draws, lane.rows
        self.going = [Going(g.draw, g.left + (self._draws_of(g.draw) - 1.0) * g.draw.steps) for g in lane.going]
        self._free = lane.slots - sum(each.draw.slots for each in lane.going)
        self._bulk = sum(each.draw.slots for each in lane.going if each.draw.bulk)
        self._slots = lane.slots

    @property
    def step_s(self) -> float:
        return -(-(self._slots - self._free) // self._rows) * self.pace.call_s

    @property
    def urgent(self) -> bool:
        """Whether an interactive image is in it."""
        return self.line.interactive or any(not each.draw.bulk for each in self.going)

    @property
    def least_left(self) -> float:
        return min(each.left for each in self.going)

    def admit(self, clock: float) -> None:
        while clock >= self.ready and (draw := self.line.next(self._free, self._bulk)) is not None:
            self.going.append(Going(draw, draw.steps * self._draws_of(draw)))
            self._hold(draw, 1)

    def advance(self, steps: float) -> list[Draw]:
        """Take steps; the draws that end by them."""
        ended = []
        for each in self.going:
            each.left -= steps
            if each.left <= 1e-6:
                ended.append(each.draw)
                self._hold(each.draw, -1)
        self.going = [each for each in self.going if each.left > 1e-6]
        return ended

    def _draws_of(self, draw: Draw) -> float:
        return self._draws.get(draw.order, 1.0)

    def _hold(self, draw: Draw, sign: int) -> None:
        self._free -= sign * draw.slots
        self._bulk += sign * draw.slots if draw.bulk else 0
