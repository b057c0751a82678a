"""Several generators at one desk: they are loaded while others go on, and make room for one another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from scanloom.errors import ArtefactError, BusyError, DeadlineError, StoreError
from scanloom.sampling.desk import Desk
from scanloom.sampling.workbench import Workbench
from tests.desks import Clock, desks, order, result
from tests.gated_generator import PATIENCE_S, GatedGenerator, bench_of


@pytest.fixture
def opened() -> Iterator[Callable[..., Desk]]:
    with desks() as open_desk:
        yield open_desk


def test_a_generator_is_loaded_while_another_goes_on(opened: Callable[..., Desk]) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def load(name: str) -> Workbench:
        if name == "b":
            loading.set()
            assert go_on.wait(PATIENCE_S)
        return bench_of(GatedGenerator(name))

    desk = opened(load)
    desk.open("a").result(PATIENCE_S)
    slow = desk.take(order("b"))
    assert loading.wait(PATIENCE_S)
    for seed in range(3):
        result(desk.take(order("a", seed=seed)))
    assert not slow.done()
    assert desk.status().generators["b"].waiting == 1
    go_on.set()
    result(slow)


def test_the_least_recently_used_idle_generator_makes_room(opened: Callable[..., Desk]) -> None:
    loads: list[str] = []

    def load(name: str) -> Workbench:
        loads.append(name)
        return bench_of(GatedGenerator(name))

    desk = opened(load, loaded=2)
    for name in "abacab":
        result(desk.take(order(name)))
    # b made room for c, and c for b.
    assert loads == [*"abcb"]
    told = desk.status().generators
    assert {name for name, status in told.items() if status.loaded} == {"a", "b"}
    assert {name: status.images for name, status in told.items()} == {"a": 3, "b": 2, "c": 1}


def test_a_generator_that_is_refused_because_it_must_be_loaded_first_is_loaded_all_the_same(
    opened: Callable[..., Desk],
) -> None:
    desk = opened(lambda name: bench_of(GatedGenerator(name)), loaded=1)
    for name in "ab":
        result(desk.take(order(name)))
    desk._book._absent["a"] = 1e6
    with pytest.raises(DeadlineError):
        desk.take(order("a"))
    desk.open("a").result(PATIENCE_S)
    result(desk.take(order("a")))


def test_a_generator_that_is_at_work_makes_no_room(opened: Callable[..., Desk]) -> None:
    generators = {name: GatedGenerator(name) for name in "ab"}
    desk = opened(lambda name: bench_of(generators[name]), loaded=1)
    desk.open("a").result(PATIENCE_S)
    generators["a"].shut()
    first, second = desk.take(order("a")), desk.take(order("b"))
    generators["a"].until_shut()
    generators["a"].let(1)
    generators["a"].until_shut()
    assert generators["b"].log == []
    generators["a"].let(None)
    result(first)
    result(second)


def test_a_generator_that_always_has_work_makes_room_in_the_end(opened: Callable[..., Desk]) -> None:
    clock = Clock()
    generators = {name: GatedGenerator(name) for name in "ab"}
    desk = opened(lambda name: bench_of(generators[name]), loaded=1, clock=clock)
    desk.open("a").result(PATIENCE_S)
    generators["a"].shut()
    running = desk.take(order("a", steps=9, within_s=500))
    waits = desk.take(order("b", within_s=500))
    for passed_s in (0.0, 20.0):
        clock.now += passed_s
        desk.take(order("a", steps=9, within_s=500))
        generators["a"].let(1)
        generators["a"].until_shut()
    clock.now += 20.0
    generators["a"].let(1)
    generators["a"].until_shut()
    with pytest.raises(BusyError, match="makes room for another"):
        desk.take(order("a"))
    generators["a"].let(None)
    result(running)
    result(waits)
    result(desk.take(order("a")))


def test_a_generator_that_cannot_be_loaded_fails_its_own_orders(opened: Callable[..., Desk]) -> None:
    def load(name: str) -> Workbench:
        if name == "lost":
            raise ArtefactError("no artefact here")
        return bench_of(GatedGenerator(name))

    desk = opened(load)
    futures = [desk.take(order("lost")) for _ in range(2)]
    result(desk.take(order("a")))
    for future in futures:
        with pytest.raises(ArtefactError, match="no artefact here"):
            result(future)
    # Who asks again is told at once, for a while.
    with pytest.raises(ArtefactError, match="no artefact here"):
        desk.take(order("lost"))
    with pytest.raises(ArtefactError):
        desk.open("lost").result(PATIENCE_S)
    assert desk.open("a").result(PATIENCE_S) is None
    assert desk.healthy


def test_nothing_makes_room_for_a_generator_that_is_not_there(opened: Callable[..., Desk]) -> None:
    loads: list[str] = []

    def load(name: str) -> Workbench:
        loads.append(name)
        return bench_of(GatedGenerator(name))

    def look(name: str) -> None:
        if name == "lost":
            raise StoreError("the store does not answer", retryable=True)

    desk = opened(load, look=look, loaded=1)
    result(desk.take(order("a")))
    with pytest.raises(StoreError, match="does not answer"):
        result(desk.take(order("lost")))
    result(desk.take(order("a")))
    result(desk.take(order("b")))
    assert loads == ["a", "b"]


def test_a_generator_comes_back_that_made_room_for_one_that_cannot_be_loaded(opened: Callable[..., Desk]) -> None:
    loads: list[str] = []
    back = threading.Event()

    def load(name: str) -> Workbench:
        loads.append(name)
        if name == "damaged":
            raise ArtefactError("changed since it was written")
        if loads.count(name) == 2:
            back.set()
        return bench_of(GatedGenerator(name))

    desk = opened(load, loaded=1)
    result(desk.take(order("a")))
    with pytest.raises(ArtefactError, match="changed since"):
        result(desk.take(order("damaged")))
    # Nobody asks for it.
    assert back.wait(PATIENCE_S)
    result(desk.take(order("a")))
    assert loads == ["a", "damaged", "a"]


def test_an_image_that_waits_to_be_decoded_with_bulk_ones_keeps_its_generators_turns(
    opened: Callable[..., Desk],
) -> None:
    log: list[str] = []
    generators = {name: GatedGenerator(name, log) for name in "ab"}
    desk = opened(lambda name: bench_of(generators[name], slots=8, eager_below=0), loaded=2)
    for name, generator in generators.items():
        desk.open(name).result(PATIENCE_S)
        generator.shut()
    log.clear()
    bulk = desk.take(order("a", priority="bulk", count=3, steps=12))
    generators["a"].until_shut()
    awaited = desk.take(order("a", steps=3))
    at_its_end: list[str] = []
    awaited.add_done_callback(lambda _: at_its_end.extend(log))
    other = desk.take(order("b", steps=200))
    for generator in generators.values():
        generator.let(None)
    for future in (awaited, bulk, other):
        result(future)
    # Its last step is a's fourth; there is company for it after the thirteenth at the latest.
    assert at_its_end.count("a") >= 12
    assert at_its_end.count("b") <= 20
