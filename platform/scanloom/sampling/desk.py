"""The desk: takes orders for a few images from any thread, and makes them in one thread that owns the engines.

Every turn of the loop is one step of one generator: images are let in by the rule of `sampling.admission`, the batch
is advanced, and what is finished is judged; what the judges refuse is drawn again, as in datasets. Generators take
turns by step, those with an interactive image first; images of two generators never share a batch. A generator that is
not loaded is loaded by a second thread while the others go on; before one makes room for it, as `sampling.shelf` says,
that thread looks whether it could be loaded. Where there is nothing to do the loop waits on a condition.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from scanloom.errors import BusyError, DeadlineError, QualityError, RecipeError, ScanloomError
from scanloom.sampling.admission import Draw, Rota
from scanloom.sampling.batch import ImageRequest, Shape
from scanloom.sampling.bookings import Bookings, Capacity
from scanloom.sampling.dataset import Pixels
from scanloom.sampling.decoding import FinishedImage, NotNumbers
from scanloom.sampling.desk_status import DeskStatus, GeneratorStatus, Meter
from scanloom.sampling.image_order import ImageOrder, MadeImages
from scanloom.sampling.quality import Verdict
from scanloom.sampling.shelf import Shelf
from scanloom.sampling.workbench import Workbench

LOG = logging.getLogger("scanloom")
STUCK_S, MOST_FORESEEN = 300.0, 50.0
"""A step that takes longer than both, the second in steps as foreseen, is taken for one that hangs."""
RETRY_S = 1.0
"""After which another engine may have taken the place of one that stopped."""
_LEAST_RETRY_S = 0.1
Answer = tuple["Future[Any]", Any]
"""A future and what becomes of it: a result, or the error that it raises."""


@dataclass
class _Job:
    """An order, and what has come of it."""

    order: ImageOrder
    future: Future[MadeImages]
    pixels: dict[int, Pixels] = field(default_factory=dict)
    refused: Counter[int] = field(default_factory=Counter)
    """Draws of each image."""
    rejects: Counter[str] = field(default_factory=Counter)
    tellable: bool = False
    """Whether the generator was seen to understand the attributes."""

    def made(self, bench: Workbench) -> MadeImages:
        indices = sorted(self.pixels)
        attempts = [self.refused[index] for index in indices]
        pixels = np.stack([self.pixels[index] for index in indices])
        return MadeImages(pixels, attempts, bench.digest, dict(self.rejects), bench.environment, bench.gate)


@dataclass
class _Post:
    """A generator that is loaded."""

    bench: Workbench
    capacity: Capacity
    load_s: float


@dataclass(frozen=True)
class _Turn:
    """A step that is to be taken."""

    generator: str
    post: _Post
    shape: Shape | None
    """None: nothing but decoding is left."""
    draws: Sequence[Draw]
    """Those that start with it."""
    calls: int
    foreseen_s: float = 0.0


@dataclass(frozen=True)
class _Looked:
    """A draw that is finished, and what the judges say of it."""

    draw: Draw
    pixels: Pixels | None
    verdict: Verdict


@dataclass(frozen=True)
class _Loaded:
    generator: str
    outcome: _Post | Exception | None
    """None: it was only looked at, and could be loaded."""


class Desk:
    """Makes images to order. All methods may be called from any thread."""

    def __init__(
        self,
        load: Callable[[str], Workbench],
        *,
        look: Callable[[str], None] | None = None,
        loaded: int = 2,
        orders: int = 64,
        stuck_s: float = STUCK_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`load` opens the generator that is served under a name; `look` raises why that would fail, as far as can be
        known without its weights, and is asked before another one makes room for it. `loaded` are in memory at once
        at most, and `orders` are taken at once at most. A step that takes longer than `stuck_s`, and much longer than
        foreseen, will not end. `clock` gives seconds since 1970."""
        self._load, self._look, self._clock = load, look, clock
        self._changed = threading.Condition()
        """Guards all below but `_drawn` and the engines, which are the loop's own."""
        self._book = Bookings(orders)
        self._jobs: dict[int, _Job] = {}
        self._withdrawn: list[int] = []
        self._posts: dict[str, _Post] = {}
        self._rota = Rota[Shape | None]()
        self._shelf = Shelf(loaded)
        self._wanted: dict[str, Future[None]] = {}
        self._loading: str | None = None
        self._found: str | None = None
        """The generator that was looked at last, and could be loaded."""
        self._loaded: list[_Loaded] = []
        self._meters: dict[str, Meter] = {}
        self._rejects: Counter[str] = Counter()
        self._closing = self._closed = False
        self._error: Exception | None = None
        self._stuck_s, self._stuck_at = stuck_s, math.inf
        """When the step that is being taken is to be taken for one that will not end."""
        self._drawn: dict[int, tuple[ImageRequest, Draw]] = {}
        """By the request's identity: what the engines know of a draw."""
        self._loader = ThreadPoolExecutor(1, "scanloom-load")
        self._thread = threading.Thread(target=self._run, name="scanloom-desk", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """False where the loop ended by an error, or hangs in a step: nothing will be made here any more."""
        return self._error is None and time.monotonic() < self._stuck_at

    def open(self, generator: str) -> Future[None]:
        """Have a generator loaded and warmed up before somebody asks for it."""
        with self._changed:
            self._require_open()
            if generator in self._posts:
                future = Future[None]()
                future.set_result(None)
                return future
            self._changed.notify_all()
            return self._wanted.setdefault(generator, Future())

    def take(self, order: ImageOrder) -> Future[MadeImages]:
        """Accept an order; cancelling the future withdraws it and frees its slots at the next step.

        Raises at once what `Bookings.take` and `Shelf.require` raise, and BusyError where the desk makes nothing any
        more. The future raises DeadlineError where it turns out late all the same, QualityError where an image cannot
        be made that the judges let pass, RecipeError where the generator cannot make what is asked for, BusyError where
        the engine stops, and what loading the generator raises.
        """
        with self._changed:
            self._require_open()
            self._shelf.require(order.generator, self._clock())
            try:
                number = self._book.take(order, self._clock())
            except DeadlineError:
                # Too late for this order, but whoever asks again is to find it loaded.
                if order.generator not in self._posts:
                    self._wanted.setdefault(order.generator, Future())
                    self._changed.notify_all()
                raise
            job = self._jobs[number] = _Job(order, Future())
            self._changed.notify_all()
        job.future.add_done_callback(partial(self._withdraw, number))
        return job.future

    def status(self) -> DeskStatus:
        with self._changed:
            names = {*self._meters, *(job.order.generator for job in self._jobs.values())}
            told = {name: self._status(name) for name in sorted(names)}
            return DeskStatus(self.healthy, len(self._jobs), told, dict(self._rejects))

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more orders, finish those that can be within `drain_s` seconds, and end the others by BusyError."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._jobs or not self.healthy, drain_s)
            self._closed = True
            self._changed.notify_all()
        # No longer than for a step that hangs.
        self._thread.join(self._stuck_s)
        self._loader.shutdown(wait=False, cancel_futures=True)

    # --- from other threads -------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if not self.healthy:
            raise _stopped(self._error or TimeoutError("a step of the engine hangs"))
        if self._closing:
            raise BusyError("this engine is being stopped; ask again, another one will answer", RETRY_S)

    def _withdraw(self, number: int, future: Future[MadeImages]) -> None:
        if future.cancelled():
            with self._changed:
                self._withdrawn.append(number)
                self._changed.notify_all()

    def _status(self, generator: str) -> GeneratorStatus:
        meter = self._meters.get(generator) or Meter()
        book = self._book
        return GeneratorStatus(
            generator in self._posts, book.waiting(generator), book.running(generator), *book.slots(generator),
            meter.steps, meter.images, *meter.rates(self._clock()),
        )  # fmt: skip

    # --- of the second thread -----------------------------------------------------------------------------------

    def _prepare(self, generator: str, prepare: Callable[[str], _Post | None]) -> None:
        try:
            outcome: _Post | Exception | None = prepare(generator)
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait for the generator are told
            outcome = error
        with self._changed:
            self._loaded.append(_Loaded(generator, outcome))
            self._changed.notify_all()

    def _open_post(self, generator: str) -> _Post:
        started = time.perf_counter()
        bench = self._load(generator)
        capacity = bench.warm_up()
        post = _Post(bench, capacity, time.perf_counter() - started)
        LOG.info("generator %s: loaded and warm after %.1f s", generator, post.load_s)
        return post

    # --- the loop -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:
            LOG.exception("the engine's loop ended")
            with self._changed:
                self._error = error
                answers = self._end_all(_stopped(error))
                self._changed.notify_all()
            _settle(answers)

    def _turn(self) -> bool:
        """One step of one generator, or a wait for something to happen; False at the end."""
        with self._changed:
            answers = self._tidy()
            turn = self._next_turn()
            if turn is None and not answers:
                if self._closed:
                    return False
                self._changed.wait(self._patience_s())
                return True
        _settle(answers)
        self._drop_ended()
        if turn is not None:
            _settle(self._step(turn))
        return True

    def _tidy(self) -> list[Answer]:
        """Take note of all that happened outside; whom that ends."""
        now = self._clock()
        answers = [answer for loaded in self._loaded for answer in self._opened(loaded, now)]
        self._loaded.clear()
        answers += [self._end(number, None) for number in self._withdrawn if number in self._jobs]
        self._withdrawn.clear()
        late = self._book.late(now)
        ends = self._book.ends(now) if late else {}
        for number in late:
            due = self._jobs[number].order.due
            error = DeadlineError(
                "it took longer than was foreseen and cannot be made by its deadline any more; ask again",
                max(ends.get(number, due) - due, _LEAST_RETRY_S),
            )
            answers.append(self._end(number, error))
        if self._closed:
            answers += self._end_all(BusyError("this engine was stopped; ask again, another one will answer", RETRY_S))
        self._begin_loading(now)
        return answers

    def _opened(self, loaded: _Loaded, now: float) -> Iterable[Answer]:
        self._loading, outcome = None, loaded.outcome
        if outcome is None:
            self._found = loaded.generator
            return ()
        self._found = None
        wanted = self._wanted.pop(loaded.generator, None)
        if isinstance(outcome, Exception):
            LOG.error("generator %s: cannot be loaded: %s", loaded.generator, outcome)
            self._shelf.failed(loaded.generator, outcome, now)
            failed = [self._end(number, outcome) for number in self._book.of(loaded.generator)]
            return [*failed, *([(wanted, outcome)] if wanted is not None else [])]
        self._shelf.loaded(loaded.generator, now)
        self._posts[loaded.generator] = outcome
        self._meters.setdefault(loaded.generator, Meter())
        error = RecipeError("guidance_scale: a guided image takes two slots and the engine has one; set it to 1")
        failed = [self._end(number, error) for number in self._book.opened(loaded.generator, outcome.capacity)]
        return [*failed, *([(wanted, None)] if wanted is not None else [])]

    def _begin_loading(self, now: float) -> None:
        """Load the next generator that is asked for, where there is room or another makes room."""
        if self._loading is not None or self._closed:
            return
        asked_for = list(dict.fromkeys([*self._wanted, *(job.order.generator for job in self._jobs.values())]))
        first = self._shelf.first(asked_for, now)
        if self._look is not None and first is not None and first != self._found:
            self._loading = first
            self._loader.submit(self._prepare, first, self._look)
            return
        found = self._shelf.next(asked_for, self._is_idle, now)
        if found is None:
            return
        wanted, gone = found
        if gone is not None:
            self._book.closed(gone, self._posts.pop(gone).load_s)
        self._loading = wanted
        self._book.loading(wanted, now)
        self._loader.submit(self._prepare, wanted, self._open_post)

    def _is_idle(self, generator: str) -> bool:
        return not self._book.of(generator) and not self._posts[generator].bench.engine.busy

    def _next_turn(self) -> _Turn | None:
        batches: dict[tuple[str, Shape | None], bool] = {}
        decoding = self._decoding()
        for name, post in self._posts.items():
            shapes = sorted(self._book.shapes(name))
            batches |= {(name, shape): name in decoding or self._book.is_urgent(name, shape) for shape in shapes}
            if not shapes and post.bench.engine.busy:
                batches[name, None] = True
        chosen = self._rota.next(batches)
        if chosen is None:
            return None
        name, shape = chosen
        self._shelf.used(name)
        if shape is None:
            return _Turn(name, self._posts[name], None, (), 0)
        draws, calls = self._book.admit(name, shape), self._book.calls(name, shape)
        return _Turn(name, self._posts[name], shape, draws, calls, self._book.foreseen_s(name, shape))

    def _decoding(self) -> set[str]:
        """Generators with an interactive image that has taken its last step and comes with another's."""
        draws = (draw for _, draw in self._drawn.values() if not draw.bulk and draw.order in self._jobs)
        return {self._jobs[draw.order].order.generator for draw in draws if not self._book.is_going(draw)}

    def _patience_s(self) -> float | None:
        """Until the next order is late, if nothing happens, and a little more, so that it is late then."""
        due = self._book.next_due
        return None if due == math.inf else max(0.0, due - self._clock()) + 0.001

    def _step(self, turn: _Turn) -> list[Answer]:
        """Take a step; whom it ends."""
        errors = self._submit(turn)
        if errors:
            with self._changed:
                return [self._end(number, error) for number, error in errors.items()]
        started = time.perf_counter()
        self._stuck_at = time.monotonic() + max(self._stuck_s, MOST_FORESEEN * turn.foreseen_s)
        try:
            finished = turn.post.bench.engine.step(turn.shape)
            looked = self._look_at(turn.post.bench, finished)
        except NotNumbers as error:
            # The others come with the next step.
            finished, looked = [], self._look_at_none(error.request)
        self._stuck_at = math.inf
        seconds = time.perf_counter() - started
        made = sum(each.verdict.reason is None for each in looked)
        with self._changed:
            if turn.shape is not None:
                self._book.stepped(turn.generator, turn.shape)
                self._book.measured(turn.generator, turn.shape, seconds, turn.calls, len(finished))
            self._meters[turn.generator].count(self._clock(), int(turn.shape is not None), made)
            return [answer for each in looked for answer in self._judged(turn.post.bench, each)]

    def _submit(self, turn: _Turn) -> Mapping[int, Exception]:
        """Hand to the engine what starts; the orders that it cannot make, and why."""
        errors: dict[int, Exception] = {}
        for draw in turn.draws:
            job = self._jobs[draw.order]
            if draw.order in errors:
                continue
            try:
                self._tell(turn.post.bench, job, draw)
            except ScanloomError as error:
                errors[draw.order] = error
        return errors

    def _tell(self, bench: Workbench, job: _Job, draw: Draw) -> None:
        order = job.order
        if not job.tellable:
            # Of the order alone, before a batch depends on it.
            try:
                bench.generator.condition([order.attributes])
            except (ValueError, TypeError, LookupError) as error:
                raise RecipeError(f"attributes: the generator does not know what to make of them: {error}") from error
            job.tellable = True
        request = ImageRequest(
            draw.index, order.seed, order.attributes, order.steps, order.guidance_scale, job.refused[draw.index],
            order.latent_shape,
        )  # fmt: skip
        bench.engine.submit(request)
        self._drawn[id(request)] = (request, draw)

    def _look_at(self, bench: Workbench, finished: Sequence[FinishedImage]) -> list[_Looked]:
        """What the judges say of finished images, without those that nobody waits for any more."""
        alike: dict[Any, list[tuple[Draw, FinishedImage]]] = {}
        for each in finished:
            _, draw = self._drawn.pop(id(each.request))
            if draw.order in self._jobs:
                bits = self._jobs[draw.order].order.bits_stored
                alike.setdefault((bits, each.image.shape), []).append((draw, each))
        looked = []
        for (bits, _), entries in alike.items():
            told = bench.look([each for _, each in entries], bits)
            looked += [_Looked(draw, *what) for (draw, _), what in zip(entries, told, strict=True)]
        return looked

    def _look_at_none(self, request: ImageRequest) -> list[_Looked]:
        _, draw = self._drawn.pop(id(request))
        return [_Looked(draw, None, Verdict("not-numbers"))] if draw.order in self._jobs else []

    def _judged(self, bench: Workbench, looked: _Looked) -> list[Answer]:
        draw, reason = looked.draw, looked.verdict.reason
        job = self._jobs.get(draw.order)
        if job is None:
            # Another image of its order failed for good in the same step.
            return []
        if reason is None and looked.pixels is not None:
            job.pixels[draw.index] = looked.pixels
        else:
            self._rejects[str(reason)] += 1
            job.rejects[str(reason)] += 1
            job.refused[draw.index] += 1
            if job.refused[draw.index] >= bench.attempts:
                return [self._end(draw.order, _hopeless(job, draw.index, bench.attempts))]
        complete = self._book.judged(draw, passed=reason is None)
        return [self._end(draw.order, job.made(bench))] if complete else []

    # --- endings ------------------------------------------------------------------------------------------------

    def _end(self, number: int, outcome: MadeImages | Exception | None) -> Answer:
        self._book.forget(number)
        job = self._jobs.pop(number)
        self._changed.notify_all()
        return job.future, outcome

    def _end_all(self, error: Exception) -> list[Answer]:
        answers: list[Answer] = [self._end(number, error) for number in list(self._jobs)]
        answers += [(future, error) for future in self._wanted.values()]
        self._wanted.clear()
        return answers

    def _drop_ended(self) -> None:
        """Free the slots of orders that ended unmade; what is being decoded is handed out all the same."""
        for identity, (request, draw) in list(self._drawn.items()):
            if draw.order not in self._jobs and any(p.bench.engine.cancel(request) for p in self._posts.values()):
                del self._drawn[identity]


def _hopeless(job: _Job, index: int, attempts: int) -> QualityError:
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(job.rejects.items()))
    return QualityError(
        f"image {index} of seed {job.order.seed}: none of {attempts} attempts passed the quality checks ({reasons} in "
        "all); ask for other attributes, more steps or another seed"
    )


def _stopped(error: Exception) -> BusyError:
    stopped = BusyError(
        "this engine stopped by an error of its own; ask again, another one takes its place", RETRY_S
    )  # fmt: skip
    stopped.__cause__ = error
    return stopped


def _settle(answers: Iterable[Answer]) -> None:
    """End futures: outside of all locks, since what waits for them may run at once."""
    for future, outcome in answers:
        if future.set_running_or_notify_cancel():
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
